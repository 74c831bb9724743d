"""Stored records of a batch-size study, read back and validated like those of a race."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import cast

from steepest.lab.disk.fields import HIGHEST_RATE, LOWEST_RATE, Fields, RecordError
from steepest.lab.disk.packed import StudyFiles
from steepest.lab.studies.records import HUGE, Run, check_positive, find_run, named_runs, open_study, time_of

_SHORT = (("weight_decay=", "wd="),)  # so that arms with different values stay apart beside a curve


@dataclass(frozen=True)
class ArmRecord:
    """A method with some options changed, as `study.json` calls it.

    Args:
        label: "muon momentum=0.9".
        method: The first word.
        changes: Options that were changed, with their values as text.
    """

    label: str
    method: str
    changes: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """The label, shortened."""
        name = self.label
        for long, short in _SHORT:
            name = name.replace(long, short)
        return name


@dataclass(frozen=True)
class Asked:
    """A run that the study lists.

    Args:
        arm: Name of the arm.
        batch_size: Examples per step.
        lr: Learning rate.
        seed: Of weights and order of examples.
        tunes: Whether it serves to find the learning rate only.
    """

    arm: str
    batch_size: int
    lr: float
    seed: int
    tunes: bool


@dataclass(frozen=True)
class BatchRun:
    """A run that exists, and what it was for."""

    asked: Asked
    run: Run


@dataclass(frozen=True)
class AbsentRun:
    """A run that the study lists and that cannot be used; `problem` is None when it has not been started."""

    asked: Asked
    problem: str | None


@dataclass(frozen=True)
class BatchStudy:
    """A batch-size study: what was asked for (`study.json`), the runs that exist, and those that do not.

    `targets` fall, `batches` rise. Runs that follow from results are listed only once these are there.
    """

    task: str
    preset: str
    arms: tuple[ArmRecord, ...]
    seeds: tuple[int, ...]
    batches: tuple[int, ...]
    targets: tuple[float, ...]
    command: str
    created: datetime
    asked: tuple[Asked, ...]
    runs: tuple[BatchRun, ...]
    absent: tuple[AbsentRun, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the arms: what a page calls its methods."""
        return tuple(arm.name for arm in self.arms)

    @property
    def baseline(self) -> str:
        """The first arm of AdamW, or the first one."""
        return next((arm.name for arm in self.arms if arm.method == "adamw"), self.arms[0].name)


def read_batch_study(study_dir: Path) -> BatchStudy:
    """Read a batch-size study and all of its runs.

    A run that cannot be read does not spoil the others: it is listed in `absent` with what is wrong with it.

    Args:
        study_dir: The directory that holds `study.json`, or a packed study.

    Raises:
        RecordError: If `study.json` is missing, damaged, or not a batch-size study.
    """
    files = StudyFiles(study_dir)
    study = open_study(files)
    study.expect("kind", "critical-batch")
    arms = _arms(study)
    asked = _asked(study, {arm.label: arm for arm in arms})
    runs: list[BatchRun] = []
    absent: list[AbsentRun] = []
    by_name = {arm.name: arm for arm in arms}
    for name, one in asked.items():
        found = _find(files, name, one, by_name[one.arm])
        if isinstance(found, Run):
            runs.append(BatchRun(one, found))
        else:
            absent.append(AbsentRun(one, found))
    return BatchStudy(
        task=study.text("task"),
        preset=study.text("preset"),
        arms=arms,
        seeds=study.counts("seeds"),
        batches=_batches(study),
        targets=_targets(study),
        command=study.text("command"),
        created=time_of(study, "created"),
        asked=tuple(asked.values()),
        runs=tuple(runs),
        absent=tuple(absent),
    )


def _arms(study: Fields) -> tuple[ArmRecord, ...]:
    methods, labels = study.texts("methods"), study.texts("arms")
    arms: list[ArmRecord] = []
    for label in labels:
        method = next((name for name in methods if label == name or label.startswith(f"{name} ")), None)
        if method is None:
            raise study.error("arms", f"a list of the methods {list(methods)} with what was changed of them")
        changes = re.findall(r"(\w+)=(\S+)", label[len(method) :])
        arms.append(ArmRecord(label, method, tuple(changes)))
    if len({arm.name for arm in arms}) < len(arms):
        raise study.error("arms", "a list of arms with different names")
    return tuple(arms)


def _batches(study: Fields) -> tuple[int, ...]:
    batches = study.counts("batches")
    if min(batches) < 1 or list(batches) != sorted(batches):
        raise study.error("batches", "a list of whole numbers of at least 1, rising")
    return batches


def _targets(study: Fields) -> tuple[float, ...]:
    value = study.values.get("targets")
    items = cast(list[object], value) if isinstance(value, list) else []
    targets = [float(item) for item in items if isinstance(item, int | float) and 0 < item <= HUGE]
    if not targets or len(targets) < len(items) or targets != sorted(set(targets), reverse=True):
        raise study.error("targets", f"a list of losses above 0 and at most {HUGE:g}, falling")
    return tuple(targets)


def _asked(study: Fields, arms: Mapping[str, ArmRecord]) -> dict[str, Asked]:
    """The runs by the names of their directories, in the order of arms, batch sizes, rates and seeds."""
    runs, batches, seeds = study.inner("runs"), _batches(study), study.counts("seeds")
    places = {arm.name: place for place, arm in enumerate(arms.values())}
    found: dict[str, Asked] = {}
    rates: dict[tuple[str, int], float] = {}
    for name, run in named_runs(study).items():
        if not isinstance(tunes := run.values.get("tunes"), bool):
            raise run.error("tunes", "true or false")
        one = Asked(_arm_of(run, arms), run.count("batch_size"), run.real("lr"), run.count("seed"), tunes)
        if one.batch_size not in batches or (one.seed in seeds) == one.tunes:
            raise runs.error(name, f"at one of the batch sizes {list(batches)}, with one of the seeds {list(seeds)}")
        if not LOWEST_RATE <= one.lr < HIGHEST_RATE:
            raise run.error("lr", f"above 0 and below {HIGHEST_RATE:g}")
        if one in found.values():
            raise runs.error(name, "the only run of its arm, batch size, learning rate and seed")
        if not one.tunes and rates.setdefault((one.arm, one.batch_size), one.lr) != one.lr:
            raise run.error("lr", f"{rates[one.arm, one.batch_size]}, as for the other seeds of that batch size")
        found[name] = one
    order = {name: (places[one.arm], one.batch_size, one.tunes, one.lr, one.seed) for name, one in found.items()}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}


def _arm_of(run: Fields, arms: Mapping[str, ArmRecord]) -> str:
    label = run.text("arm")
    if label not in arms or run.text("method") != arms[label].method:
        raise run.error("arm", f"one of the arms {list(arms)}, and of its method")
    return arms[label].name


def _find(study: StudyFiles, name: str, asked: Asked, arm: ArmRecord) -> Run | str | None:
    """As `find_run`, also comparing batch size and the options that were changed."""
    found = find_run(study, name, method=arm.method, seed=asked.seed, lr=asked.lr)
    if not isinstance(found, Run):
        return found
    config, files = found.config, study.run(name)
    own = {"batch_size": str(config.batch_size)} | {key: str(value) for key, value in config.options.items()}
    expected = {"batch_size": str(asked.batch_size)} | dict(arm.changes)
    wrong = [f"{key} {own.get(key)} instead of {value}" for key, value in expected.items() if own.get(key) != value]
    try:
        check_positive(files, found)
        if wrong:
            raise files.error("config.json", f"the run has {', '.join(wrong)}")
    except RecordError as problem:
        return study.told(problem)
    return found
