import itertools
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.lab.data import documents
from steepest.lab.data.documents import identify, pieces
from steepest.lab.data.tokenizer import read_tokenizer
from steepest.lab.disk.files import DataError, RecordError
from steepest.lab.errors import UsageError
from tests.cases import cases
from tests.lab.data.tiny_tokenizer import SENTENCES, write_tokenizer
from tests.lab.disk.test_files import SECRET, THINGS

TEXTS = st.lists(
    st.sampled_from([*SENTENCES, *"aZé'!<1 \n\t\r\x1c\x85\u00a0\u2028\u3000", " \n ", "'ll", "  "]), max_size=30
).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return read_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "gpt2"))


def joined(found):
    """Documents with their splits."""
    whole = []
    for piece in found:
        if piece.first:
            whole.append([piece.split, ""])
        whole[-1][1] += piece.text
    return [tuple(one) for one in whole]


def read(*paths, validation=0.05):
    return [*pieces([identify(path) for path in paths], validation=validation)]


@settings(deadline=None)
@given(text=TEXTS, length=st.integers(1, 9))
def test_pieces_have_the_tokens_that_the_whole_has(tmp_path_factory, tokenizer, text, length):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_bytes(text.encode())
    (folder / "b.jsonl").write_text(json.dumps({"text": text, "more": 1}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", length)
        found = read(folder)
    assert [text for _, text in joined(found)] == [text, text]
    ids = [token for tokens in tokenizer.encode([piece.text for piece in found]) for token in tokens.tolist()]
    assert ids == 2 * tokenizer.encode([text])[0].tolist()


def test_a_large_text_comes_in_many_pieces(tmp_path):
    text = "a line of words\n" * 30_000
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'text': text})}\n{json.dumps({'text': 'b'})}\n")
    (tmp_path / "a.txt").write_text(text)
    for path in (tmp_path / "a.txt", tmp_path / "a.jsonl"):
        found = read(path)
        assert len(found) > 7
        assert max(len(piece.text) for piece in found) <= documents.PIECE + len("a line")
        assert [piece.read for piece in found] == sorted(piece.read for piece in found)
        assert found[-1].read == path.stat().st_size


@settings(deadline=None)
@given(count=st.integers(2, 200), share=st.floats(0.001, 0.5), files=st.booleans(), end=st.sampled_from(["\n", ""]))
def test_what_is_held_out_has_its_share_and_is_spread(tmp_path_factory, count, share, files, end):
    folder = tmp_path_factory.mktemp("texts")
    lines = [f'{{"text": "{number}"}}' for number in range(count - files)]
    (folder / "a.jsonl").write_text("\n".join(lines) + end)
    if files:
        (folder / "b.txt").write_text("")
    splits = [split for split, _ in joined(read(folder, validation=share))]
    held = [number for number, split in enumerate(splits) if split == "val"]
    assert len(splits) == count
    assert len(held) == max(1, round(share * count))
    gaps = {after - before for before, after in itertools.pairwise([-1, *held])}
    assert max(gaps) - min(gaps) <= 1
    assert held[-1] == count - 1


@cases("lines, problem", [([], "There are no documents"), (["one"], "There is one document")])
def test_two_documents_are_needed(tmp_path, lines, problem):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    with pytest.raises(UsageError, match=rf"{problem} in the texts, and two are needed.*Give more"):
        read(tmp_path / "a.jsonl")


def test_files_are_documents_in_the_order_of_their_paths_and_lines_of_jsonl_are_too(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "b" / "z.py").write_text("two")
    (tmp_path / "b.txt").write_text("one\n")
    (tmp_path / "c.jsonl").write_text('{"text": "three \\ud83d\\ude00"}\n{"id": 1, "text": ""}')
    (tmp_path / "d").write_text("")
    (tmp_path / "link").mkdir()
    expected = ["one\n", "two", "three 😀", "", ""]
    assert [text for _, text in joined(read(tmp_path))] == expected
    (tmp_path / "elsewhere").symlink_to(tmp_path / "b.txt")
    os.rename(tmp_path / "elsewhere", tmp_path.parent / "elsewhere")  # what is given may be a link
    assert [text for _, text in joined(read(tmp_path.parent / "elsewhere", tmp_path))] == ["one\n", *expected]


@pytest.mark.parametrize("ends", ["\n", ""])
def test_of_a_single_file_the_end_is_held_out(tmp_path, ends):
    lines = [f"line {number:04d}\n" for number in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines)[:-1] + ends)
    for share, count in ((0.05, 50), (0.0495, 49), (0.0505, 50)):
        assert joined(read(tmp_path / "a.txt", validation=share)) == [
            ("train", "".join(lines[:-count])),
            ("val", "".join(lines[-count:])[:-1] + ends),
        ]


@cases("text", ["", "x", "one line without an end", "a\n" + "b" * 100, "b" * 100 + "\n"])
def test_a_single_file_whose_end_has_no_line_is_refused(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    identified = identify(tmp_path / "a.txt")
    with pytest.raises(RecordError, match=r"a\.txt: no line begins in the last 0\.05 of it.* Give more text, or"):
        pieces([identified], validation=0.05)  # before the first is asked for


@cases("length", [1, 3, 2**16])
@cases("name", ["a.txt", "a.jsonl"])
def test_what_is_not_utf8_is_refused_with_its_place(tmp_path, monkeypatch, name, length):
    monkeypatch.setattr(documents, "PIECE", length)
    (folder := tmp_path / "texts").mkdir()
    for bad, at in ((b"\xff", 0), (b"x\xc3y", 1), (b"\xc3", 0)):
        before = '{"text": "é"}\n{"text": "é'.encode()
        (folder / name).write_bytes(before + bad)
        where = rf"{name}: it is not UTF-8 at byte {len(before) + at}, in line 2 \(.*\)\. Mend it"
        with pytest.raises(RecordError, match=where):
            identify(folder)


@cases(
    "line, message",
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('"text"', "the content must be an object, got 'text'"),
        ('{"body": "a"}', "text is missing"),
        ('{"text": 1}', "text must be a string, got 1"),
        ('{"text": "\\ud800"}', "not valid JSON"),
        (f'{{"text": "{"a" * 100}"}}', "has more than 50 bytes"),
    ],
)
def test_a_line_that_is_no_document_is_refused(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(documents, "LONGEST_LINE", 50)
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{line}\n{{"text": "a"}}\n')
    with pytest.raises(RecordError, match=rf"a\.jsonl: line 2:? {message}"):
        identify(tmp_path / "a.jsonl")


def test_a_text_in_which_no_word_ends_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_WORD", 2**17)
    with (tmp_path / "a.txt").open("wb") as file:
        file.write(b"a\n")
        file.truncate(2**30)
    with pytest.raises(RecordError, match=r"a\.txt: no word ends in 131,072 characters of it\. Mend it, or take it"):
        identify(tmp_path / "a.txt")


@cases("thing", THINGS)
def test_a_folder_of_a_stranger_leads_nowhere_else(tmp_path, thing):
    (folder := tmp_path / "inside").mkdir()
    THINGS[thing](folder / "it")
    if thing == "a directory":
        with pytest.raises(UsageError, match="is no file, and no folder that holds one"):
            identify(folder)
        return
    with pytest.raises(RecordError, match=r"it: the file cannot be read \(it is a \w+, not a regular file\)"):
        identify(folder)
    assert not (tmp_path / "outside").exists() or (tmp_path / "outside").read_text() == SECRET


def test_a_link_to_a_folder_inside_a_folder_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "it").symlink_to("/etc")
    with pytest.raises(RecordError, match=r"it: the file cannot be read \(it is a link"):
        identify(tmp_path / "texts")


def test_what_is_given_is_there_and_a_file(tmp_path):
    with pytest.raises(UsageError, match="nowhere' is no file, and no folder"):
        identify(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a pipe, not a regular file"):
        identify(tmp_path / "pipe")


def test_content_and_how_it_is_read_tell_a_text_from_others(tmp_path):
    (tmp_path / "a.txt").write_text('{"text": "a"}\n')
    (tmp_path / "b.txt").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    same, again, other = (identify(tmp_path / name) for name in ("a.txt", "b.txt", "a.jsonl"))
    assert (same.sha256, same.bytes) == (again.sha256, again.bytes)
    assert other.sha256 != same.sha256
    for name, contents in (("one", ("ab", "c")), ("two", ("a", "bc"))):
        (tmp_path / name).mkdir()
        for number, content in enumerate(contents):
            (tmp_path / name / str(number)).write_text(content)
    assert identify(tmp_path / "one").sha256 != identify(tmp_path / "two").sha256


@cases("change", ["xxx\nb\n", "a\nb\nc\n", "a\nc\n"])
def test_a_text_that_changes_meanwhile_is_refused(tmp_path, change):
    (tmp_path / "a.txt").write_text("a\nb\n")
    text = identify(tmp_path)
    (tmp_path / "a.txt").write_text(change)
    with pytest.raises(RecordError, match=r"it has changed since the command began\. Bring back what it was"):
        list(pieces([text], validation=0.5))
