"""Stored records of a learning-rate sweep, read back and validated like those of a race."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, cast

import msgspec
from msgspec import Meta

from steepest.lab.disk.fields import Count, Rate, RunName, Text, check_distinct
from steepest.lab.disk.packed import StudyFiles
from steepest.lab.studies.records import Absent, Listed, Run, by_content, check_baseline, find_run, open_study

Key = tuple[str, float, int]  # method, learning rate, seed


@dataclass(frozen=True)
class SweepStudy:
    """A sweep: what was asked for (`study.json`), the runs that exist, and those that do not.

    `lrs` are each method's learning rates, in ascending order.
    """

    task: str
    preset: str
    methods: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...]
    lrs: Mapping[str, tuple[float, ...]]
    command: str
    created: datetime
    runs: tuple[Run, ...]
    absent: tuple[Absent, ...]

    @property
    def asked(self) -> int:
        """Number of runs that the sweep asks for."""
        return len(self.seeds) * sum(map(len, self.lrs.values()))


class _SweepRun(msgspec.Struct):
    method: Text
    lr: float
    seed: Count


class _Sweep(Listed, frozen=True, kw_only=True):
    kind: Literal["sweep"]
    baseline: str
    lrs: Mapping[str, Annotated[tuple[Rate, ...], Meta(min_length=1)]]
    runs: Mapping[RunName, _SweepRun]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_baseline(self.baseline, self.methods)
        for method in self.methods:
            if method not in self.lrs:
                raise ValueError(f"lrs.{method} is missing")
            check_distinct(f"lrs.{method}", self.lrs[method])
        self.names()

    @property
    def rates(self) -> Mapping[str, tuple[float, ...]]:
        """The learning rates of each method, rising."""
        return {method: tuple(sorted(self.lrs[method])) for method in self.methods}

    def names(self) -> Mapping[Key, str]:
        """The directories of the runs."""
        among = "one of the methods with one of its learning rates and one of the seeds"
        runs = {name: (run.method, run.lr, run.seed) for name, run in self.runs.items()}
        return by_content(runs, self.asked(), among)

    def asked(self) -> list[Key]:
        """What the runs are, in the order of methods, rising rates and seeds."""
        return [(method, lr, seed) for method in self.methods for lr in self.rates[method] for seed in self.seeds]


def read_sweep(study_dir: Path) -> SweepStudy:
    """Read a sweep and all of its runs.

    A run that cannot be read does not spoil the others: it is listed in `absent` with what is wrong with it.

    Args:
        study_dir: The directory that holds `study.json`, or a packed study.

    Raises:
        RecordError: If `study.json` is missing, damaged, or not a sweep.
    """
    files = StudyFiles(study_dir)
    study = open_study(files, _Sweep)
    names = study.names()
    runs: list[Run] = []
    absent: list[Absent] = []
    for method, lr, seed in study.asked():
        found = find_run(files, names.get((method, lr, seed)), method=method, seed=seed, lr=lr)
        if isinstance(found, Run):
            runs.append(found)
        else:
            absent.append(Absent(method, seed, found, lr))
    return SweepStudy(
        task=study.task,
        preset=study.preset,
        methods=study.methods,
        baseline=study.baseline,
        seeds=study.seeds,
        lrs=study.rates,
        command=study.command,
        created=study.created,
        runs=tuple(runs),
        absent=tuple(absent),
    )


def rate(run: Run) -> float:
    """The learning rate of a run that `read_sweep` has found."""
    return cast(float, run.config.options["lr"])
