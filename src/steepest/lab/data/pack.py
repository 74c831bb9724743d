"""Texts become shards: tokens of document after document, each behind <|endoftext|>, cut into files of one size.

That is how llm.c's dev/data/fineweb.py makes them, and FineWeb's shards that modded-nanogpt downloads are of that kind:
a document may begin in one and end in the next. The last shard of a split is as long as it comes out.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from steepest.lab.data.documents import Piece, Text, pieces
from steepest.lab.data.manifest import (
    MOST_SHARDS,
    NAME,
    REPEAT,
    Manifest,
    PackedShard,
    PackedText,
    read_manifest,
    shard_name,
)
from steepest.lab.data.shards import END_OF_TEXT, HEADER, SPLITS, SplitName, header
from steepest.lab.data.tokenizer import Tokenizer
from steepest.lab.disk.files import RecordError, digest, exists, make_directory, one_line, replacing, write_all
from steepest.lab.disk.ours import locked, refusal
from steepest.lab.errors import UsageError

BATCH = 2**20  # characters that are made tokens of at once: on all processors, in about 200 MB
_AGAIN = f"Delete it. {REPEAT}."


class Progress(NamedTuple):
    """How far it is.

    Args:
        read: Bytes of the texts.
        tokens: Of both splits, in shards and on the way there.
        shard: One that has just become whole.
    """

    read: int
    tokens: int
    shard: PackedShard | None = None


def pack(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    out: Path,
    *,
    shard_tokens: int,
    validation: float,
    tell: Callable[[Progress], None],
) -> Manifest:
    """Write the shards of texts, those that are not there yet.

    Killed at any moment and called again, it ends with the same files. The texts are read again from their beginning,
    but tokens are made only of what is in no whole shard.

    Args:
        texts: In order.
        tokenizer: GPT-2's, or of its kind.
        out: Folder for the shards, and nothing else.
        shard_tokens: Tokens of a shard.
        validation: Share of the documents that is held out, or of a single one.
        tell: Called now and then.

    Returns:
        What the folder's manifest says.

    Raises:
        UsageError: If the folder holds something else, or shards that were made in another way, or cannot be made, or
            there are too few documents.
        RecordError: If a whole shard or the manifest has been changed, or a text meanwhile.
        OSError: If something cannot be read or written.
    """
    asked = Manifest(
        format=1,
        vocabulary=tokenizer.sha256,
        shard_tokens=shard_tokens,
        validation=validation,
        texts=tuple(PackedText(one_line(text.path.name) or ".", text.bytes, text.sha256) for text in texts),
    )
    read = pieces(texts, validation=validation)
    try:
        make_directory(out)
    except OSError as problem:
        remedy = "Give a folder that is yours to write to, or a place for a new one."
        raise UsageError(
            f"--out {str(out)!r} is no folder, and cannot become one ({problem.strerror}). {remedy}"
        ) from None
    if (problem := refusal(out, "shards")) is not None:
        raise UsageError(problem)
    with locked(out, doing="packed", after="the same command then keeps the shards that are whole"):
        begun = read_manifest(out)
        if begun is None or not begun.shards:
            asked.write(out)
            begun = asked
        _check_same(begun, asked, out)
        kept: dict[SplitName, Sequence[PackedShard]] = {split: _kept(begun, split, out) for split in SPLITS}
        if begun.complete and sum(map(len, kept.values())) == len(begun.shards):
            return begun
        return _packed(asked, kept, read, tokenizer, out, tell)


def check_apart(out: Path, texts: Iterable[Path]) -> None:
    """Refuse a folder for shards that would be read as text when the command is repeated.

    Args:
        out: Folder for the shards.
        texts: Files and folders that were given.

    Raises:
        UsageError: If it is one of them, or lies in one.
    """
    for text in texts:
        if text.is_dir() and out.resolve().is_relative_to(text.resolve()):
            problem = f"--out {str(out)!r} lies in {str(text)!r}, all of which is text"
            raise UsageError(f"{problem}: repeated, the command would read its own shards. Give an --out beside it.")


def _packed(
    manifest: Manifest,
    kept: Mapping[SplitName, Sequence[PackedShard]],
    read: Iterable[Piece],
    tokenizer: Tokenizer,
    out: Path,
    tell: Callable[[Progress], None],
) -> Manifest:
    whole, at = [shard for shards in kept.values() for shard in shards], 0

    def finish(shard: PackedShard) -> None:
        whole.append(shard)
        _with(manifest, whole).write(out)
        tell(Progress(at, sum(writer.tokens for writer in writers.values()), shard))

    with contextlib.ExitStack() as around:
        writers: dict[SplitName, _Writer] = {
            split: around.enter_context(_Writer(out, split, manifest.shard_tokens, kept[split], finish))
            for split in SPLITS
        }
        for batch, at in _batches(read, writers):
            for piece, tokens in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
                writers[piece.split].add(np.insert(tokens, 0, END_OF_TEXT) if piece.first else tokens)
            tell(Progress(at, sum(writer.tokens for writer in writers.values())))
        for writer in writers.values():
            writer.finish()
    ended = _with(manifest, whole, complete=True)
    ended.write(out)
    return ended


class _Writer:
    """The shards of one split, one after the other.

    Args:
        out: Folder.
        split: Which.
        size: Tokens of a shard.
        kept: Those that are there.
        finish: Called with each that becomes whole.
    """

    def __init__(
        self,
        out: Path,
        split: SplitName,
        size: int,
        kept: Sequence[PackedShard],
        finish: Callable[[PackedShard], None],
    ) -> None:
        self.tokens = sum(shard.tokens for shard in kept)
        self._out, self._size, self._finish = out, size, finish
        self._split: SplitName = split
        self._number = len(kept)
        self._pieces, self._drop = (kept[-1].pieces, kept[-1].offset) if kept else (0, 0)
        self._left = self._pieces
        self._around = contextlib.ExitStack()
        self._descriptor, self._count = -1, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._around.__exit__(*raised)  # what is half written goes

    def has_next(self) -> bool:
        """Whether the next piece lies in whole shards; each is asked for once."""
        self._left -= 1
        return self._left >= 0

    def add(self, tokens: NDArray[np.uint16]) -> None:
        """Those of the next piece that does not.

        Raises:
            RecordError: If the manifest has more of them in a whole shard than there are.
        """
        if self._drop > len(tokens):
            raise self._damaged(f"{self._drop:,} tokens of a piece that has {len(tokens):,}")
        at, self._drop = self._drop, 0
        while at < len(tokens):
            if not self._count:
                self._begin()
            taken = tokens[at : at + self._size - self._count]
            write_all(self._descriptor, taken.astype("<u2").tobytes())
            at, self._count, self.tokens = at + len(taken), self._count + len(taken), self.tokens + len(taken)
            if self._count == self._size:
                self._end(at)
        self._pieces += 1

    def finish(self) -> None:
        """The last shard is as long as it is.

        Raises:
            RecordError: If the manifest has more of the split in whole shards than there is.
        """
        if self._left > 0 or self._drop:
            raise self._damaged(f"{self._left:,} pieces and {self._drop:,} tokens more than the texts have")
        if self._count:
            self._end(0)

    def _damaged(self, what: str) -> RecordError:
        problem = f"its last whole shard of {self._split!r} is to hold {what}: it is damaged"
        return RecordError(self._out / NAME, problem, "Delete the folder, and pack the texts again.")

    @property
    def _path(self) -> Path:
        return self._out / shard_name(self._split, self._number)

    def _begin(self) -> None:
        if self._number == MOST_SHARDS:
            raise UsageError(f"--shard-tokens {self._size} makes more than {MOST_SHARDS:,} shards. Make them larger.")
        self._descriptor = self._around.enter_context(replacing(self._path, durable=True))
        write_all(self._descriptor, bytes(HEADER))

    def _end(self, offset: int) -> None:
        os.pwrite(self._descriptor, header(self._count), 0)
        self._around.close()
        name, sha256 = self._path.name, digest(self._path, remedy=_AGAIN)
        tokens, self._count, self._number = self._count, 0, self._number + 1
        self._finish(PackedShard(name, tokens, sha256, self._pieces, offset))


def _batches(read: Iterable[Piece], writers: Mapping[SplitName, _Writer]) -> Iterator[tuple[Sequence[Piece], int]]:
    """Pieces that are in no whole shard, many at once; and how many bytes of the texts have been read."""
    batch: list[Piece] = []
    passed = at = 0
    for piece in read:
        if not writers[piece.split].has_next():
            batch.append(piece)
        passed, at = passed + len(piece.text) + 64, piece.read  # a document without text takes room, too
        if passed >= BATCH:
            yield batch, at
            batch, passed = [], 0
    yield batch, at


def _with(manifest: Manifest, whole: Sequence[PackedShard], *, complete: bool = False) -> Manifest:
    ordered = tuple(sorted(whole, key=lambda shard: shard.name))
    return msgspec.structs.replace(manifest, shards=ordered, complete=complete)


def _check_same(begun: Manifest, asked: Manifest, out: Path) -> None:
    """Refuse to go on with shards that were made in another way."""
    for option, there, here in (
        ("tokenizer", begun.vocabulary, asked.vocabulary),
        ("shard-tokens", begun.shard_tokens, asked.shard_tokens),
        ("validation", begun.validation, asked.validation),
    ):
        if there != here:
            problem = f"{out} was packed with another --{option}: {there} there, {here} here"
            raise UsageError(f"{problem}. Give the same as before, or another --out.")
    for place, (there, here) in enumerate(itertools.zip_longest(begun.texts, asked.texts), start=1):
        if there is None or here is None or (there.bytes, there.sha256) != (here.bytes, here.sha256):
            was, now = ("none" if one is None else f"{one.name} of {one.bytes:,} bytes" for one in (there, here))
            problem = f"{out} was packed from other texts: the text number {place} was {was}, and is {now}"
            changed = ", with another content" if was == now else ""
            raise UsageError(f"{problem}{changed}. Give the texts as they were, or another --out.")


def _kept(manifest: Manifest, split: SplitName, out: Path) -> Sequence[PackedShard]:
    """Shards that are whole, up to the first that is missing."""
    listed = (shard for shard in manifest.shards if shard.split == split)
    kept = [*itertools.takewhile(lambda shard: exists(out / shard.name), listed)]
    for shard in kept:
        if digest(out / shard.name, remedy=_AGAIN) != shard.sha256:
            raise RecordError(out / shard.name, "it is not as it was packed", _AGAIN)
    return kept
