import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from steepest.lab.data.shards import HEADER
from steepest.lab.disk.files import DataError
from steepest.lab.tasks import make_task
from steepest.lab.tasks.fineweb import HASHED, FinewebTask
from steepest.lab.tasks.order import ExampleOrder
from tests.lab.disk.test_files import THINGS
from tests.lab.tasks.fake_data import shard, write_fineweb


@pytest.fixture
def folder(tmp_path):
    return write_fineweb(tmp_path / "fineweb")


def tokens_of(path):
    return np.frombuffer(path.read_bytes()[HEADER:], dtype="<u2").astype(np.int64)


def test_an_example_is_a_window_of_one_shard(folder):
    task = FinewebTask("demo", data=folder)
    assert task.train_size == 3000 // 129 + 2000 // 129 == 23 + 15
    inputs, targets = task.batch(torch.tensor([22, 23, 0, 37]))
    assert inputs.dtype == targets.dtype == torch.int64
    for row, (name, number) in enumerate([("000001", 22), ("000002", 0), ("000001", 0), ("000002", 14)]):
        window = tokens_of(folder / f"fineweb_train_{name}.bin")[number * 129 : (number + 1) * 129]
        assert inputs[row].tolist() == window[:-1].tolist()
        assert targets[row].tolist() == window[1:].tolist()


def test_the_order_of_tokens_does_not_depend_on_the_batch_size(folder):
    task = FinewebTask("demo", data=folder)
    read = []
    for size in (3, 4):
        order = ExampleOrder(task.train_size, seed=1)
        read.append(torch.cat([task.batch(order.take(size))[0] for _ in range(12 // size)]))
    assert torch.equal(*read)


def test_a_shard_shorter_than_a_window_gives_none(folder):
    (folder / "fineweb_train_000000.bin").write_bytes(shard(range(128)))
    (folder / "fineweb_train_000003.bin").write_bytes(shard(range(129)))
    task = FinewebTask("demo", data=folder)
    assert task.train_size == 39
    assert task.batch(torch.tensor([38]))[0].tolist() == [list(range(128))]


def test_validation_windows_are_distinct_and_evenly_spread(tmp_path):
    (folder := tmp_path / "data").mkdir()
    (folder / "a_train_0.bin").write_bytes(shard(range(200)))
    (folder / "a_val_0.bin").write_bytes(shard(np.arange(129 * 48)))
    task = FinewebTask("demo", data=folder)
    starts = task.held_out_windows[task.held_out.examples("report", whole=False)][:, 0] // 129
    assert starts.tolist() == [12 + i * 36 // 32 for i in range(32)]
    assert task.held_out.examples("tuning", whole=True).tolist() == list(range(12))


@pytest.mark.slow
def test_evaluation_is_the_mean_over_all_validation_tokens(folder, rng):
    task = FinewebTask("demo", data=folder)
    model = task.build_model(0)
    assert task.evaluate(model, "report", whole=True).loss == pytest.approx(np.log(50304), rel=1e-6)
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=rng)
    windows = task.held_out_windows[task.held_out.examples("report", whole=True)]
    assert len(windows) == 9
    with torch.no_grad():
        scores = model(windows[:, :-1]).log_softmax(-1)
    expected = -scores.gather(-1, windows[:, 1:, None]).double().mean()
    assert task.evaluate(model, "report", whole=True).loss == pytest.approx(expected.item(), rel=1e-5)


def test_too_few_validation_windows_are_refused(tmp_path):
    (folder := tmp_path / "data").mkdir()
    (folder / "a_train_0.bin").write_bytes(shard(range(200)))
    (folder / "a_val_0.bin").write_bytes(shard(range(129 * 3)))
    with pytest.raises(ValueError, match=r"The validation shards of 'data' fill 3 windows; 4 are needed"):
        FinewebTask("demo", data=folder)


def test_the_identity_sees_content_but_no_names(tmp_path, folder):
    here = make_task("fineweb", data=folder).data_identity()
    assert here.name == "fineweb"
    assert here.bytes == 3 * HEADER + 2 * 6500
    (renamed := tmp_path / "renamed").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, renamed / path.name.replace("fineweb", "other"))
    assert make_task("fineweb", data=renamed).data_identity().sha256 == here.sha256
    path = folder / "fineweb_train_000001.bin"
    path.rename(folder / "fineweb_train_000009.bin")  # after the other one
    assert make_task("fineweb", data=folder).data_identity().sha256 != here.sha256


@pytest.mark.parametrize(
    ("place", "seen"), [(0, True), (HASHED // 2 - 1, True), (HASHED, False), (-HASHED // 2, True), (-1, True)]
)
def test_of_a_long_shard_both_ends_count(folder, place, seen):
    path, tokens = folder / "fineweb_train_000001.bin", np.zeros(2 * HASHED, dtype=np.uint16)  # 4 MiB
    path.write_bytes(shard(tokens))
    before = make_task("fineweb", data=folder).data_identity().sha256
    tokens[place] = 1
    path.write_bytes(shard(tokens))
    assert (make_task("fineweb", data=folder).data_identity().sha256 != before) == seen


def test_no_data_says_what_to_download_and_where(tmp_path, folder):
    remedy = r"Download shards, .*cached_fineweb10B\.py.*--data DIR"
    with pytest.raises(FileNotFoundError, match=rf"'fineweb' has no data of its own\. {remedy}"):
        make_task("fineweb")
    with pytest.raises(FileNotFoundError, match=rf"nowhere' is not a folder\. {remedy}"):
        make_task("fineweb", data=tmp_path / "nowhere")
    (folder / "fineweb_val_000000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no \*_val_\*\.bin\. {remedy}"):
        make_task("fineweb", data=folder)


def test_shards_without_a_window_are_refused(folder):
    (folder / "fineweb_val_000000.bin").write_bytes(shard(range(100)))
    with pytest.raises(ValueError, match="No validation shard fills one window of 129 tokens; the longest has 100"):
        make_task("fineweb", data=folder)


def test_a_token_outside_of_the_vocabulary_is_refused_when_it_is_read(folder):
    tokens = np.zeros(300, dtype=np.uint16)
    tokens[200] = 50257
    (folder / "fineweb_train_000002.bin").write_bytes(shard(tokens))
    task = make_task("fineweb", data=folder)
    assert len(task.batch(torch.tensor([23]))[0]) == 1
    with pytest.raises(ValueError, match=r"fineweb_train_000002\.bin has the token 50257; .* ends at 50256"):
        task.batch(torch.tensor([24]))


def trained_by(folder, out):
    """In a process of its own, which a shard could end or make hang."""
    command = [sys.executable, "-Pm", "steepest", "train", "--task", "fineweb", "--method", "adamw", "--steps", "4"]
    return subprocess.run(
        [*command, "--data", str(folder), "--out", str(out)], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("size", [0, HEADER, HEADER + 2 * 200])
def test_a_shard_that_shrinks_while_the_task_uses_it_is_named(folder, size):
    task = make_task("fineweb", data=folder)
    path = folder / "fineweb_train_000001.bin"
    full = path.stat().st_size
    os.truncate(path, size)
    with pytest.raises(
        DataError, match=rf"000001\.bin had {full} bytes when the run began, and has {size} now\. Bring"
    ):
        task.batch(torch.tensor([0]))


def test_a_shard_that_is_gone_is_named(folder):
    task = make_task("fineweb", data=folder)
    (folder / "fineweb_train_000001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"fineweb_train_000001\.bin"):
        task.batch(torch.tensor([0]))


@pytest.mark.parametrize("kind", ["train", "val"])
@pytest.mark.parametrize("thing", THINGS)
def test_what_is_no_regular_file_among_shards_is_refused_at_once(folder, thing, kind):
    path = next(folder.glob(f"*_{kind}_*.bin"))
    path.unlink()
    THINGS[thing](path)
    with pytest.raises((ValueError, OSError), match=path.name):
        make_task("fineweb", data=folder)


@pytest.mark.slow
def test_foreign_tokens_end_a_command_with_one_line(folder, tmp_path):
    tokens = np.full(3000, 65535, dtype=np.uint16)
    for path in folder.glob("*_train_*.bin"):
        path.write_bytes(shard(tokens))
    ended = trained_by(folder, tmp_path / "run")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert re.search(r"error: .*\.bin has the token 65535; GPT-2's vocabulary ends at 50256", ended.stderr)
