"""A study read back: what its `study.json` asks for, the runs that exist, and what is wrong with the others.

A study directory holds `study.json` and one directory per run under `runs/`, or all of that in one packed file. A kind
of study declares what its `study.json` holds, a `Listed`, and which runs that asks for; all else is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec

from steepest.lab.disk.fields import Counts, RecordError, RunName, Text, Texts, check_distinct, wrong
from steepest.lab.disk.packed import RunFiles, StudyFiles
from steepest.lab.runs.config import names_of, run_hash
from steepest.lab.runs.records import Run, read_run
from steepest.lab.studies import KINDS


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run that a study asks for.

    Args:
        method: That trains it.
        seed: Of weights and order of examples.
        lr: Learning rate; None where the study does not choose it.
    """

    method: str
    seed: int
    lr: float | None

    @property
    def name(self) -> str:
        """What is compared."""
        return self.method

    def __str__(self) -> str:
        return f"{self.method!r} with seed {self.seed}" + ("" if self.lr is None else f" and lr {self.lr}")

    def check(self, run: Run, files: RunFiles) -> None:
        """Refuse a run that is another one.

        Args:
            run: What its files say.
            files: These, for error messages.

        Raises:
            RecordError: If they differ.
        """
        rate: Any = None if self.lr is None else run.config.options.get("lr")
        own = Asked(method=run.config.method, seed=run.config.seed, lr=rate)
        if (own.method, own.seed, own.lr) != (self.method, self.seed, self.lr):
            raise files.error("config.json", f"the run is {own}, study.json says {self}")


A = TypeVar("A", bound=Asked)


class Listed(msgspec.Struct, Generic[A], frozen=True, kw_only=True):
    """What `study.json` says of all kinds of study; each adds its own.

    Raises:
        ValueError: If a method or a seed is there twice.
    """

    task: Text
    preset: Text
    listed_methods: Texts = msgspec.field(name="methods")
    seeds: Counts
    command: Text
    created: datetime
    runs: Mapping[RunName, object]

    def __post_init__(self) -> None:
        check_distinct("methods", self.listed_methods)
        check_distinct("seeds", self.seeds)

    @property
    def methods(self) -> tuple[str, ...]:
        """What is compared, as a page calls it."""
        return self.listed_methods

    def asked(self) -> Mapping[A, str | None]:
        """Every run that is asked for, in the order of a report, with its directory; None if that is not listed."""
        raise NotImplementedError


S = TypeVar("S", bound=Listed[Any])
T = TypeVar("T")


@dataclass(frozen=True)
class Recorded(Generic[S, A]):
    """All records of a study.

    Args:
        study: What was asked for.
        found: The runs that exist.
        absent: Those that cannot be used, and why; None for one that has simply not been started.
    """

    study: S
    found: Mapping[A, Run]
    absent: Mapping[A, str | None]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs that exist."""
        return tuple(self.found.values())

    @property
    def by_name(self) -> dict[str, list[Run]]:
        """The runs that exist of each method, or whatever is compared."""
        names = self.study.methods
        return {name: [run for one, run in self.found.items() if one.name == name] for name in names}

    @property
    def asked(self) -> tuple[A, ...]:
        """Every run, in the study's order."""
        return tuple(self.study.asked())

    @property
    def waiting(self) -> int:
        """How many runs have not ended."""
        return len(self.asked) - sum(run.result is not None for run in self.runs)


class _Head(msgspec.Struct):
    format: Literal[1]
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise wrong("kind", f"one of {', '.join(KINDS)}", self.kind)


def read_study(study_dir: Path, kind: type[S]) -> Recorded[S, Any]:
    """Read a study and all of its runs.

    A run that cannot be read does not spoil the others: it is listed in `absent` with what is wrong with it.

    Args:
        study_dir: The directory that holds `study.json`, or a packed study.
        kind: What `study.json` holds.

    Raises:
        RecordError: If `study.json` is missing, damaged, or of another kind.
    """
    files = StudyFiles(study_dir)
    study = open_study(files, kind)
    found: dict[Any, Run] = {}
    absent: dict[Any, str | None] = {}
    for asked, name in study.asked().items():
        run = _find(files, name, asked)
        if isinstance(run, Run):
            found[asked] = run
        else:
            absent[asked] = run
    return Recorded(study, found, absent)


def open_study(files: StudyFiles, kind: type[T]) -> T:
    """The content of `study.json`, of a known format and kind.

    Args:
        files: The records of the study.
        kind: Of the record that it is read as.

    Raises:
        RecordError: If the file is damaged, or of another format or kind.
    """
    files.study(_Head)
    return files.study(kind)


def read_kind(study_dir: Path) -> str:
    """What a study directory holds.

    Raises:
        RecordError: As `open_study`, or if there is no study.
    """
    return StudyFiles(study_dir).study(_Head).kind


def named(runs: Mapping[str, A], asked: Sequence[A], among: str) -> dict[A, str | None]:
    """What is asked for, each with the name of its run, or None.

    Args:
        runs: What each is, by name.
        asked: What they may be, each once.
        among: The same in words, for error messages.

    Raises:
        ValueError: If a run is nothing of that, or what another one is already.
    """
    names: dict[A, str | None] = dict.fromkeys(asked)
    for name, one in runs.items():
        if one not in names:
            raise wrong(f"runs.{name}", among, str(one))
        if names[one] is not None:
            raise ValueError(f"runs.{name} must be the only run of {one}, which {names[one]} is already")
        names[one] = name
    return names


def check_baseline(baseline: str, methods: Sequence[str]) -> None:
    """Refuse to compare with a method that does not take part.

    Raises:
        ValueError: If it is not one of the methods.
    """
    if baseline not in methods:
        raise wrong("baseline", f"one of the methods {list(methods)}", baseline)


def _find(study: StudyFiles, name: str | None, asked: Asked) -> Run | str | None:
    """The run that a study asks for, or what is wrong with it, or None if it has not been started."""
    if name is None or not (files := study.run(name)).has("config.json"):
        return None
    try:
        run = read_run(files)
        asked.check(run, files)
        if name not in names_of(run.config):
            changed = f"changed since the run began, its content belongs to a run named {run_hash(run.config)}"
            raise files.error("config.json", changed)
    except RecordError as problem:
        return study.told(problem)
    return run
