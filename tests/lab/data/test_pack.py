import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.lab.data import documents
from steepest.lab.data import pack as packing
from steepest.lab.data.documents import identify, pieces
from steepest.lab.data.manifest import read_manifest
from steepest.lab.data.pack import check_apart, pack
from steepest.lab.data.shards import read_shard
from steepest.lab.data.tokenizer import Tokenizer, read_tokenizer
from steepest.lab.disk.files import RecordError
from steepest.lab.disk.ours import RunBusyError, locked
from steepest.lab.errors import UsageError
from tests.cases import cases
from tests.lab.data.tiny_tokenizer import SENTENCES, decoded, tokens_in, trained, write_tokenizer
from tests.lab.disk.test_files import FullDisk


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return read_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "gpt2"))


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 16)
    monkeypatch.setattr(packing, "BATCH", 100)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # of hundreds of files


def write_texts(folder, texts):
    """A file for every text, and all of them once more in a .jsonl."""
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_bytes(text.encode())
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def packed(folder, out, tokenizer, *, tell=lambda _: None, **options):
    options = {"shard_tokens": 40, "validation": 0.3, **options}
    return pack([identify(folder)], tokenizer, out, tell=tell, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(st.text(max_size=20) | st.sampled_from(SENTENCES), min_size=2, max_size=8),
    shard_tokens=st.integers(1, 100),
    length=st.integers(1, 50),
)
def test_shards_hold_the_documents(tmp_path_factory, tokenizer, texts, shard_tokens, length):
    base = tmp_path_factory.mktemp("packed")
    write_texts(base / "texts", ["a text that is trained on", *texts, "end"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", length)
        patch.setattr(packing, "BATCH", 2 * length)
        patch.setattr(os, "fsync", lambda _: None)  # of hundreds of files
        manifest = packed(base / "texts", base / "out", tokenizer, shard_tokens=shard_tokens)
        expected = {"train": [], "val": []}
        for piece in pieces([identify(base / "texts")], validation=0.3):
            expected[piece.split] += [""] if piece.first else []
            expected[piece.split][-1] += piece.text
    assert sorted([*expected["train"], *expected["val"]]) == sorted(
        [*texts, *texts, *2 * ["a text that is trained on", "end"]]
    )
    for split in ("train", "val"):
        assert decoded(tokens_in(base / "out", split)) == expected[split]
        counts = [shard.tokens for shard in manifest.shards if shard.split == split]
        assert counts[:-1] == [shard_tokens] * (len(counts) - 1)
        assert 0 < counts[-1] <= shard_tokens
        read = [read_shard(path).tokens for path in sorted((base / "out").glob(f"*_{split}_*.bin"))]
        assert read == counts


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("small_pieces")
def test_wherever_packing_ends_the_same_command_ends_with_the_same_files(tmp_path, tokenizer):
    folder, ends = write_texts(tmp_path / "texts", [*SENTENCES, "", *SENTENCES]), []
    packed(folder, tmp_path / "whole", tokenizer, tell=ends.append)
    shards = sum(progress.shard is not None for progress in ends)
    assert len(ends) > 15
    assert shards > 7
    for last in range(len(ends)):
        left = iter(range(last))

        def tell(_, left=left):
            if next(left, None) is None:
                raise Killed

        out = tmp_path / str(last)
        with pytest.raises(Killed):
            packed(folder, out, tokenizer, tell=tell)
        assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
        again = []
        packed(folder, out, tokenizer, tell=again.append)
        assert contents(out) == contents(tmp_path / "whole")
        made = [progress.shard.name for progress in again if progress.shard is not None]
        assert len(made) + len(before) == shards
        assert {name: (out / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.usefixtures("small_pieces")
def test_what_is_whole_is_not_made_tokens_of_again(tmp_path, tokenizer, monkeypatch):
    folder = write_texts(tmp_path / "texts", SENTENCES * 4)
    made = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, texts: made.extend(texts) or encode(self, texts))
    packed(folder, tmp_path / "out", tokenizer)
    whole = len(made)
    last = sorted((tmp_path / "out").glob("*_train_*"))[-1]
    before = contents(tmp_path / "out")
    last.unlink()
    made.clear()
    packed(folder, tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == before
    assert 0 < len(made) < whole / 3
    made.clear()
    packed(folder, tmp_path / "out", tokenizer)
    assert not made


@pytest.mark.usefixtures("small_pieces")
def test_a_kill_between_a_shard_and_the_manifest_loses_nothing(tmp_path, tokenizer):
    folder = write_texts(tmp_path / "texts", SENTENCES * 4)
    packed(folder, tmp_path / "whole", tokenizer)
    out = tmp_path / "out"

    class Last:
        count = 0

        def __call__(self, progress):
            self.count += progress.shard is not None
            if self.count == 3:
                raise Killed

    with pytest.raises(Killed):
        packed(folder, out, tokenizer, tell=Last())
    shards = read_manifest(out).shards
    content = json.loads((out / "manifest.json").read_text())
    content["shards"].pop()
    (out / "manifest.json").write_text(json.dumps(content))
    (out / f".{shards[-1].name}.123.0123abcd.tmp").write_bytes(b"half of one")
    (out / ".manifest.json.123.0123abcd.tmp").write_bytes(b"half of one")
    packed(folder, out, tokenizer)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_shard_that_was_changed_is_refused(tmp_path, tokenizer):
    folder = write_texts(tmp_path / "texts", SENTENCES * 4)
    packed(folder, tmp_path / "out", tokenizer)
    before = contents(tmp_path / "out")
    path = tmp_path / "out" / "packed_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(RecordError, match=r"train_000000\.bin: it is not as it was packed\. Delete it\. Repeat the"):
        packed(folder, tmp_path / "out", tokenizer)
    path.unlink()
    packed(folder, tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == before


def other_tokenizer():
    vocabulary, merges = trained()
    return Tokenizer(vocabulary, merges[:-1], None)


@cases(
    "change, message",
    [
        ({"shard_tokens": 41}, "packed with another --shard-tokens: 40 there, 41 here"),
        ({"validation": 0.2}, r"packed with another --validation: 0\.3 there, 0\.2 here"),
        ({"tokenizer": other_tokenizer()}, "packed with another --tokenizer: [0-9a-f]{64} there, [0-9a-f]{64} here"),
        ({"content": "bcd"}, "number 1 was texts of 13 bytes, and is texts of 13 bytes, with another content"),
        ({"content": "longer"}, "packed from other texts: the text number 1 was texts of 13 bytes, and is texts of 16"),
        ({"more": True}, "the text number 2 was none, and is texts of 13 bytes"),
    ],
)
def test_other_settings_and_other_texts_are_refused(tmp_path, tokenizer, change, message):
    (folder := tmp_path / "texts").mkdir()
    (folder / "a").write_text("a long one")
    (folder / "b").write_text("abc")
    options = {"shard_tokens": 40, "validation": 0.3, "tell": lambda _: None}
    pack([identify(folder)], tokenizer, tmp_path / "out", **options)
    before = contents(tmp_path / "out")
    (folder / "b").write_text(change.pop("content", "abc"))
    texts = [identify(folder)] * (1 + change.pop("more", False))
    changed = {"tokenizer": tokenizer, **options, **change}
    with pytest.raises(UsageError, match=rf"out was {message}.* or another --out|{message}.* or another --out"):
        pack(texts, out=tmp_path / "out", **changed)
    assert contents(tmp_path / "out") == before


def test_a_folder_of_somebody_else_is_not_written_to(tmp_path, tokenizer):
    folder = write_texts(tmp_path / "texts", SENTENCES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fineweb_train_000001.bin").write_bytes(b"downloaded")
    with pytest.raises(UsageError, match=r"out is not empty and no manifest\.json, it holds 'fineweb_train_000001"):
        packed(folder, tmp_path / "out", tokenizer)
    (tmp_path / "out" / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(UsageError, match=r"out holds a manifest\.json that the lab did not write"):
        packed(folder, tmp_path / "out", tokenizer)
    assert (tmp_path / "out" / "fineweb_train_000001.bin").read_bytes() == b"downloaded"


def test_one_command_at_a_time_packs_into_a_folder(tmp_path, tokenizer):
    folder = write_texts(tmp_path / "texts", SENTENCES)
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(RunBusyError, match=r"is being packed by process \d+\. Wait until"):
        packed(folder, tmp_path / "out", tokenizer)


def test_what_was_asked_first_does_not_count_where_nothing_is_whole(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    with pytest.raises(UsageError, match="two are needed"):
        packed(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)
    (tmp_path / "a.txt").write_text("one line without an end")
    with pytest.raises(RecordError, match="or a larger --validation"):
        packed(tmp_path / "a.txt", tmp_path / "out", tokenizer)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    assert packed(tmp_path / "a.jsonl", tmp_path / "out", tokenizer).complete
    assert [decoded(tokens_in(tmp_path / "out", split)) for split in ("train", "val")] == [["one"], ["two"]]


def test_too_many_shards_are_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "MOST_SHARDS", 2)
    folder = write_texts(tmp_path / "texts", SENTENCES)
    with pytest.raises(UsageError, match=r"--shard-tokens 40 makes more than 2 shards\. Make them larger"):
        packed(folder, tmp_path / "out", tokenizer)


@cases("room", [0, 1000, 2000, 3000])
@pytest.mark.usefixtures("small_pieces")
def test_a_full_disk_loses_nothing(tmp_path, tokenizer, room):
    folder = write_texts(tmp_path / "texts", SENTENCES)
    packed(folder, tmp_path / "whole", tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", FullDisk(room))
        with pytest.raises(OSError, match="No space left on device") as refused:
            packed(folder, tmp_path / "out", tokenizer)
        assert refused.value.errno == errno.ENOSPC
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]
    packed(folder, tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_pieces")
@cases("name, bad, good", [("z.txt", b"\xff", b"mended"), ("z.jsonl", b"{}", b'{"text": "mended"}')])
def test_a_bad_text_that_was_mended_is_packed(tmp_path, tokenizer, name, bad, good):
    folder = write_texts(tmp_path / "texts", SENTENCES * 4)
    (folder / name).write_bytes(bad)
    with pytest.raises(RecordError, match=rf"{name}: .*Mend it, or take it away"):
        packed(folder, tmp_path / "out", tokenizer)
    (folder / name).write_bytes(good)
    assert packed(folder, tmp_path / "out", tokenizer).complete


@pytest.mark.usefixtures("small_pieces")
@cases("split", ["train", "val"])
@cases("change", [{"pieces": 10**6}, {"offset": 10**6}, {"pieces": 10**6, "offset": 10**6}])
def test_a_manifest_that_has_more_than_the_texts_is_refused(tmp_path, tokenizer, split, change):
    folder = write_texts(tmp_path / "texts", SENTENCES * 4)
    packed(folder, tmp_path / "out", tokenizer)
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    *kept, last = [shard for shard in content["shards"] if shard["name"].startswith(f"packed_{split}")]
    kept[-1].update(change)
    content["shards"].remove(last)
    path.write_text(json.dumps({**content, "complete": False}))
    (tmp_path / "out" / last["name"]).unlink()
    with pytest.raises(RecordError, match=rf"json: its last whole shard of '{split}' is to hold .*Delete the folder"):
        packed(folder, tmp_path / "out", tokenizer)
    assert not read_manifest(tmp_path / "out").complete


def test_what_is_given_as_out_must_be_able_to_become_a_folder(tmp_path, tokenizer):
    folder = write_texts(tmp_path / "texts", SENTENCES)
    (tmp_path / "file").write_text("mine")
    for out in ("/proc/x", tmp_path / "file", tmp_path / "file" / "shards"):
        with pytest.raises(UsageError, match=rf"--out '{out}' is no folder, and cannot become one \(.+\)\. Give a"):
            packed(folder, Path(out), tokenizer)
    assert (tmp_path / "file").read_text() == "mine"


@cases("out", ["texts", "texts/shards", "other/../texts/a/b", "link/shards"])
def test_shards_are_not_put_among_the_texts(tmp_path, out):
    for name in ("texts", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "texts")
    with pytest.raises(UsageError, match=rf"--out '.*{out}' lies in '.*texts', all of which is text.* Give an --out"):
        check_apart(tmp_path / out, [tmp_path / "other", tmp_path / "texts"])
    check_apart(tmp_path / "texts2", [tmp_path / "other", tmp_path / "texts"])
