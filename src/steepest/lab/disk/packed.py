"""The records of a study, where they are kept: in a directory for every run, or packed into one file of text.

The packed file is compressed with xz and holds one JSON object per line: the first has the content of `study.json`,
every other the name of a run and the content of its files, to the byte. It counts where no `study.json` stands beside
it. It may come from a stranger: how much is read, and how much memory reading takes, is bounded.
"""

from __future__ import annotations

import json
import lzma
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Literal, TypeVar, cast

import msgspec

from steepest.lab.disk.fields import RunName, Text, decode
from steepest.lab.disk.files import MOST_BYTES, RecordError, exists, open_to_read, read_lines, read_text

PACKED = "runs.jsonl.xz"
RECORDS = ("config.json", "environment.json", "metrics.jsonl", "result.json")
FORMAT = 1
MOST_UNPACKED_BYTES = 2**29
MOST_MEMORY = 2**27  # that unpacking may take; what we write needs a tenth
STUDY_REMEDY = "Delete the file and repeat the study's command: finished runs are found by their content."

T = TypeVar("T")
_PIECE = 2**20
_DAMAGED = "Take the packed file anew from where it came: this one is not as it was packed."
_NO_STUDY = "Give the directory that race or sweep was given as --out."


class RunFiles:
    """The records of one run, in its directory.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.remedy = (
            f"Delete the directory {path.name} and repeat the study's command: only this run is trained again."
        )
        self.lost = "Delete this file: only the description of the machine is lost."

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""
        return exists(self.path / name)

    def text(self, name: str) -> str:
        """The content of a file.

        Raises:
            RecordError: If it is missing or cannot be read.
        """
        return read_text(self.path / name, remedy=self.remedy)

    def error(self, name: str, problem: str) -> RecordError:
        """The error to raise when what a file says cannot be."""
        return RecordError(self.path / name, problem, self.remedy)

    def lines(self, name: str) -> Iterator[str]:
        """The whole lines of a file without their ends; a last one without an end is still being written, and left out.

        Raises:
            RecordError: As `text`.
        """
        return read_lines(self.path / name, remedy=self.remedy)


class PackedRun(RunFiles):
    """The records of one run, from a line of a packed study.

    Args:
        path: The packed file and, as if it were a directory, the name of the run: what messages show.
        contents: What its files hold.
    """

    def __init__(self, path: Path, contents: Mapping[str, bytes]) -> None:
        super().__init__(path)
        self.remedy = self.lost = _DAMAGED
        self.contents = contents

    def has(self, name: str) -> bool:
        """As of any run."""
        return name in self.contents

    def text(self, name: str) -> str:
        """As of any run."""
        if name not in self.contents:
            raise self.error(name, "the file is missing")
        return self.contents[name].decode()

    def lines(self, name: str) -> Iterator[str]:
        """As of any run."""
        yield from self.text(name).split("\n")[:-1]


class StudyFiles:
    """The records of a study, read when they are asked for.

    Args:
        directory: Holds `study.json`, or a packed study.

    Raises:
        RecordError: If it holds neither.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.packed = is_packed(directory)
        if not self.packed and not exists(directory / "study.json"):
            raise RecordError(directory / "study.json", "no study here", _NO_STUDY)

    def study(self, kind: type[T]) -> T:
        """The content of `study.json`.

        Args:
            kind: Of the record that it is read as.

        Raises:
            RecordError: If it is damaged.
        """
        if self.packed:
            path = self.directory / PACKED
            first = decode(_First, next(_lines(path)), path, remedy=_DAMAGED, where="line 1: ")
            return decode(kind, first.study, path / "study.json", remedy=_DAMAGED)
        path = self.directory / "study.json"
        return decode(kind, read_text(path, remedy=STUDY_REMEDY), path, remedy=STUDY_REMEDY)

    def run(self, name: str) -> RunFiles:
        """The records of a run, which may have none.

        Args:
            name: 16 hexadecimal digits.

        Raises:
            RecordError: If the study is packed, and damaged.
        """
        if self.packed:
            return PackedRun(self.directory / PACKED / name, self.runs.get(name, {}))
        return RunFiles(self.directory / "runs" / name)

    def told(self, problem: RecordError) -> str:
        """What is wrong with a file, without the directory of the study."""
        return str(problem).replace(f"{self.directory}/", "")

    @cached_property
    def runs(self) -> Mapping[str, Mapping[str, bytes]]:
        """Every run of a packed study: its files by their names.

        Raises:
            RecordError: If it is damaged.
        """
        return unpack(self.directory / PACKED)[1]


def is_packed(directory: Path) -> bool:
    """Whether the packed file counts: one stands in a directory without a `study.json`."""
    return exists(directory / PACKED) and not exists(directory / "study.json")


def unpacking(directory: Path) -> str:
    """What to do where the runs themselves are needed, which are then found."""
    return f"To unpack its runs: steepest unpack {shlex.quote(str(directory))} (and then repeat the command)."


def pack(study: bytes, runs: Mapping[str, Mapping[str, bytes]]) -> bytes:
    """The content of a packed file; the same records give the same bytes.

    Args:
        study: Content of `study.json`.
        runs: By the names of their directories: contents by the names of the files.

    Raises:
        UnicodeDecodeError: If one is no UTF-8.
    """
    first = {"format": FORMAT, "study.json": study.decode()}
    rows = [{"run": name, **{key: runs[name][key].decode() for key in sorted(runs[name])}} for name in sorted(runs)]
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in (first, *rows))
    return lzma.compress(text.encode(), preset=6)


def unpack(path: Path) -> tuple[bytes, Mapping[str, Mapping[str, bytes]]]:
    """What `pack` was given.

    Raises:
        RecordError: If the file is missing, no regular file, too large, cut short, or not what `pack` writes.
    """
    lines = _lines(path)
    first = decode(_First, next(lines), path, remedy=_DAMAGED, where="line 1: ")
    runs: dict[str, Mapping[str, bytes]] = {}
    for number, line in enumerate(lines, start=2):
        row = decode(_Line, line, path, remedy=_DAMAGED, where=f"line {number}: ")
        if row.run in runs:
            raise RecordError(path, f"line {number}: run {row.run} is there already", _DAMAGED)
        files = cast(dict[str, str | None], msgspec.to_builtins(row))
        runs[row.run] = {key: text.encode() for key in RECORDS if (text := files[key]) is not None}
    return first.study.encode(), runs


class _First(msgspec.Struct, forbid_unknown_fields=True):
    format: Literal[1]
    study: Text = msgspec.field(name="study.json")


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    run: RunName
    config: Text = msgspec.field(name="config.json")
    metrics: Text = msgspec.field(name="metrics.jsonl")
    result: Text = msgspec.field(name="result.json")
    environment: Text | None = msgspec.field(name="environment.json", default=None)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a packed file, at least one."""
    line, number = bytearray(), 0
    with open_to_read(path, remedy=_DAMAGED, most=MOST_UNPACKED_BYTES) as file:
        for piece in _pieces(file, path):
            for end in re.findall(rb"[^\n]*\n|[^\n]+", piece):  # and not at other ends of lines
                line += end
                if len(line) > MOST_BYTES:
                    raise RecordError(path, f"a line has more than {MOST_BYTES} bytes", _DAMAGED)
                if end.endswith(b"\n"):
                    yield _text(line, path)
                    line.clear()
                    number += 1
    if line or not number:
        raise RecordError(path, "the last line is cut short", _DAMAGED)


def _text(line: bytearray, path: Path) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as problem:
        raise RecordError(path, f"the file cannot be read ({problem})", _DAMAGED) from None


def _pieces(file: BufferedReader, path: Path) -> Iterator[bytes]:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_MEMORY)
    left = MOST_UNPACKED_BYTES
    try:
        while not unpacker.eof:
            packed = file.read(_PIECE) if unpacker.needs_input else b""
            if unpacker.needs_input and not packed:
                raise RecordError(path, "the file is cut short", _DAMAGED)
            piece = unpacker.decompress(packed, max_length=_PIECE)
            left -= len(piece)
            if left < 0:
                raise RecordError(path, f"the file has more than {MOST_UNPACKED_BYTES} bytes when unpacked", _DAMAGED)
            yield piece
    except (lzma.LZMAError, EOFError) as problem:
        raise RecordError(path, f"the file cannot be unpacked ({problem})", _DAMAGED) from None
    if unpacker.unused_data or file.read(1):
        raise RecordError(path, "there is something behind the end of what was packed", _DAMAGED)
