"""Batch-size studies made up for tests: the plan of a real one, with runs whose K(b) is known."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.lab.runs.config import RunConfig
from steepest.lab.runs.schedule import SMOOTHED
from steepest.lab.studies.batch.plan import TUNING_SEED, BatchSweep, make_arms
from steepest.lab.studies.study import run_directory, write_study
from steepest.lab.tasks import make_task

START, POWER = 2.3, 1.5
COMMAND = "steepest critical-batch measure --out here"


def pole(b_min: float, limit: float = 150.0) -> Callable[[int], float]:
    """K(b) with b* = 2.25 b_min, infinite at and below b_min."""
    return lambda b: limit / (1 - math.sqrt(b_min / b)) if b > b_min else math.inf


def hyperbola(knee: float, limit: float = 150.0) -> Callable[[int], float]:
    return lambda b: limit * (1 + knee / b)


@dataclass(frozen=True)
class World:
    """How runs go: K to the last target by arm and batch size, at the best of learning rates.

    Args:
        steps: By arm.
        best: Exponent of the best rate at batch size b, against the arm's own.
        noise: Of log K between seeds.
        begun: Which listed runs exist, by what `study.json` says of them.
        start: Loss before the first step.
        diverges: Which runs do after five steps.
    """

    steps: dict[str, Callable[[int], float]]
    best: Callable[[int], float] = lambda b: 0.5 * math.log2(b / 16)
    noise: float = 0.03
    begun: Callable[[dict[str, Any]], bool] = lambda run: True
    start: float = START
    diverges: Callable[[dict[str, Any]], bool] = lambda run: False


def plan_of(
    methods: Sequence[str] = ("muon", "adamw"),
    *,
    batches: Sequence[int] = (4, 8, 16, 32, 64, 128, 256),
    targets: Sequence[float] = (0.1, 0.05),
    seeds: Sequence[int] = (0, 1, 2),
    vary: Sequence[tuple[str, str, Sequence[Any]]] = (),
    **more: Any,
) -> BatchSweep:
    return BatchSweep(
        task=make_task("digits"),
        methods=tuple(methods),
        arms=make_arms(methods, vary),
        seeds=tuple(seeds),
        batches=tuple(batches),
        targets=tuple(targets),
        most_steps=more.pop("most_steps", 4000),
        most_samples=more.pop("most_samples", 10**6),
        options=more.pop("options", {}),
        steps=None,
        **more,
    )


def write_batch_study(out: Path, world: World, plan: BatchSweep) -> Path:
    """What `run_study` leaves behind in such a world."""
    while True:
        configs = plan.grown(out)
        fresh = [one for one in configs if not run_directory(out, one).exists() and world.begun(plan.described(one))]
        for config in fresh:
            _write_run(run_directory(out, config), config, world, plan)
        if not fresh:
            break
    write_study(out, plan, configs, command=COMMAND)
    path = out / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created": "2025-01-31T12:00:00+00:00"}))
    return out


def _write_run(run: Path, config: RunConfig, world: World, plan: BatchSweep) -> None:
    told = plan.described(config)
    arm = next(arm for arm in plan.arms if arm.label == told["arm"])
    away = math.log2(float(config.options["lr"]) / float(plan.rate(arm, 0)["lr"])) - world.best(config.batch_size)
    noise = (
        0.0
        if config.seed >= TUNING_SEED
        else random.Random(f"{arm.label} {config.batch_size} {config.seed}").gauss(0, 1)
    )
    steps = world.steps[arm.label](config.batch_size) * math.exp(0.1 * away**2 + world.noise * noise)
    pace = steps / ((START / plan.targets[-1]) ** (1 / POWER) - 1)
    rows: list[dict[str, Any]] = []
    step, last = 0, config.steps
    while step <= last:
        loss = world.start * (1 + step / pace) ** -POWER
        common = {"step": step, "tokens": step * config.batch_size, "loss": loss}
        lost = world.diverges(told) and step >= 5
        if step and len(rows) < 20:
            times = {
                "forward_backward_s": 0.01 + 0.0002 * config.batch_size,
                "optimizer_s": 0.005,
                "train_s": 0.1 * step,
            }
            rows.append({"kind": "train", **common, "lr": config.options["lr"], **times})
        rows.append({"kind": "eval", **common, "loss": None if lost else loss, "accuracy": None, "train_s": 0.1 * step})
        below = [row["loss"] for row in rows if row["kind"] == "eval" and not lost][-SMOOTHED:]
        if lost or step == last or (len(below) == SMOOTHED and sorted(below)[2] < plan.targets[-1]):
            break
        near = loss < 1.5 * plan.targets[0]
        step = min(last, step + max(1, int((0.015 if near else 0.2) * step)))
    run.mkdir(parents=True)
    (run / "config.json").write_text(config.to_json())
    (run / "environment.json").write_text(json.dumps({"cpu model": "Example CPU"}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    final = rows[-1]["loss"]
    result = {"format": 1, "status": "finished" if final is not None else "diverged", "steps": step}
    result |= {"final_loss": final, "final_accuracy": None, "train_s": 0.1 * step, "optimizer_s": 0.0}
    result |= {"forward_backward_s": 0.0, "peak_memory_bytes": 1, "finished": "2025-01-31T12:01:00+00:00"}
    (run / "result.json").write_text(json.dumps(result))
