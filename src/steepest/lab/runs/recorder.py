"""Where the numbers of a run go: `metrics.jsonl`, which is the truth, and TensorBoard events for the eye."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import msgspec

from steepest.lab.disk.fields import Count, RecordError, Text, decode, parse_object
from steepest.lab.disk.files import exists, open_to_append, read_lines, write_all, write_whole
from steepest.lab.runs.records import Final
from steepest.lab.tasks.held_out import Evaluation

_REMEDY = "Delete the run's directory and repeat the command: only this run is trained again."


class Recorder:
    """Writes the rows of a run. Use it as a context manager.

    Args:
        run_dir: The run's directory; None writes nothing, as on ranks other than the first.
        step: Optimizer steps done so far; later rows are dropped, see `MetricsFile`.

    Raises:
        ModuleNotFoundError: If TensorBoard is not installed.
        RecordError: If the rows so far are damaged.
    """

    def __init__(self, run_dir: Path | None, *, step: int) -> None:
        self._metrics = self._events = None
        if run_dir is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "A training run writes TensorBoard events, and tensorboard is not installed: "
                "pip install 'steepest[lab]'."
            ) from error
        self._metrics = MetricsFile(run_dir / "metrics.jsonl", step=step)
        # from step 0 on, too: a run that was killed before its first checkpoint has left events
        self._events = SummaryWriter(str(run_dir), purge_step=step + 1 if step else 0)

    def train(
        self,
        *,
        step: int,
        tokens: int,
        loss: float,
        lr: float,
        forward_backward_s: float,
        optimizer_s: float,
        train_s: float,
    ) -> None:
        """Record one optimizer step; a loss that is not finite becomes null with "diverged": true."""
        seconds = {"forward_backward_s": forward_backward_s, "optimizer_s": optimizer_s, "train_s": train_s}
        row = {"kind": "train", "step": step, "tokens": tokens, **_finite(loss), "lr": lr, **seconds}
        self._append(row)
        self._show("loss/train", loss, step)
        self._show("lr", lr, step)
        self._show("time/forward_backward", forward_backward_s, step)
        self._show("time/optimizer", optimizer_s, step)

    def evaluation(self, result: Evaluation, *, step: int, tokens: int, train_s: float) -> None:
        """Record one evaluation; a loss that is not finite becomes null with "diverged": true."""
        row = {"kind": "eval", "step": step, "tokens": tokens, **_finite(result.loss), "accuracy": result.accuracy}
        self._append({**row, "train_s": train_s})
        self._show("loss/eval", result.loss, step)
        if result.accuracy is not None:
            self._show("accuracy/eval", result.accuracy, step)

    def final(self, final: Final, *, step: int) -> None:
        """Record what the run is judged by."""
        self._append({"kind": "final", "step": step, **msgspec.structs.asdict(final)})
        self._show("loss/final", final.loss, step)

    def diagnostics(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Record numbers of an optimizer by name; one that is not finite becomes null."""
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        self._append({"kind": "diagnostics", "step": step, "numbers": finite})
        for name, number in numbers.items():
            self._show(f"optimizer/{name}", number, step)

    def sync(self) -> None:
        """Bring all rows and events so far to the disk."""
        if self._metrics and self._events:
            self._metrics.sync()
            self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics and self._events:
            self._metrics.close()
            self._events.close()

    def _append(self, row: Mapping[str, object]) -> None:
        if self._metrics:
            self._metrics.append(row)

    def _show(self, name: str, number: float, step: int) -> None:
        if self._events:
            self._events.add_scalar(name, number, step)


def _finite(loss: float) -> dict[str, object]:
    return {"loss": loss} if math.isfinite(loss) else {"loss": None, "diverged": True}


class MetricsFile:
    """`metrics.jsonl`, open for appending; each row is one line and one write.

    Args:
        path: The file. Rows after `step` are dropped, and so is a last line that was cut short: both were written
            after the checkpoint from which the run now goes on.
        step: Optimizer steps done so far.

    Raises:
        RecordError: If a row up to `step` is damaged or missing.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        rows = _rows_until(path, step) if step and exists(path) else []
        trained = [row["step"] for row in rows if row["kind"] == "train"]
        if trained != list(range(1, step + 1)):
            problem = f"the checkpoint is at step {step}, but {len(trained)} training rows lead up to it"
            raise RecordError(path, problem, _REMEDY)
        write_whole(path, "".join(map(_line, rows)))
        self._path = path
        self._file = open_to_append(path)
        self._size = os.fstat(self._file).st_size

    def append(self, row: Mapping[str, object]) -> None:
        """Write one row, whole or not at all; numbers must be finite.

        Raises:
            OSError: If it could not be written, as on a full disk.
        """
        line = _line(row).encode()
        try:
            write_all(self._file, line)
        except OSError as problem:
            os.ftruncate(self._file, self._size)  # a part of a row would run into the next one
            raise OSError(problem.errno, problem.strerror, str(self._path)) from problem
        self._size += len(line)

    def sync(self) -> None:
        """Make sure that all rows so far would survive a power failure."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _line(row: Mapping[str, object]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


class _Row(msgspec.Struct):
    kind: Text
    step: Count


def _rows_until(path: Path, step: int) -> list[Mapping[str, object]]:
    """The rows of the first `step` steps, the evaluation after the last of them included."""
    rows: list[Mapping[str, object]] = []
    for number, line in enumerate(read_lines(path, remedy=_REMEDY), start=1):
        where = f"line {number}: "
        if decode(_Row, line, path, remedy=_REMEDY, where=where).step <= step:
            rows.append(parse_object(line, path, remedy=_REMEDY, where=where))
    return rows
