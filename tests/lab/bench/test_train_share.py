import itertools
import statistics

import pytest
import torch

from steepest.lab.bench.pictures import train_png
from steepest.lab.bench.timing import Quartiles
from steepest.lab.bench.train_share import (
    BASELINE,
    CYCLE,
    Seconds,
    Share,
    Trainer,
    refreshes,
    summarize,
    time_steps,
    weighed,
)
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import Budget
from steepest.optim import SteepestDescent


@pytest.fixture(scope="module")
def task():
    made = make_task("digits", "demo")
    made.budget = Budget(steps=8, batch_size=4, eval_every=8)
    return made


class NoLoss:
    """A task that has lost its way."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, model, batch):
        return self._task.loss(model, batch) * torch.nan


def test_all_methods_do_the_same_steps_and_each_part_is_timed(task):
    ticks = itertools.count()
    seconds = time_steps(task, ["adamw", "muon", "newton-muon"], steps=8, clock=lambda: float(next(ticks)))
    assert seconds == {method: [Seconds(1.0, 1.0)] * 8 for method in ("adamw", "muon", "newton-muon")}
    assert next(ticks) == 3 * 3 * (8 + CYCLE)


def test_a_refresh_is_in_the_last_step_of_each_cycle(task):
    trainer = Trainer.of(task, "newton-muon")
    assert isinstance(trainer.optimizer, SteepestDescent)
    ages = []
    for _ in range(3 * CYCLE):
        trainer.step(task.batch(torch.arange(4)), itertools.count().__next__)
        ages.append(trainer.optimizer.diagnostics().get("input_moment_age"))
    assert ages == [None] * (CYCLE - 1) + [*range(CYCLE)] * 2 + [0]


def test_only_methods_that_look_at_inputs_refresh():
    assert refreshes("newton-muon")
    assert not refreshes("muon")


def test_refreshes_are_weighed_by_how_often_they_are():
    values = [1.0, 1.0, 1.0, 33.0] * 4
    assert weighed(values, every=32) == Quartiles(2.0, 2.0, 2.0)
    assert weighed(values, every=4) == Quartiles(9.0, 9.0, 9.0)
    assert weighed(values, every=None).median == 1.0


def test_ratios_are_of_one_round():
    own = [Seconds(2.0, 3.0), Seconds(20.0, 40.0)] * 4
    base = [Seconds(1.0, 1.5), Seconds(10.0, 10.0)] * 4
    share = summarize({"adamw": own, BASELINE: base}, every=32)[0]
    assert share.step_ratio == Quartiles(2.0, 2.5, 3.0)
    assert share.optimizer_ratio == Quartiles(2.0, 3.0, 4.0)
    assert share.forward_backward_ms.median == statistics.median([2000.0, 20000.0])
    assert share.share == pytest.approx(21500 / (21500 + 11000))
    assert share.every is None


def test_the_baseline_is_once_itself_and_periods_are_told():
    seconds = {method: [Seconds(1.0, 2.0)] * 8 for method in (BASELINE, "newton-muon")}
    base, newton = summarize(seconds, every=32)
    assert base.step_ratio == base.optimizer_ratio == newton.step_ratio == Quartiles(1.0, 1.0, 1.0)
    assert (base.every, newton.every) == (None, 32)


@pytest.mark.parametrize("steps", [0, 4, 10])
def test_parts_of_cycles_are_refused(task, steps):
    with pytest.raises(ValueError, match=f"steps takes whole cycles of 4, at least two, got {steps}. Take 8 or 32."):
        time_steps(task, ["muon"], steps=steps)


@pytest.mark.parametrize("methods", [["adamw"], ["muon", "adamw", "adamw"]], ids=",".join)
def test_the_baseline_must_be_there_and_nobody_twice(task, methods):
    with pytest.raises(ValueError, match=f"methods takes different names, 'muon' among them, got {', '.join(methods)}"):
        time_steps(task, methods, steps=8)


def test_an_unknown_method_is_refused_by_name(task):
    with pytest.raises(ValueError, match="muonn"):
        time_steps(task, ["muon", "muonn"], steps=8)


def test_a_loss_that_is_not_finite_ends_the_measurement(task):
    trainer = Trainer.of(NoLoss(task), "muon")
    with pytest.raises(ValueError, match=r"The loss of 'muon' became nan\. Take fewer steps, or leave the method out"):
        trainer.step(task.batch(torch.arange(4)), itertools.count().__next__)


def test_the_figure_is_a_png():
    one = Quartiles(1.0, 2.0, 3.0)
    shares = [Share("muon", None, one, one, one, one), Share("newton-muon", 32, one, one, one, one)]
    assert train_png({"demo": shares, "small": shares[:1]}).startswith(b"\x89PNG")
