"""Tune the methods of the races: at a preset every method gets as many tried settings, on one seed that no race uses.

    .venv/bin/python results/tuning/tune.py --out out/tuning
    .venv/bin/python results/tuning/tune.py --preset tiny --budget 24 --out out/tuning

Each method walks downhill over its learning rates and momenta (`search`), from where an earlier
search had ended, by the loss on the part of the held-out text that is for tuning. Runs are kept in --out and never
trained twice; `TASK.csv` and `environment.json` are written here.
"""

import argparse
import csv
import itertools
import json
import math
import random
import threading
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from steepest.lab.disk.fields import read_text
from steepest.lab.disk.files import write_whole
from steepest.lab.engine.pool import Pool, last_words
from steepest.lab.engine.study import default_workers
from steepest.lab.runs.config import RunConfig, configure
from steepest.lab.runs.records import read_result
from steepest.lab.studies.study import run_directory, write_configs
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import Task

HERE = Path(__file__).parent
SEED = 1000
BUDGET = 16
BETAS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
SECOND_BETAS = (0.7, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999)
DECAYS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
RATES = ("lr", "other_lr", "table_lr")
SCHEDULES = ("cooldown", "warmup-long-cooldown")
STRIDES = (2, 1)  # rungs from one tried value of an option to the next: coarse first


@dataclass(frozen=True)
class Contestant:
    """A method with some options fixed.

    Args:
        method: A key of `METHODS`.
        start: Of the options that are searched: where the walk begins. "schedule" is the run's, by its place in
            `SCHEDULES`.
        fixed: Of the others.
    """

    method: str
    start: Mapping[str, float]
    fixed: Mapping[str, str] = field(default_factory=dict[str, str])


def _muon(**fixed: str) -> Contestant:
    start = {"momentum": 0.95, "lr": 0.04, "other_lr": 0.02, "beta2": 0.95, "beta1": 0.9}
    return Contestant("muon", start, fixed)


CONTESTANTS = {
    ("text", "demo"): {
        "adamw": Contestant("adamw", {"beta1": 0.9, "lr": 0.004, "other_lr": 0.008, "beta2": 0.95}),
        "muon": _muon(),
        "muonadam": Contestant("muonadam", {"momentum": 0.95, "lr": 0.04, "other_lr": 0.02, "beta2": 0.95}),
        "muon-jordan": _muon(coefficients="jordan"),
        "muon-nonic": _muon(coefficients="nonic"),
    },
    # from where the searches at demo ended, as far as longer runs want longer averages
    ("text", "tiny"): {
        "muon": Contestant(
            "muon",
            {
                "momentum": 0.85,
                "lr": 0.0565685,
                "other_lr": 0.02,
                "beta2": 0.975,
                "table_lr": 0.02,
                "weight_decay": 0.0,
                "beta1": 0.85,
            },
        ),
        "adamw": Contestant(
            "adamw",
            {
                "beta1": 0.75,
                "lr": 0.004,
                "other_lr": 0.0226274,
                "beta2": 0.9,
                "schedule": 0,
                "table_lr": 0.0226274,
                "weight_decay": 0.01,
            },
        ),
    },
    ("digits", "demo"): {
        "adamw": Contestant("adamw", {"beta1": 0.9, "lr": 0.01, "other_lr": 0.02, "beta2": 0.95}),
        "muon": Contestant("muon", {"momentum": 0.95, "lr": 0.04, "other_lr": 0.01, "beta2": 0.95, "beta1": 0.9}),
        "muonadam": Contestant("muonadam", {"momentum": 0.95, "lr": 0.02, "other_lr": 0.02, "beta2": 0.95}),
    },
}


def ladder(name: str, start: float) -> tuple[float, ...]:
    """The values of an option: rates by factors of the root of two around the start."""
    if name in RATES:
        return tuple(float(f"{start * 2 ** (rung / 2):.6g}") for rung in range(-10, 11))
    fixed = {"beta2": SECOND_BETAS, "weight_decay": DECAYS, "schedule": tuple(map(float, range(len(SCHEDULES))))}
    return fixed.get(name, BETAS)


@dataclass(frozen=True)
class Tried:
    """One setting of a search.

    Args:
        options: Value by name of the option.
        loss: What it came to; infinite for a run that diverged.
    """

    options: Mapping[str, float]
    loss: float


def search(
    ladders: Mapping[str, tuple[float, ...]], start: Mapping[str, float], *, budget: int
) -> Generator[dict[str, float], float, list[Tried]]:
    """Walk downhill, one option after the other, until as many settings were tried as may be.

    An option goes up its ladder as long as that helps, else down; after all of them, again, with smaller strides. If
    no neighbour is better before the budget is spent, settings beside the best in several options are tried, drawn at
    random, the same ones each time.

    Args:
        ladders: For each option the values that it may have, rising; options are tried in this order.
        start: A value of each ladder.
        budget: Number of settings, at least 1.

    Yields:
        A setting that was not tried before; send its loss.

    Returns:
        All settings in the order in which they were tried.

    Raises:
        ValueError: If a start is not on its ladder, a ladder does not rise, or there are fewer settings than `budget`.
    """
    places = _places(ladders, start, budget)
    losses: dict[tuple[int, ...], float] = {}

    def named(rungs: tuple[int, ...]) -> dict[str, float]:
        return {name: values[rung] for (name, values), rung in zip(ladders.items(), rungs, strict=True)}

    def inside(rungs: tuple[int, ...]) -> bool:
        return all(0 <= rung < len(values) for rung, values in zip(rungs, ladders.values(), strict=True))

    def ask(rungs: tuple[int, ...]) -> Generator[dict[str, float], float, bool]:
        """Whether there was room to try it, if it was not tried before."""
        if rungs not in losses:
            if len(losses) == budget:
                return False
            loss = yield named(rungs)
            losses[rungs] = loss if math.isfinite(loss) else math.inf
        return True

    best = places
    room = yield from ask(best)
    strides = itertools.chain(STRIDES, itertools.repeat(STRIDES[-1]))
    generator = random.Random(0)
    while room and len(losses) < budget:
        stride, before = next(strides), len(losses)
        for place in range(len(best)):
            for step in (stride, -stride):
                moved = False
                while inside(other := (*best[:place], best[place] + step, *best[place + 1 :])):
                    room = yield from ask(other)
                    if not room or losses[other] >= losses[best]:
                        break
                    best, moved = other, True
                if moved:
                    break
        if len(losses) == before and stride == STRIDES[-1]:
            beside = [rung + generator.choice((-1, 0, 1)) for rung in best]
            if inside(other := tuple(beside)):
                room = yield from ask(other)
                best = min(losses, key=losses.__getitem__)
    return [Tried(named(rungs), loss) for rungs, loss in losses.items()]


def best_of(tried: list[Tried]) -> Tried:
    """The setting with the lowest loss; the first on a tie."""
    return min(tried, key=lambda one: one.loss)


def at_edge(tried: list[Tried]) -> tuple[str, ...]:
    """Options of which the best setting has the lowest or the highest value that was tried."""
    best = best_of(tried).options
    values = {name: {one.options[name] for one in tried} for name in best}
    return tuple(name for name, own in values.items() if best[name] in (min(own), max(own)))


def _places(ladders: Mapping[str, tuple[float, ...]], start: Mapping[str, float], budget: int) -> tuple[int, ...]:
    for name, values in ladders.items():
        if list(values) != sorted(set(values)):
            raise ValueError(f"The ladder of {name!r} must rise, got {values}.")
        if start.get(name) not in values:
            raise ValueError(f"The start of {name!r} must be one of {values}, got {start.get(name)}.")
    if not 1 <= budget <= (most := math.prod(map(len, ladders.values()))):
        raise ValueError(f"budget must be between 1 and the {most} settings that there are, got {budget}.")
    return tuple(values.index(start[name]) for name, values in ladders.items())


def tune(task: Task, contestant: Contestant, out: Path, pool: Pool, budget: int) -> list[tuple[RunConfig, Tried]]:
    """Search for the options of one method; finished runs are not trained again."""
    walk = search({n: ladder(n, v) for n, v in contestant.start.items()}, contestant.start, budget=budget)
    configs: list[RunConfig] = []
    options = next(walk)
    while True:
        wanted = {**options, **contestant.fixed}
        schedule = SCHEDULES[int(wanted.pop("schedule", 0))]
        config = configure(
            task,
            method=contestant.method,
            seed=SEED,
            options=wanted,
            schedule=schedule,
            eval_every=task.budget.steps,
            part="tuning",
        )
        configs.append(config)
        run = run_directory(out, config)
        write_configs(out, [config])
        if not (run / "result.json").exists() and (outcome := pool.train(run)) != "finished":
            raise SystemExit(f"{run}: {outcome}, {last_words(run)}")
        result = read_result(run / "result.json")
        loss = math.inf if result is None or result.tuning_loss is None else result.tuning_loss
        print(f"{contestant.method} {schedule} {wanted}: {loss:.4f}", flush=True)  # noqa: T201
        try:
            options = walk.send(loss)
        except StopIteration as end:
            return list(zip(configs, end.value, strict=True))


def main() -> None:
    """Train what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tuning"))
    parser.add_argument(
        "--budget", type=int, default=BUDGET, help="tried settings of each method (default: %(default)s)"
    )
    parser.add_argument("--task", default="text", choices=sorted({task for task, _ in CONTESTANTS}))
    parser.add_argument("--preset", default="demo", choices=sorted({preset for _, preset in CONTESTANTS}))
    parser.add_argument("--only", nargs="+", help="walks to train; tables are written where all have ended")
    options = parser.parse_args()
    contestants = CONTESTANTS.get((options.task, options.preset))
    if contestants is None or not {*(options.only or ())} <= {*contestants}:
        known = "; ".join(f"{task} {preset}: {' '.join(own)}" for (task, preset), own in CONTESTANTS.items())
        parser.error(f"walks are, by task and preset, {known}")
    task = make_task(options.task, options.preset)
    pool = Pool(default_workers(), threads=1, data=None, stop=threading.Event())
    with ThreadPoolExecutor(pool.workers) as threads:
        walks = {
            label: threads.submit(tune, task, contestants[label], options.out, pool, options.budget)
            for label in options.only or contestants
        }
        try:
            found = {label: walk.result() for label, walk in walks.items()}
        finally:
            pool.stop.set()
    if len(found) == len(contestants):
        write_rows(task, found, options.out)


def write_rows(task: Task, found: Mapping[str, list[tuple[RunConfig, Tried]]], out: Path) -> None:
    """One row per setting in the order of the walk, and the machine of the first."""
    rows: list[dict[str, object]] = []
    for label, walk in found.items():
        tried = [one for _, one in walk]
        best, edge = best_of(tried), at_edge(tried)
        print(f"{label}: {dict(best.options)} {best.loss:.4f}, at the edge: {', '.join(edge) or 'none'}")  # noqa: T201
        for number, (config, one) in enumerate(walk, start=1):
            keys = (*RATES, "momentum", "beta1", "beta2", "weight_decay", "coefficients")
            row = {
                "task": task.name,
                "preset": config.preset,
                "label": label,
                "method": config.method,
                "number": number,
            }
            row |= {key: config.options.get(key, "") for key in keys} | {
                "schedule": config.schedule,
                "seed": config.seed,
            }
            row |= {"tuning_loss": one.loss, "best": one is best, "edge": " ".join(edge) if one is best else ""}
            run = run_directory(out, config).name
            rows.append(row | {"run": run, "code": config.code, "data": config.data.sha256[:12]})
    name = task.name if task.preset == "demo" else f"{task.name}_{task.preset}"
    with (HERE / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    first = run_directory(out, next(iter(found.values()))[0][0])
    environment = read_text(first / "environment.json", remedy="Delete the run's directory.")
    write_whole(HERE / "environment.json", json.dumps(json.loads(environment), indent=2) + "\n")


if __name__ == "__main__":
    main()
