"""Whose a directory is: it may be written to if it is empty or made by the lab, and by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Literal

from steepest.lab.disk.fields import parse_object
from steepest.lab.disk.files import (
    RecordError,
    exists,
    is_unfinished,
    open_to_append,
    read_bytes,
    read_text,
    remove_unfinished,
    write_all,
)
from steepest.lab.disk.packed import is_packed, unpacking
from steepest.lab.errors import Failure

Content = Literal["run", "study", "branches", "bench", "shards"]
_REMEDY = "Choose another --out: nothing of somebody else's is overwritten."
# What tells a directory of ours, and what every version of it has.
_MARKS = {
    "run": ("config.json", {"format", "method", "code"}),
    "study": ("study.json", {"format", "kind", "runs"}),
    "shards": ("manifest.json", {"format", "vocabulary", "shards"}),
}
_DATABASE = r"optuna\.db(-journal|-wal|-shm)?"
_REPORT = r"report\.html|plots|[a-z_]+\.csv"
_BRANCH = r"[0-9a-f]{16}-[0-9a-f]{12}-[0-9]+-[0-9]+-[a-z]+-[0-9]+\.json"
_BENCH = ("accuracy", "cost", "coverage", "gpu", "momenta", "momo", "passes", "ranks", "scaling", "step", "train")


class RunBusyError(Failure, RuntimeError):
    """Another process is writing to the run's directory."""


@contextlib.contextmanager
def locked(
    run_dir: Path, *, doing: str = "trained", after: str = "the run then goes on from its last checkpoint"
) -> Generator[None]:
    """Hold a directory, as that of a run, for this process; the kernel lets go when the process ends, however it ends.

    Args:
        run_dir: The directory.
        doing: What is done with it, for who comes second.
        after: What happens when the first one was stopped, likewise.

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
            remedy = f"Wait until it ends, or stop that process first: {after}."
            process = owner[1].decode() if owner else "unknown"
            raise RunBusyError(f"{run_dir} is being {doing} by process {process}. {remedy}") from None
        os.ftruncate(descriptor, 0)
        write_all(descriptor, f"{os.getpid()}\n".encode())
        remove_unfinished(run_dir)  # of a holder that was killed
        yield
    finally:
        os.close(descriptor)


def refusal(directory: Path, content: Content) -> str | None:
    """Why a directory cannot be written to, or None if it can: it is not there, empty, or ours.

    Args:
        directory: What was given as --out.
        content: What shall stand in it.
    """
    if not directory.is_dir() or not (names := set(os.listdir(directory))):
        return None
    if content == "study" and is_packed(directory):
        return f"{directory} holds a packed study. {unpacking(directory)} Or choose another --out."
    mark, keys = _MARKS.get(content, (None, set[str]()))
    if "lock" in names and not _is_lock(directory / "lock"):
        return f"{directory} holds a lock that the lab did not write. {_REMEDY}"
    if mark is not None and mark in names:
        foreign = _is_foreign(directory / mark, keys)
        return f"{directory} holds a {mark} that the lab did not write. {_REMEDY}" if foreign else None
    if _is_begun(directory, content, names):
        return None
    shown = sorted(names)[:3]
    among = f"{', '.join(map(repr, shown))}{' and more' if len(names) > len(shown) else ''}"
    lacks = f" and no {mark}" if mark is not None else ""
    return f"{directory} is not empty{lacks}, it holds {among}. {_REMEDY}"


def _is_begun(directory: Path, content: Content, names: set[str]) -> bool:
    """Whether everything in a directory without its mark is what the lab writes there."""
    if content == "bench":
        return any(_is_bench(directory / f"{name}.json") for name in _BENCH)
    rest = {name for name in names if not is_unfinished(name)} - {"lock"}
    if content in ("run", "shards"):
        return rest <= ({"worker.log"} if content == "run" else set())
    if content == "branches":
        return all(re.fullmatch(_BRANCH, name) for name in rest)
    runs = os.listdir(directory / "runs") if (directory / "runs").is_dir() else []
    if not all(re.fullmatch("[0-9a-f]{16}", name) for name in runs):
        return False
    known = f"runs|{_DATABASE}" + (f"|{_REPORT}" if runs else "")  # a study.json that was deleted is written anew
    return all(re.fullmatch(known, name) for name in rest)


def _is_foreign(path: Path, keys: set[str]) -> bool:
    """Whether a file is readable, and not ours; what is wrong with others says who reads them."""
    try:
        return not keys <= parse_object(read_text(path), path, remedy=_REMEDY).keys()
    except RecordError:
        return False


def _is_lock(path: Path) -> bool:
    """Whether a lock holds what ours do; links, pipes and the like are refused by whoever takes it."""
    try:
        return re.fullmatch(rb"[0-9]{0,10}\n?", read_bytes(path, most=64)) is not None
    except RecordError:
        return not path.is_file() or path.is_symlink()


def _is_bench(path: Path) -> bool:
    if not exists(path):
        return False
    try:
        return {"command", "commit", "environment"} <= parse_object(read_text(path), path, remedy=_REMEDY).keys()
    except RecordError:
        return False
