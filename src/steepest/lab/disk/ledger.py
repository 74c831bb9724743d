"""The files of a run: whole lines, whole files, and one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Generator, Mapping
from pathlib import Path

import msgspec

from steepest.lab.disk.fields import Count, RecordError, Text, decode, parse_object
from steepest.lab.disk.files import exists, open_to_append, read_lines, remove_unfinished, write_all, write_whole
from steepest.lab.errors import Failure

__all__ = ["MetricsFile", "RunBusyError", "locked", "write_whole"]

_REMEDY = "Delete the run's directory and repeat the command: only this run is trained again."


class RunBusyError(Failure, RuntimeError):
    """Another process is writing to the run's directory."""


@contextlib.contextmanager
def locked(run_dir: Path) -> Generator[None]:
    """Hold the run's directory for this process; the kernel lets go when the process ends, however it ends.

    Raises:
        RunBusyError: If another process holds it.
        RecordError: If its `lock` is no regular file inside it.
    """
    descriptor = open_to_append(run_dir / "lock", empty=True)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = re.fullmatch(rb"([0-9]{1,10})\n", os.pread(descriptor, 12, 0))
            remedy = "Wait until it ends, or stop that process first: the run then goes on from its last checkpoint."
            process = owner[1].decode() if owner else "unknown"
            raise RunBusyError(f"{run_dir} is being trained by process {process}. {remedy}") from None
        os.ftruncate(descriptor, 0)
        write_all(descriptor, f"{os.getpid()}\n".encode())
        remove_unfinished(run_dir)  # of a holder that was killed
        yield
    finally:
        os.close(descriptor)


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
