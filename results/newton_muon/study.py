"""The runs behind this page: equal tuning of Muon and Newton-Muon, what each choice is worth, and when it pays.

    .venv/bin/python results/newton_muon/study.py tune ablation scale --out out/newton_muon

Runs are kept in --out and never trained twice; `PART.csv` and `environment.json` are written next to this file.
"""

import argparse
import csv
import dataclasses
import itertools
import json
from pathlib import Path

from steepest.lab.disk.fields import read_text
from steepest.lab.disk.files import write_whole
from steepest.lab.engine.study import train_runs
from steepest.lab.runs.config import RunConfig, configure
from steepest.lab.runs.records import read_result
from steepest.lab.studies.study import run_directory
from steepest.lab.tasks import make_task

HERE = Path(__file__).parent
TASK = make_task("text", "demo")
TUNING_SEED = 1000
SEEDS = (1001, 1002)
RATES = {"lr": 0.04, "other_lr": 0.02}

# What is changed against the default, one thing at a time; names of layers are those of the lab's transformer.
ABLATION: dict[str, dict[str, object]] = {
    "default: wide maps, diagonal, (1, 0)": {},
    "wide maps, (1/2, 0)": {"exponent_in": 0.5},
    "wide maps, 4 blocks": {"wide": "block"},
    "wide maps, full": {"wide": "full"},
    "all layers, (1, 0)": {"structure": "full"},
    "all layers, (1/2, 0)": {"structure": "full", "exponent_in": 0.5},
    "all layers, (1/4, 0)": {"structure": "full", "exponent_in": 0.25},
    "all layers, (1/2, 1/2)": {"structure": "full", "exponent_in": 0.5, "exponent_out": 0.5},
    "all layers diagonal, (1, 0)": {"structure": "diagonal"},
    "all but the wide maps, (1/2, 0)": {"structure": "full", "wide": "none", "exponent_in": 0.5},
    "all but the wide maps, (1, 0)": {"structure": "full", "wide": "none"},
    "all layers, (1, 0), on the gradient": {"structure": "full", "on": "gradient"},
    "preset paper_record4, every 8": {"preset": "paper_record4"},
    "refresh every step, decay 0.99": {"every": 1, "first": 0, "decay": 0.99},
    "refresh every 32": {"every": 32, "first": 31},
    "first refresh at step 0": {"first": 0},
    "ridge 0.02": {"ridge": 0.02},
    "ridge 1": {"ridge": 1.0},
    "blend 1/2": {"blend": 0.5},
    "annealed to Muon": {"anneal_from": 50, "anneal_to": 150},
}


def tune() -> list[RunConfig]:
    """Twelve settings of each method on one seed."""
    muon = [
        {"lr": lr, "other_lr": other} for lr, other in itertools.product((0.02, 0.04, 0.08), (0.005, 0.01, 0.02, 0.04))
    ]
    kinds = (("none", 1.0), ("none", 0.5), ("full", 0.5), ("full", 1.0))
    newton = [
        {"lr": lr, "other_lr": 0.02, "structure": structure, "exponent_in": exponent}
        for lr, (structure, exponent) in itertools.product((0.02, 0.04, 0.08), kinds)
    ]
    both = [("muon", options) for options in muon] + [("newton-muon", options) for options in newton]
    return [configure(TASK, method=method, seed=TUNING_SEED, options=options) for method, options in both]


def ablation() -> list[RunConfig]:
    """Muon, and Newton-Muon with one thing changed."""
    chosen = [("muon", RATES), *(("newton-muon", {**RATES, **change}) for change in ABLATION.values())]
    return [configure(TASK, method=method, seed=seed, options=o) for seed in SEEDS for method, o in chosen]


def scale() -> list[RunConfig]:
    """Both methods with more and fewer steps, and with larger and smaller batches."""
    sizes = [(600, 16), (150, 64)]
    return [
        dataclasses.replace(configure(TASK, method=method, seed=seed, options=RATES, steps=steps), batch_size=batch)
        for seed in SEEDS[:1]
        for steps, batch in sizes
        for method in ("muon", "newton-muon")
    ]


PARTS = {"tune": tune, "ablation": ablation, "scale": scale}


def main() -> None:
    """Train what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("out/newton_muon"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    for part in options.parts:
        runs = PARTS[part]()
        train_runs({part: runs}, options.out, workers=options.workers)
        write_rows(part, runs, options.out)


def write_rows(part: str, runs: list[RunConfig], out: Path) -> None:
    """One row per run, and the machine of the first."""
    names = {tuple(sorted(change.items())): name for name, change in ABLATION.items()}
    rows: list[dict[str, object]] = []
    for config in runs:
        directory = run_directory(out, config)
        result = read_result(directory / "result.json")
        if result is None:
            raise SystemExit(f"{directory} has no result.")
        change = {key: value for key, value in config.options.items() if key not in RATES}
        defaults = configure(TASK, method=config.method, seed=0, options=RATES).options
        change = tuple(sorted((key, value) for key, value in change.items() if value != defaults[key]))
        row = {"method": config.method, "seed": config.seed, "steps": config.steps, "batch_size": config.batch_size}
        row |= {"change": names.get(change, "") if part == "ablation" and config.method != "muon" else ""}
        row |= {key: config.options.get(key, "") for key in ("lr", "other_lr", "structure", "exponent_in")}
        row |= {"status": result.status, "final_loss": result.final_loss, "train_s": round(result.train_s, 1)}
        rows.append(row | {"run": directory.name, "code": config.code, "data": config.data.sha256[:12]})
    with (HERE / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    environment = read_text(run_directory(out, runs[0]) / "environment.json", remedy="Delete the run's directory.")
    write_whole(HERE / "environment.json", json.dumps(json.loads(environment), indent=2) + "\n")


if __name__ == "__main__":
    main()
