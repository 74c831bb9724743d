"""Documents of the user's texts: a file is one, and so is each line of a .jsonl.

They are read in pieces, so that one may be larger than memory. GPT-2 takes a text apart by a pattern before it makes
tokens, and no part of it goes on from something else into a space or the end of a line. A piece that ends there has the
tokens that it has inside its document, whatever the pieces are.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from steepest.lab.data.shards import SplitName
from steepest.lab.disk.fields import decode
from steepest.lab.disk.files import RecordError, exists, open_data, open_to_read
from steepest.lab.errors import UsageError

PIECE = 2**16  # read or cut at once; manifests count in pieces, so another number goes with another format of theirs
LONGEST_LINE = 2**26  # bytes of a document that is a line
LONGEST_WORD = 2**22  # characters without the end of a word
_BORDER = re.compile(r".*\S(?=[ \n])", re.DOTALL)
_TAKE_AWAY = "Mend it, or take it away."


@dataclass(frozen=True)
class Text:
    """A file or a folder of the user's.

    Args:
        path: What was given.
        files: It, or all files in it but hidden ones, in the order of their paths.
        documents: In all of them.
        bytes: Of all of them.
        sha256: Of what they hold, and how each is read.
    """

    path: Path
    files: tuple[Path, ...]
    documents: int
    bytes: int
    sha256: str


class Piece(NamedTuple):
    """Some of a document.

    Args:
        split: Where it goes.
        first: Whether the document begins with it.
        text: What it says; empty if the document is.
        read: Bytes of all texts up to its end, about.
    """

    split: SplitName
    first: bool
    text: str
    read: int


def identify(path: Path) -> Text:
    """Read a text once, for what tells it from others.

    What is no text is found here, before anything is made of the first one: mended later, it would be another text.

    Raises:
        UsageError: If there is none.
        RecordError: If something in a folder is no regular file, such as a link; or it is not UTF-8, has a line that is
            no document, or no spaces or ends of lines.
        DataError: If a file that was given is none; it may be a link.
        OSError: If something cannot be read.
    """
    files = tuple(_files_in(path)) if path.is_dir() else (path,) if exists(path) else ()
    if not files:
        raise UsageError(f"{str(path)!r} is no file, and no folder that holds one. Give files and folders of text.")
    whole, count, size = hashlib.sha256(), 0, 0
    for file in files:
        with _reading(file, path, whole) as reader:
            for parts in _documents(reader):
                count += 1
                for _ in _cut(parts, file):
                    pass
            size += reader.read
    return Text(path, files, count, size, whole.hexdigest())


def pieces(texts: Sequence[Text], *, validation: float) -> Iterator[Piece]:
    """All documents, piece by piece, the same ones each time.

    Their share of documents is held out for validation, at least one, evenly spread over all. Of a single file that is
    one document its share of bytes is held out: the end, from the first line on that begins in it.

    Args:
        texts: In order, as they were identified.
        validation: The share, above 0 and below 1.

    Raises:
        UsageError: If there are fewer documents than two, and not a single file.
        RecordError: If no line begins in what is held out of a single file; while they are read, if a text has changed.
        OSError: If one cannot be read.
    """
    count = sum(text.documents for text in texts)
    alone = count == 1 and not any(_of_lines(file) for text in texts for file in text.files)
    if count < 2 and not alone:
        problem = f"There {'are no documents' if count == 0 else 'is one document'} in the texts"
        raise UsageError(f"{problem}, and two are needed: one to train on, and one to hold out. Give more.")
    if alone:
        [(path, file)] = [(text.path, file) for text in texts for file in text.files]
        with _reading(file, path, hashlib.sha256()) as reader:
            for _, parts in _halves(reader, validation):
                for _ in parts:
                    pass
    return _pieces(texts, validation, None if alone else _Splits(count, validation))


class _Document(msgspec.Struct):
    text: str


class _Splits:
    """Where documents go, one after the other.

    Args:
        count: Of all.
        validation: Share of those that are held out.
    """

    def __init__(self, count: int, validation: float) -> None:
        self._count, self._held, self._number = count, max(1, round(validation * count)), 0

    def next(self) -> SplitName:
        """Of the next one."""
        before = self._number * self._held // self._count
        self._number += 1
        return "val" if self._number * self._held // self._count > before else "train"


def _pieces(texts: Sequence[Text], validation: float, splits: _Splits | None) -> Iterator[Piece]:
    before = 0
    for text in texts:
        whole = hashlib.sha256()
        for file in text.files:
            with _reading(file, text.path, whole) as reader:
                documents: Iterable[tuple[SplitName, Iterable[str]]]
                if splits is None:
                    documents = _halves(reader, validation)
                else:
                    documents = ((splits.next(), parts) for parts in _documents(reader))
                for split, parts in documents:
                    first = True
                    for piece in _cut(parts, file):
                        yield Piece(split, first, piece, before + reader.read)
                        first = False
                before += reader.read
        if whole.hexdigest() != text.sha256:
            raise RecordError(text.path, "it has changed since the command began", "Bring back what it was.")


class _Reader:
    """A file that is read from front to end, all of which goes through a hash, too."""

    def __init__(self, file: io.BufferedReader[Any], path: Path, whole: hashlib._Hash) -> None:
        self.path, self.read, self.lines = path, 0, 0
        self._file, self._whole = file, whole

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def take(self, most: int) -> bytes:
        """So many bytes, or what is left."""
        return self._taken(self._file.read(most))

    def line(self) -> bytes:
        """Up to the end of a line."""
        line = self._taken(self._file.readline(LONGEST_LINE + 1))
        if len(line) > LONGEST_LINE:
            raise RecordError(self.path, f"line {self.lines + 1} has more than {LONGEST_LINE:,} bytes", _TAKE_AWAY)
        return line

    def not_utf8(self, problem: UnicodeDecodeError) -> RecordError:
        """The error to raise where what was read last cannot be decoded."""
        left = problem.object[problem.start :]
        byte, line = self.read - len(left), self.lines - left.count(b"\n") + 1
        where = f"it is not UTF-8 at byte {byte:,}, in line {line:,} ({problem.reason})"
        return RecordError(self.path, where, _TAKE_AWAY)

    def _taken(self, content: bytes) -> bytes:
        self._whole.update(content)
        self.read += len(content)
        self.lines += content.count(b"\n")
        return content


@contextlib.contextmanager
def _reading(file: Path, given: Path, whole: hashlib._Hash) -> Generator[_Reader]:
    """A file of a text; what is given may be a link, what is found in a folder may not."""
    with contextlib.ExitStack() as around:
        if file == given:
            opened: io.BufferedReader[Any] = io.BufferedReader(around.enter_context(open_data(file)))
        else:
            opened = around.enter_context(open_to_read(file, remedy=_TAKE_AWAY, most=None))
        reader = _Reader(opened, file, whole)
        whole.update(f"{'lines' if _of_lines(file) else 'one'} {reader.size}\0".encode())
        yield reader


def _files_in(folder: Path) -> list[Path]:
    """All that is no folder, links to folders included, which are then refused by name."""

    def stop(problem: OSError) -> None:
        raise problem

    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = (name for name in folders if os.path.islink(os.path.join(place, name)))
        found += [Path(place, name) for name in (*names, *links) if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _of_lines(file: Path) -> bool:
    return file.suffix == ".jsonl"


def _documents(reader: _Reader) -> Iterator[Iterable[str]]:
    """Parts of each document of a file."""
    if not _of_lines(reader.path):
        yield _decoded(reader)
        return
    for line in iter(reader.line, b""):
        try:
            content = line.decode()
        except UnicodeDecodeError as problem:
            raise reader.not_utf8(problem) from None
        number = reader.lines + (not line.endswith(b"\n"))
        text = decode(_Document, content, reader.path, remedy=_TAKE_AWAY, where=f"line {number}: ").text
        yield (text[place : place + PIECE] for place in range(0, len(text), PIECE))


def _halves(reader: _Reader, validation: float) -> Iterator[tuple[SplitName, Iterable[str]]]:
    """Two documents of one file."""
    size = reader.size
    yield "train", _decoded(reader, until=max(size - int(validation * size) - 1, 0))
    if reader.read == size:
        problem = f"no line begins in the last {validation:.3g} of it, which is held out for validation"
        raise RecordError(reader.path, problem, "Give more text, or a larger --validation.")
    yield "val", _decoded(reader)


def _decoded(reader: _Reader, *, until: int | None = None) -> Iterator[str]:
    """What is left of a file; or up to that byte, and from there to the end of its line."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while content := reader.take(PIECE if until is None else min(PIECE, until - reader.read)):
            yield decoder.decode(content)
        yield decoder.decode(b"" if until is None else reader.line(), final=True)
    except UnicodeDecodeError as problem:
        raise reader.not_utf8(problem) from None


def _cut(parts: Iterable[str], path: Path) -> Iterator[str]:
    """The same text in pieces that end where tokens end; at least one."""
    rest, count = "", 0
    for part in parts:
        rest += part
        if border := _BORDER.match(rest):
            yield rest[: border.end()]
            rest, count = rest[border.end() :], count + 1
        elif len(rest) > LONGEST_WORD:
            raise RecordError(path, f"no word ends in {LONGEST_WORD:,} characters of it", _TAKE_AWAY)
    if rest or not count:
        yield rest
