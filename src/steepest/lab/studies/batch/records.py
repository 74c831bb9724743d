"""Stored records of a batch-size study, read back and validated like those of a race."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from steepest.lab.disk.fields import HUGE, Count, Positive, Rate, RecordError, RunName, Text, Texts, wrong
from steepest.lab.disk.packed import StudyFiles
from steepest.lab.studies.records import Listed, Run, check_positive, find_run, open_study

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


class _BatchRun(msgspec.Struct):
    method: Text
    arm: Text
    batch_size: Count
    lr: Rate
    seed: Count
    tunes: bool


class _Batches(Listed, frozen=True, kw_only=True):
    kind: Literal["critical-batch"]
    arms: Texts
    batches: Annotated[tuple[Positive, ...], Meta(min_length=1)]
    targets: Annotated[tuple[Annotated[float, Meta(gt=0, le=HUGE)], ...], Meta(min_length=1)]
    runs: Mapping[RunName, _BatchRun]

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.batches) != sorted(set(self.batches)):
            raise wrong("batches", "a list of whole numbers of at least 1, rising", self.batches)
        if list(self.targets) != sorted(set(self.targets), reverse=True):
            raise wrong("targets", f"a list of losses above 0 and at most {HUGE:g}, falling", self.targets)
        self.asked()

    def all_arms(self) -> tuple[ArmRecord, ...]:
        """What is compared."""
        arms: list[ArmRecord] = []
        for label in self.arms:
            method = next((name for name in self.methods if label == name or label.startswith(f"{name} ")), None)
            if method is None:
                expected = f"a list of the methods {list(self.methods)} with what was changed of them"
                raise wrong("arms", expected, self.arms)
            changes = re.findall(r"(\w+)=(\S+)", label[len(method) :])
            arms.append(ArmRecord(label, method, tuple(changes)))
        if len({arm.name for arm in arms}) < len(arms):
            raise wrong("arms", "a list of arms with different names", self.arms)
        return tuple(arms)

    def asked(self) -> Mapping[str, Asked]:
        """The runs by the names of their directories, in the order of arms, batch sizes, rates and seeds."""
        arms = {arm.label: arm for arm in self.all_arms()}
        places = {arm.name: place for place, arm in enumerate(arms.values())}
        found: dict[str, Asked] = {}
        rates: dict[tuple[str, int], float] = {}
        for name, run in self.runs.items():
            if run.arm not in arms or run.method != arms[run.arm].method:
                raise wrong(f"runs.{name}.arm", f"one of the arms {list(arms)}, and of its method", run.arm)
            one = Asked(arms[run.arm].name, run.batch_size, run.lr, run.seed, run.tunes)
            if one.batch_size not in self.batches or (one.seed in self.seeds) == one.tunes:
                among = f"at one of the batch sizes {list(self.batches)}, with one of the seeds {list(self.seeds)}"
                raise wrong(f"runs.{name}", among, (one.batch_size, one.seed))
            if one in found.values():
                raise ValueError(f"runs.{name} must be the only run of its arm, batch size, learning rate and seed")
            if not one.tunes and (rate := rates.setdefault((one.arm, one.batch_size), one.lr)) != one.lr:
                raise wrong(f"runs.{name}.lr", f"{rate}, as for the other seeds of that batch size", one.lr)
            found[name] = one
        order = {name: (places[one.arm], one.batch_size, one.tunes, one.lr, one.seed) for name, one in found.items()}
        return {name: found[name] for name in sorted(found, key=order.__getitem__)}


def read_batch_study(study_dir: Path) -> BatchStudy:
    """Read a batch-size study and all of its runs.

    A run that cannot be read does not spoil the others: it is listed in `absent` with what is wrong with it.

    Args:
        study_dir: The directory that holds `study.json`, or a packed study.

    Raises:
        RecordError: If `study.json` is missing, damaged, or not a batch-size study.
    """
    files = StudyFiles(study_dir)
    study = open_study(files, _Batches)
    arms, asked = study.all_arms(), study.asked()
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
        task=study.task,
        preset=study.preset,
        arms=arms,
        seeds=study.seeds,
        batches=study.batches,
        targets=study.targets,
        command=study.command,
        created=study.created,
        asked=tuple(asked.values()),
        runs=tuple(runs),
        absent=tuple(absent),
    )


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
