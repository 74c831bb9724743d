"""Checkpoints: written at once, checked byte by byte when read, and loaded without running code from the file."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from steepest.lab.ledger import write_whole


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the text says why and what to do."""

    def __init__(self, path: Path, problem: str) -> None:
        remedy = "Delete this file and repeat the command: the run starts again from step 0, nothing else is lost."
        super().__init__(f"{path}: the checkpoint cannot be used ({problem}). {remedy}")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at once, on disk before this returns.

    Args:
        path: The file.
        state: Tensors, numbers, strings, and lists and dicts of them.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name of the file, too
    finally:
        os.close(directory)


def load_checkpoint(path: Path, *, keys: set[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Args:
        path: The file.
        keys: What must be in it, no more and no less.

    Raises:
        CheckpointError: If the file is damaged, would run code, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not look at the checksums
        if damaged is not None:
            raise CheckpointError(path, f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, ValueError, KeyError) as problem:
        raise CheckpointError(path, _first_line(problem)) from problem
    except RuntimeError as problem:
        if isinstance(problem, CheckpointError):
            raise
        raise CheckpointError(path, _first_line(problem)) from problem
    if not isinstance(state, dict) or set(state) != keys:
        raise CheckpointError(path, f"it must hold {sorted(keys)}")
    return state


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]
