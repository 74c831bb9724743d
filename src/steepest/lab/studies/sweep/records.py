"""Stored records of a learning-rate sweep, read back and validated like those of a race."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import cast

from steepest.lab.disk.fields import HIGHEST_RATE, LOWEST_RATE, Fields
from steepest.lab.disk.packed import StudyFiles
from steepest.lab.studies.records import Absent, Run, baseline, find_run, named_runs, open_study, time_of

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


def read_sweep(study_dir: Path) -> SweepStudy:
    """Read a sweep and all of its runs.

    A run that cannot be read does not spoil the others: it is listed in `absent` with what is wrong with it.

    Args:
        study_dir: The directory that holds `study.json`, or a packed study.

    Raises:
        RecordError: If `study.json` is missing, damaged, or not a sweep.
    """
    files = StudyFiles(study_dir)
    study = open_study(files)
    study.expect("kind", "sweep")
    methods, seeds = study.texts("methods"), study.counts("seeds")
    lrs = {method: _lrs(study.inner("lrs"), method) for method in methods}
    asked = [(method, lr, seed) for method in methods for lr in lrs[method] for seed in seeds]
    names = _run_names(study, asked)
    runs: list[Run] = []
    absent: list[Absent] = []
    for method, lr, seed in asked:
        found = find_run(files, names.get((method, lr, seed)), method=method, seed=seed, lr=lr)
        if isinstance(found, Run):
            runs.append(found)
        else:
            absent.append(Absent(method, seed, found, lr))
    return SweepStudy(
        task=study.text("task"),
        preset=study.text("preset"),
        methods=methods,
        baseline=baseline(study, methods),
        seeds=seeds,
        lrs=lrs,
        command=study.text("command"),
        created=time_of(study, "created"),
        runs=tuple(runs),
        absent=tuple(absent),
    )


def rate(run: Run) -> float:
    """The learning rate of a run that `read_sweep` has found."""
    return cast(float, run.config.options["lr"])


def _lrs(fields: Fields, method: str) -> tuple[float, ...]:
    value = fields.values.get(method)
    items = cast(list[object], value) if isinstance(value, list) else []
    rates = {float(item) for item in items if isinstance(item, int | float) and LOWEST_RATE <= item < HIGHEST_RATE}
    if not rates or len(rates) < len(items):
        raise fields.error(method, f"a list of different numbers above 0 and below {HIGHEST_RATE:g}")
    return tuple(sorted(rates))


def _run_names(study: Fields, asked: list[Key]) -> dict[Key, str]:
    runs = study.inner("runs")
    names: dict[Key, str] = {}
    for name, run in named_runs(study).items():
        key = run.text("method"), run.real("lr"), run.count("seed")
        if key not in asked:
            raise runs.error(name, "one of the methods with one of its learning rates and one of the seeds")
        if key in names:
            method, lr, seed = key
            raise runs.error(
                name, f"the only run of {method!r} with lr {lr} and seed {seed}, which {names[key]} is already"
            )
        names[key] = name
    return names
