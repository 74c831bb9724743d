"""A look-ahead around a whole optimizer: its definition, Momo within it, and that nothing is lost or left over."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from steepest import AdaInf, Max, Momo, Muon, OuterNesterov, Sign, Spectral, SteepestDescent, TailAverage
from steepest.optim.guard import Guard
from steepest.testing import backward, batch, network
from tests.cases import cases
from tests.reference import grid
from tests.reference.outer import EmaNesterov
from tests.reference.regression import ROLES, blocks, oracle, parameter_groups, train

STEPS = 50
LR = {"matrix": 0.5, "embedding": 0.2, "head": 0.2, "vector": 0.2}
WAYS = {
    "plain": None,
    "momo": Momo(1.2),
    "momo, direct": Momo(1.2, bookkeeping="direct"),
    "momo, auto": Momo("auto"),
}


def stepped(model, optimizer, step):
    optimizer.zero_grad()
    loss = backward(model, step, model[0].weight.dtype)
    if isinstance(optimizer, SteepestDescent):
        optimizer.step(loss=loss.detach())
    else:
        optimizer.step()


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@cases("way", WAYS)
@cases("other", [Sign(), AdaInf()])
@cases("decays", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")
def test_it_is_what_its_definition_says_and_momo_goes_along(way, other, decays):
    """Momo's model of the reference is the sum over the whole history, at the points where gradients are taken."""
    norms = {"matrix": Spectral(scale="none", polar="svd"), **dict.fromkeys(ROLES[1:], other)}
    momo = WAYS[way]
    groups, parameters = parameter_groups()
    optimizer = SteepestDescent(
        groups, lr=LR, momentum=0.9, betas=(0.9, 0.95), weight_decay=decays, norms=norms, product=Max(), step_size=momo
    )
    OuterNesterov(optimizer, strength=0.6, decay=0.8)
    options = {role: {"lr": LR[role], "weight_decay": decays} for role in ROLES}
    own = blocks(norms, options)
    reference = EmaNesterov([block.start for block in own], decay=0.8)
    bound = None if momo is None else momo.lower_bound
    expected = grid.descend(
        own,
        oracle,
        STEPS,
        grid.Method(("max", *ROLES), lower_bound=bound),
        after=lambda x: reference.ahead(x, 0.6),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Weights were changed")
        for ours, theirs in zip(train(optimizer, parameters, STEPS), expected, strict=True):
            np.testing.assert_allclose(ours, np.concatenate([w.ravel() for w in theirs.weights]), rtol=0, atol=1e-10)
    if momo is not None:
        assert optimizer.diagnostics()["t"] == pytest.approx(expected[-1].length, rel=1e-6)
        assert any(step.length < 1 for step in expected)


@cases("window", [(0, None), (10, 30)])
def test_the_look_ahead_follows_the_learning_rate_of_any_optimizer(window):
    start, end = window
    rng = np.random.default_rng(3)
    slopes = rng.normal(size=(STEPS, 4))
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / 100))
    outer = OuterNesterov(optimizer, strength=0.7, decay=0.9, start=start, end=end)
    reference, y = EmaNesterov([np.zeros(4)], decay=0.9), np.zeros(4)
    for step in range(STEPS):
        rate = optimizer.param_groups[0]["lr"]
        parameter.grad = parameter.detach() + torch.from_numpy(slopes[step])
        optimizer.step()
        scheduler.step()
        x = y - rate * (y + slopes[step])
        active = start <= step + 1 and (end is None or step + 1 < end)
        (y,) = reference.ahead([x], 0.7 * rate / 0.5 * active)
        np.testing.assert_allclose(parameter.detach().numpy(), y, rtol=0, atol=1e-12)
        with outer.base():
            np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=0, atol=1e-12)
    assert outer.steps == STEPS


def test_a_rate_that_grows_is_the_largest_from_then_on():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    outer = OuterNesterov(optimizer)
    for rate, ahead in ((0.1, 0.6), (0.4, 0.6), (0.2, 0.3), (0.0, 0.0)):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
        assert outer.state_dict()["ahead"] == {"group 0[0]": pytest.approx(ahead)}


@cases("recipe", {"muon": {}, "momo": {"step_size": Momo(1.0)}, "kept": {"rounding": "kept"}})
@cases("dtype", [torch.float32, torch.bfloat16])
def test_looking_at_the_base_leaves_no_trace(recipe, dtype):
    options = {"muon": {}, "momo": {"step_size": Momo(1.0)}, "kept": {"rounding": "kept"}}[recipe]
    found = []
    for looks in (False, True):
        model = network().to(dtype)
        optimizer = Muon(model, lr=0.1, **options)
        outer = OuterNesterov(optimizer, decay=0.8)
        average = TailAverage(model)
        average.follow(optimizer)
        shares = []
        for step in range(8):
            stepped(model, optimizer, step)
            shares.append(optimizer.diagnostics().get("t"))
            if looks:
                before = weights(model)
                with outer.base():
                    assert same(before, weights(model)) is False
                with pytest.raises(ZeroDivisionError), outer.base():
                    1 / 0  # noqa: B018
                with average.averaged(), torch.no_grad():
                    model(batch(0)[0].to(dtype))
                assert same(before, weights(model))
        found.append((shares, weights(model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_kept_bits_make_bfloat16_weights_those_of_float32():
    """Weights that start alike stay alike, as the look-ahead moves kept bits too."""
    wide, narrow = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    for parameter, rounding in ((wide, "nearest"), (narrow, "kept")):
        optimizer = Muon([parameter], lr=1e-3, rounding=rounding)
        OuterNesterov(optimizer, decay=0.8)
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(3, 4, generator=generator).bfloat16().to(parameter.dtype)
            optimizer.step()
    exact = optimizer.exact(narrow)
    torch.testing.assert_close(exact, wide.detach(), rtol=0, atol=1e-6)
    assert (wide.detach() - 1).abs().max() > 1e-3
    assert torch.equal(exact.bfloat16(), narrow.detach())


def test_what_rounding_would_lose_is_right_on_average_where_it_is_drawn_for():
    moved = {}
    for rounding in ("nearest", "stochastic"):
        parameter = nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
        optimizer = Muon([parameter], rounding=rounding)
        direction = torch.full((100, 100), 1e-3)
        optimizer.displace([(parameter, direction, 1.0)])
        moved[rounding] = float((parameter.detach().float() - 1).mean())
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(1e-3, rel=0.1)


@cases("stays", [False, True])
@cases("momo", [False, True])
def test_steps_that_are_passed_over_leave_everything_as_it_was(stays, momo, monkeypatch):
    found = []
    for bad in ((), (2, 7)):
        model = network()
        optimizer = Muon(model, lr=0.1, step_size=Momo(1.0) if momo else None)
        outer = OuterNesterov(optimizer, decay=0.8, start=1, end=9)
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            if stays:
                patched.setattr(Guard, "admit", stay_on_device)
            good = iter(range(8))
            for step in range(8 + len(bad)):
                optimizer.zero_grad()
                loss = backward(model, 99 if step in bad else next(good)).detach()
                before = (weights(model), copy.deepcopy(outer.state_dict()))
                if step in bad:
                    model[0].weight.grad[0] = math.nan
                optimizer.step(loss=loss)
                if step in bad:
                    assert same(before[0], weights(model))
                    now = outer.state_dict()
                    assert same(before[1]["averages"].values(), now["averages"].values())
                    assert [before[1][key] for key in ("steps", "ahead")] == [now[key] for key in ("steps", "ahead")]
        found.append([*weights(model), *outer.state_dict()["averages"].values()])
        assert outer.steps == 8
    assert same(*found)


def stay_on_device(self, names, gradients, loss):
    finite = torch.stack([g.isfinite().all() for g in gradients]).all()
    self._count(~finite)
    return finite


def test_a_parameter_without_a_gradient_stays_where_it_is():
    one, two = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = Muon([one, two], lr=0.1)
    outer = OuterNesterov(optimizer, decay=0.5)
    for step in range(6):
        one.grad = torch.ones(2, 2)
        two.grad = torch.ones(2, 2) if step < 3 else None
        before = two.detach().clone()
        optimizer.step()
        assert torch.equal(before, two.detach()) is (step >= 3)
    ahead = outer.state_dict()["ahead"]
    assert set(ahead.values()) == {0.6}


def test_weights_that_somebody_else_writes_to_are_still_noticed():
    model = network()
    optimizer = Muon(model, lr=0.1, step_size=Momo(1.0))
    OuterNesterov(optimizer)
    for step in range(3):
        stepped(model, optimizer, step)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.warns(UserWarning, match="Weights were changed since the last step"):
        stepped(model, optimizer, 3)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    optimizer.displace([(model[0].weight, torch.ones_like(model[0].weight), 0.5)])
    assert optimizer._losses.changed() is True


def saved_and_loaded(thing):
    stream = io.BytesIO()
    torch.save(thing, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@cases("momo", [False, True])
def test_it_goes_on_bit_for_bit_from_a_file_and_in_copies(momo):
    options = {"lr": 0.1, "step_size": Momo(1.0) if momo else None}
    model = network()
    optimizer = Muon(model, **options)
    outer = OuterNesterov(optimizer, decay=0.8, start=2, end=12)
    for step in range(6):
        stepped(model, optimizer, step)
    again = network()
    loaded = Muon(again, **options)
    loaded_outer = OuterNesterov(loaded, decay=0.8, start=2, end=12)
    again.load_state_dict(saved_and_loaded(model.state_dict()))
    loaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    loaded_outer.load_state_dict(saved_and_loaded(outer.state_dict()))
    runs = [
        (model, optimizer, outer),
        (again, loaded, loaded_outer),
        copy.deepcopy((model, optimizer, outer)),
        pickle.loads(pickle.dumps((model, optimizer, outer))),
    ]
    for step in range(6, 14):
        for m, own, _ in runs:
            stepped(m, own, step)
    for m, own, other in runs[1:]:
        assert same(weights(m), weights(model))
        assert same(other.state_dict()["averages"].values(), outer.state_dict()["averages"].values())
        assert own.diagnostics().get("t") == optimizer.diagnostics().get("t")
    with pytest.raises(TypeError, match="copy it with its optimizer"):
        copy.copy(outer)


def test_momo_goes_along_right_after_a_state_is_loaded():
    """Where the weights are known by their sum alone."""
    values = []
    for loads in (False, True):
        model = network()
        optimizer = Muon(model, lr=0.1, step_size=Momo(1.0))
        for step in range(4):
            stepped(model, optimizer, step)
        if loads:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = Muon(model, lr=0.1, step_size=Momo(1.0))
            optimizer.load_state_dict(state)
        optimizer.displace([(p, torch.ones_like(p), 0.01) for p in model.parameters()])
        stepped(model, optimizer, 4)
        values.append((optimizer.diagnostics()["gap"], optimizer.diagnostics()["t"]))
    assert values[0] == values[1]


def test_removing_goes_back():
    model = network()
    optimizer = Muon(model, lr=0.1)
    outer = OuterNesterov(optimizer)
    for step in range(3):
        stepped(model, optimizer, step)
    with outer.base():
        base = weights(model)
    outer.remove()
    assert same(base, weights(model))
    state = copy.deepcopy(outer.state_dict()["averages"])
    stepped(model, optimizer, 3)
    assert same(state.values(), outer.state_dict()["averages"].values())
    with outer.base():
        pass
    outer.remove()
    other, copied, gone = copy.deepcopy((model, optimizer, outer))  # neither does a copy look ahead
    stepped(other, copied, 4)
    assert gone.steps == 3
    stepped(model, optimizer, 4)
    assert same(weights(model), weights(other))


def test_parameters_that_come_later_look_ahead_too():
    model = network()
    optimizer = Muon(model, lr=0.1)
    outer = OuterNesterov(optimizer)
    stepped(model, optimizer, 0)
    late = nn.Linear(3, 3, bias=False)
    optimizer.add_module(late, "late")
    late.weight.grad = torch.ones(3, 3)
    backward(model, 1)
    optimizer.step()
    state = outer.state_dict()
    assert state["averages"]["late.weight"].abs().max() > 0
    assert state["ahead"]["late.weight"] == 0.6


def test_steps_and_states_inside_the_base_are_refused():
    model = network()
    optimizer = Muon(model, lr=0.1)
    outer = OuterNesterov(optimizer)
    stepped(model, optimizer, 0)
    with outer.base():
        for call in (
            lambda: stepped(model, optimizer, 1),
            outer.base().__enter__,
            outer.state_dict,
            lambda: outer.load_state_dict({}),
            outer.remove,
        ):
            with pytest.raises(RuntimeError, match=r"base\(\)|the weights are x already"):
                call()
    with pytest.raises(RuntimeError, match="weights were written to inside"), outer.base():
        nn.init.ones_(model[0].weight)


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    model = network()
    optimizer = Muon(model, lr=0.1)
    outer = OuterNesterov(optimizer)
    stepped(model, optimizer, 0)
    state = copy.deepcopy(outer.state_dict())
    name = next(iter(state["averages"]))
    broken = {
        "a state has steps, peaks, ahead, averages, got steps": {"x": 1},
        "has shape (3,) in the state": {"averages": {**state["averages"], name: torch.ones(3)}},
        "ahead must be a mapping with the names": {"ahead": {}},
        f"ahead['{name}'] must be a number": {"ahead": {**state["ahead"], name: "x"}},
        "peaks must be a list with one number for each of": {"peaks": [1.0]},
        "peaks must be finite and at least 0": {"peaks": [math.nan] * len(state["peaks"])},
        "steps must be at least 0": {"steps": -1},
    }
    for text, change in broken.items():
        with pytest.raises((ValueError, TypeError)) as refused:
            outer.load_state_dict({**state, **change})
        assert text in str(refused.value)
        now = outer.state_dict()
        assert same(state["averages"].values(), now["averages"].values())
        assert [state[key] for key in ("steps", "peaks", "ahead")] == [now[key] for key in ("steps", "peaks", "ahead")]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, or what wraps one"):
        OuterNesterov(network())
    with pytest.raises(ValueError, match="end must be after start, which is 4, got 3"):
        OuterNesterov(Muon(network()), start=4, end=3)
