"""Contestants: names, missing packages, peers that fail, and what is counted."""

import importlib
from typing import ClassVar

import pytest
import torch

from steepest.lab.bench.contestants import BASELINE, CONTESTANTS, Contestant, Settings, choose
from steepest.lab.bench.examine import Examined, count_flops, examine, make_workload
from steepest.linalg import flops

SHAPES = [(8, 8), (16, 8), (4, 2, 2, 2)]


@pytest.fixture
def work():
    return make_workload(SHAPES, dtype=torch.float32, device="cpu", seed=0, settings=Settings())


def test_steepest_always_takes_part_and_comes_first():
    assert [one.name for one in choose(["torch"])] == [BASELINE, "torch"]
    assert [one.name for one in choose(["all"])] == list(CONTESTANTS)


def test_unknown_contestants_are_refused():
    with pytest.raises(ValueError, match="Unknown contestant 'torhc': did you mean 'torch'"):
        choose(["torch", "torhc"])


@pytest.mark.parametrize("name", ["steepest-jordan", "torch-fp32"])
def test_float32_forms_take_the_steps_of_torch_as_far_as_its_eight_bits_tell(name):
    settings, generator = Settings(lr=0.1), torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in [(8, 8), (16, 8), (8, 16)]]
    found = []
    for contestant in (CONTESTANTS["torch"], CONTESTANTS[name]):
        gradients = torch.Generator().manual_seed(1)
        params = [weight.clone().requires_grad_() for weight in weights]
        step = contestant.build(list(params), settings)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=gradients)
            step()
        found.append([param.detach() for param in params])
    for theirs, own in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0.03)  # three steps of 0.1, times √2
        assert not torch.equal(own, theirs)


def test_plain_muon_passes_over_what_has_no_gradient():
    param = torch.ones(2, 2, requires_grad=True)
    CONTESTANTS["torch-fp32"].build([param], Settings())()
    assert torch.equal(param, torch.ones(2, 2))


def test_our_own_row_has_everything(work):
    found = examine(CONTESTANTS[BASELINE], work)
    assert isinstance(found, Examined)
    assert found.flops > 0
    assert found.peak_bytes > 0
    assert set(found.accuracy) == {"gaussian", "decaying"}
    assert found.step() > 0


def test_a_step_hands_over_gradients_and_leaves_weights_and_gradients_of_the_workload_alone(work):
    weights, gradients = ([tensor.clone() for tensor in tensors] for tensors in (work.weights, work.gradients))
    seen = []

    def build(params, settings):
        def step():
            seen.append([param.grad.clone() for param in params])
            for param in params:
                with torch.no_grad():
                    param.sub_(param.grad)
                param.grad.zero_()
                param.grad = None

        return step

    assert isinstance(examine(Contestant("sgd", "torch", build, "parameters"), work), Examined)
    assert all(map(torch.equal, work.weights, weights))
    assert all(map(torch.equal, work.gradients, gradients))
    assert all(map(torch.equal, seen[-1], gradients))
    assert all(map(torch.equal, seen[-2], gradients))


def test_products_are_counted_as_torch_is_asked_for_them(work):
    assert count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5
    found = examine(CONTESTANTS["torch-fp32"], work)
    assert isinstance(found, Examined)
    sides = [(8, 8), (8, 16), (4, 8)]
    assert found.flops == sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)


@pytest.mark.parametrize("name", ["steepest", "steepest-jordan", "steepest-bf16"])
def test_our_own_products_are_counted_by_the_library(work, name):
    options = {
        "steepest": {"dtype": torch.float32},
        "steepest-jordan": {"coefficients": "jordan", "dtype": torch.float32},
        "steepest-bf16": {"dtype": torch.bfloat16},
    }
    found = examine(CONTESTANTS[name], work)
    assert isinstance(found, Examined)
    assert found.flops == sum(flops(m, n, **options[name]) for m, n in [(8, 8), (16, 8), (4, 8)])


def test_a_peer_that_is_not_installed_says_how_to_install_it(work, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for name, module in (("heavyball", "heavyball"), ("pytorch-optimizer", "pytorch_optimizer")):
        assert examine(CONTESTANTS[name], work) == (
            f"{module} is not installed. Peers come with: pip install 'steepest[bench]'."
        )


class Failing:
    """Builds an optimizer that cannot step."""

    errors: ClassVar = {"text": RuntimeError("first line\nsecond line"), "none": ZeroDivisionError()}

    def __init__(self, which):
        self.error = self.errors[which]

    def __call__(self, params, settings):
        def step():
            raise self.error

        return step


@pytest.mark.parametrize(
    ("which", "reason"), [("text", "RuntimeError: first line"), ("none", "ZeroDivisionError: no message")]
)
def test_a_peer_that_fails_has_a_reason(work, which, reason):
    assert examine(Contestant("other", "torch", Failing(which), "float32"), work) == reason


def test_our_own_failures_are_raised(work):
    with pytest.raises(RuntimeError, match="first line"):
        examine(Contestant("own", "steepest", Failing("text"), "float32", ours=True), work)


def test_the_dtype_of_products_follows_parameters_or_the_contestant():
    float32, bfloat16 = torch.float32, torch.bfloat16
    assert CONTESTANTS["torch-fp32"].products_dtype(bfloat16, "cpu") == bfloat16
    assert CONTESTANTS["torch"].products_dtype(float32, "cpu") == bfloat16
    assert CONTESTANTS["steepest"].products_dtype(bfloat16, "cpu") == float32
    assert CONTESTANTS["steepest"].products_dtype(float32, "cuda:0") == bfloat16
    assert CONTESTANTS["steepest-jordan"].products_dtype(float32, "cuda:0") == float32


def test_versions_are_those_of_what_is_installed():
    assert torch.__version__.startswith(CONTESTANTS["torch"].version())
    assert Contestant("other", "no-such-package", Failing("text"), "float32").version() is None
    compiled = CONTESTANTS["heavyball"]
    assert compiled.examined() is CONTESTANTS["heavyball-eager"]
    assert CONTESTANTS["torch"].examined() is CONTESTANTS["torch"]


@pytest.mark.parametrize("name", ["pytorch-optimizer", "heavyball-eager"])
def test_peers_step_where_they_are_installed(work, name):
    pytest.importorskip(CONTESTANTS[name].package)
    found = examine(CONTESTANTS[name], work)
    assert isinstance(found, Examined), found
    assert found.flops == sum(5 * (4 * m * m * n + 2 * m**3) for m, n in [(8, 8), (8, 16), (4, 8)])
    assert found.accuracy["gaussian"].alignment > 0.5
