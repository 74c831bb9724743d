"""Steps to a target: what they count, and what they do not depend on."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from steepest import Muon
from steepest.batch_size.curve_crossing import first_crossings
from steepest.lab.disk.packed import RunFiles
from steepest.lab.runs.config import configure
from steepest.lab.runs.records import EvalRow, read_run
from steepest.lab.runs.train import Interrupted, train_run
from steepest.lab.studies.batch.results import run_crossing
from steepest.lab.tasks import make_task


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
    from steepest.lab.runs.training import Training

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
