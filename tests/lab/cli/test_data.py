"""From a text of one's own to a run: pack, check, train."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from steepest.lab.cli import main
from steepest.lab.data.tokenizer import read_tokenizer
from tests.cases import cases
from tests.lab.cli.test_main import run
from tests.lab.data.tiny_tokenizer import SENTENCES, decoded, tokens_in, write_tokenizer
from tests.lab.tasks.fake_data import shard, write_fineweb

TEXT = "".join(f"{number}. {SENTENCES[number % 3]}\n" for number in range(1000))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder / "gpt2")
    (folder / "notes.txt").write_text(TEXT)
    return folder


def words(base, out, *options):
    return ["data", "pack", f"{base}/notes.txt", "--tokenizer", f"{base}/gpt2", "--out", str(out), *options]


@pytest.mark.slow
def test_a_text_is_packed_and_checked_and_trained_on(base, tmp_path, capsys):
    code, out, err = run(capsys, *words(base, tmp_path / "shards", "--shard-tokens", "9000"))
    assert code == 0
    train, val = (tokens_in(tmp_path / "shards", split) for split in ("train", "val"))
    assert re.search(r"^packed_train_000000\.bin: 9,000 tokens$", err, flags=re.MULTILINE)
    assert f"For training: {len(train):,} tokens in {-(-len(train) // 9000)} shards\n" in out
    assert f"For validation: {len(val):,} tokens in 1 shard\n" in out
    assert "The vocabulary is not GPT-2's, though it has as many tokens" in out
    assert "".join([*decoded(train), *decoded(val)]) == TEXT

    code, out, _ = run(capsys, "data", "check", str(tmp_path / "shards"))
    assert code == 0
    assert re.search(r"packed_train_000000\.bin +9,000 +1 +[0-9a-f]{64}", out)
    windows = sum(count // 129 for count in (9000,) * (len(train) // 9000) + (len(train) % 9000,))
    assert f", 128: {windows:,}, 256: " in out

    code, out, _ = run(
        capsys,
        *("train", "--task", "fineweb", "--preset", "demo", "--data", str(tmp_path / "shards")),
        *("--method", "adamw", "--steps", "2", "--batch-size", "2", "--out", str(tmp_path / "run")),
    )
    assert code == 0
    assert float(re.match(r"Final loss (\S+) after 2 steps", out)[1]) < math.log(50304)


def test_programs_read_what_was_packed_and_found(base, tmp_path, capsys):
    code, out, _ = run(capsys, *words(base, tmp_path / "shards", "--json"))
    assert code == 0
    packed = json.loads(out)
    assert packed["gpt2"] is False
    assert packed["complete"]
    assert packed["vocabulary"] == read_tokenizer(base / "gpt2").sha256
    assert packed["texts"][0]["bytes"] == len(TEXT.encode())
    code, out, _ = run(capsys, "data", "check", str(tmp_path / "shards"), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["problems"] == []
    assert [(one["name"], one["sha256"]) for one in found["shards"]] == [
        (one["name"], one["sha256"]) for one in packed["shards"]
    ]
    tokens = found["shards"][0]["tokens"]
    assert found["windows"]["train"]["256"] == tokens // 257


def test_every_bad_shard_is_an_error_of_its_own(tmp_path, capsys):
    folder = write_fineweb(tmp_path / "fineweb")
    (folder / "fineweb_train_000002.bin").write_bytes(shard(np.full(200, 65535)))
    (folder / "fineweb_val_000000.bin").write_bytes(shard([1], version=7))
    code, out, err = run(capsys, "data", "check", str(folder))
    assert code == 1
    first, second = err.splitlines()
    assert re.match(r"error: .*train_000002\.bin has the token 65535 at place 0; .*\. Download shards", first)
    assert re.match(r"error: .*val_000000\.bin starts with 20240520 and 7, not with .*\. Download shards", second)
    assert re.search(r"fineweb_train_000002\.bin +\? +\? +\?", out)
    assert "For training: 3,000 tokens in 1 shard; windows of 32: 90, 128: 23, 256: 11, 1024: 2" in out
    code, out, _ = run(capsys, "data", "check", str(folder), "--json")
    assert code == 1
    assert len(json.loads(out)["problems"]) == 2


def test_shards_that_were_taken_away_are_noticed_when_training_begins(base, tmp_path, capsys):
    assert run(capsys, *words(base, tmp_path / "shards", "--shard-tokens", "9000"))[0] == 0
    (tmp_path / "shards" / "packed_train_000001.bin").unlink()
    code, _, err = run(
        capsys,
        *("train", "--task", "fineweb", "--method", "adamw", "--data", str(tmp_path / "shards")),
        *("--out", str(tmp_path / "run")),
    )
    assert code == 1
    assert "packed_train_000001.bin: the shard is missing. Repeat the command that packed it" in err


@cases(
    "change, message",
    [
        ({"notes.txt": "nowhere.txt"}, "nowhere.txt' is no file, and no folder that holds one"),
        ({"/gpt2": "/gpt3"}, "gpt3' is not there. Give GPT-2's own: a folder with encoder.json and vocab.bpe"),
        ({"9000": "1000"}, "'1000' must be a whole number of at least 1024"),
        ({"9000": "3000000000"}, "at most 2,147,483,647"),
        ({"0.05": "0"}, "'0' must be a finite number above 0"),
        ({"0.05": "0.6"}, "'0.6' must be at most 0.5"),
    ],
)
def test_wrong_usage_is_told(base, tmp_path, capsys, change, message):
    typed = words(base, tmp_path / "out", "--shard-tokens", "9000", "--validation", "0.05")
    for old, new in change.items():
        typed = [word.replace(old, new) if word.endswith(old) else word for word in typed]
    code, _, err = run(capsys, *typed)
    assert code == 2
    assert message in err


def test_shards_are_not_put_among_the_texts(base, capsys):
    code, _, err = run(capsys, *(word.replace("/notes.txt", "") for word in words(base, base / "shards")))
    assert code == 2
    assert f"--out '{base}/shards' lies in '{base}', all of which is text" in err
    assert not (base / "shards").exists()


def test_a_folder_without_shards_is_told(tmp_path, capsys):
    code, _, err = run(capsys, "data", "check", str(tmp_path))
    assert code == 2
    assert "has no *_train_*.bin. Download shards" in err
    assert "--data" not in err
    code, _, err = run(capsys, "data", "check", str(tmp_path / "nowhere"))
    assert code == 2
    assert "nowhere' is not a folder. Give the one with the shards." in err


@pytest.mark.slow
def test_killed_in_the_middle_and_repeated_it_ends_with_the_same_files(base, tmp_path):
    text = tmp_path / "large.txt"
    text.write_text(TEXT * 100)
    typed = ["data", "pack", str(text), "--tokenizer", f"{base}/gpt2", "--shard-tokens", "200000", "--out"]
    assert main([*typed, str(tmp_path / "whole")]) == 0
    out, killed = tmp_path / "out", 0
    for _ in range(3):
        before = len([*out.glob("*.bin")])
        process = subprocess.Popen([sys.executable, "-Pm", "steepest", *typed, str(out)], stderr=subprocess.DEVNULL)
        while process.poll() is None and len([*out.glob("*.bin")]) <= before:  # until one more is whole
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert killed
    assert killed <= len(kept) < len([*(tmp_path / "whole").glob("*.bin")])
    assert main([*typed, str(out)]) == 0
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))
    for path in (tmp_path / "whole").iterdir():
        assert path.name == "lock" or path.read_bytes() == (out / path.name).read_bytes()
    again = {name: (out / name).stat().st_mtime_ns for name in kept}
    assert sum(again[name] == kept[name] for name in kept) >= len(kept) - 1  # one may not have been listed yet
