"""What defines a run: one frozen record, written as `config.json`, and the hash that names the run's directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from steepest.lab.disk.fields import (
    LARGEST,
    Count,
    Positive,
    RecordError,
    Text,
    Versioned,
    decode,
    parse_object,
    read_text,
    wrong,
)
from steepest.lab.methods import LATER, RATES, resolve
from steepest.lab.methods.tuned import OptionValue, Tuning
from steepest.lab.runs.version import code_version
from steepest.lab.tasks.held_out import Part
from steepest.lab.tasks.task import Budget, DataIdentity, Precision, Schedule, Task
from steepest.names import unknown_name

FORMAT = 1
_REMEDY = (
    "Delete the run's directory, if it is one, and repeat the command: only this run is trained again. Or choose "
    "another --out."
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that the numbers of a run depend on, apart from the machine, and how its options were found.

    Args:
        task: Name of the task.
        preset: Size of the task.
        method: Name of the method that trains the model.
        options: Every option of the method, defaults included.
        seed: Of the weights and of the order of the examples, from 0 to 2^63 - 1.
        steps: Optimizer steps, at least 1.
        batch_size: Examples per step, at least 1.
        eval_every: Steps from one evaluation to the next, at least 1; the last step is always evaluated.
        tuning: How the options were found; None for options chosen by hand, at an unknown budget. No part of what the
            run is.
        code: Version of the code that trains.
        data: Which data, exactly.
        schedule: Of the learning rate; see `rate_factor`.
        target: Validation loss at which the run ends early, and for which it is evaluated more often; see `reached`.
            None: it goes to the last step.
        watch_from: Validation loss below which it is evaluated most often; None: from the start. With a target only.
        part: Of what is held out: "tuning" for a run that serves to choose options, which never looks at the other.
        precision: "bf16": forward passes of training under autocast; weights, gradients and state are float32.
        tail: Part of the run, at its end, whose weights are averaged, in [0, 1]; evaluated is then `tail_mix` of the
            average and the rest of the weights themselves. 0: no average.
        tail_parts: Into how many the tail is divided: about one of them the average looks back; see `TailAverage`.
        tail_mix: In (0, 1].
        outer: Strength of a look-ahead around the optimizer, at least 0; see `OuterNesterov`. 0: none.

    Raises:
        ValueError: If a number is out of range, or the schedule or the precision is unknown.
    """

    task: Text
    preset: Text
    method: Text
    options: Mapping[str, OptionValue]
    seed: Count
    steps: Positive
    batch_size: Positive
    eval_every: Positive
    tuning: Tuning | None
    code: Text
    data: DataIdentity
    schedule: Schedule = "cooldown"
    target: float | None = None
    watch_from: float | None = None
    part: Part = "report"
    precision: Precision = "fp32"
    tail: float = 0.0
    tail_parts: float = 1.0
    tail_mix: float = 1.0
    outer: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("schedule", Schedule), ("part", Part), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(unknown_name(name, getattr(self, name), get_args(kind)))
        for name in ("target", "watch_from"):
            if (loss := getattr(self, name)) is not None and not math.isfinite(loss):
                raise ValueError(f"{name} must be a finite loss or None, got {loss}.")
        for name, least in (("seed", 0), ("steps", 1), ("batch_size", 1), ("eval_every", 1)):
            if not least <= (value := getattr(self, name)) < LARGEST:
                raise ValueError(f"{name} must be a whole number of at least {least} and below 2^63, got {value}.")
        if not 0 <= self.tail <= 1:
            raise ValueError(f"tail must be between 0 and 1, a part of the run, got {self.tail}.")
        if not 0 <= self.outer < math.inf:
            raise ValueError(f"outer must be finite and at least 0, got {self.outer}.")
        if not (0 < self.tail_parts < math.inf and 0 < self.tail_mix <= 1):
            given = f"got {self.tail_parts} and {self.tail_mix}"
            raise ValueError(f"tail_parts must be finite and above 0, and tail_mix in (0, 1], {given}.")
        for name, value in self.options.items():
            if isinstance(value, int) and not -LARGEST < value < LARGEST:
                raise wrong(f"options.{name}", "a number between -2^63 and 2^63", value)

    @property
    def counted_options(self) -> dict[str, OptionValue]:
        """Those that count: options that older configs do not have only where they change what those runs did."""
        later = LATER.get(self.method, {})
        return {name: own for name, own in self.options.items() if name not in later or own != later[name]}

    def to_json(self) -> str:
        """The content of `config.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, path: Path, remedy: str = _REMEDY) -> RunConfig:
        """Read what `to_json` wrote.

        Args:
            text: Content of the file.
            path: The file, for error messages.
            remedy: What to do about a damaged file, for error messages.

        Raises:
            RecordError: If anything is missing, unknown, of the wrong type or out of range; it names file and key.
        """
        decode(Versioned, text, path, remedy=remedy)
        content = parse_object(text, path, remedy=remedy)
        try:
            _check_known(content, cls, "format")
            _check_known(content.get("data"), DataIdentity, inside="data.")
            _check_known(content.get("tuning"), Tuning, inside="tuning.")
        except ValueError as unknown:
            raise RecordError(path, str(unknown), remedy) from None
        return decode(cls, text, path, remedy=remedy)


def read_config(directory: Path, *, remedy: str = _REMEDY) -> RunConfig:
    """The config of a run.

    Args:
        directory: Of the run.
        remedy: What to do where there is none, or a damaged one, for error messages.

    Raises:
        RecordError: If it is missing or damaged.
    """
    path = directory / "config.json"
    return RunConfig.from_json(read_text(path, remedy=remedy), path=path, remedy=remedy)


def configure(
    task: Task,
    *,
    method: str,
    seed: int,
    options: Mapping[str, OptionValue] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    eval_every: int | None = None,
    schedule: Schedule | None = None,
    target: float | None = None,
    watch_from: float | None = None,
    part: Part = "report",
    precision: Precision | None = None,
    tail: float = 0.0,
    tail_parts: float = 1.0,
    tail_mix: float = 1.0,
    outer: float = 0.0,
) -> RunConfig:
    """The config of one run: what is not given comes from the task's preset and the method's defaults for it.

    Args:
        task: Data, model and sizes.
        method: A key of `METHODS`.
        seed: Of the weights and of the order of the examples, from 0 to 2^63 - 1.
        options: Options of the method that differ from its defaults; the tuning record then no longer applies.
        steps: None for the preset's at this batch size; the tuning record applies to no other number, and only to the
            task's own data.
        batch_size: None for the preset's; the tuning record applies to no other size. Where the preset says that rates
            go with its root, those that `options` leaves open do.
        eval_every: None for the preset's.
        schedule: None for the preset's; the tuning record applies to no other.
        target: As in the config; the tuning record applies to whole runs only.
        watch_from: As in the config.
        part: As in the config.
        precision: None for the preset's; the tuning record applies to no other.
        tail: As in the config; the tuning record applies to no run whose weights are averaged.
        tail_parts: As in the config.
        tail_mix: As in the config.
        outer: As in the config; the tuning record applies to no run with a look-ahead.

    Raises:
        ValueError: If a name is unknown or a number out of range.
    """
    budget, given = task.budget, options or {}
    resolved = resolve(method, task=task.name, preset=task.preset, options=given)
    batch_size = budget.batch_size if batch_size is None else batch_size
    schedule, precision = schedule or budget.schedule, precision or budget.precision
    usual = (budget.steps, budget.eval_every) if budget.at_batch_size is None else budget.at_batch_size(batch_size)
    steps = usual[0] if steps is None else steps
    known = (budget.steps, budget.batch_size, budget.schedule, budget.precision, None, 0, 0)
    whole = (steps, batch_size, schedule, precision, target, tail, outer) == known
    return RunConfig(
        task=task.name,
        preset=task.preset,
        method=method,
        options=_at_batch_size(resolved.options, given, batch_size, budget),
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        eval_every=usual[1] if eval_every is None else eval_every,
        tuning=resolved.tuning if task.own_data and whole else None,
        code=code_version(),
        data=task.data_identity(),
        schedule=schedule,
        target=target,
        watch_from=watch_from,
        part=part,
        precision=precision,
        tail=tail,
        tail_parts=tail_parts,
        tail_mix=tail_mix,
        outer=outer,
    )


def _at_batch_size(
    options: Mapping[str, OptionValue], given: Mapping[str, OptionValue], batch_size: int, budget: Budget
) -> Mapping[str, OptionValue]:
    """Options with the rates that go with the root of the batch size."""
    if not budget.root_rates or batch_size == budget.batch_size:
        return options
    factor = math.sqrt(batch_size / budget.batch_size)
    rates = {name: float(options[name]) * factor for name in RATES if name in options and name not in given}
    return {**options, **rates}


def run_hash(config: RunConfig) -> str:
    """The name of the run's directory: 16 hexadecimal digits.

    What the losses depend on counts, and nothing else: of the data the content, not the name, as a folder may be moved;
    of the options what they are, not how they were found. Fields and options that older configs do not have count only
    where they differ from what those runs did.
    """
    return _hash(dataclasses.replace(config, tuning=None))


def names_of(config: RunConfig) -> tuple[str, ...]:
    """The names that the run's directory may have: today's, and that of older records, by the record of its tuning."""
    return run_hash(config), _hash(config)


def _hash(config: RunConfig) -> str:
    content = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING and content[field.name] == field.default:
            del content[field.name]
    content["options"] = config.counted_options
    content["data"] = config.data.sha256
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _check_known(content: object, record: type, *more: str, inside: str = "") -> None:
    """Refuse keys that a record does not have: a misspelled one would be left out."""
    known = {*more, *(field.name for field in dataclasses.fields(record))}
    for key in content if isinstance(content, dict) else ():
        if key not in known:
            raise ValueError(f"{inside}{key} must be absent. {unknown_name('key', str(key), known)[:-1]}")
