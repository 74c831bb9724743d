"""A study on disk: which runs belong to it, and where each of them is."""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import msgspec

from steepest.lab.disk.fields import NAME, RecordError, RunName, Text, decode, read_text, wrong
from steepest.lab.disk.files import exists, make_directory, names_in, one_line, rename_directory, write_whole
from steepest.lab.disk.packed import PACKED, StudyFiles, unpacking
from steepest.lab.errors import UsageError
from steepest.lab.methods import METHODS
from steepest.lab.methods.tuned import OptionValue
from steepest.lab.runs.config import RunConfig, names_of, read_config, run_hash
from steepest.lab.runs.version import code_version
from steepest.lab.tasks.task import Task
from steepest.names import near_miss, unknown_name

FORMAT = 1
_REMEDY = "Choose another --out, or delete the file: runs that still fit are found by their content."


class StudyMismatchError(UsageError, ValueError):
    """The output directory holds a study of something else, or is no place for one."""


@dataclass(frozen=True, kw_only=True)
class StudyPlan(ABC):
    """What is asked for: methods on one task, each with the same seeds.

    Args:
        task: Data, model and sizes.
        methods: Keys of `METHODS`, at least one, each once.
        seeds: Of weights and order of examples; every method runs with each.
        options: Options by method that differ from its defaults.
        steps: Optimizer steps of a run; None for the preset's.

    Raises:
        ValueError: If a method is unknown or listed twice, has options without taking part, or there is no seed.
    """

    kind: ClassVar[str]  # a key of `KINDS`

    task: Task
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Mapping[str, OptionValue]]
    steps: int | None = None

    def __post_init__(self) -> None:
        for method in (*self.methods, *self.options):
            if method not in METHODS:
                raise ValueError(unknown_name("method", method, METHODS))
        if not self.methods or len(set(self.methods)) < len(self.methods):
            got = ", ".join(self.methods) or "none"
            raise ValueError(f"A {self.kind} takes each method once and at least one, got {got}.")
        self.check_takes_part("An option is given for", self.options)
        if not self.seeds:
            raise ValueError(f"A {self.kind} takes at least one seed, got none.")

    def check_takes_part(self, what: str, methods: Mapping[str, object] | Sequence[str]) -> None:
        """Refuse methods that something is said about, but that are not among those asked for."""
        for method in methods:
            if method not in self.methods:
                among = ", ".join(self.methods)
                guess = near_miss(method, self.methods)
                raise ValueError(f"{what} {method!r}, which is not among the methods {among}; add it.{guess}")

    @abstractmethod
    def configs(self) -> list[RunConfig]:
        """Every run, in an order in which a study cut short still compares like with like.

        Raises:
            ValueError: If an option is unknown or out of range, or a method does not fit the task.
            TypeError: If an option is of the wrong type.
        """

    def grown(self, out: Path) -> list[RunConfig]:
        """Every run that is known to be needed by now; more, for a plan that goes by the results in `out`."""
        del out
        return self.configs()

    def described(self, config: RunConfig) -> dict[str, object]:
        """What `study.json` says of a run."""
        return {"method": config.method, "seed": config.seed}

    @abstractmethod
    def own_fields(self) -> Mapping[str, object]:
        """What `study.json` holds for this kind of study only."""


@dataclass(frozen=True)
class Listing:
    """What `study.json` lists.

    Args:
        name: Of the study, wherever runs of many studies are handed out; another code is another study.
        runs: Method of each run, by the name of its directory.
    """

    name: str
    runs: Mapping[str, str]


def rounded(rate: float) -> float:
    """To six digits, so that the name of a run does not depend on the last bit."""
    return float(f"{rate:.6g}")


def run_directory(out: Path, config: RunConfig) -> Path:
    """Where a run of a study lives: named by its content, so that a finished run is found and never run again."""
    return out / "runs" / run_hash(config)


def write_configs(out: Path, configs: Iterable[RunConfig]) -> None:
    """Make the directory of each run, with its `config.json`; what is there already stays.

    Raises:
        OSError: If they cannot be written.
    """
    for config in configs:
        directory = run_directory(out, config)
        make_directory(directory)
        if not exists(directory / "config.json"):
            write_whole(directory / "config.json", config.to_json())


def write_study(out: Path, plan: StudyPlan, configs: Sequence[RunConfig], *, command: str) -> None:
    """Write `study.json` and each run's `config.json`; what is there already stays, by the names of today.

    Args:
        out: Directory of the study, made if need be.
        plan: What was asked for.
        configs: Its runs.
        command: How to repeat it, for the report.

    Raises:
        StudyMismatchError: If the directory holds a study of another kind, or on another task or preset.
        RecordError: If its `study.json` is damaged.
        OSError: If the directory cannot be written.
    """
    path = out / "study.json"
    fresh = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "id": secrets.token_hex(6)}
    kept = _kept(path, plan) if exists(path) else {}
    if kept:
        _rename(out)
    write_configs(out, configs)
    content = {
        "format": FORMAT,
        "kind": plan.kind,
        "task": plan.task.name,
        "preset": plan.task.preset,
        "methods": plan.methods,
        "seeds": plan.seeds,
        **plan.own_fields(),
        "runs": {run_hash(config): plan.described(config) for config in configs},
        "command": command,
        **fresh,
        **kept,
    }
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _rename(out: Path) -> None:
    """Give runs of today's training code that have a name of an older rule the one by which they are found."""
    for old in names_in(out / "runs") if exists(out / "runs") else ():
        directory = out / "runs" / old
        if not NAME.match(old) or not exists(directory / "config.json"):
            continue
        try:
            config = read_listed(directory)
        except RecordError:  # which is told when it is trained or reported
            continue
        if config.code == code_version() and old in names_of(config) and not exists(run_directory(out, config)):
            rename_directory(directory, run_hash(config))


def read_listing(out: Path) -> Listing:
    """Read which runs belong to a study, for whoever trains them.

    Raises:
        RecordError: If there is no study, or its `study.json` is damaged.
    """
    if (files := StudyFiles(out)).packed:
        raise RecordError(out / PACKED, "the runs of this study are packed", unpacking(out))
    study = files.study(_Listed)
    runs = {name: run.method for name, run in study.runs.items()}
    return Listing(f"{study.kind} {study.task}-{study.preset} {study.id} {code_version()}", runs)


def read_listed(run: Path) -> RunConfig:
    """The config of a run that a study has written.

    Raises:
        RecordError: If it is missing or damaged.
    """
    again = "Delete the run's directory and repeat the command that made the study: it writes the file anew."
    return read_config(run, remedy=again)


def _kept(path: Path, plan: StudyPlan) -> dict[str, str]:
    """What stays of the study that is there, after a look at whether it is the same one."""
    old = decode(_Old, read_text(path, remedy=_REMEDY), path, remedy=_REMEDY)
    if (old.kind, old.task, old.preset) != (plan.kind, plan.task.name, plan.task.preset):
        raise StudyMismatchError(
            f"{path.parent} holds a {one_line(old.kind)} on {old.task!r} at preset {old.preset!r}, "
            f"not a {plan.kind} on {plan.task.name!r} at {plan.task.preset!r}. Choose another --out."
        )
    return {"created": old.created} | ({} if old.id is None else {"id": old.id})


class _Old(msgspec.Struct):
    kind: Text
    task: Text
    preset: Text
    created: Text
    id: Text | None = None


class _Method(msgspec.Struct):
    method: Text


class _Listed(msgspec.Struct):
    kind: Text
    task: Text
    preset: Text
    id: Text
    runs: dict[RunName, _Method]

    def __post_init__(self) -> None:
        for key in ("kind", "task", "preset", "id"):
            if not (value := getattr(self, key)).isprintable():
                raise wrong(key, "a string without control characters", value)
