"""`fineweb`: predict the next token of web text, from the .bin shards that modded-nanogpt and llm.c train on."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steepest.lab.data.manifest import read_manifest
from steepest.lab.data.shards import FOREIGN, HEADER, REMEDY, SPLITS, VOCABULARY, Shard, read_shard, shard_paths
from steepest.lab.disk.files import DataError, open_data
from steepest.lab.models.gpt import GPTConfig
from steepest.lab.tasks.held_out import TUNING_SHARE, Sizes
from steepest.lab.tasks.task import Budget, DataIdentity, PresetName, folder_of
from steepest.lab.tasks.windows import WindowPreset, WindowTask

PADDED = 50304  # rows of the model's tables, for GPT-2's 50257 tokens: a multiple of 128
HASHED = 2**20  # bytes at each end of a shard that count for its identity


def _model(layers: int, width: int, head_size: int) -> GPTConfig:
    return GPTConfig(vocabulary=PADDED, layers=layers, width=width, head_size=head_size)


PRESETS: dict[PresetName, WindowPreset] = {
    "demo": WindowPreset(_model(2, 128, 32), 128, Budget(steps=100, batch_size=4, eval_every=10), Sizes(32, 64, 256)),
    "tiny": WindowPreset(_model(4, 128, 32), 128, Budget(steps=500, batch_size=8, eval_every=25), Sizes(64, 128, 512)),
    "small": WindowPreset(
        _model(6, 256, 64), 256, Budget(steps=1000, batch_size=8, eval_every=50), Sizes(128, 256, 1024)
    ),
}


class FinewebTask(WindowTask):
    """GPT-2 tokens in windows that do not overlap or cross shards; an example is one window of T + 1 tokens.

    Shards stay on disk. They are read in the order of their names.

    Args:
        preset: One of the sizes.
        data: Folder with the shards, *_train_*.bin and *_val_*.bin.

    Raises:
        FileNotFoundError: If there is no folder, or no shard of a kind in it.
        DataError: If a shard is damaged or of another format.
        RecordError: If they were packed here, and are not those that were, as far as names and sizes tell.
        ValueError: If none fills one window.
    """

    name = "fineweb"
    own_data = False

    def __init__(self, preset: PresetName, *, data: Path | None = None) -> None:
        size, folder = PRESETS[preset], folder_of(self.name, data, REMEDY)
        shards, others = ([*map(read_shard, shard_paths(folder, split))] for split in SPLITS)
        if (manifest := read_manifest(folder)) is not None:
            manifest.check(folder, [*shards, *others])
        identity = _identify(folder.name, shards, others)
        train = ShardWindows(shards, size.window, part="training")
        held_out = ShardWindows(others, size.window, part="validation")
        tuning = len(held_out) // TUNING_SHARE
        if tuning == 0:
            problem = f"The validation shards of {folder.name!r} fill {len(held_out)} windows"
            raise ValueError(f"{problem}; {TUNING_SHARE} are needed, to tune by one of them. {REMEDY}")
        super().__init__(preset, size, train, held_out, tuning=tuning, identity=identity)
        self.evaluation_batch = size.budget.batch_size


class ShardWindows:
    """All whole windows of some shards, numbered through; a window is read when it is asked for.

    Args:
        shards: In order; those shorter than a window give none.
        window: T; a window has T + 1 tokens.
        part: What the shards are for, for the error message.

    Raises:
        ValueError: If no shard fills one window.
    """

    def __init__(self, shards: Sequence[Shard], window: int, *, part: str) -> None:
        self._length = window + 1
        filled = [shard for shard in shards if shard.tokens >= self._length]
        if not filled:
            longest = max(shard.tokens for shard in shards)
            problem = f"No {part} shard fills one window of {self._length} tokens; the longest has {longest}"
            raise ValueError(f"{problem}. {REMEDY}")
        self._shards = filled
        self._ends = torch.tensor([shard.tokens // self._length for shard in filled], device="cpu").cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Windows (B, T + 1) int64 of the given numbers (B,), each below the length.

        Raises:
            DataError: If there is a token in them that GPT-2 does not have, or a shard has another size by now.
        """
        places = torch.searchsorted(self._ends, numbers, right=True)
        read = [self._read(*pair) for pair in zip(places.tolist(), numbers.tolist(), strict=True)]
        return torch.from_numpy(np.stack(read))

    def _read(self, place: int, number: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        shard = self._shards[place]
        start = HEADER + 2 * (number - (int(self._ends[place - 1]) if place else 0)) * self._length
        with open_data(shard.path) as file:  # not mapped: a map of a file that shrinks ends the process
            size = os.fstat(file.fileno()).st_size
            content = os.pread(file.fileno(), 2 * self._length, start)
        if size != shard.bytes or len(content) < 2 * self._length:
            problem = f"{shard.path} had {shard.bytes} bytes when the run began, and has {size} now"
            raise DataError(f"{problem}. Bring the file back, and repeat the command. {REMEDY}")
        window = np.frombuffer(content, dtype="<u2").astype(np.int64)
        if (largest := int(window.max())) >= VOCABULARY:
            raise DataError(f"{shard.path} has the token {largest}; {FOREIGN} {REMEDY}")
        return window


def _identify(name: str, train: Sequence[Shard], validation: Sequence[Shard]) -> DataIdentity:
    """Name of the folder, size of all shards, and a SHA-256 that is made without reading all of them.

    Of each shard it sees the header, the size, and the first and last MiB of tokens, in order, training shards first.
    Names count only by the order that they give. A change in the middle of a shard goes unnoticed.
    """
    digest = hashlib.sha256()
    for part, shards in (("train", train), ("val", validation)):
        digest.update(f"{part} {len(shards)}\0".encode())
        for shard in shards:
            digest.update(f"{shard.bytes}\0".encode())
            with open_data(shard.path) as file:
                digest.update(file.read(HEADER + HASHED))
                file.seek(max(HEADER, shard.bytes - HASHED))
                digest.update(file.read(HASHED))
    return DataIdentity(name, digest.hexdigest(), sum(shard.bytes for shard in (*train, *validation)))
