"""A study on disk: which runs belong to it, and where each of them is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from steepest.lab.config import RunConfig, configure, run_hash
from steepest.lab.fields import parse_object, read_text
from steepest.lab.ledger import write_whole
from steepest.lab.methods import METHODS, check_buildable
from steepest.lab.tasks import Task
from steepest.lab.tuned import OptionValue
from steepest.names import unknown_name

FORMAT = 1
_REMEDY = "Choose another --out, or delete the file: runs that still fit are found by their content."


class StudyMismatchError(ValueError):
    """The output directory holds a study of something else, or is no place for one."""


@dataclass(frozen=True)
class Race:
    """Methods on one task, each with the same seeds.

    Args:
        task: Data, model and sizes.
        methods: Keys of `METHODS`, at least one, each once.
        seeds: Of weights and order of examples; every method runs with each.
        baseline: The method that others are compared with; one of `methods`.
        options: Options by method that differ from its defaults.
        steps: Optimizer steps of a run; None for the preset's.

    Raises:
        ValueError: If a method is unknown or listed twice, the baseline does not race, or there is no seed.
    """

    task: Task
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    options: Mapping[str, Mapping[str, OptionValue]]
    steps: int | None = None

    def __post_init__(self) -> None:
        for method in (*self.methods, *self.options):
            if method not in METHODS:
                raise ValueError(unknown_name("method", method, METHODS))
        repeated = {method for method in self.methods if self.methods.count(method) > 1}
        if repeated or not self.methods:
            raise ValueError(
                f"A race takes each method once and at least one, got {', '.join(self.methods) or 'none'}."
            )
        for method in {self.baseline, *self.options} - set(self.methods):
            what = "The baseline" if method == self.baseline else "An option is given for"
            raise ValueError(f"{what} {method!r}, which is not among the methods {', '.join(self.methods)}; add it.")
        if not self.seeds:
            raise ValueError("A race takes at least one seed, got none.")

    def configs(self) -> list[RunConfig]:
        """One run per seed and method, all methods of a seed together: a race cut short still compares like with like.

        Raises:
            ValueError: If an option is unknown or out of range, or a method does not fit the task.
            TypeError: If an option is of the wrong type.
        """
        configs = [
            configure(self.task, method=method, seed=seed, options=self.options.get(method), steps=self.steps)
            for seed in self.seeds
            for method in self.methods
        ]
        for config in configs[: len(self.methods)]:  # before anything is written or trained
            check_buildable(config.method, self.task, config.options)
        return configs


def run_directory(out: Path, config: RunConfig) -> Path:
    """Where a run of a study lives: named by its content, so that a finished run is found and never run again."""
    return out / "runs" / run_hash(config)


def write_study(out: Path, race: Race, configs: Sequence[RunConfig], *, command: str) -> None:
    """Write `study.json` and each run's `config.json`; what is there already stays.

    Args:
        out: Directory of the study, made if need be.
        race: What was asked for.
        configs: Its runs.
        command: How to repeat it, for the report.

    Raises:
        StudyMismatchError: If the directory holds a study on another task or preset.
        RecordError: If its `study.json` is damaged.
        OSError: If the directory cannot be written.
    """
    path = out / "study.json"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    if path.exists():
        old = parse_object(read_text(path, remedy=_REMEDY), path, remedy=_REMEDY)
        there, here = (old.text("task"), old.text("preset")), (race.task.name, race.task.preset)
        if there != here:
            raise StudyMismatchError(
                f"{out} holds a race on {there[0]!r} at preset {there[1]!r}, not on {here[0]!r} at {here[1]!r}. "
                "Choose another --out."
            )
        created = old.text("created")
    for config in configs:
        directory = run_directory(out, config)
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "config.json").exists():
            write_whole(directory / "config.json", config.to_json())
    content = {
        "format": FORMAT,
        "kind": "race",
        "task": race.task.name,
        "preset": race.task.preset,
        "methods": race.methods,
        "baseline": race.baseline,
        "seeds": race.seeds,
        "runs": {run_hash(config): {"method": config.method, "seed": config.seed} for config in configs},
        "command": command,
        "created": created,
    }
    write_whole(path, json.dumps(content, indent=2) + "\n")
