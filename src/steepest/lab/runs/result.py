"""What a run came to, as recorded in `result.json`; the file exists only when the run has ended."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from steepest.lab.disk.fields import LARGEST, Fields, parse_object, read_text
from steepest.lab.disk.files import exists
from steepest.lab.tasks.held_out import BLOCKS

FORMAT = 1
_REMEDY = "Delete this file and repeat the command: the run goes on from its last checkpoint."


@dataclass(frozen=True)
class Final:
    """What a run that ended is judged by: the evaluation of the whole of its part.

    Args:
        loss: On the part of its config.
        accuracy: Likewise; None for tasks without one.
        blocks: Likewise, see `Evaluation`.
        tuning_loss: On the part that options are chosen by.
    """

    loss: float
    accuracy: float | None
    blocks: tuple[float, ...]
    tuning_loss: float


@dataclass(frozen=True)
class Result:
    """The end of a run.

    Args:
        status: "diverged" if a loss was not finite: the run stopped there.
        steps: Optimizer steps done.
        final_loss: On the whole of its part, or, for a run to a target, the last evaluation; None after divergence.
        final_accuracy: None after divergence, and for tasks without one.
        train_s: Seconds of training; evaluation and checkpoints are not counted.
        optimizer_s: The part of it in the optimizer.
        forward_backward_s: The part of it in data, forward and backward.
        peak_memory_bytes: Largest resident memory of the process.
        finished: When, ISO 8601 with time zone.
        final_blocks: Of `final_loss`, see `Evaluation`; empty where it is exact, and in older records.
        tuning_loss: On the part that options are chosen by; None after divergence, for a run to a target, and in
            records of runs that had one held-out part for both.
    """

    status: Literal["finished", "diverged"]
    steps: int
    final_loss: float | None
    final_accuracy: float | None
    train_s: float
    optimizer_s: float
    forward_backward_s: float
    peak_memory_bytes: int
    finished: str
    final_blocks: tuple[float, ...] = ()
    tuning_loss: float | None = None

    def to_json(self) -> str:
        """The content of `result.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, allow_nan=False) + "\n"


def read_result(path: Path) -> Result | None:
    """What the file says; None if the run has not ended.

    Raises:
        RecordError: If the file is damaged.
    """
    return parse_result(read_text(path, remedy=_REMEDY), path=path, remedy=_REMEDY) if exists(path) else None


def parse_result(text: str, *, path: Path, remedy: str) -> Result:
    """What `to_json` wrote.

    Args:
        text: Content of the file.
        path: The file, for error messages.
        remedy: What to do about a damaged file, for error messages.

    Raises:
        RecordError: If anything is missing, of the wrong type or out of range.
    """
    fields = parse_object(text, path, remedy=remedy)
    fields.expect("format", FORMAT)
    status = _status(fields)
    if status == "diverged":
        fields.expect("final_loss", None)
    return Result(
        status=status,
        steps=fields.count("steps"),
        final_loss=fields.real("final_loss") if status == "finished" else None,
        final_accuracy=fields.real_or_none("final_accuracy"),
        train_s=fields.seconds("train_s"),
        optimizer_s=fields.seconds("optimizer_s"),
        forward_backward_s=fields.seconds("forward_backward_s"),
        peak_memory_bytes=fields.count("peak_memory_bytes"),
        finished=fields.text("finished"),
        final_blocks=blocks(fields, "final_blocks"),
        tuning_loss=fields.real_or_none("tuning_loss") if "tuning_loss" in fields.values else None,
    )


def blocks(fields: Fields, key: str) -> tuple[float, ...]:
    """A list of at most `BLOCKS` losses, or nothing in an older record.

    Raises:
        RecordError: If it is anything else.
    """
    value = fields.values.get(key, [])
    items = cast(list[object], value) if isinstance(value, list) else [None]
    if len(items) > BLOCKS or not all(_is_loss(item) for item in items):
        raise fields.error(key, f"a list of at most {BLOCKS} losses")
    return tuple(float(cast(float, item)) for item in items)


def _is_loss(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _status(fields: Fields) -> Literal["finished", "diverged"]:
    status = fields.text("status")
    if status not in ("finished", "diverged"):
        raise fields.error("status", "'finished' or 'diverged'")
    return status
