"""Stored records of runs, written, read back and validated: what is in the files, or an error, never a guess.

The files may have been edited, cut short or sent by a stranger, so every field is checked before anything is computed
from it, and what two files both say is compared. Text is kept as it is: whoever displays it escapes it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from steepest.lab.disk.fields import (
    HUGE,
    LARGEST,
    Count,
    Positive,
    Seconds,
    Text,
    Versioned,
    decode,
    parse_object,
    read_text,
    wrong,
)
from steepest.lab.disk.files import exists
from steepest.lab.disk.packed import RunFiles
from steepest.lab.runs.config import RunConfig
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


Status = Literal["finished", "diverged", "unfinished"]


class _Row(msgspec.Struct, frozen=True, tag_field="kind"):
    """One line of `metrics.jsonl`."""


class TrainRow(_Row, frozen=True, tag="train"):
    """One optimizer step, counted from 1. Seconds; `train_s` is cumulative and leaves evaluations out."""

    step: Positive
    tokens: Count
    loss: float | None
    lr: float
    forward_backward_s: Seconds
    optimizer_s: Seconds
    train_s: Seconds

    def __post_init__(self) -> None:
        force_setattr(self, "loss", _bounded(self.loss))


class EvalRow(_Row, frozen=True, tag="eval"):
    """One evaluation after `step` steps; `loss` is None where it was not finite."""

    step: Count
    tokens: Count
    loss: float | None
    accuracy: float | None
    train_s: Seconds

    def __post_init__(self) -> None:
        force_setattr(self, "loss", _bounded(self.loss))


class Diagnostics(_Row, frozen=True, tag="diagnostics"):
    """Numbers of an optimizer, for the eye: no report reads them."""

    numbers: dict[str, object]


@dataclass(frozen=True)
class Run:
    """One training run. `name` is its directory under `runs/`; `result` is None while it has not ended."""

    name: str
    config: RunConfig
    environment: Mapping[str, object]
    train: tuple[TrainRow, ...]
    evals: tuple[EvalRow, ...]
    result: Result | None

    @property
    def status(self) -> Status:
        """Whether the run has ended, and how."""
        return "unfinished" if self.result is None else self.result.status


def read_run(files: RunFiles) -> Run:
    """Read one run, finished or not. A run that ended at a loss above `HUGE` counts as diverged.

    Raises:
        RecordError: If a file is damaged, or `result.json` does not follow from the rows of `metrics.jsonl`.
    """
    config = RunConfig.from_json(files.text("config.json"), path=files.path / "config.json", remedy=files.remedy)
    result_path = files.path / "result.json"
    result = (
        parse_result(files.text("result.json"), path=result_path, remedy=files.remedy)
        if files.has("result.json")
        else None
    )
    train, evals, final = _metrics(files) if files.has("metrics.jsonl") or result else ((), (), None)
    _agree(files, result, config, evals, final)
    environment = _environment(files) if files.has("environment.json") else {}
    return Run(files.path.name, config, environment, train, evals, _diverged_if_huge(result))


def check_positive(files: RunFiles, run: Run) -> None:
    """Refuse a run with an evaluation that has no logarithm, for studies that go by it.

    Raises:
        RecordError: It names the line.
    """
    if all(row.loss is None or row.loss > 0 for row in run.evals):
        return
    for number, row in enumerate(_rows(files), start=1):
        if isinstance(row, EvalRow) and row.loss is not None and row.loss <= 0:
            needed = f"line {number}: loss must be above 0, as steps to a loss are found by its logarithm"
            raise files.error("metrics.jsonl", f"{needed}, got {row.loss}")


def finals(runs: Iterable[Run]) -> dict[int, float | None]:
    """Final loss by seed of the runs that have ended; None for a diverged one."""
    return {run.config.seed: run.result.final_loss for run in runs if run.result is not None}


def _rows(files: RunFiles) -> Iterator[TrainRow | EvalRow | Final | Diagnostics]:
    """The rows of a run; a last line without its line end is still being written, and left out."""
    kinds = cast("type[TrainRow | EvalRow | Final | Diagnostics]", TrainRow | EvalRow | Final | Diagnostics)
    path = files.path / "metrics.jsonl"
    for number, line in enumerate(files.lines("metrics.jsonl"), start=1):
        yield decode(kinds, line, path, remedy=files.remedy, where=f"line {number}: ")


def _environment(files: RunFiles) -> Mapping[str, object]:
    return parse_object(files.text("environment.json"), files.path / "environment.json", remedy=files.lost)


def _bounded(loss: float | None) -> float | None:
    return None if loss is None or abs(loss) > HUGE else loss


def _diverged_if_huge(result: Result | None) -> Result | None:
    if result is None or _bounded(result.final_loss) == result.final_loss:
        return result
    return dataclasses.replace(result, status="diverged", final_loss=None, final_accuracy=None)


def _metrics(files: RunFiles) -> tuple[tuple[TrainRow, ...], tuple[EvalRow, ...], Final | None]:
    train: list[TrainRow] = []
    evals: list[EvalRow] = []
    final: Final | None = None
    for number, row in enumerate(_rows(files), start=1):
        if isinstance(row, Final):
            final = row
        elif not isinstance(row, Diagnostics):
            before = train if isinstance(row, TrainRow) else evals
            if before and row.step <= before[-1].step:
                order = f"step must be larger than {before[-1].step}, the one before it, got {row.step}"
                raise files.error("metrics.jsonl", f"line {number}: {order}")
            train.append(row) if isinstance(row, TrainRow) else evals.append(row)
    return tuple(train), tuple(evals), final


def _agree(
    files: RunFiles, result: Result | None, config: RunConfig, evals: tuple[EvalRow, ...], final: Final | None
) -> None:
    """Refuse a finished run whose result is not what the last rows of its own metrics say."""
    if result is None or result.status == "diverged":
        return
    last = evals[-1] if evals else None
    early = config.target is not None and 0 < result.steps <= config.steps
    if last is None or last.step != result.steps or not (early or result.steps == config.steps):
        got = f"the last evaluation is at step {last.step if last else None}, the result at step {result.steps}"
        raise files.error("result.json", f"the run counts as finished with {config.steps} steps, but {got}")
    if (final is None) != (result.tuning_loss is None):
        there, missing = ("result.json", "metrics.jsonl") if final is None else ("metrics.jsonl", "result.json")
        raise files.error("result.json", f"{there} has the evaluation of a whole part, {missing} has not")
    if final is not None and (final.tuning_loss, final.blocks) != (result.tuning_loss, result.final_blocks):
        raise files.error("result.json", "tuning_loss or final_blocks are not those of the final row in metrics.jsonl")
    own, recorded = _bounded(result.final_loss), _bounded(final.loss) if final is not None else last.loss
    if recorded != own and (recorded is None or own is None or not math.isclose(recorded, own, rel_tol=1e-6)):
        problem = f"final_loss is {result.final_loss}, but the last evaluation in metrics.jsonl is {recorded}"
        raise files.error("result.json", problem)
