"""What `steepest data pack` says of its shards in the file beside them, by which it goes on and they are checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from steepest.lab.data.shards import LARGEST_SHARD, SPLITS, Shard, SplitName
from steepest.lab.disk.fields import Count, Positive, Sha256, Text, Versioned, decode, wrong
from steepest.lab.disk.files import RecordError, exists, read_text, write_whole

NAME = "manifest.json"
MOST_SHARDS = 10**6  # whose names have six digits, by which they are ordered
REPEAT = "Repeat the command that packed it: shards that are whole are kept, the others are made anew"
_REMEDY = "If `steepest data pack` made the folder, delete it and pack the texts again; if not, take this file away."


class PackedText(msgspec.Struct, frozen=True):
    """One that was packed: its name, bytes, and the SHA-256 of what it holds."""

    name: Text
    bytes: Count
    sha256: Sha256


class PackedShard(msgspec.Struct, frozen=True):
    """One that is whole, and where the text of the next one begins.

    Args:
        name: Of the file.
        tokens: In it.
        sha256: Of it.
        pieces: How many pieces of its split's text end before.
        offset: How many tokens of the next piece it has, too.
    """

    name: Annotated[str, Meta(pattern=r"^packed_(train|val)_[0-9]{6}\.bin\Z")]
    tokens: Annotated[int, Meta(ge=1, le=LARGEST_SHARD)]
    sha256: Sha256
    pieces: Count
    offset: Count

    @property
    def split(self) -> SplitName:
        """Where it belongs."""
        return "train" if self.name.startswith("packed_train") else "val"


class Manifest(Versioned, kw_only=True):
    """How shards were made, and which are whole.

    Args:
        vocabulary: SHA-256 of the tokenizer's.
        shard_tokens: Tokens of a shard; the last one of a split has fewer.
        validation: Share that was held out.
        texts: In order.
        shards: Those that are whole, in the order of their names.
        complete: Whether that is all.
    """

    vocabulary: Sha256
    shard_tokens: Positive
    validation: Annotated[float, Meta(gt=0, lt=1)]
    texts: Annotated[tuple[PackedText, ...], Meta(min_length=1)]
    shards: tuple[PackedShard, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        names = [shard.name for shard in self.shards]
        counts = {split: sum(shard.split == split for shard in self.shards) for split in SPLITS}
        if names != [shard_name(split, number) for split in SPLITS for number in range(counts[split])]:
            raise wrong("shards", "a list of names in order, numbered from 0", names)

    def write(self, folder: Path) -> None:
        """Into the folder, in place of the one that is there."""
        write_whole(folder / NAME, msgspec.json.format(msgspec.json.encode(self)) + b"\n", durable=True)

    def check_ended(self, folder: Path) -> None:
        """Refuse shards to which others will come.

        Raises:
            RecordError: If packing has not ended.
        """
        if not self.complete:
            raise RecordError(folder / NAME, "packing has not ended", f"{REPEAT}.")

    def check(self, folder: Path, shards: Iterable[Shard]) -> None:
        """Refuse shards that are not those that were packed, as far as names and sizes tell.

        Args:
            folder: Where it is.
            shards: All in the folder.

        Raises:
            RecordError: If they are not.
        """
        packed, found = ({one.name: one.tokens for one in self.shards}, {one.path.name: one.tokens for one in shards})
        for name in sorted(packed.keys() | found.keys()):
            if name not in packed:
                raise RecordError(folder / name, f"it is not one of the shards that {NAME} lists", "Take it away.")
            if name not in found:
                raise RecordError(folder / name, "the shard is missing", f"{REPEAT}.")
            if packed[name] != found[name]:
                problem = f"it has {found[name]} tokens, and had {packed[name]} when it was packed"
                raise RecordError(folder / name, problem, f"Delete it. {REPEAT}.")


def shard_name(split: SplitName, number: int) -> str:
    """Of a packed shard, counted from 0."""
    return f"packed_{split}_{number:06d}.bin"


def read_manifest(folder: Path) -> Manifest | None:
    """What is said of the shards in a folder; None where they were not packed here.

    Raises:
        RecordError: If the file is damaged.
    """
    if not exists(folder / NAME):
        return None
    return decode(Manifest, read_text(folder / NAME, remedy=_REMEDY), folder / NAME, remedy=_REMEDY)
