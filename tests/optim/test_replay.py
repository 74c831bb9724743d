"""Steps on an accelerator: nothing is waited for, and a step that was recorded once can be replayed."""

import copy
import warnings
from functools import partial

import pytest
import torch

from steepest import (
    Adam,
    Averages,
    InputMoment,
    Momo,
    Muon,
    MuonAdam,
    MuonMax,
    OuterNesterov,
    PethickScion,
    PolarGrad,
    RowNorm,
    Scion,
    Sign,
    Sphere,
    SteepestDescent,
    TailAverage,
)
from steepest.optim import groups, replay
from steepest.optim.momentum import FORGET_EVERY
from steepest.stages import RadialBrake, RowFloor, RowScaling, Stage
from tests.accelerator import Accelerator, Away, WaitedError, play
from tests.cases import cases

SHAPES = {"matrix": [(6, 4), (4, 9), (6, 4)], "embedding": [(11, 4)], "vector": [(4,)]}
NORMS = {"matrix": RowNorm(), "embedding": Sign(), "vector": Sign()}
METHODS = {
    "muon": partial(Muon, weight_decay=0.1),
    "muon without nesterov": partial(Muon, nesterov=False),
    "scion": Scion,
    "pethick scion": PethickScion,
    "polar grad": PolarGrad,
    "muon adam": MuonAdam,
    "adam": Adam,
    "muon max": partial(MuonMax, weight_decay=0.1),
    "muon max, stale": partial(MuonMax, dual="stale"),
    "muon max with momo": partial(MuonMax, weight_decay=0.1, step_size=Momo(0.5)),
    "muon with momo, auto": partial(Muon, step_size=Momo("auto")),
    "muon adam with momo, direct": partial(MuonAdam, step_size=Momo(bookkeeping="direct")),
    "nor muon": partial(Muon, stages=[RowScaling()]),
    "muon with a brake and a floor": partial(Muon, stages=[RowFloor(), RadialBrake()]),
    "muon max of averages, with momo": partial(
        MuonMax, momentum=Averages.two(0.8, 0.95, start=4), step_size=Momo(0.5), weight_decay=0.1
    ),
    "muon on spheres": partial(Muon, weight_decay=Sphere(relative=True)),
    "muon max on spheres, with momo": partial(MuonMax, weight_decay=Sphere(), step_size=Momo(0.5)),
    "own norms": partial(SteepestDescent, norms=NORMS),
}
WARM, STEPS = 3, 9
RATES = [0.02, 0.02, 0.02, 0.03, 0.01, 0.0, 0.05, 0.02, 0.01]
BROKEN = 6  # a step with a gradient that is not finite


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(groups, "PLAIN", groups.PLAIN | {Away})
    with Accelerator() as device:
        yield device


class Run:
    """Parameters, gradients, a loss and a rate on the device, and an optimizer of them."""

    def __init__(self, device, build, **options):
        generator = torch.Generator().manual_seed(1)

        def draw(shape):
            return device.put(torch.randn(shape, generator=generator))

        self.params = {role: [draw(shape).requires_grad_() for shape in own] for role, own in SHAPES.items()}
        for param in self.every:
            param.grad = torch.zeros_like(param)
        self.loss = device.put(torch.tensor(0.0))
        named = [{"params": own, "role": role} for role, own in self.params.items()]
        self.optimizer = build(named, lr=device.put(torch.tensor(RATES[0])), **options)
        self.device = device
        self.parts = [group["lr"].here / RATES[0] for group in self.optimizer.param_groups]  # roles have their own

    @property
    def every(self):
        return [param for own in self.params.values() for param in own]

    def feed(self, step):
        """What a loader and a scheduler write into memory that is there."""
        generator = torch.Generator().manual_seed(100 + step)
        for param in self.every:
            param.grad.here.copy_(torch.randn(param.shape, generator=generator))
        if step == BROKEN:
            self.every[1].grad.here[0, 0] = torch.nan
        self.loss.here.fill_(2.0 - 0.1 * step)
        for group, part in zip(self.optimizer.param_groups, self.parts, strict=True):
            group["lr"].here.copy_(RATES[step] * part)

    def step(self):
        self.optimizer.step(loss=self.loss)

    def numbers(self):
        """Weights, state and counts, as they lie in memory."""
        self.device.unguarded = True
        state = [{k: v.here.clone() for k, v in self.optimizer.state[p].items()} for p in self.every]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*the step is skipped", RuntimeWarning)
            found = [p.here.clone() for p in self.every], state, self.optimizer.diagnostics()
        self.device.unguarded = False
        return found


@cases("method", METHODS)
def test_a_step_waits_for_nothing(method, device):
    run = Run(device, METHODS[method])
    for step in range(STEPS):
        run.feed(step)
        before = device.operations
        run.step()
        assert device.operations > before
    with pytest.raises(WaitedError, match="reads a number"):
        run.optimizer.diagnostics()


def test_rates_on_the_device_are_not_asked_whether_they_are_zero(device):
    run = Run(device, Muon)
    assert not run.optimizer._still
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)  # as torch's distributed checkpoints write there
    assert run.optimizer._still


@cases("method", METHODS)
def test_steps_are_those_of_the_cpu(method, device):
    """There numbers are read, and what is not finite is found before anything is written; the rest is rounding."""
    away, here = Run(device, METHODS[method]), Run(device, METHODS[method])
    params = [param.here.requires_grad_() for param in here.every]
    taken = iter(params)
    named = [{"params": [next(taken) for _ in own], "role": role} for role, own in SHAPES.items()]
    optimizer = METHODS[method](named, lr=RATES[0])
    for step in range(STEPS):
        away.feed(step)
        away.step()
        here.feed(step)
        for param, other in zip(params, here.every, strict=True):
            param.grad = other.grad.here.clone()
        for group, part in zip(optimizer.param_groups, here.parts, strict=True):
            group["lr"] = RATES[step] * float(part)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*this step is skipped", RuntimeWarning)
            optimizer.step(loss=here.loss.here)
    for one, other in zip(away.numbers()[0], params, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)


@cases("method", METHODS)
def test_replays_are_steps(method, device, monkeypatch):
    """Bit for bit, with other gradients, losses and rates, and a step that is passed over."""
    eager, recorded = Run(device, METHODS[method]), Run(device, METHODS[method])
    for step in range(STEPS):
        eager.feed(step)
        eager.step()
    for step in range(WARM):
        recorded.feed(step)
        recorded.step()
    recorded.feed(WARM)
    with monkeypatch.context() as patch, device.taped() as tape:
        for module in ("descent", "momo.clipping"):
            patch.setattr(f"steepest.optim.{module}.recording", lambda: True)
        recorded.step()
    with torch.no_grad():
        for step in range(WARM + 1, STEPS):
            recorded.feed(step)
            play(tape)
    (weights, states, told), (others, other_states, other_told) = eager.numbers(), recorded.numbers()
    for one, other in zip(weights, others, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(states, other_states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert told == other_told
    assert told["skipped_steps"] == 1


FOLLOWERS = {
    "mean": lambda params: TailAverage(params, start=1),
    "mixture": lambda params: TailAverage(params, start=2, end=8, parts=2.0, mix=0.6),
    "exponential": lambda params: TailAverage(params, beta=0.9),
}


@cases("kind", FOLLOWERS)
def test_averages_of_weights_wait_for_nothing_and_are_replayed(kind, device, monkeypatch):
    eager, recorded = Run(device, Muon), Run(device, Muon)
    averages = [FOLLOWERS[kind](run.every) for run in (eager, recorded)]
    for run, average in zip((eager, recorded), averages, strict=True):
        average.follow(run.optimizer)
    for step in range(STEPS):
        eager.feed(step)
        eager.step()
    for step in range(WARM):
        recorded.feed(step)
        recorded.step()
    recorded.feed(WARM)
    with monkeypatch.context() as patch, device.taped() as tape:
        for module in ("descent", "momo.clipping", "averaging"):
            patch.setattr(f"steepest.optim.{module}.recording", lambda: True)
        recorded.step()
    with torch.no_grad():
        for step in range(WARM + 1, STEPS):
            recorded.feed(step)
            play(tape)
    device.unguarded = True
    one, other = (average.state_dict() for average in averages)
    assert one["steps"] == other["steps"] == STEPS - 1
    for name, average in one["averages"].items():
        assert torch.equal(average.here, other["averages"][name].here)


@cases("method", ["muon", "muon max with momo", "muon adam with momo, direct"])
@cases("window", [(0, None), (1, 7)])
def test_a_look_ahead_waits_for_nothing_and_is_replayed(method, window, device, monkeypatch):
    runs = [Run(device, METHODS[method]) for _ in range(2)]
    outers = [OuterNesterov(run.optimizer, decay=0.8, start=window[0], end=window[1]) for run in runs]
    eager, recorded = runs
    for step in range(STEPS):
        eager.feed(step)
        before = [param.here.clone() for param in eager.every]
        eager.step()
        stays = all(torch.equal(one, param.here) for one, param in zip(before, eager.every, strict=True))
        assert stays is (step == BROKEN or RATES[step] == 0)  # with the rate, the look-ahead is 0, too
    for step in range(WARM):
        recorded.feed(step)
        recorded.step()
    recorded.feed(WARM)
    with monkeypatch.context() as patch, device.taped() as tape:
        for module in ("descent", "momo.clipping"):
            patch.setattr(f"steepest.optim.{module}.recording", lambda: True)
        recorded.step()
    with torch.no_grad():
        for step in range(WARM + 1, STEPS):
            recorded.feed(step)
            play(tape)
    for one, other in zip(eager.numbers()[0], recorded.numbers()[0], strict=True):
        assert torch.equal(one, other)
    device.unguarded = True
    one, other = (outer.state_dict() for outer in outers)
    assert one["steps"] == other["steps"] == STEPS - 1
    assert [one[key] for key in ("peaks", "ahead")] == [other[key] for key in ("peaks", "ahead")]
    for name, average in one["averages"].items():
        assert torch.equal(average.here, other["averages"][name].here)


def test_weights_that_somebody_else_writes_to_are_seen_in_replays(device, monkeypatch):
    runs = [Run(device, METHODS["muon max with momo"]) for _ in range(2)]
    for run in runs:
        for step in range(WARM):
            run.feed(step)
            run.step()
    eager, recorded = runs
    recorded.feed(WARM)
    eager.feed(WARM)
    eager.step()
    with monkeypatch.context() as patch, device.taped() as tape:
        for module in ("descent", "momo.clipping"):
            patch.setattr(f"steepest.optim.{module}.recording", lambda: True)
        recorded.step()
    for step in (WARM + 1, WARM + 2):
        for run in runs:
            run.every[0].here.add_(0.5)
            run.feed(step)
        eager.step()
        with torch.no_grad():
            play(tape)
    for one, other in zip(eager.numbers()[0], recorded.numbers()[0], strict=True):
        assert torch.equal(one, other)


def test_a_replayed_average_comes_to_rest(device, monkeypatch):
    """What is nothing but rounding is set to zero at every 61st step of Python's count, and at every replay."""
    run = Run(device, partial(Muon, momentum=0.5))
    for step in range(WARM):
        run.feed(step)
        run.step()
    for param in run.every:
        param.grad.here.zero_()
        run.optimizer.state[param]["momentum_buffer"].here.fill_(1e-38)
    assert run.optimizer._steps % FORGET_EVERY
    with monkeypatch.context() as patch, device.taped() as tape:
        patch.setattr("steepest.optim.descent.recording", lambda: True)
        run.step()
    with torch.no_grad():
        play(tape)
    assert not any(run.optimizer.state[param]["momentum_buffer"].here.any() for param in run.every)


class Counting(Stage):
    """One that counts in Python."""


REFUSED = {
    "no step": ({}, 0, "No step was taken with this state yet. Take at least one step as usual"),
    "function": ({"step_size": Momo(lambda step: 0.1 * step)}, 2, "lower_bound is a function"),
    "stage": ({"stages": [Counting()]}, 2, "Counting object at .* decides anew in each step"),
}


@cases("options, steps, text", REFUSED.values(), ids=REFUSED)
def test_what_replays_would_not_do_is_refused(device, monkeypatch, options, steps, text):
    run = Run(device, Muon, **options)
    for step in range(steps):
        run.feed(step)
        run.step()
    monkeypatch.setattr("steepest.optim.descent.recording", lambda: True)
    with pytest.raises(RuntimeError, match=f"This step cannot be recorded into a CUDA graph: .*{text}"):
        run.step()


def test_a_step_that_raises_is_not_recorded(device, monkeypatch):
    run = Run(device, Muon, on_nonfinite="raise")
    run.optimizer._warm = True  # as after a step, which would wait
    monkeypatch.setattr("steepest.optim.descent.recording", lambda: True)
    with pytest.raises(RuntimeError, match="on_nonfinite='raise' waits for the device"):
        run.step()


def test_a_loaded_or_copied_state_needs_a_step_first(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Muon([weight])
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    monkeypatch.setattr("steepest.optim.descent.recording", lambda: True)
    for one in (optimizer, copied):
        with pytest.raises(RuntimeError, match="No step was taken with this state yet"):
            one.step()


def test_newton_muon_is_taken_as_usual(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = Muon(model, precondition=InputMoment(structure="full", every=2))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    monkeypatch.setattr("steepest.optim.descent.recording", lambda: True)
    with pytest.raises(RuntimeError, match="decides anew in each step what to do"):
        optimizer.step()


def test_nothing_is_recorded_without_cuda():
    assert not replay.recording()


def test_kept_numbers_lie_where_they_lay():
    old = torch.zeros(2)
    assert replay.kept(old, torch.ones(2)) is old
    assert old.tolist() == [1, 1]
    new = torch.ones(3)
    other = replay.kept(old, new)
    assert torch.equal(other, new)
    assert other is not new
    with torch.inference_mode():
        made = replay.kept(None, torch.ones(2))
    made.add_(1)
    assert made.tolist() == [2, 2]
