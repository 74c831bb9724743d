"""A step that fails leaves everything as it was, or says what it has changed."""

import pytest
import torch
from torch import nn

from steepest import Frobenius, Momo, Muon, MuonMax, SteepestDescent
from tests.cases import cases
from tests.optim.training import assert_same, backward, network, snapshot, train


def shape(model, _):
    model[7].weight.grad.data = torch.ones(4, 1)


def broadcast(model, _):
    model[5].bias.grad.data = torch.ones(())


def kind(model, _):
    model[7].weight.data = model[7].weight.data.double()
    model[7].weight.grad = torch.ones(4, 12, dtype=torch.float64)


def swapped(model, _):
    model[7].weight.data = torch.ones(3, 12)
    model[7].weight.grad = torch.ones(3, 12)


def complicated(model, _):
    model[7].weight.grad.data = torch.ones(4, 12, dtype=torch.complex64)


def sparse(model, _):
    model[7].weight.grad = torch.ones(4, 12).to_sparse()


def rate(_, optimizer):
    optimizer.param_groups[-1]["lr"] = -1.0


FAULTS = {
    "shape": (
        shape,
        ValueError,
        r"gradient of '7\.weight' has shape \(4, 1\) on cpu, but the param",
    ),
    "broadcast": (broadcast, ValueError, r"gradient of '5\.bias' has shape \(\)"),
    "kind": (kind, ValueError, r"became torch\.float64"),
    "swapped": (swapped, ValueError, r"'7\.weight' ha[sd] .*\(3, 12\)"),
    "complex": (
        complicated,
        TypeError,
        r"gradient of '7\.weight' must be of real floating point, got torch\.c",
    ),
    "sparse": (sparse, ValueError, "layout"),
    "rate": (rate, ValueError, "lr"),
}


@pytest.mark.slow
@cases("first", [True, False], ["first", "later"])
@cases("fault", FAULTS)
def test_what_can_be_seen_before_is_refused_before(recipe, fault, first):
    change, error, message = FAULTS[fault]
    model = network()
    optimizer = recipe(model)
    if not first:
        train(model, optimizer, range(2))
    if fault in ("kind", "swapped") and first:
        return  # the state is made for what is there then
    backward(model, 2)
    change(model, optimizer)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    assert len(optimizer.state) == (0 if first else len(list(model.parameters())))


def bound_that_fails(calls):
    if calls == 2:
        raise RuntimeError("no bound today")
    return 0.0


def test_a_lower_bound_that_raises_changes_nothing():
    model = network()
    optimizer = MuonMax(model, step_size=Momo(bound_that_fails))
    for step in range(3):
        optimizer.zero_grad()
        loss = backward(model, step)
        before = snapshot(model, optimizer)
        if step < 2:
            optimizer.step(loss=loss)
    with pytest.raises(RuntimeError, match="no bound today") as raised:
        optimizer.step(loss=loss)
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    assert not hasattr(raised.value, "__notes__")


class Failing(Frobenius):
    """A norm of a user, with a fault."""

    def lmo(self, m, /, v=None):
        raise KeyboardInterrupt


@pytest.mark.parametrize("together", [False, True])
def test_a_norm_that_raises_is_told_with_what_was_changed(together):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    groups = [
        {"params": [("first", model[0].weight)], "role": "matrix"},
        {"params": [("second", model[1].weight)], "role": "head", "norm": Failing()},
    ]
    optimizer = SteepestDescent(groups, product="euclid" if together else "max")
    for parameter in model.parameters():
        parameter.grad = torch.ones(3, 3)
    with pytest.raises(KeyboardInterrupt) as raised:
        optimizer.step()
    (note,) = raised.value.__notes__
    assert "averages and counts of first, second hold the gradients of this step" in note
    assert ("weights of none have moved" if together else "weights of first have moved") in note


def test_state_made_in_inference_mode_serves_later_steps():
    model = network()
    optimizer = Muon(model)
    backward(model, 0)
    with torch.inference_mode():
        optimizer.step()
    train(model, optimizer, range(2))
