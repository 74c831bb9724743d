import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from steepest.lab.data import check
from steepest.lab.data.check import check_folder
from steepest.lab.data.documents import identify
from steepest.lab.data.pack import pack
from steepest.lab.data.shards import HEADER
from steepest.lab.data.tokenizer import read_tokenizer
from steepest.lab.disk.files import RecordError
from steepest.lab.tasks import make_task
from tests.cases import cases
from tests.lab.data.tiny_tokenizer import SENTENCES, write_tokenizer
from tests.lab.tasks.fake_data import shard, write_fineweb


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Shards with a manifest."""
    base = tmp_path_factory.mktemp("packed")
    lines = [json.dumps({"text": f"{number} {SENTENCES[number % 3]}"}) for number in range(100)]
    (base / "a.jsonl").write_text("\n".join(lines))
    tokenizer = read_tokenizer(write_tokenizer(base / "gpt2"))
    pack([identify(base / "a.jsonl")], tokenizer, base / "out", shard_tokens=1000, validation=0.2, tell=lambda _: None)
    return base / "out"


@pytest.fixture
def packed(whole, tmp_path):
    """A copy of them to change."""
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def problems(folder):
    shards, others = check_folder(folder, tell=lambda _: None)
    return [one.problem for one in shards if one.problem is not None] + others


@cases("chunk", [1024, 1026, 2**22])
def test_all_is_read_and_counted(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(check, "CHUNK", chunk)
    (folder := tmp_path / "it").mkdir()
    written = {
        "a_train_0.bin": [50256, 1, 2, 50256, 3],
        "a_train_1.bin": [],
        "a_val_0.bin": np.arange(50257),
    }
    for name, tokens in written.items():
        (folder / name).write_bytes(shard(tokens))
    read = []
    shards, others = check_folder(folder, tell=read.append)
    assert others == []
    assert [(one.name, one.split, one.tokens, one.documents, one.problem) for one in shards] == [
        ("a_train_0.bin", "train", 5, 2, None),
        ("a_train_1.bin", "train", 0, 0, None),
        ("a_val_0.bin", "val", 50257, 1, None),
    ]
    assert [one.sha256 for one in shards] == [
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in written
    ]
    assert sum(read) == sum(path.stat().st_size for path in folder.iterdir())


@cases("chunk", [1024, 1026, 2**22])
@cases("place", [0, 700, 2999])
def test_a_foreign_token_is_found_with_its_place(tmp_path, monkeypatch, chunk, place):
    monkeypatch.setattr(check, "CHUNK", chunk)
    folder = write_fineweb(tmp_path / "fineweb")
    tokens = np.zeros(3000, dtype=np.uint16)
    tokens[place] = 50257
    (folder / "fineweb_train_000001.bin").write_bytes(shard(tokens))
    [problem] = problems(folder)
    assert f"000001.bin has the token 50257 at place {place:,}; GPT-2's vocabulary ends at 50256. It is" in problem
    assert "or of another tokenizer. Download shards, for example" in problem


def test_every_bad_shard_is_named(tmp_path):
    folder = write_fineweb(tmp_path / "fineweb")
    (folder / "fineweb_train_000003.bin").write_bytes(shard([1], magic=20240801, version=7))
    (folder / "fineweb_train_000004.bin").write_bytes(shard([1, 2], promised=3))
    (folder / "fineweb_train_000005.bin").write_bytes(shard([65535]))
    (folder / "fineweb_train_000006.bin").write_bytes(b"")
    (folder / "fineweb_val_000007.bin").mkdir()
    found = problems(folder)
    assert len(found) == 5
    for name, problem, told in zip(
        range(3, 8),
        ["starts with 20240801 and 7", "perhaps not downloaded", "token 65535", "0 bytes", "is a directory"],
        found,
        strict=True,
    ):
        assert f"00000{name}.bin" in told
        assert problem in told


def test_what_was_packed_is_as_it_was(packed):
    assert problems(packed) == []


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@cases("place", [HEADER + 2, HEADER + 1000, -2, 900], ["first", "middle", "last", "header"])
def test_one_byte_that_has_changed_is_found(packed, place):
    flip(packed / "packed_train_000000.bin", place)
    [problem] = problems(packed)
    assert "packed_train_000000.bin: its SHA-256 was " in problem
    assert "when it was packed, and is " in problem
    assert problem.endswith(
        "Delete it. Repeat the command that packed it: shards that are whole are kept, the others are made anew."
    )
    flip(packed / "packed_train_000000.bin", place)
    assert problems(packed) == []


def test_without_a_manifest_a_token_that_has_changed_goes_unnoticed(packed):
    """Which the page says; there is a hash to compare by hand."""
    (packed / "manifest.json").unlink()
    before = check_folder(packed, tell=lambda _: None)[0][0].sha256
    flip(packed / "packed_train_000000.bin", HEADER + 1000)
    assert problems(packed) == []
    assert check_folder(packed, tell=lambda _: None)[0][0].sha256 != before


def test_a_shard_that_is_truncated_missing_or_foreign_is_named(packed):
    os.truncate(packed / "packed_train_000000.bin", 1500)
    (packed / "packed_train_000001.bin").unlink()
    (packed / "fineweb_val_000009.bin").write_bytes(shard([1]))
    truncated, foreign, missing = problems(packed)
    assert "packed_train_000000.bin has 1500 bytes; its header promises 1000 tokens" in truncated
    assert truncated.endswith("the others are made anew.")
    assert "fineweb_val_000009.bin: it is not one of the shards that manifest.json lists. Take it away." in foreign
    assert "packed_train_000001.bin: the shard is missing. Repeat the command" in missing


def test_an_unfinished_packing_is_named(packed):
    content = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps({**content, "complete": False}))
    [problem] = problems(packed)
    assert "manifest.json: packing has not ended. Repeat the command that packed it" in problem
    with pytest.raises(RecordError, match=r"manifest\.json: packing has not ended"):
        make_task("fineweb", data=packed)
    (packed / "packed_val_000000.bin").unlink()
    shards = [one for one in content["shards"] if "_val_" not in one["name"]]
    (packed / "manifest.json").write_text(json.dumps({**content, "complete": False, "shards": shards}))
    assert problems(packed) == [problem]
    with pytest.raises(RecordError, match=r"manifest\.json: packing has not ended"):
        make_task("fineweb", data=packed)
    (packed / "manifest.json").write_text("{")
    with pytest.raises(RecordError, match="not valid JSON"):
        check_folder(packed, tell=lambda _: None)


def test_names_of_a_stranger_steer_no_terminal(tmp_path):
    folder = write_fineweb(tmp_path / "fineweb")
    (folder / "a_train_\x1b[2J.bin").write_bytes(b"")
    [problem] = problems(folder)
    assert "\x1b" not in problem
