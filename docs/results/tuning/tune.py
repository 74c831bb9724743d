"""Tune the methods of the demo races: every method gets as many tried settings, on one seed that no race uses.

    .venv/bin/python docs/results/tuning/tune.py --out out/tuning

Each method has a 3 x 4 grid, by factors of two, over the learning rate of the matrices inside the model and that of
everything else. Runs are kept in --out and never trained twice; `TASK.csv` and `environment.json` are written here.
"""

import argparse
import csv
import itertools
import json
from pathlib import Path

from steepest.lab.config import RunConfig, configure
from steepest.lab.engine import default_workers
from steepest.lab.fields import read_text
from steepest.lab.ledger import write_whole
from steepest.lab.result import read_result
from steepest.lab.runs import train_runs
from steepest.lab.study import run_directory
from steepest.lab.tasks import make_task

HERE = Path(__file__).parent
SEED = 1000
# Centres: (learning rate of matrices, of everything else), found by a coarse search by hand.
CENTRES = {
    "text": {"adamw": (0.004, 0.016), "torch-muon": (0.04, 0.02), "muon": (0.04, 0.02), "muonadam": (0.04, 0.02)},
    "digits": {"adamw": (0.01, 0.02), "muon": (0.04, 0.02), "muonadam": (0.02, 0.02)},
}
FACTORS, OTHER_FACTORS = (0.5, 1.0, 2.0), (0.25, 0.5, 1.0, 2.0)


def configs(name: str) -> list[RunConfig]:
    """All runs of a task."""
    task = make_task(name, "demo")
    return [
        configure(task, method=method, seed=SEED, options={"lr": centre[0] * a, "other_lr": centre[1] * b})
        for method, centre in CENTRES[name].items()
        for a, b in itertools.product(FACTORS, OTHER_FACTORS)
    ]


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tuning"))
    parser.add_argument("--tasks", nargs="+", default=list(CENTRES))
    options = parser.parse_args()
    for name in options.tasks:
        runs = configs(name)
        members = {method: [config for config in runs if config.method == method] for method in CENTRES[name]}
        train_runs(members, options.out, workers=default_workers())
        write_rows(name, runs, options.out)


def write_rows(name: str, runs: list[RunConfig], out: Path) -> None:
    """One row per run, and the machine of the first."""
    rows: list[dict[str, object]] = []
    for config in runs:
        directory = run_directory(out, config)
        result = read_result(directory / "result.json")
        if result is None:
            raise SystemExit(f"{directory} has no result.")
        row = {"task": name, "preset": config.preset, "method": config.method, **config.options, "seed": config.seed}
        row = {key: row[key] for key in ("task", "preset", "method", "lr", "other_lr", "seed")}
        row |= {"status": result.status, "final_loss": result.final_loss, "train_s": round(result.train_s, 1)}
        rows.append(row | {"run": directory.name, "code": config.code, "data": config.data.sha256[:12]})
    with (HERE / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    environment = read_text(run_directory(out, runs[0]) / "environment.json", remedy="Delete the run's directory.")
    write_whole(HERE / "environment.json", json.dumps(json.loads(environment), indent=2) + "\n")


if __name__ == "__main__":
    main()
