"""The runs behind this page: every method gets as many tried settings at the preset tiny; each part is added alone.

    .venv/bin/python results/strongest/study.py tune --out out/strongest
    .venv/bin/python results/strongest/study.py parts looks --out out/strongest
    .venv/bin/python results/strongest/study.py changes report --out out/strongest
    .venv/bin/python results/strongest/study.py tables

All runs are kept in one file, `records.jsonl.xz`, with the command and commit that wrote it last, and none of them is
trained twice; after `--seconds` no run is started, and the same command goes on. Either command writes the tables anew,
from the records alone.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from steepest.lab.disk.files import make_directory, write_whole
from steepest.lab.disk.packed import RECORDS, PackedRun, pack, unpack
from steepest.lab.engine.pool import Pool, last_words
from steepest.lab.engine.walk import Tried, at_edge, best_of, ladder, search
from steepest.lab.report.statistics import Ended, holm, paired_verdicts
from steepest.lab.runs.config import RunConfig, configure, run_hash
from steepest.lab.runs.records import Run, read_run
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import Schedule

HERE = Path(__file__).parent
KEPT = HERE / "records.jsonl.xz"
TASK = make_task("text", "tiny")
TUNING_SEED = 1000
BUDGET = 20  # tried settings of each method
SCHEDULES: tuple[Schedule, ...] = ("cooldown", "warmup-long-cooldown")
LADDERS: Mapping[str, tuple[float, ...]] = {  # of what is no rate, momentum or decay
    "schedule": tuple(map(float, range(len(SCHEDULES)))),
    "vector_ratio": (0.25, 0.3535, 0.5, 0.7071, 1.0, 1.4142, 2.0, 2.8284, 4.0, 5.6569, 8.0),
    "powers": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "powers_beta": (0.8, 0.9, 0.95, 0.975, 0.99),
}


@dataclass(frozen=True)
class Walk:
    """How the options of a method are searched.

    Args:
        method: A key of `METHODS`.
        start: Where the walk begins; its keys are walked in this order. "schedule" is the run's, by its place in
            `SCHEDULES`.
        fixed: Options that stay.
    """

    method: str
    start: Mapping[str, float]
    fixed: Mapping[str, float | bool | str] = field(default_factory=dict[str, float | bool | str])


# From where searches of shorter runs had ended, as far as longer runs want longer averages.
WALKS = {
    "muon": Walk(
        "muon",
        {
            "momentum": 0.85,
            "lr": 0.0565685,
            "other_lr": 0.02,
            "beta2": 0.975,
            "table_lr": 0.02,
            "weight_decay": 0.0,
            "beta1": 0.85,
            "vector_ratio": 1.0,
        },
    ),
    "shampoo": Walk(
        "parts",
        {
            "table_lr": 0.02,
            "beta2": 0.975,
            "powers": 0.5,
            "lr": 0.0565685,
            "vector_ratio": 4.0,
            "momentum": 0.85,
            "other_lr": 0.01,
            "powers_beta": 0.975,
            "weight_decay": 0.0,
            "beta1": 0.85,
        },
        {"powers_split": True, "powers_block": 128},
    ),
    "adamw": Walk(
        "adamw",
        {
            "beta1": 0.75,
            "lr": 0.004,
            "other_lr": 0.0226274,
            "beta2": 0.9,
            "schedule": 0,
            "table_lr": 0.0226274,
            "weight_decay": 0.01,
            "vector_ratio": 1.0,
        },
    ),
}


# What is added to Muon, alone: options of the method "parts", and fields of the run.
PARTS: Mapping[str, tuple[Mapping[str, float | bool | str], Mapping[str, float]]] = {
    "Muon": ({}, {}),
    "powers of Shampoo's factors, 0.3": ({"powers": 0.3}, {}),
    "powers of Shampoo's factors, 0.45": ({"powers": 0.45}, {}),
    "SOAP's basis": ({"basis_every": 5}, {}),
    "diagonal metric of noise": ({"metric": "noise"}, {}),
    "row scaling": ({"rows": True}, {}),
    "moments of inputs": ({"inputs": "wide"}, {}),
    "two averages": ({"slow": 0.98, "share": 0.5615, "slow_from": 150}, {}),
    "look-ahead": ({}, {"outer": 0.6}),
    "mean of the tail": ({}, {"tail": 0.2, "tail_mix": 0.6}),
    "floor of rows": ({"floor": 0.3825}, {}),
    "radial brake": ({"brake": 0.5}, {}),
    "cautious decay": ({"weight_decay": 0.1, "decay": "cautious"}, {}),
    "table at 0.08, second beta 0.99": ({"table_lr": 0.08, "beta2": 0.99}, {}),
}
# What is taken from the winner, or added to it: changes of its setting, and fields of the run.
CHANGES: Mapping[str, tuple[Mapping[str, float | bool | str], Mapping[str, float]]] = {
    "winner": ({}, {}),
    "no powers": ({"powers": 0.0}, {}),
    "powers before the polar factor only": ({"powers_split": False}, {}),
    "whole sides": ({"powers_block": 8192}, {}),
    "moments that begin with the identity": ({"powers_prior": 1.0}, {}),
    "one rate for vectors and heads": ({"vector_ratio": 1.0}, {}),
    "table at 0.04, second beta 0.99": ({"table_lr": 0.04, "beta2": 0.99}, {}),
    "row scaling": ({"rows": True}, {}),
    "mean of the tail": ({}, {"tail": 0.2, "tail_mix": 0.6}),
    "two averages": ({"slow": 0.98, "share": 0.5615, "slow_from": 150}, {}),
}
# Several parts at once, on the tuning seed: which of them the winner's search begins with.
LOOKS: Mapping[str, Mapping[str, float | bool | str]] = {
    "powers 0.45": {"powers": 0.45},
    "powers 0.45, row scaling": {"powers": 0.45, "rows": True},
    "powers 0.45, diagonal metric": {"powers": 0.45, "metric": "noise"},
    "powers 0.45, momentum 0.9": {"powers": 0.45, "momentum": 0.9},
}
PART_SEEDS = (2001, 2002, 2003)
# The best of each walk on seeds that chose nothing, for so many steps, each with the whole schedule.
LENGTHS: Mapping[str, tuple[int, ...]] = {"muon": (500,), "shampoo": (425, 500, 375), "adamw": (500,)}
REPORT_SEEDS = tuple(range(3001, 3013))
ALONE: Mapping[str, float] = {"lr": 0.0565685, "momentum": 0.85, "other_lr": 0.02, "beta1": 0.85, "beta2": 0.975}


def rungs(name: str, start: float) -> tuple[float, ...]:
    """The values that an option, or the schedule, may have."""
    return LADDERS[name] if name in LADDERS else ladder(name, start)


def setting(method: str, options: Mapping[str, object], **more: object) -> RunConfig:
    """A run of the study at preset tiny; "schedule" may stand among the options, as in a walk."""
    chosen = dict(options)
    schedule = SCHEDULES[int(chosen.pop("schedule", 0))]  # pyright: ignore[reportArgumentType]
    config = configure(TASK, method=method, options=chosen, schedule=schedule, **more)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(config, tuning=None, eval_every=config.steps)


class Kept:
    """All runs of the study: in the packed file, and in directories while they are trained.

    Args:
        out: Where runs are trained.
        seconds: After which no run is started.
    """

    def __init__(self, out: Path | None, seconds: float = math.inf) -> None:
        self.runs = dict(unpack(KEPT)[1]) if KEPT.exists() else {}
        self.out = out
        self.end = time.monotonic() + seconds
        self.pool = Pool(1, threads=1, data=None, stop=threading.Event())
        self.lock = threading.Lock()

    def read(self, config: RunConfig) -> Run | None:
        """A run with its rows; None if it was not trained."""
        name = run_hash(config)
        return read_run(PackedRun(KEPT / name, self.runs[name])) if name in self.runs else None

    def train(self, config: RunConfig) -> Run | None:
        """A run, trained if it has not been; None when the time is over."""
        if (run := self.read(config)) is not None:
            return run
        if self.out is None:
            return None
        directory = self.out / "runs" / run_hash(config)
        if not (directory / "result.json").exists():
            if time.monotonic() > self.end:
                return None
            make_directory(directory)
            write_whole(directory / "config.json", config.to_json())
            if (outcome := self.pool.train(directory)) != "finished":
                raise SystemExit(f"{directory}: {outcome}, {last_words(directory)}")
        with self.lock:
            self.runs |= unpack(KEPT)[1] if KEPT.exists() else {}  # another command may have written since
            self.runs[directory.name] = {f: (directory / f).read_bytes() for f in RECORDS if (directory / f).exists()}
            about = {"command": " ".join(sys.argv), "commit": _commit()}
            write_whole(KEPT, pack(json.dumps(about).encode(), self.runs), durable=True)
        return self.read(config)


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def walk(label: str, kept: Kept, budget: int = BUDGET) -> list[tuple[RunConfig, Tried]]:
    """The settings that were tried of a method, in their order; as many as there was time for."""
    own = WALKS[label]
    steps = search({n: rungs(n, v) for n, v in own.start.items()}, own.start, budget=budget)
    tried: list[tuple[RunConfig, Tried]] = []
    options = next(steps)
    while True:
        config = setting(own.method, {**options, **own.fixed}, seed=TUNING_SEED, part="tuning")
        run = kept.train(config)
        if run is None:
            return tried
        loss = finite(None if run.result is None else run.result.tuning_loss)
        tried.append((config, Tried(options, loss)))
        if kept.out is not None:
            print(f"{label} {len(tried)} {dict(options)}: {loss:.4f}", flush=True)  # noqa: T201
        try:
            options = steps.send(loss)
        except StopIteration:
            return tried


def tuning_rows(kept: Kept) -> list[dict[str, object]]:
    """One row for each tried setting."""
    rows: list[dict[str, object]] = []
    names = sorted({name for own in WALKS.values() for name in own.start})
    for label in WALKS:
        found = walk(label, kept)
        settings = [one for _, one in found]
        best = best_of(settings) if settings else None
        for number, (config, one) in enumerate(found, start=1):
            row: dict[str, object] = {"walk": label, "number": number}
            row |= {name: one.options.get(name, "") for name in names}
            edge = " ".join(at_edge(settings)) if one is best else ""
            rows.append(row | {"tuning_loss": one.loss, "best": one is best, "edge": edge, "run": run_hash(config)})
    return rows


def part_runs(kept: Kept, workers: int = 1, around: str = "muon") -> list[tuple[str, int, Run]]:
    """Runs of Muon with each part alone, or of the winner with each change, one seed after the other.

    Args:
        kept: All runs.
        workers: Runs at a time.
        around: "muon" or "shampoo".

    Returns:
        What it is, seed and run; as many as there was time for.
    """
    parts = PARTS if around == "muon" else CHANGES
    base = ALONE if around == "muon" else best_setting(around, Kept(None))
    if base is None:
        return []

    def run(label: str, seed: int) -> tuple[str, int, Run | None]:
        options, fields = parts[label]
        return label, seed, kept.train(setting("parts", {**base, **options}, seed=seed, **fields))

    pairs = [(label, seed) for seed in PART_SEEDS for label in parts]
    with ThreadPoolExecutor(workers) as threads:
        found = list(threads.map(lambda pair: run(*pair), pairs))
    return [(label, seed, own) for label, seed, own in found if own is not None]


def look_runs(kept: Kept, workers: int = 1) -> list[tuple[str, Run]]:
    """Runs of Muon with several parts on the tuning seed; as many as there was time for."""

    def run(options: Mapping[str, float | bool | str]) -> Run | None:
        return kept.train(setting("parts", {**ALONE, **options}, seed=TUNING_SEED, part="tuning"))

    with ThreadPoolExecutor(workers) as threads:
        found = list(threads.map(run, LOOKS.values()))
    return [(label, own) for label, own in zip(LOOKS, found, strict=True) if own is not None]


def look_rows(kept: Kept) -> list[dict[str, object]]:
    """One row for each look."""
    rows: list[dict[str, object]] = []
    for label, run in look_runs(kept):
        loss = finite(None if run.result is None else run.result.tuning_loss)
        rows.append({"parts": label, "seed": TUNING_SEED, "tuning_loss": loss, "run": run_hash(run.config)})
    return rows


def best_setting(label: str, kept: Kept) -> Mapping[str, float | bool | str] | None:
    """Options, and perhaps a schedule, of the best run of a walk; None before the first."""
    tried = [one for _, one in walk(label, kept)]
    return {**best_of(tried).options, **WALKS[label].fixed} if tried else None


def report_runs(kept: Kept, workers: int = 1) -> list[tuple[str, int, int, Run]]:
    """Runs at the best setting of each walk, one seed after the other: label, steps, seed and run."""
    chosen = {label: best_setting(label, Kept(None)) for label in LENGTHS}
    asked = [
        (label, steps, seed, options)
        for seed in REPORT_SEEDS
        for label, lengths in LENGTHS.items()
        for steps in lengths
        if (options := chosen[label]) is not None
    ]

    def run(label: str, steps: int, seed: int, options: Mapping[str, float | bool | str]) -> Run | None:
        return kept.train(setting(WALKS[label].method, options, seed=seed, steps=steps))

    with ThreadPoolExecutor(workers) as threads:
        found = list(threads.map(lambda one: run(*one), asked))
    return [(*one[:3], own) for one, own in zip(asked, found, strict=True) if own is not None]


def finite(loss: float | None) -> float:
    """A loss, infinite if it was not finite."""
    return math.inf if loss is None else loss


def ended(run: Run) -> Ended:
    """A run, for the tests of the lab."""
    return Ended(None, None) if run.result is None else Ended(run.result.final_loss, run.result.final_blocks)


def report_rows(kept: Kept) -> list[dict[str, object]]:
    """One row for each run of the report."""
    return [
        {"walk": label, "steps": steps, "seed": seed, "loss": finite(ended(run).loss), "run": run_hash(run.config)}
        for label, steps, seed, run in report_runs(kept)
    ]


def step_rows(kept: Kept) -> list[dict[str, object]]:
    """Each method and length against Muon's whole run: differences of final losses; p is corrected for all of them."""
    runs: dict[tuple[str, int], dict[int, Ended]] = {}
    for label, steps, seed, run in report_runs(kept):
        runs.setdefault((label, steps), {})[seed] = ended(run)
    base = runs.pop(("muon", 500), {})
    verdicts = [paired_verdicts({"muon": base, label: own})[0] for (label, _), own in runs.items()]
    corrected = holm([1.0 if verdict.p is None else verdict.p for verdict in verdicts])
    rows: list[dict[str, object]] = []
    for (label, steps), verdict, p in zip(runs, verdicts, corrected, strict=True):
        low, high = ("", "") if verdict.interval is None else (verdict.interval.low, verdict.interval.high)
        row: dict[str, object] = {"walk": label, "steps": steps, "seeds": verdict.n, "difference": verdict.difference}
        rows.append(row | {"low": low, "high": high, "p": p, "diverged": " ".join(verdict.diverged)})
    return rows


def part_rows(kept: Kept, around: str = "muon") -> list[dict[str, object]]:
    """One row for each run with a part; a loss that was not finite is infinite."""
    rows: list[dict[str, object]] = []
    for label, seed, run in part_runs(kept, around=around):
        loss = finite(ended(run).loss)
        rows.append({"part": label, "seed": seed, "loss": loss, "run": run_hash(run.config)})
    return rows


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


TABLES: Mapping[str, Callable[[Kept], list[dict[str, object]]]] = {
    "tuning": tuning_rows,
    "parts": part_rows,
    "changes": partial(part_rows, around="shampoo"),
    "looks": look_rows,
    "report": report_rows,
    "steps": step_rows,
}


def tables() -> dict[str, str]:
    """All tables of this page that have rows, by name of the file."""
    kept = Kept(None)
    return {f"{name}.csv": table(found) for name, rows in TABLES.items() if (found := rows(kept))}


def main() -> None:
    """Train what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["tune", "parts", "changes", "looks", "report", "tables"])
    parser.add_argument("--only", nargs="+", choices=list(WALKS), default=list(WALKS), help="walks to train")
    parser.add_argument("--out", type=Path, default=Path("out/strongest"))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run is started afterwards")
    options = parser.parse_args()
    if "tune" in options.parts:
        kept = Kept(options.out, options.seconds)
        with ThreadPoolExecutor(options.workers) as threads:
            for done in [threads.submit(walk, label, kept) for label in options.only]:
                done.result()
    if "parts" in options.parts:
        part_runs(Kept(options.out, options.seconds), options.workers)
    if "changes" in options.parts:
        part_runs(Kept(options.out, options.seconds), options.workers, "shampoo")
    if "looks" in options.parts:
        look_runs(Kept(options.out, options.seconds), options.workers)
    if "report" in options.parts:
        report_runs(Kept(options.out, options.seconds), options.workers)
    found = tables()
    for name in TABLES:
        if f"{name}.csv" in found:
            write_whole(HERE / f"{name}.csv", found[f"{name}.csv"])
        else:
            (HERE / f"{name}.csv").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
