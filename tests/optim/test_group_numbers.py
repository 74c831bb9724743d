"""Numbers of the groups as schedulers and users may write them: looked at before every step."""

import math

import numpy as np
import pytest
import torch

from steepest import Muon, NonFiniteError
from steepest.optim.options import check_numbers
from tests.cases import cases
from tests.optim.training import assert_same, backward, network, snapshot, train

BAD = {
    "nan": (math.nan, ValueError),
    "infinite": (math.inf, ValueError),
    "negative": (-0.1, ValueError),
    "text": ("0.1", TypeError),
    "none": (None, TypeError),
    "numpy": (np.float64("nan"), ValueError),
    "nan tensor": (torch.tensor(math.nan), ValueError),
    "infinite tensor": (torch.tensor(math.inf), ValueError),
    "negative tensor": (torch.tensor(-1.0), ValueError),
    "vector": (torch.ones(2), TypeError),
    "one of a vector": (torch.ones(1) / 2, TypeError),
    "whole": (torch.tensor(0), TypeError),
}


@pytest.mark.slow
@cases("option", ["lr", "momentum", "weight_decay", "beta2"])
@cases("case", BAD)
def test_a_number_that_is_none_is_refused_before_anything_changes(recipe, option, case):
    value, error = BAD[case]
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    group = optimizer.param_groups[1]
    kept, group[option] = group[option], value
    with pytest.raises(error, match=rf"parameter group 1 \(role '{group['role']}'\), as this step finds it: {option}"):
        optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    group[option] = kept
    optimizer.step()


@pytest.mark.parametrize("value", ["no", 1, None, torch.tensor(True)], ids=str)
def test_a_flag_that_is_none_is_refused_before_anything_changes(recipe, value):
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    group = optimizer.param_groups[1]
    kept, group["nesterov"] = group["nesterov"], value
    with pytest.raises(TypeError, match="as this step finds it: nesterov must be True or False, got "):
        optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    group["nesterov"] = np.bool_(kept)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:lr · weight_decay is")
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_whole_number_of_any_size_is_a_float(option):
    model = network()
    optimizer = Muon(model)
    backward(model, 0)
    optimizer.param_groups[0][option] = 2**70
    optimizer.step()


@pytest.mark.parametrize("value", [1.0, 2.5, torch.tensor(1.0)], ids=str)
@pytest.mark.parametrize("option", ["momentum", "beta2"])
def test_a_weight_of_the_old_average_is_below_one(option, value):
    model = network()
    optimizer = Muon(model)
    backward(model, 0)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("value", [1, 0, np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)])
def test_numbers_of_every_kind_are_taken(value):
    model = network()
    optimizer = Muon(model)
    for group in optimizer.param_groups:
        group["lr"] = value if group["role"] == "matrix" else 0.1 * value  # one rate for all would be told
        group["weight_decay"] = value
    train(model, optimizer, range(2))


def test_a_scheduler_that_writes_nan_is_named_and_weights_stay():
    model = network()
    optimizer = Muon(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.nan if step == 2 else 1.0)
    for step in range(2):
        train(model, optimizer, [step])
        scheduler.step()
    with pytest.raises(ValueError, match=r"parameter group 0 .*lr.*nan"):
        train(model, optimizer, [2])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:lr · weight_decay is inf")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_rate_on_an_accelerator_masks_the_step(recipe, bad, monkeypatch):
    """On the CPU a tensor is read at once; here it stays one, as it would on an accelerator."""
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    optimizer.param_groups[0]["lr"] = torch.tensor(bad)
    allowed = torch.tensor(bad).isfinite() & (torch.tensor(bad) >= 0)
    monkeypatch.setattr("steepest.optim.descent.check_numbers", lambda groups: [allowed])
    monkeypatch.setattr("steepest.optim.guard.Guard.admit", lambda *_: torch.tensor(True))
    optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    with pytest.warns(RuntimeWarning, match="is not finite"):
        assert optimizer.diagnostics()["skipped_steps"] == 1


def test_unread_numbers_are_judged_on_their_device():
    group = {"role": "matrix", "momentum": 0.9, "weight_decay": 0.0, "beta2": 0.0}
    (flag,) = check_numbers([(0, {**group, "lr": torch.ones((), device="meta")})])
    assert flag.device.type == "meta"
    assert flag.dtype == torch.bool


def test_raising_waits_for_a_rate():
    model = network()
    optimizer = Muon(model, on_nonfinite="raise")
    with pytest.raises(NonFiniteError, match="A learning rate, a momentum or a decay that is a tensor is not finite"):
        optimizer._guard.restrict(True, [torch.tensor(False)])
