"""Numbers of a batch-size study against worlds in which they are known."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from steepest import Muon
from steepest.batch_size.curve_crossing import first_crossings
from steepest.lab.disk.packed import RunFiles
from steepest.lab.runs.config import configure
from steepest.lab.runs.records import EvalRow, read_run
from steepest.lab.runs.train import Interrupted, train_run
from steepest.lab.studies.batch.plan import BatchStudy
from steepest.lab.studies.batch.results import BatchReport, read_report, reference, run_crossing, sample_ratios
from steepest.lab.studies.batch.varied import varied
from steepest.lab.studies.records import read_study
from steepest.lab.tasks import entry, make_task
from tests.lab.studies.batch.cases import written


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> BatchReport:
    return read_report(read_study(written(tmp_path_factory, "clear"), BatchStudy))


def test_the_known_batch_sizes_are_found(clear: BatchReport) -> None:
    muon, adamw = (one.estimate for one in clear.at(0.05))
    assert muon is not None
    assert adamw is not None
    assert muon.b_star.contains(2.25 * 12)
    assert adamw.chosen.family.key == "H"
    assert adamw.knee.value == pytest.approx(40, rel=0.15)
    assert adamw.b_star.kind == "at most"


def test_only_reported_seeds_count(clear: BatchReport) -> None:
    assert {one.seed for result in clear.results for one in result.arrivals} == {0, 1, 2}


def test_runs_below_the_pole_are_stopped(clear: BatchReport) -> None:
    muon = clear.at(0.05)[0]
    assert {one.crossing.status for one in muon.at(8)} == {"stopped"}
    assert muon.reached == (16, 32, 64, 128, 256)


def test_the_learning_rate_follows_the_root(clear: BatchReport) -> None:
    inner = [rate for rate in clear.arms[1].rates if not rate.at_edge]
    slope = math.log(inner[-1].lr / inner[0].lr) / math.log(inner[-1].batch_size / inner[0].batch_size)
    assert slope == pytest.approx(0.5, abs=0.15)
    assert clear.arms[0].rates[0].at_edge  # at b = 8 every rate misses the target


def test_the_ratio_is_that_of_the_worlds(clear: BatchReport) -> None:
    assert reference(clear) == "adamw"
    muon, adamw = clear.at(0.05)
    found = {one.batch_size: one for one in sample_ratios(adamw, muon, level=0.9)}
    true = 300 * (1 + 40 / 64) / (150 / (1 - math.sqrt(12 / 64)))
    assert found[64].value == pytest.approx(true, rel=0.1)
    assert found[64].low is not None
    assert found[64].low < found[64].value
    assert not any(one.bound for one in found.values())
    turned = {one.batch_size: one for one in sample_ratios(muon, adamw, level=0.9)}
    assert turned[64].value == pytest.approx(1 / found[64].value)
    assert (turned[8].bound, turned[8].low) == (True, None)


def test_a_step_costs_what_it_costs(clear: BatchReport) -> None:
    assert clear.arms[0].seconds[64] == pytest.approx(0.015 + 0.0002 * 64)
    assert clear.at(0.05)[1].time is not None


def test_a_target_below_all_is_refused(clear: BatchReport) -> None:
    with pytest.raises(ValueError, match=r"The target 0\.01 is below 0\.05, at which the runs of this study ended"):
        read_report(clear.records, targets=(0.01,))


def test_nothing_is_made_up_while_rates_are_sought(tmp_path_factory: pytest.TempPathFactory) -> None:
    report = read_report(read_study(written(tmp_path_factory, "started"), BatchStudy))
    assert [one.refusal for one in report.results] == ["No run to be counted has ended."] * 2
    assert report.shown == 0.05
    assert reference(report) is None


def test_arms_that_differ_in_one_option_are_put_side_by_side(tmp_path_factory: pytest.TempPathFactory) -> None:
    report = read_report(read_study(written(tmp_path_factory, "varied"), BatchStudy))
    [one] = varied(report)
    assert (one.method, one.option, [value for value, _ in one.values]) == ("muon", "momentum", [0.8, 0.9])


@pytest.mark.parametrize(("task", "unit"), [("digits", "images"), ("text", "sequences"), ("<b>", "examples")])
def test_batch_sizes_have_units(task: str, unit: str) -> None:
    assert entry(task).examples == unit


def to_target(batch_size, **changes):
    task = make_task("quadratic")
    options = {"steps": 600, "eval_every": 1, "schedule": "constant", "target": 0.3, "watch_from": 1.0, **changes}
    return configure(task, method="muon", seed=0, batch_size=batch_size, options={"lr": 0.02}, **options)


def test_a_run_ends_when_its_target_is_reached_and_says_when_it_was(tmp_path):
    config = to_target(16)
    result = train_run(config, tmp_path, threads=1)
    run = read_run(RunFiles(tmp_path))
    assert result.status == "finished"
    assert result.steps < config.steps
    crossing = run_crossing(run, 0.3)
    assert crossing.status == "reached"
    assert result.steps - 5 <= crossing.steps <= result.steps
    assert run_crossing(run, 0.6).steps < crossing.steps
    never = run_crossing(run, 1e-3)
    assert (never.status, never.steps) == ("stopped", result.steps)


def test_interrupted_at_any_step_it_ends_at_the_same_one(tmp_path):
    config = to_target(16)
    whole = train_run(config, tmp_path / "whole", threads=1)
    for stop in (1, whole.steps - 2, whole.steps - 1):
        steps = iter(range(1, 1000))
        with pytest.raises(Interrupted):
            train_run(config, tmp_path / str(stop), threads=1, stop=lambda steps=steps, at=stop: next(steps) == at)
        again = train_run(config, tmp_path / str(stop), threads=1)
        assert (again.steps, again.final_loss) == (whole.steps, whole.final_loss)


@pytest.mark.slow
def test_samples_counted_are_samples_drawn(tmp_path):
    """3 does not divide the training set, whose epochs run on into each other: nothing is dropped."""
    task = make_task("digits")
    config = configure(task, method="sgd", seed=0, steps=500, batch_size=3, eval_every=500)
    drawn = []
    batch = task.batch
    task.batch = lambda examples: drawn.append(len(examples)) or batch(examples)
    from steepest.lab.runs.recorder import Recorder
    from steepest.lab.runs.train import Training

    training = Training(config, task)
    with Recorder(tmp_path, step=0) as recorder:
        for _ in range(500):
            training.train_step(recorder)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(drawn) == 1500 > task.train_size
    assert [row["tokens"] for row in rows] == [3 * row["step"] for row in rows]


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulating_micro_batches_leaves_the_steps_to_a_target_as_they_are(pieces):
    crossings = []
    for parts in (1, pieces):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
        teacher = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
        optimizer = Muon([weight], 0.05, polar="svd")
        losses = []
        for step in range(60):
            batch = inputs[64 * step : 64 * (step + 1)]
            for piece in batch.chunk(parts):
                ((piece @ (weight.T - teacher)).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float((inputs @ (weight.detach().T - teacher)).square().mean()))
        crossings.append(first_crossings(range(1, 61), losses, [0.2])[0].steps)
    assert crossings[0] == pytest.approx(crossings[1], rel=1e-9)


def test_a_run_that_diverged_is_called_so(tmp_path):
    rows = [EvalRow(step, step, loss, None, 0.0) for step, loss in enumerate([4.0, 3.0, 2.5, 2.2, 2.1, 2.0, None])]
    train_run(to_target(16, steps=2), tmp_path, threads=1)
    crossing = run_crossing(dataclasses.replace(read_run(RunFiles(tmp_path)), evals=tuple(rows)), 1.0)
    assert (crossing.status, crossing.steps) == ("diverged", 6)
