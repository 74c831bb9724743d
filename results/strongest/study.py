"""The runs behind this page: equal tuning, fresh seeds, what each part brings, other lengths and batches.

    .venv/bin/python results/strongest/study.py tune --only muon --out out/strongest
    .venv/bin/python results/strongest/study.py report parts --out out/strongest
    .venv/bin/python results/strongest/study.py tables

All runs are kept in one file, `records.jsonl.xz`, and none of them is trained twice; `--seconds` ends between two runs,
and the same command goes on. `tables` writes the tables of this page anew, from the records alone.
"""

import argparse
import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from steepest.lab.disk.files import make_directory, write_whole
from steepest.lab.disk.packed import RECORDS, PackedRun, pack, unpack
from steepest.lab.engine.pool import Pool, last_words
from steepest.lab.engine.walk import Tried, at_edge, best_of, search
from steepest.lab.runs.config import RunConfig, configure, run_hash
from steepest.lab.runs.records import Run, read_run
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import Schedule

HERE = Path(__file__).parent
KEPT = HERE / "records.jsonl.xz"
TASK = make_task("text", "tiny")
TUNING_SEED = 1000
BUDGET = 24  # tried settings of each method
BETAS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
SECOND_BETAS = (0.7, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999)
DECAYS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
RATES = ("lr", "other_lr", "table_lr")
SCHEDULES: tuple[Schedule, ...] = ("cooldown", "warmup-long-cooldown")


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
        },
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
        },
    ),
}


def ladder(name: str, start: float) -> tuple[float, ...]:
    """The values of an option: rates by factors of the root of two around the start."""
    if name in RATES:
        return tuple(float(f"{start * 2 ** (rung / 2):.6g}") for rung in range(-10, 11))
    fixed = {"beta2": SECOND_BETAS, "weight_decay": DECAYS, "schedule": tuple(map(float, range(len(SCHEDULES))))}
    return fixed.get(name, BETAS)


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
            # another process may have kept runs meanwhile
            self.runs |= unpack(KEPT)[1] if KEPT.exists() else {}
            self.runs[directory.name] = {f: (directory / f).read_bytes() for f in RECORDS if (directory / f).exists()}
            about = {"command": " ".join(sys.argv), "commit": _commit()}
            write_whole(KEPT, pack(json.dumps(about).encode(), self.runs), durable=True)
        return self.read(config)


def _commit() -> str:
    git = shutil.which("git")
    return (
        subprocess.run([git, "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
        if git
        else ""
    )


def walk(label: str, kept: Kept, budget: int = BUDGET) -> list[tuple[RunConfig, Tried]]:
    """The settings that were tried of a method, in their order; as many as there was time for."""
    own = WALKS[label]
    steps = search({n: ladder(n, v) for n, v in own.start.items()}, own.start, budget=budget)
    tried: list[tuple[RunConfig, Tried]] = []
    options = next(steps)
    while True:
        config = setting(own.method, {**options, **own.fixed}, seed=TUNING_SEED, part="tuning")
        run = kept.train(config)
        if run is None:
            return tried
        loss = math.inf if run.result is None or run.result.tuning_loss is None else run.result.tuning_loss
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


def write_rows(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """A table as a file beside this one."""
    with (HERE / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


TABLES: Mapping[str, Callable[[Kept], list[dict[str, object]]]] = {"tuning": tuning_rows}


def main() -> None:
    """Train what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["tune", "tables"])
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
    for name, rows in TABLES.items():
        write_rows(name, rows(Kept(None)))


if __name__ == "__main__":
    main()
