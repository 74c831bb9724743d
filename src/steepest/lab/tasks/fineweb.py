"""`fineweb`: predict the next token of web text, from the .bin shards that modded-nanogpt and llm.c train on."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
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
_REMEDY = f"{REMEDY.removesuffix('.')}: --data DIR."


def _model(layers: int, width: int, head_size: int) -> GPTConfig:
    return GPTConfig(vocabulary=PADDED, layers=layers, width=width, head_size=head_size)


# The models of published runs, whose differences from ours docs/tracks.md lists. Record 4 of modded-nanogpt, as in
# train_gpt_newton_muon_1.py of https://github.com/zhehangdu/Newton-Muon; record 28, as in train_gpt_newton_muon_2.py
# there; GPT-2, as in gptopt/gpt_model.py of https://github.com/modichirag/GPT-opt.
_RECORD_4 = GPTConfig(
    vocabulary=VOCABULARY,
    layers=12,
    width=768,
    head_size=64,
    tied=True,
    biases=False,
    norm="rms-plain",
    embedding_norm=False,
    query_norm=False,
    activation="gelu",
    positions="rotary",
    attention_gain=24**-0.5,
    initial="torch",
)
_RECORD_28 = GPTConfig(
    vocabulary=PADDED,
    layers=12,
    width=768,
    head_size=128,
    softcap=15.0,
    biases=False,
    norm="rms-plain",
    attention_scale=0.12,
    value_tables=3,
    without_attention=(7,),
)
_GPT2 = GPTConfig(
    vocabulary=VOCABULARY,
    layers=12,
    width=768,
    head_size=64,
    tied=True,
    norm="layer",
    embedding_norm=False,
    query_norm=False,
    activation="gelu-tanh",
    positions="learned",
    context=1024,
    initial="gpt2",
)
_SHORT = Budget(steps=6200, batch_size=512, eval_every=100, schedule="late-cooldown", precision="bf16", micro_batch=16)
_MEDIUM = Budget(
    steps=1695, batch_size=384, eval_every=50, schedule="cooldown-to-tenth", precision="bf16", micro_batch=16
)
_FINEWEB1B = Budget(
    steps=1907, batch_size=512, eval_every=100, schedule="warmup-cooldown", precision="bf16", micro_batch=16
)


def _rehearsal(model: GPTConfig, budget: Budget) -> WindowPreset:
    """The same parts in few and small layers, the same schedule, and a batch of 16 in parts of 4.

    In float32, so that losses do not depend on who trains it: rounding to bfloat16 makes more of other last bits.
    """
    small = replace(
        model,
        layers=4,
        width=32,
        head_size=8,
        context=32 if model.context else 0,
        value_tables=min(1, model.value_tables),
        without_attention=(2,) if model.without_attention else (),
        attention_gain=8**-0.5 if model.attention_gain != 1 else 1.0,
    )
    return WindowPreset(
        small,
        32,
        replace(budget, steps=8, batch_size=16, eval_every=4, precision="fp32", micro_batch=4),
        Sizes(8, 8, 8),
    )


PRESETS: dict[PresetName, WindowPreset] = {
    "demo": WindowPreset(_model(2, 128, 32), 128, Budget(steps=100, batch_size=4, eval_every=10), Sizes(32, 64, 256)),
    "tiny": WindowPreset(_model(4, 128, 32), 128, Budget(steps=500, batch_size=8, eval_every=25), Sizes(64, 128, 512)),
    "small": WindowPreset(
        _model(6, 256, 64), 256, Budget(steps=1000, batch_size=8, eval_every=50), Sizes(128, 256, 1024)
    ),
    "gpt2-short": WindowPreset(_RECORD_4, 1024, _SHORT, Sizes(1024, 2560, 10_240)),
    "gpt2-short-rehearsal": _rehearsal(_RECORD_4, _SHORT),
    "gpt2-medium": WindowPreset(_RECORD_28, 1024, _MEDIUM, Sizes(1024, 2560, 10_240)),
    "gpt2-medium-rehearsal": _rehearsal(_RECORD_28, _MEDIUM),
    "gpt2-fineweb1b": WindowPreset(_GPT2, 1024, _FINEWEB1B, Sizes(1024, 2048, 8192)),
    "gpt2-fineweb1b-rehearsal": _rehearsal(_GPT2, _FINEWEB1B),
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
        size, folder = PRESETS[preset], folder_of(self.name, data, _REMEDY)
        if (manifest := read_manifest(folder)) is not None:
            manifest.check_ended(folder)
        shards, others = (
            [read_shard(path, remedy=_REMEDY) for path in shard_paths(folder, split, remedy=_REMEDY)]
            for split in SPLITS
        )
        if manifest is not None:
            manifest.check(folder, [*shards, *others])
        identity = _identify(folder.name, shards, others)
        train = ShardWindows(shards, size.window, part="training")
        held_out = ShardWindows(others, size.window, part="validation")
        tuning = len(held_out) // TUNING_SHARE
        if tuning == 0:
            problem = f"The validation shards of {folder.name!r} fill {len(held_out)} windows"
            raise ValueError(f"{problem}; {TUNING_SHARE} are needed, to tune by one of them. {_REMEDY}")
        super().__init__(preset, size, train, held_out, tuning=tuning, identity=identity)
        self.evaluation_batch = size.budget.micro_batch or size.budget.batch_size


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
            raise ValueError(f"{problem}. {_REMEDY}")
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
            raise DataError(f"{problem}. Bring the file back, and repeat the command. {_REMEDY}")
        window = np.frombuffer(content, dtype="<u2").astype(np.int64)
        if (largest := int(window.max())) >= VOCABULARY:
            raise DataError(f"{shard.path} has the token {largest}; {FOREIGN} {_REMEDY}")
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
