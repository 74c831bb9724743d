"""Averages of weights: what they are, that evaluating them leaves no trace, and that they can be saved and shared."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from steepest import Momo, Muon, TailAverage
from steepest.optim.guard import Guard
from steepest.testing import backward, batch, network
from tests.cases import cases
from tests.reference.averaging import mean_of_tail, weighted_tail

STEPS = 50
KINDS = {
    "mean": ({}, lambda w: mean_of_tail(w, 0)),
    "mean of the tail": ({"start": 20}, lambda w: mean_of_tail(w, 20)),
    "parts": ({"start": 10, "parts": 3.0}, lambda w: weighted_tail(w, 10, lambda age: max(1, age / 3))),
    "long": ({"start": 10, "parts": 0.5}, lambda w: weighted_tail(w, 10, lambda age: max(1, age / 0.5))),
    "constant": (
        {"start": 10, "end": 50, "parts": 4.0, "mix": 0.6},
        lambda w: 0.4 * w[-1] + 0.6 * weighted_tail(w, 10, lambda age: 10),
    ),
    "exponential": ({"beta": 0.9, "mix": 0.25}, lambda w: 0.75 * w[-1] + 0.25 * weighted_tail(w, 0, lambda age: 10)),
    "exponential later": ({"beta": 0.5, "start": 30}, lambda w: weighted_tail(w, 30, lambda age: 2)),
}
METHODS = {
    "plain": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "muon": lambda model: Muon(model, lr=0.02, weight_decay=0.1),
    "momo": lambda model: Muon(model, lr=0.3, step_size=Momo(1.0)),
}


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def inside(average, model):
    with average.averaged():
        return weights(model)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def stepped(model, optimizer, step):
    optimizer.zero_grad()
    loss = backward(model, step, model[0].weight.dtype)
    if isinstance(optimizer, Muon):
        optimizer.step(loss=loss.detach())
    else:
        optimizer.step()


@cases("kind", KINDS)
@cases("method", METHODS)
def test_an_average_is_what_its_definition_says_at_every_step(kind, method):
    options, definition = KINDS[kind]
    model = network().double()
    optimizer = METHODS[method](model)
    average = TailAverage(model, **options)
    average.follow(optimizer)
    past = [weights(model)]
    for step in range(STEPS):
        stepped(model, optimizer, step)
        past.append(weights(model))
        for place, found in enumerate(inside(average, model)):
            expected = definition([w[place].numpy() for w in past])
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)
    assert average.steps == STEPS


@cases("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@cases("mix", [1.0, 0.6])
@cases("fails", [False, True])
def test_afterwards_weights_averages_and_what_follows_are_bit_for_bit_what_they_were(dtype, mix, fails):
    models = [network().to(dtype) for _ in range(2)]
    averages = [TailAverage(model, start=2, mix=mix) for model in models]
    for model, average in zip(models, averages, strict=True):
        average.follow(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(8):
            stepped(model, optimizer, step)
            if model is models[0]:
                before, kept = weights(model), copy.deepcopy(average.state_dict()["averages"])
                try:
                    with average.averaged():
                        assert same(before, weights(model)) is (step < 3)
                        if fails:
                            raise KeyboardInterrupt
                except KeyboardInterrupt:
                    assert fails
                assert same(before, weights(model))
                assert same(kept.values(), average.state_dict()["averages"].values())
    assert same(*map(weights, models))
    assert same(*(average.state_dict()["averages"].values() for average in averages))


def test_weights_of_16_bits_are_averaged_in_32():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = TailAverage([weight])
    for step in range(1, 301):
        with torch.no_grad():
            weight.fill_(1 + (step % 2) / 64)
        average.update()
    (kept,) = average.state_dict()["averages"].values()
    torch.testing.assert_close(kept, torch.full((3,), 1 + 0.5 / 64), rtol=1e-6, atol=0)


@cases("bookkeeping", ["recurrent", "direct"])
@cases("mix", [1.0, 0.5])
def test_momo_goes_on_as_if_nobody_had_looked(bookkeeping, mix):
    """Weights that come back the same are no change: no warning, and its model does not start again."""
    shares = []
    for looks in (False, True):
        model = network()
        optimizer = Muon(model, lr=0.3, step_size=Momo(1.0, bookkeeping=bookkeeping))
        average = TailAverage(model, mix=mix)
        average.follow(optimizer)
        own = []
        for step in range(12):
            stepped(model, optimizer, step)
            told = optimizer.diagnostics()
            own.append((told["t"], told["gap"]))
            if looks:
                with average.averaged(), torch.no_grad():
                    model(batch(0)[0])
        shares.append((own, weights(model)))
    assert shares[0][0] == shares[1][0]
    assert any(t < 1 for t, _ in shares[0][0])
    assert same(shares[0][1], shares[1][1])


@cases("stays", [False, True])
def test_steps_that_are_passed_over_are_none(stays, monkeypatch):
    """Also where whether a step is taken stays unread, as on an accelerator."""
    found = []
    for bad in ((), (2, 7)):
        model = network()
        optimizer = Muon(model, lr=0.02)
        average = TailAverage(model, start=1, parts=2.0)
        average.follow(optimizer)
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            if stays:
                patched.setattr(Guard, "admit", stay_on_device)
            good = iter(range(8))
            for step in range(8 + len(bad)):
                optimizer.zero_grad()
                backward(model, 99 if step in bad else next(good))
                if step in bad:
                    model[0].weight.grad[0] = math.nan
                optimizer.step()
        assert average.steps == 8
        found.append([*weights(model), *average.state_dict()["averages"].values()])
    assert same(*found)


def stay_on_device(self, names, gradients, loss):
    finite = torch.stack([g.isfinite().all() for g in gradients]).all()
    self._count(~finite)
    return finite


@cases("fused", [False, True])
def test_steps_that_a_scaler_passes_over_are_none(fused):
    """A fused optimizer is called all the same, and passes over the step itself."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    average = TailAverage(model)
    average.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.zero_grad()
        inputs, classes = batch(step)
        scaler.scale(nn.functional.cross_entropy(model(inputs), classes)).backward()
        if step == 2:
            model[0].weight.grad[0] = math.inf
        before = average.state_dict()["averages"]["0.weight"].clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, average.state_dict()["averages"]["0.weight"]) == (step == 2)
    assert average.steps == 3


def test_following_can_end_and_sees_through_wrappers():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = network()
    optimizer = METHODS["plain"](model)
    average = TailAverage(model)
    following = average.follow(Wrapper(Wrapper(optimizer)))
    stepped(model, optimizer, 0)
    following.remove()
    stepped(model, optimizer, 1)
    assert average.steps == 1
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, or what wraps one"):
        average.follow(model)


def test_a_step_that_raises_is_none():
    model = network()
    optimizer = Muon(model, on_nonfinite="raise")
    average = TailAverage(model)
    average.follow(optimizer)
    backward(model, 0)
    model[0].weight.grad[0] = math.nan
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert average.steps == 0


def test_tied_and_frozen_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[1].weight = model[0].weight
    model[3].requires_grad_(False)
    average = TailAverage(model)
    assert [*average.state_dict()["averages"]] == ["0.weight", "2.weight", "2.bias"]
    average.update()
    model(torch.randn(4, 3))
    statistics = model[2].running_mean.clone()
    with average.averaged():
        assert torch.equal(model[2].running_mean, statistics)
        model(torch.randn(4, 3))
        moved = model[2].running_mean.clone()
    assert torch.equal(model[2].running_mean, moved)
    assert not torch.equal(moved, statistics)


def test_names_are_those_of_the_model_without_wrappers():
    model = network()
    names = [*TailAverage(model).state_dict()["averages"]]
    assert names == [name for name, _ in model.named_parameters()]
    assert [*TailAverage(torch.compile(model, backend="eager")).state_dict()["averages"]] == names
    assert [*TailAverage(model.named_parameters()).state_dict()["averages"]] == names
    bare = [*model.parameters()]
    assert [*TailAverage([*bare, bare[0]]).state_dict()["averages"]] == [f"params[{i}]" for i in range(len(bare))]


def test_a_compiled_model_is_evaluated_with_the_averaged_weights():
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    average = TailAverage(compiled)
    average.follow(optimizer := METHODS["plain"](model))
    x = batch(0)[0]
    with torch.no_grad():
        compiled(x)
    for step in range(3):
        stepped(model, optimizer, step)
    with torch.no_grad():
        outside = model(x)
        with average.averaged():
            torch.testing.assert_close(compiled(x), model(x))
            assert (compiled(x) - outside).abs().max() > 1e-3
        torch.testing.assert_close(compiled(x), outside)


@cases("kind", KINDS)
def test_a_saved_average_goes_on_bit_for_bit(kind):
    options, _ = KINDS[kind]
    model = network()
    optimizer = METHODS["plain"](model)
    average = TailAverage(model, **options)
    for step in range(25):
        stepped(model, optimizer, step)
        average.update()
    stream = io.BytesIO()
    torch.save(average.state_dict(), stream)
    stream.seek(0)
    again = copy.deepcopy(model)
    loaded = TailAverage(again, **options)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    pairs = [(again, loaded), copy.deepcopy((model, average)), pickle.loads(pickle.dumps((model, average)))]
    runs = [(m, own, METHODS["plain"](m)) for m, own in [(model, average), *pairs]]
    for step in range(25, 35):
        for m, own, opt in runs:
            stepped(m, opt, step)
            own.update()
    expected = inside(average, model)
    assert not same(expected, weights(model))
    for m, own, _ in runs[1:]:
        assert same(inside(own, m), expected)
        assert own.steps == 35


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    model = network()
    average = TailAverage(model)
    average.update()
    state = copy.deepcopy(average.state_dict())
    first = next(iter(state["averages"]))
    broken = {
        "has shape (3,) in the state": {"averages": {**state["averages"], first: torch.ones(3)}},
        "must be a tensor of real floating point, got [1]": {"averages": {**state["averages"], first: [1]}},
        f"the state has no parameter '{first}'": {
            "averages": {n: t for n, t in state["averages"].items() if n != first}
        },
        "the model has no parameter 'x'": {"averages": {**state["averages"], "x": torch.ones(3)}},
        "steps must be at least 0": {"steps": -1},
        "averages must be a mapping": {"averages": 3},
        "a state has steps, averages, got steps, averages, weights": {"weights": 3},
    }
    for text, change in broken.items():
        with pytest.raises((ValueError, TypeError)) as refused:
            average.load_state_dict({**state, **change})
        assert text in str(refused.value)
        assert average.steps == 1
        assert same(state["averages"].values(), average.state_dict()["averages"].values())
    with pytest.raises(TypeError, match="must be what state_dict"):
        average.load_state_dict([state])


def test_what_makes_no_sense_is_refused():
    model = network()
    with pytest.raises(ValueError, match="end must be after start, which is 5, got 5"):
        TailAverage(model, start=5, end=5)
    for other in ({"end": 9}, {"parts": 2.0}):
        with pytest.raises(ValueError, match=r"beta=0\.9 says how far the average looks back"):
            TailAverage(model, beta=0.9, **other)
    with pytest.raises(ValueError, match="empty parameter list"):
        TailAverage([])
    with pytest.raises(ValueError, match="two parameters have the name 'a'"):
        TailAverage([("a", torch.ones(1)), ("a", torch.ones(1))])


def test_training_and_saving_inside_are_refused():
    model = network()
    average = TailAverage(model)
    average.follow(optimizer := METHODS["plain"](model))
    stepped(model, optimizer, 0)
    before = weights(model)
    with pytest.raises(RuntimeError, match="a step was taken inside"), average.averaged():
        stepped(model, optimizer, 1)
    assert same(before, weights(model))
    with pytest.raises(RuntimeError, match="weights were written to inside"), average.averaged():
        nn.init.zeros_(model[0].weight)
    assert same(before, weights(model))
    with average.averaged():
        for call in (average.averaged().__enter__, average.state_dict, lambda: average.load_state_dict({})):
            with pytest.raises(RuntimeError, match="averaged"):
                call()
    assert same(before, weights(model))


def test_a_parameter_that_changed_its_shape_is_named():
    model = network()
    average = TailAverage(model)
    model[0].bias.data = torch.ones(1)
    for call in (average.update, average.averaged().__enter__):
        with pytest.raises(ValueError, match=r"'0\.bias' has shape \(1,\) on cpu, and its average"):
            call()
