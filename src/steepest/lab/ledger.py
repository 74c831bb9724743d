"""The files of a run: whole lines, whole files, and one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Generator, Mapping
from pathlib import Path

from steepest.lab.fields import RecordError, parse_object, read_text

_REMEDY = "Delete the run's directory and repeat the command: only this run is trained again."


class RunBusyError(RuntimeError):
    """Another process is writing to the run's directory."""


@contextlib.contextmanager
def locked(run_dir: Path) -> Generator[None]:
    """Hold the run's directory for this process; the kernel lets go when the process ends, however it ends.

    Raises:
        RunBusyError: If another process holds it.
    """
    with (run_dir / "lock").open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            remedy = "Wait until it ends, or stop that process first: the run then goes on from its last checkpoint."
            raise RunBusyError(f"{run_dir} is being trained by process {owner}. {remedy}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        for unfinished in run_dir.glob(".*.tmp"):  # of a holder that was killed
            if not unfinished.name.startswith(".config.json."):  # which is written without the lock, too
                unfinished.unlink()
        yield


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file at once: a reader, or a crash at any moment, finds the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
        rows = _rows_until(path, step) if step and path.exists() else []
        trained = [row["step"] for row in rows if row["kind"] == "train"]
        if trained != list(range(1, step + 1)):
            problem = f"the checkpoint is at step {step}, but {len(trained)} training rows lead up to it"
            raise RecordError(path, problem, _REMEDY)
        write_whole(path, "".join(map(_line, rows)))
        self._file = path.open("ab", buffering=0)

    def append(self, row: Mapping[str, object]) -> None:
        """Write one row; numbers must be finite."""
        self._file.write(_line(row).encode())

    def sync(self) -> None:
        """Make sure that all rows so far would survive a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: Mapping[str, object]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _rows_until(path: Path, step: int) -> list[Mapping[str, object]]:
    """The rows of the first `step` steps, the evaluation after the last of them included."""
    rows: list[Mapping[str, object]] = []
    for number, line in enumerate(read_text(path, remedy=_REMEDY).split("\n")[:-1], start=1):
        fields = parse_object(line, path, remedy=_REMEDY, where=f"line {number}: ")
        fields.text("kind")
        if fields.count("step") <= step:
            rows.append(fields.values)
    return rows
