"""What the `study.json` of a batch-size study says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from steepest.lab.disk.fields import HUGE, Count, Positive, Rate, RunName, Text, Texts, wrong
from steepest.lab.disk.packed import RunFiles
from steepest.lab.runs.records import Run, check_positive
from steepest.lab.studies.records import Asked, Listed

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


@dataclass(frozen=True, kw_only=True)
class BatchAsked(Asked):
    """A run that a batch-size study lists.

    Args:
        lr: Learning rate.
        arm: Of which it is.
        batch_size: Examples per step.
        tunes: Whether it serves to find the learning rate only.
    """

    lr: float
    arm: ArmRecord
    batch_size: int
    tunes: bool

    @property
    def name(self) -> str:
        """Of the arm."""
        return self.arm.name

    def check(self, run: Run, files: RunFiles) -> None:
        """As of any run, also comparing batch size and the options that were changed.

        Raises:
            RecordError: If they differ, or a loss is not above 0.
        """
        super().check(run, files)
        check_positive(files, run)
        own = {"batch_size": run.config.batch_size, **run.config.options}
        expected = {"batch_size": str(self.batch_size), **dict(self.arm.changes)}
        both = [(key, str(own.get(key)), value) for key, value in expected.items()]
        if differing := [f"{key} {found} instead of {value}" for key, found, value in both if found != value]:
            raise files.error("config.json", f"the run has {', '.join(differing)}")


class _Run(msgspec.Struct):
    method: Text
    arm: Text
    batch_size: Count
    lr: Rate
    seed: Count
    tunes: bool


class BatchStudy(Listed[BatchAsked], frozen=True, kw_only=True):
    """Arms at several batch sizes; `targets` fall, `batches` rise. Runs that follow from results are listed later.

    Raises:
        ValueError: If the fields contradict each other.
    """

    kind: Literal["critical-batch"]
    labels: Texts = msgspec.field(name="arms")
    batches: Annotated[tuple[Positive, ...], Meta(min_length=1)]
    targets: Annotated[tuple[Annotated[float, Meta(gt=0, le=HUGE)], ...], Meta(min_length=1)]
    runs: Mapping[RunName, _Run]

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.batches) != sorted(set(self.batches)):
            raise wrong("batches", "a list of whole numbers of at least 1, rising", self.batches)
        if list(self.targets) != sorted(set(self.targets), reverse=True):
            raise wrong("targets", f"a list of losses above 0 and at most {HUGE:g}, falling", self.targets)
        if len(set(self.methods)) < len(self.labels):
            raise wrong("arms", "a list of arms with different names", self.labels)
        self.asked()

    @property
    def arms(self) -> tuple[ArmRecord, ...]:
        """What is compared.

        Raises:
            ValueError: If one is of another method.
        """
        return tuple(map(self._arm, self.labels))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the arms."""
        return tuple(arm.name for arm in self.arms)

    @property
    def baseline(self) -> str:
        """The first arm of AdamW, or the first one."""
        return next((arm.name for arm in self.arms if arm.method == "adamw"), self.methods[0])

    def asked(self) -> Mapping[BatchAsked, str | None]:
        """The runs that are listed, in the order of arms, batch sizes, rates and seeds."""
        arms = {arm.label: arm for arm in self.arms}
        found: dict[BatchAsked, str | None] = {}
        rates: dict[tuple[str, int], float] = {}
        for name, run in self.runs.items():
            if run.arm not in arms or run.method != arms[run.arm].method:
                raise wrong(f"runs.{name}.arm", f"one of the arms {list(arms)}, and of its method", run.arm)
            one = BatchAsked(
                method=run.method,
                seed=run.seed,
                lr=run.lr,
                arm=arms[run.arm],
                batch_size=run.batch_size,
                tunes=run.tunes,
            )
            if one.batch_size not in self.batches or (one.seed in self.seeds) == one.tunes:
                among = f"at one of the batch sizes {list(self.batches)}, with one of the seeds {list(self.seeds)}"
                raise wrong(f"runs.{name}", among, (one.batch_size, one.seed))
            if one in found:
                raise ValueError(f"runs.{name} must be the only run of its arm, batch size, learning rate and seed")
            if not one.tunes and (rate := rates.setdefault((run.arm, one.batch_size), one.lr)) != one.lr:
                raise wrong(f"runs.{name}.lr", f"{rate}, as for the other seeds of that batch size", one.lr)
            found[one] = name
        places = {label: place for place, label in enumerate(arms)}
        order = sorted(found, key=lambda one: (places[one.arm.label], one.batch_size, one.tunes, one.lr, one.seed))
        return {one: found[one] for one in order}

    def _arm(self, label: str) -> ArmRecord:
        for method in self.listed_methods:
            if label == method or label.startswith(f"{method} "):
                return ArmRecord(label, method, tuple(re.findall(r"(\w+)=(\S+)", label[len(method) :])))
        expected = f"a list of the methods {list(self.listed_methods)} with what was changed of them"
        raise wrong("arms", expected, self.labels)
