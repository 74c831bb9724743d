"""The runs behind this page: every method gets as many tried settings at the preset tiny.

    .venv/bin/python results/strongest/study.py tune --out out/strongest
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
from pathlib import Path

from steepest.lab.disk.files import make_directory, write_whole
from steepest.lab.disk.packed import RECORDS, PackedRun, pack, unpack
from steepest.lab.engine.pool import Pool, last_words
from steepest.lab.engine.walk import Tried, at_edge, best_of, ladder, search
from steepest.lab.runs.config import RunConfig, configure, run_hash
from steepest.lab.runs.records import Run, read_run
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import Schedule

HERE = Path(__file__).parent
KEPT = HERE / "records.jsonl.xz"
TASK = make_task("text", "tiny")
TUNING_SEED = 1000
BUDGET = 24  # tried settings of each method
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


def rungs(name: str, start: float) -> tuple[float, ...]:
    """The values that an option, or the schedule, may have."""
    return tuple(map(float, range(len(SCHEDULES)))) if name == "schedule" else ladder(name, start)


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


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


TABLES: Mapping[str, Callable[[Kept], list[dict[str, object]]]] = {"tuning": tuning_rows}


def tables() -> dict[str, str]:
    """All tables of this page, by name of the file."""
    return {f"{name}.csv": table(rows(Kept(None))) for name, rows in TABLES.items()}


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
    for name, text in tables().items():
        write_whole(HERE / name, text)


if __name__ == "__main__":
    main()
