"""The optimizer is found in whatever wraps it."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import steepest
from steepest.integrations.wrapped import unwrapped


def test_the_optimizer_is_found_behind_any_chain_of_wrappers():
    optimizer = steepest.Muon(torch.nn.Linear(3, 3))
    assert unwrapped(optimizer) is optimizer
    assert unwrapped(SimpleNamespace(optimizer=optimizer)) is optimizer
    assert unwrapped(SimpleNamespace(optimizer=SimpleNamespace(_optimizer=optimizer))) is optimizer


def test_what_holds_none_of_ours_is_refused():
    other = torch.optim.SGD(torch.nn.Linear(3, 3).parameters(), lr=0.1)
    with pytest.raises(TypeError, match="no optimizer of steepest inside of SimpleNamespace around SGD"):
        unwrapped(SimpleNamespace(optimizer=other))
    loop = SimpleNamespace()
    loop.optimizer = loop
    with pytest.raises(TypeError, match=r"inside of SimpleNamespace, got"):
        unwrapped(loop)


@pytest.mark.parametrize("host", ["transformers", "accelerate", "lightning", "peft"])
def test_a_host_that_is_not_installed_is_named_with_the_extra_that_has_it(host, monkeypatch):
    monkeypatch.setitem(sys.modules, host, None)
    for name in [name for name in sys.modules if name.startswith(f"{host}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"steepest.integrations.{host}", raising=False)
    with pytest.raises(ImportError, match=rf"steepest\.integrations\.{host} needs .*pip install 'steepest\[{host}\]'"):
        importlib.import_module(f"steepest.integrations.{host}")
