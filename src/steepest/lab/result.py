"""What a run came to, as recorded in `result.json`; the file exists only when the run has ended."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steepest.lab.fields import Fields, parse_object, read_text

FORMAT = 1
_REMEDY = "Delete this file and repeat the command: the run goes on from its last checkpoint."


@dataclass(frozen=True)
class Result:
    """The end of a run.

    Args:
        status: "diverged" if a loss was not finite: the run stopped there.
        steps: Optimizer steps done.
        final_loss: The last evaluation; None after divergence.
        final_accuracy: None after divergence, and for tasks without one.
        train_s: Seconds of training; evaluation and checkpoints are not counted.
        optimizer_s: The part of it in the optimizer.
        forward_backward_s: The part of it in data, forward and backward.
        peak_memory_bytes: Largest resident memory of the process.
        finished: When, ISO 8601 with time zone.
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

    def to_json(self) -> str:
        """The content of `result.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, allow_nan=False) + "\n"


def read_result(path: Path, *, remedy: str = _REMEDY) -> Result | None:
    """What the file says; None if the run has not ended.

    Args:
        path: The file.
        remedy: What to do about a damaged file, for error messages.

    Raises:
        RecordError: If the file is damaged.
    """
    if not path.exists():
        return None
    fields = parse_object(read_text(path, remedy=remedy), path, remedy=remedy)
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
    )


def _status(fields: Fields) -> Literal["finished", "diverged"]:
    status = fields.text("status")
    if status not in ("finished", "diverged"):
        raise fields.error("status", "'finished' or 'diverged'")
    return status
