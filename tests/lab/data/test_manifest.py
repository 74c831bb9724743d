import json

import msgspec
import pytest

from steepest.lab.data.manifest import Manifest, PackedShard, PackedText, read_manifest
from steepest.lab.data.shards import Shard
from steepest.lab.disk.files import RecordError
from tests.cases import cases
from tests.lab.disk.test_files import THINGS

SHARDS = {"packed_train_000000.bin": 2000, "packed_train_000001.bin": 7, "packed_val_000000.bin": 100}


def manifest(**other):
    shards = tuple(PackedShard(name, tokens, "a" * 64, 1, 0) for name, tokens in SHARDS.items())
    fields = {"vocabulary": "b" * 64, "shard_tokens": 2000, "validation": 0.05, "shards": shards, "complete": True}
    return Manifest(**{"format": 1, "texts": (PackedText("a.txt", 5, "c" * 64),), **fields, **other})


def test_what_is_written_is_read_back(tmp_path):
    assert read_manifest(tmp_path) is None
    manifest().write(tmp_path)
    assert read_manifest(tmp_path) == manifest()
    assert [shard.split for shard in read_manifest(tmp_path).shards] == ["train", "train", "val"]


def damaged(**other):
    content = json.loads(msgspec.json.encode(manifest()))
    return json.dumps({**content, **other})


def renamed(*names):
    return [{"name": name, "tokens": 1, "sha256": "a" * 64, "pieces": 0, "offset": 1} for name in names]


@cases(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[]", "the content must be an object"),
        (damaged(format=2), "format must be 1"),
        (damaged(vocabulary="b"), "vocabulary must be 64 hexadecimal digits, got 'b'"),
        (damaged(validation=1), "validation must be"),
        (damaged(texts=[]), "texts must be a non-empty list"),
        (damaged(shards=renamed("../secret")), "shards.*name must be a string"),
        (damaged(shards=renamed("packed_train_000000.bin\n")), "shards.*name must be a string"),
        (
            damaged(shards=renamed("packed_train_000001.bin")),
            "shards must be a list of names in order, numbered from 0",
        ),
        (damaged(shards=renamed("packed_train_000000.bin", "packed_train_000000.bin")), "shards must be a list of nam"),
        (damaged(shards=renamed("packed_val_000000.bin", "packed_train_000000.bin")), "shards must be a list of names"),
    ],
)
def test_one_that_is_damaged_is_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(
        RecordError,
        match=rf"manifest\.json: {message}.*If `steepest data pack` made the folder, delete it and pack.* if not, take",
    ):
        read_manifest(tmp_path)


@cases("thing", THINGS)
def test_one_that_is_no_regular_file_is_refused(tmp_path, thing):
    (folder := tmp_path / "inside").mkdir()
    THINGS[thing](folder / "manifest.json")
    with pytest.raises(RecordError, match=r"manifest\.json: .*not a regular file"):
        read_manifest(folder)


@cases(
    "change, message",
    [
        ({"packed_train_000001.bin": None}, r"packed_train_000001\.bin: the shard is missing\. Repeat the command"),
        (
            {"packed_train_000001.bin": 8},
            r"000001\.bin: it has 8 tokens, and had 7 when it was packed\. Delete it\. Rep",
        ),
        (
            {"other_val_000000.bin": 8},
            r"other_val_000000\.bin: it is not one of the shards that manifest.* Take it awa",
        ),
    ],
)
def test_shards_that_are_not_those_that_were_packed_are_refused(tmp_path, change, message):
    def found(counts):
        return [Shard(tmp_path / name, tokens) for name, tokens in counts.items() if tokens is not None]

    manifest().check_ended(tmp_path)
    manifest().check(tmp_path, found(SHARDS))
    with pytest.raises(RecordError, match=message):
        manifest().check(tmp_path, found({**SHARDS, **change}))
    with pytest.raises(RecordError, match=r"manifest\.json: packing has not ended\. Repeat the command"):
        manifest(complete=False).check_ended(tmp_path)
