"""The loss that a closure returns is that of the gradients that are present, or it is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from steepest import Momo, Muon, MuonAdam, MuonMax
from tests.optim.training import backward, batch, network

METHODS = {
    "muon": lambda model, **o: Muon(model, **o),
    "muon_adam": lambda model, **o: MuonAdam(model, **o),
    "muon_max": lambda model, **o: MuonMax(model, **o),
}
PARTS = 4


def part(model, index):
    """Loss and gradient of a micro-batch, divided as hosts do."""
    x, y = batch(index)
    loss = nn.functional.cross_entropy(model(x), y) / PARTS
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("bound", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_closure_that_adds_to_gradients_of_earlier_passes_is_refused_and_nothing_changes(method, bound):
    model = network()
    optimizer = METHODS[method](model, step_size=Momo(bound))
    for index in range(PARTS - 1):
        part(model, index)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"gradients of earlier backward passes .*record_loss\(loss, weight=1 / "):
        optimizer.step(lambda: part(model, 3))
    weights, state = kept
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True))
    assert repr(optimizer.state_dict()) == repr(state)
    with pytest.raises(ValueError, match="gradients of earlier backward passes"):  # and again
        optimizer.step(lambda: part(model, 4))


def test_the_first_closure_of_a_batch_clears_and_the_last_is_refused():
    model = network()
    optimizer = MuonMax(model, step_size=Momo())

    def closure(index):
        if index == 0:
            optimizer.zero_grad()
        return part(model, index)

    backward(model, 9)
    for index in range(PARTS - 1):
        closure(index)
    with pytest.raises(ValueError, match="gradients of earlier backward passes"):
        optimizer.step(lambda: closure(PARTS - 1))


def test_a_gradient_that_only_some_parameters_have_is_found():
    model = network()
    optimizer = MuonMax(model, step_size=Momo())
    backward(model, 0)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.grad = None
    with pytest.raises(ValueError, match="gradients of earlier backward passes"):
        optimizer.step(lambda: backward(model, 1))


def test_a_recorded_or_explicit_loss_is_trusted_whatever_the_closure_returns():
    model = network()
    optimizer = MuonMax(model, step_size=Momo(0.5))
    losses = []

    def closure(index):
        loss = part(model, index)
        losses.append(loss * PARTS)
        optimizer.record_loss(losses[-1], weight=1 / PARTS)
        return loss

    for index in range(PARTS - 1):
        closure(index)
    optimizer.step(lambda: closure(PARTS - 1))
    assert optimizer.diagnostics()["gap"] == pytest.approx(torch.stack(losses).mean().item() - 0.5, rel=1e-6)
    optimizer.step(lambda: backward(model, 0), loss=2.0)


CLEARING = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer_to_zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model_to_zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "data": lambda model, optimizer: [p.grad.data.zero_() for p in model.parameters() if p.grad is not None],
    "set": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("clearing", CLEARING)
@pytest.mark.parametrize("clip", [False, True])
def test_closures_that_clear_gradients_by_any_means_are_trusted(clearing, inside, clip):
    model = network()
    optimizer = MuonMax(model, step_size=Momo(0.5))
    for step in range(3):

        def closure(step=step):
            if inside:
                CLEARING[clearing](model, optimizer)
            loss = backward(model, step)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            return loss

        if not inside:
            CLEARING[clearing](model, optimizer)
        optimizer.step(closure)


def test_several_passes_within_a_closure_are_its_own():
    model = network()
    optimizer = MuonMax(model, step_size=Momo(0.5))

    def closure():
        optimizer.zero_grad()
        return sum(part(model, index) for index in range(PARTS))

    loss = optimizer.step(closure)
    assert optimizer.diagnostics()["gap"] == pytest.approx(loss.item() - 0.5, rel=1e-6)


def test_a_closure_without_a_pass_of_its_own_is_asked_about():
    model = network()
    optimizer = MuonMax(model, step_size=Momo())
    loss = backward(model, 0)
    optimizer.step(lambda: loss)  # of the one pass there was
    optimizer.zero_grad()
    for index in range(3):
        loss = backward(model, index)
    with pytest.warns(UserWarning, match="closure made no gradients; those present are of 3 backward passes") as told:
        optimizer.step(lambda: loss)
    assert told[0].filename == __file__
    model.zero_grad(set_to_none=False)
    loss = backward(model, 3)
    optimizer.step(lambda: loss)


def test_without_momo_a_closure_may_add():
    model = network()
    optimizer = Muon(model)
    backward(model, 0)
    optimizer.step(lambda: backward(model, 1))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_watches_its_own_parameters(way):
    model = network()
    pair = way((model, MuonMax(model, step_size=Momo())))
    for own, optimizer in (pair, way(pair)):
        backward(own, 0)
        with pytest.raises(ValueError, match="gradients of earlier backward passes"):
            optimizer.step(lambda own=own: backward(own, 1))


def test_groups_added_later_are_watched():
    model, late = network(), nn.Linear(4, 4)
    optimizer = MuonAdam(model, step_size=Momo())
    optimizer.add_param_group({"params": [late.weight], "role": "matrix"})
    late.weight.sum().backward()
    with pytest.raises(ValueError, match="gradients of earlier backward passes"):
        optimizer.step(lambda: late(torch.ones(2, 4)).sum().backward() or 1.0)


def test_no_hook_outlives_the_optimizer():
    model = network()
    optimizer = MuonMax(model, step_size=Momo())
    assert any(p._backward_hooks for p in model.parameters())
    del optimizer
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_of_a_model_that_was_converted_there_and_back_are_heard_of():
    model = network()
    optimizer = Muon(model, momo=True)
    backward(model, 0)
    optimizer.step(loss=1.0)
    model.double().float()
    optimizer.zero_grad()
    part(model, 1)
    with pytest.raises(ValueError, match="gradients of earlier backward passes"):
        optimizer.step(lambda: part(model, 2))
