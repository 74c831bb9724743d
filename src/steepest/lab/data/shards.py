"""Shards of GPT-2's tokens: the .bin files that modded-nanogpt and llm.c train on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from steepest.lab.disk.files import DataError, open_data

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")

MAGIC, VERSION = 20240520, 1
HEADER = 1024  # bytes: 256 little-endian int32, of which the first three are magic, version and number of tokens
VOCABULARY = 50257  # GPT-2's tokens, of which the last is <|endoftext|>
REMEDY = (
    "Download shards, for example with modded-nanogpt's data/cached_fineweb10B.py, and give the folder with "
    "fineweb_train_*.bin and fineweb_val_*.bin: --data DIR."
)


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


def read_shard(path: Path) -> Shard:
    """Check the header of a shard against its size.

    Raises:
        DataError: If it is no regular file, of another format or version, or not as long as it says.
        OSError: If it cannot be read.
    """
    with open_data(path) as file:
        header = file.read(HEADER)
        size = os.fstat(file.fileno()).st_size
    if len(header) < HEADER:
        raise DataError(f"{path} has {len(header)} bytes, less than the header of {HEADER}: it is damaged. {REMEDY}")
    magic, version, tokens = (int(number) for number in np.frombuffer(header, dtype="<i4", count=3))
    if (magic, version) != (MAGIC, VERSION):
        expected = f"the magic number {MAGIC} and version {VERSION}, which is GPT-2's tokens in 16 bits"
        raise DataError(f"{path} starts with {magic} and {version}, not with {expected}. {REMEDY}")
    if tokens < 0 or size != HEADER + 2 * tokens:
        problem = f"{path} has {size} bytes; its header promises {tokens} tokens, which take {HEADER + 2 * tokens}"
        raise DataError(f"{problem}. It is damaged, perhaps not downloaded to its end. {REMEDY}")
    return Shard(path, tokens)


def shard_paths(folder: Path, split: SplitName) -> list[Path]:
    """Where the shards of a split are, in the order of their names.

    Raises:
        FileNotFoundError: If there is none.
    """
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise FileNotFoundError(f"--data {str(folder)!r} has no *_{split}_*.bin. {REMEDY}")
    return paths
