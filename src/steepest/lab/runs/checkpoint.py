"""Checkpoints: written at once, checked byte by byte when read, and loaded without running code from the file."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from steepest.lab.disk.files import RecordError, one_line, open_to_read, write_whole
from steepest.lab.errors import Failure

_REMEDY = "Delete this file and repeat the command: the run starts again from step 0, nothing else is lost."


class CheckpointError(Failure, RuntimeError):
    """A checkpoint cannot be used; the text says why and what to do."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(one_line(f"{path}: the checkpoint cannot be used ({problem}). {_REMEDY}"))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at once, on disk before this returns.

    Args:
        path: The file.
        state: Tensors, numbers, strings, and lists and dicts of them.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue(), durable=True)


def load_checkpoint(path: Path, *, keys: set[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Args:
        path: The file.
        keys: What must be in it, no more and no less.

    Raises:
        CheckpointError: If the file is damaged, would run code, or holds something else.
    """
    try:
        with open_to_read(path, remedy=_REMEDY, most=None) as file:
            with zipfile.ZipFile(file) as archive:
                _check_sizes(path, archive, os.fstat(file.fileno()).st_size)
                damaged = archive.testzip()  # torch.load itself does not look at the checksums
            if damaged is not None:
                raise CheckpointError(path, f"the checksum of {damaged} is wrong")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except RecordError as problem:
        raise CheckpointError(path, problem.problem) from None
    except Exception as problem:  # there is no list of what damaged pickles and archives raise
        raise CheckpointError(path, _first_line(problem)) from problem
    if not isinstance(state, dict) or set(state) != keys:
        raise CheckpointError(path, f"it must hold {sorted(keys)}")
    return state


def _check_sizes(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Refuse what is packed: a small file may then unfold to any size, and ours are not."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(path, "its content is packed, which ours is not")


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]
