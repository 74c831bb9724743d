"""The packed file of a study: the very bytes come back, and what is not as it was packed is refused, within bounds."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.disk import packed
from steepest.lab.disk.files import RecordError
from steepest.lab.disk.packed import PACKED, RECORDS, StudyFiles, pack, unpack
from tests.cases import cases

TEXT = st.text(min_size=1).map(str.encode)
RUN = st.fixed_dictionaries({name: TEXT for name in RECORDS if name != "environment.json"}, optional={RECORDS[1]: TEXT})
NAMES = st.text("0123456789abcdef", min_size=16, max_size=16)
ONE = {"config.json": b"{}", "metrics.jsonl": b"1\n2\n3", "result.json": b"{}\r\n"}
FIRST = {"format": 1, "study.json": '{"kind": "race"}'}
RUN_LINE = {"run": "0" * 16, **{name: content.decode() for name, content in ONE.items()}}


def write(directory: Path, *rows: Any, end: str = "\n") -> Path:
    """A packed file with these lines, whatever they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (directory / PACKED).write_bytes(lzma.compress(("\n".join(lines) + end).encode()))
    return directory / PACKED


@given(study=TEXT, runs=st.dictionaries(NAMES, RUN, max_size=4))
def test_the_very_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, study: bytes, runs: Any) -> None:
    path = tmp_path_factory.mktemp("study") / PACKED
    path.write_bytes(pack(study, runs))
    assert unpack(path) == (study, runs)


def test_the_same_records_give_the_same_file() -> None:
    shuffled = {name: dict(reversed(list(ONE.items()))) for name in ("1" * 16, "0" * 16)}
    assert pack(b"{}", shuffled) == pack(b"{}", dict.fromkeys(("0" * 16, "1" * 16), ONE))


def test_a_packed_run_is_read_like_a_directory(tmp_path: Path) -> None:
    (tmp_path / PACKED).write_bytes(pack(b'{"kind": "race"}', {"0" * 16: ONE}))
    study = StudyFiles(tmp_path)
    assert study.packed
    assert study.study(dict)["kind"] == "race"
    run = study.run("0" * 16)
    assert (run.has("config.json"), run.has("environment.json")) == (True, False)
    assert list(run.lines("metrics.jsonl")) == ["1", "2"]  # the third has no end
    assert run.text("result.json") == "{}\r\n"
    with pytest.raises(
        RecordError, match=rf"{PACKED}/0{{16}}/environment\.json: the file is missing\. Take the packed"
    ):
        run.text("environment.json")
    assert not study.run("1" * 16).has("config.json")


def test_a_study_beside_the_packed_file_counts(tmp_path: Path) -> None:
    (tmp_path / PACKED).write_bytes(pack(b'{"kind": "old"}', {}))
    (tmp_path / "study.json").write_text('{"kind": "new"}')
    assert StudyFiles(tmp_path).study(dict)["kind"] == "new"


@cases(
    "rows, message",
    [
        ([], "line 1: not valid JSON"),
        (["[]"], r"line 1: the content must be an object, got \[\]"),
        ([{"format": 2, "study.json": "{}"}], "line 1: format must be 1, got 2"),
        ([{"format": 1}], "line 1: study.json is missing"),
        ([{**FIRST, "more": 1}], "line 1: more must be absent"),
        ([{**FIRST, "study.json": "\ud800"}], "line 1: not valid JSON"),
        ([FIRST, {**RUN_LINE, "run": "../../etc/passwd"}], "line 2: run must be 16 hexadecimal digits"),
        ([FIRST, RUN_LINE, RUN_LINE], "line 3: run 0{16} is there already"),
        ([FIRST, {**RUN_LINE, "../x": "y"}], r"line 2: \.\./x must be absent"),
        ([FIRST, {**RUN_LINE, "result.json": 3}], "line 2: result.json must be a string, got 3"),
        ([FIRST, {"run": "0" * 16, "config.json": "{}"}], "line 2: metrics.jsonl is missing"),
        ([FIRST, RUN_LINE, ""], "line 3: not valid JSON"),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(RecordError, match=rf"{PACKED}: {message}.*\. Take the packed file anew from where it came"):
        unpack(write(tmp_path, *rows))


@cases(
    "change, message",
    [
        (lambda content: b"", "the file is cut short"),
        (lambda content: content[:-8], "the file is cut short"),
        (lambda content: content[: len(content) // 2], "the file is cut short"),
        (lambda content: b"no xz at all", "the file cannot be unpacked"),
        (lambda content: lzma.compress(b"{}\n", format=lzma.FORMAT_ALONE), "the file cannot be unpacked"),
        (lambda content: content[:30] + bytes([content[30] ^ 255]) + content[31:], "the file cannot be unpacked"),
        (lambda content: content + b"\0", "there is something behind the end"),
        (lambda content: content + content, "there is something behind the end"),
        (lambda content: lzma.compress(b""), "the last line is cut short"),
        (lambda content: lzma.compress(b"\xff\n"), "the file cannot be read .*utf-8"),
        (lambda content: lzma.compress(json.dumps(FIRST).encode()), "the last line is cut short"),
    ],
    ["empty", "tail", "half", "text", "alone", "flipped", "padded", "twice", "nothing", "not UTF-8", "line"],
)
def test_a_file_that_is_damaged(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / PACKED
    path.write_bytes(change(pack(b"{}", {"0" * 16: ONE})))
    with pytest.raises(RecordError, match=rf"{PACKED}: {message}"):
        unpack(path)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = write(tmp_path, FIRST, *[{**RUN_LINE, "run": f"{number:016x}"} for number in range(100)])
    monkeypatch.setattr(packed, "MOST_UNPACKED_BYTES", 2**12)
    with pytest.raises(RecordError, match="the file has more than 4096 bytes when unpacked"):
        unpack(lines)
    monkeypatch.undo()
    bomb = lzma.LZMACompressor(preset=0)
    (tmp_path / PACKED).write_bytes(b"".join([*(bomb.compress(bytes(2**24)) for _ in range(5)), bomb.flush()]))
    with pytest.raises(RecordError, match="a line has more than 67108864 bytes"):
        unpack(tmp_path / PACKED)


def test_a_file_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    greedy = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**28}]
    (tmp_path / PACKED).write_bytes(lzma.compress(json.dumps(FIRST).encode() + b"\n", filters=greedy))
    with pytest.raises(RecordError, match=r"the file cannot be unpacked .*[Mm]emory"):
        unpack(tmp_path / PACKED)
