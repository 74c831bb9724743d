"""What a run came to, as recorded in `result.json`; the file exists only when the run has ended."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from steepest.lab.disk.fields import HUGE, LARGEST, Count, Seconds, Text, Versioned, decode, read_text, wrong
from steepest.lab.disk.files import exists
from steepest.lab.tasks.held_out import BLOCKS

FORMAT = 1
Blocks = Annotated[tuple[Annotated[float, Meta(gt=-LARGEST, lt=LARGEST)], ...], Meta(max_length=BLOCKS)]
_REMEDY = "Delete this file and repeat the command: the run goes on from its last checkpoint."


class Final(msgspec.Struct, frozen=True, tag_field="kind", tag="final"):
    """What a run that ended is judged by: the evaluation of the whole of its part.

    Args:
        loss: On the part of its config.
        accuracy: Likewise; None for tasks without one.
        blocks: Likewise, see `Evaluation`.
        tuning_loss: On the part that options are chosen by.
    """

    loss: float
    accuracy: float | None
    blocks: Blocks
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
    steps: Count
    final_loss: float | None
    final_accuracy: Annotated[float, Meta(ge=-HUGE, le=HUGE)] | None
    train_s: Seconds
    optimizer_s: Seconds
    forward_backward_s: Seconds
    peak_memory_bytes: Count
    finished: Text
    final_blocks: Blocks = ()
    tuning_loss: float | None = None

    def __post_init__(self) -> None:
        if (self.final_loss is None) != (self.status == "diverged"):
            expected = "null after divergence" if self.status == "diverged" else "a finite number"
            raise wrong("final_loss", expected, self.final_loss)

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
    decode(Versioned, text, path, remedy=remedy)
    return decode(Result, text, path, remedy=remedy)
