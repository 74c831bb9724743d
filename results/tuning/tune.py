"""Tune the methods of the demo races: every method gets as many tried settings, on one seed that no race uses.

    .venv/bin/python results/tuning/tune.py --out out/tuning

Each method walks downhill over its learning rates and momenta (`search`), from where an earlier
search had ended, by the loss on the part of the held-out text that is for tuning. Runs are kept in --out and never
trained twice; `TASK.csv` and `environment.json` are written here.
"""

import argparse
import csv
import json
import math
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from steepest.lab.disk.fields import read_text
from steepest.lab.disk.files import write_whole
from steepest.lab.engine.pool import Pool, last_words
from steepest.lab.engine.study import default_workers
from steepest.lab.engine.walk import Tried, at_edge, best_of, ladder, search
from steepest.lab.runs.config import RunConfig, configure
from steepest.lab.runs.records import read_result
from steepest.lab.studies.study import run_directory, write_configs
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import Task

HERE = Path(__file__).parent
SEED = 1000
BUDGET = 16


@dataclass(frozen=True)
class Contestant:
    """A method with some options fixed.

    Args:
        method: A key of `METHODS`.
        start: Of the options that are searched: where the walk begins.
        fixed: Of the others.
    """

    method: str
    start: Mapping[str, float]
    fixed: Mapping[str, str]


def _muon(**fixed: str) -> Contestant:
    start = {"momentum": 0.95, "lr": 0.04, "other_lr": 0.02, "beta2": 0.95, "beta1": 0.9}
    return Contestant("muon", start, fixed)


CONTESTANTS = {
    "text": {
        "adamw": Contestant("adamw", {"beta1": 0.9, "lr": 0.004, "other_lr": 0.008, "beta2": 0.95}, {}),
        "muon": _muon(),
        "muonadam": Contestant("muonadam", {"momentum": 0.95, "lr": 0.04, "other_lr": 0.02, "beta2": 0.95}, {}),
        "muon-jordan": _muon(coefficients="jordan"),
        "muon-nonic": _muon(coefficients="nonic"),
    },
    "digits": {
        "adamw": Contestant("adamw", {"beta1": 0.9, "lr": 0.01, "other_lr": 0.02, "beta2": 0.95}, {}),
        "muon": Contestant("muon", {"momentum": 0.95, "lr": 0.04, "other_lr": 0.01, "beta2": 0.95, "beta1": 0.9}, {}),
        "muonadam": Contestant("muonadam", {"momentum": 0.95, "lr": 0.02, "other_lr": 0.02, "beta2": 0.95}, {}),
    },
}


def tune(task: Task, contestant: Contestant, out: Path, pool: Pool, budget: int) -> list[tuple[RunConfig, Tried]]:
    """Search for the options of one method; finished runs are not trained again."""
    walk = search({n: ladder(n, v) for n, v in contestant.start.items()}, contestant.start, budget=budget)
    configs: list[RunConfig] = []
    options = next(walk)
    while True:
        wanted = {**options, **contestant.fixed}
        config = configure(
            task, method=contestant.method, seed=SEED, options=wanted, eval_every=task.budget.steps, part="tuning"
        )
        configs.append(config)
        run = run_directory(out, config)
        write_configs(out, [config])
        if not (run / "result.json").exists() and (outcome := pool.train(run)) != "finished":
            raise SystemExit(f"{run}: {outcome}, {last_words(run)}")
        result = read_result(run / "result.json")
        loss = math.inf if result is None or result.tuning_loss is None else result.tuning_loss
        print(f"{contestant.method} {wanted}: {loss:.4f}", flush=True)  # noqa: T201
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
    parser.add_argument("--tasks", nargs="+", default=["text"], choices=list(CONTESTANTS))
    options = parser.parse_args()
    for name in options.tasks:
        task = make_task(name, "demo")
        pool = Pool(default_workers(), threads=1, data=None, stop=threading.Event())
        with ThreadPoolExecutor(pool.workers) as threads:
            walks = {
                label: threads.submit(tune, task, one, options.out, pool, options.budget)
                for label, one in CONTESTANTS[name].items()
            }
            try:
                found = {label: walk.result() for label, walk in walks.items()}
            finally:
                pool.stop.set()
        write_rows(name, found, options.out)


def write_rows(name: str, found: Mapping[str, list[tuple[RunConfig, Tried]]], out: Path) -> None:
    """One row per setting in the order of the walk, and the machine of the first."""
    rows: list[dict[str, object]] = []
    for label, walk in found.items():
        tried = [one for _, one in walk]
        best, edge = best_of(tried), at_edge(tried)
        print(f"{label}: {dict(best.options)} {best.loss:.4f}, at the edge: {', '.join(edge) or 'none'}")  # noqa: T201
        for number, (config, one) in enumerate(walk, start=1):
            keys = ("lr", "other_lr", "momentum", "beta1", "beta2", "coefficients")
            row = {"task": name, "preset": config.preset, "label": label, "method": config.method, "number": number}
            row |= {key: config.options.get(key, "") for key in keys} | {"seed": config.seed}
            row |= {"tuning_loss": one.loss, "best": one is best, "edge": " ".join(edge) if one is best else ""}
            run = run_directory(out, config).name
            rows.append(row | {"run": run, "code": config.code, "data": config.data.sha256[:12]})
    with (HERE / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    first = run_directory(out, next(iter(found.values()))[0][0])
    environment = read_text(first / "environment.json", remedy="Delete the run's directory.")
    write_whole(HERE / "environment.json", json.dumps(json.loads(environment), indent=2) + "\n")


if __name__ == "__main__":
    main()
