"""Shards are read whole: every token, and every byte for the hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steepest.lab.data.manifest import NAME, REPEAT, PackedShard, read_manifest
from steepest.lab.data.shards import (
    END_OF_TEXT,
    FOREIGN,
    HEADER,
    REMEDY,
    SPLITS,
    VOCABULARY,
    SplitName,
    read_shard,
    shard_paths,
)
from steepest.lab.disk.files import DataError, RecordError, one_line, open_data

CHUNK = 2**22  # bytes read at once
_AGAIN = f"Delete it. {REPEAT}."


@dataclass(frozen=True)
class CheckedShard:
    """What was found in a shard.

    Args:
        name: Of the file.
        split: Where it belongs.
        tokens: In it; None if it was not read to its end.
        documents: That begin in it, likewise.
        sha256: Of the file, likewise.
        problem: What is wrong, and what to do; None: nothing.
    """

    name: str
    split: SplitName
    tokens: int | None = None
    documents: int | None = None
    sha256: str | None = None
    problem: str | None = None


def check_folder(folder: Path, *, tell: Callable[[int], None]) -> tuple[list[CheckedShard], list[str]]:
    """Read all shards of a folder, and hold them against its manifest, if it has one.

    Args:
        folder: Where they are.
        tell: Called with numbers of bytes that have been read since.

    Returns:
        The shards, those for training first, in the order of their names; and what else is wrong.

    Raises:
        FileNotFoundError: If there is no shard of a split, and none is still to come.
        RecordError: If the manifest is damaged.
    """
    manifest = read_manifest(folder)
    ended = manifest is None or manifest.complete
    packed = None if manifest is None else {shard.name: shard for shard in manifest.shards}
    paths = {split: shard_paths(folder, split, needed=ended) for split in SPLITS}
    checked = [_checked(path, split, packed, tell) for split in SPLITS for path in paths[split]]
    missing = sorted((packed or {}).keys() - {one.name for one in checked})
    others = [RecordError(folder / name, "the shard is missing", f"{REPEAT}.") for name in missing]
    if not ended:
        others.append(RecordError(folder / NAME, "packing has not ended", f"{REPEAT}."))
    return checked, [*map(str, others)]


def _checked(
    path: Path, split: SplitName, packed: Mapping[str, PackedShard] | None, tell: Callable[[int], None]
) -> CheckedShard:
    listed = None if packed is None else packed.get(path.name)
    try:
        tokens, documents, sha256 = _read(path, REMEDY if listed is None else _AGAIN, tell)
    except (DataError, OSError) as problem:
        return CheckedShard(path.name, split, problem=one_line(str(problem)))
    problem = None
    if packed is not None and listed is None:
        problem = str(RecordError(path, f"it is not one of the shards that {NAME} lists", "Take it away."))
    elif listed is not None and listed.sha256 != sha256:
        problem = str(RecordError(path, f"its SHA-256 was {listed.sha256} when it was packed, and is {sha256}", _AGAIN))
    return CheckedShard(path.name, split, tokens, documents, sha256, problem)


def _read(path: Path, remedy: str, tell: Callable[[int], None]) -> tuple[int, int, str]:
    """Tokens, documents and hash; raises as `read_shard` does, and for tokens that GPT-2 does not have."""
    shard = read_shard(path, remedy=remedy)
    whole, read, documents = hashlib.sha256(), 0, 0
    with open_data(path) as file:
        for content in iter(lambda: file.read(CHUNK), b""):
            whole.update(content)
            tokens = np.frombuffer(content[: len(content) // 2 * 2], dtype="<u2")[0 if read else HEADER // 2 :]
            if (foreign := tokens >= VOCABULARY).any():
                place = int(foreign.argmax())
                at = (read - HEADER) // 2 + place if read else place
                raise DataError(f"{path} has the token {tokens[place]} at place {at:,}; {FOREIGN} {remedy}")
            documents += int(np.count_nonzero(tokens == END_OF_TEXT))
            read += len(content)
            tell(len(content))
    if read != shard.bytes:
        raise DataError(f"{path} had {shard.bytes} bytes, and had {read} a moment later. Wait until it is written.")
    return shard.tokens, documents, whole.hexdigest()
