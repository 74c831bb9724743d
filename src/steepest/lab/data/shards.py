"""Shards of GPT-2's tokens: the .bin files that modded-nanogpt and llm.c train on."""

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np

from steepest.lab.disk.files import DataError, one_line, open_data

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")

MAGIC, VERSION = 20240520, 1
HEADER = 1024  # bytes: 256 little-endian int32, of which the first three are magic, version and number of tokens
VOCABULARY = 50257  # GPT-2's tokens
END_OF_TEXT = 50256  # stands before every document, as llm.c's dev/data/fineweb.py has it
LARGEST_SHARD = 2**31 - 1  # tokens, as many as the header can promise
REMEDY = (
    "Download shards, for example with modded-nanogpt's data/cached_fineweb10B.py, or make them of texts of your own "
    "with `steepest data pack`, and give the folder with *_train_*.bin and *_val_*.bin."
)
FOREIGN = f"GPT-2's vocabulary ends at {VOCABULARY - 1}. It is damaged, or of another tokenizer."


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Args:
        path: Where it is.
        tokens: How many it holds.
    """

    path: Path
    tokens: int

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return HEADER + 2 * self.tokens


def header(tokens: int) -> bytes:
    """What stands before so many tokens."""
    fields = np.zeros(HEADER // 4, dtype="<i4")
    fields[:3] = MAGIC, VERSION, tokens
    return fields.tobytes()


def read_shard(path: Path, *, remedy: str = REMEDY) -> Shard:
    """Check the header of a shard against its size.

    Args:
        path: Where it is.
        remedy: What to do if it is none; ends every error message.

    Raises:
        DataError: If it is no regular file, of another format or version, or not as long as it says.
        OSError: If it cannot be read.
    """
    with open_data(path) as file:
        first = file.read(HEADER)
        size = os.fstat(file.fileno()).st_size
    if len(first) < HEADER:
        raise DataError(f"{path} has {len(first)} bytes, less than the header of {HEADER}: it is damaged. {remedy}")
    magic, version, tokens = (int(number) for number in np.frombuffer(first, dtype="<i4", count=3))
    if (magic, version) != (MAGIC, VERSION):
        expected = f"the magic number {MAGIC} and version {VERSION}, which is GPT-2's tokens in 16 bits"
        raise DataError(f"{path} starts with {magic} and {version}, not with {expected}. {remedy}")
    if tokens < 0 or size != HEADER + 2 * tokens:
        problem = f"{path} has {size} bytes; its header promises {tokens} tokens, which take {HEADER + 2 * tokens}"
        raise DataError(f"{problem}. It is damaged, perhaps not downloaded to its end. {remedy}")
    return Shard(path, tokens)


def shard_paths(folder: Path, split: SplitName, *, needed: bool = True, remedy: str = REMEDY) -> list[Path]:
    """Where the shards of a split are, in the order of their names.

    Args:
        folder: Where to look.
        split: Which.
        needed: Whether there must be one.
        remedy: What to do if there is none; ends the error message.

    Raises:
        FileNotFoundError: If there is none, and one is needed.
        DataError: If a name is that of both splits.
    """
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    for path in paths:
        if all(fnmatchcase(path.name, f"*_{one}_*.bin") for one in SPLITS):
            problem = f"{one_line(str(path))} has the name of both splits, *_train_*.bin and *_val_*.bin"
            raise DataError(f"{problem}: it would be trained on and held out. Rename it, or take it away.")
    if needed and not paths:
        raise FileNotFoundError(f"{str(folder)!r} has no *_{split}_*.bin. {remedy}")
    return paths
