import pytest

from steepest.lab.data.shards import read_shard, shard_paths
from steepest.lab.disk.files import DataError
from tests.lab.tasks.fake_data import shard


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(1023), "has 1023 bytes, less than the header of 1024"),
        (shard([1], magic=20251013), r"starts with 20251013 and 1, not with the magic number 20240520 and version 1"),
        (shard([1], version=7), "starts with 20240520 and 7"),
        (shard([1, 2], promised=3), "has 1028 bytes; its header promises 3 tokens, which take 1030.*downloaded to its"),
        (shard([1, 2], promised=1), "has 1028 bytes; its header promises 1 tokens, which take 1026"),
        (shard([], promised=-1), "promises -1 tokens"),
    ],
    ids=["header", "magic", "version", "short", "long", "negative"],
)
def test_a_damaged_or_foreign_shard_is_refused(tmp_path, content, message):
    (tmp_path / "fineweb_train_000002.bin").write_bytes(content)
    with pytest.raises(DataError, match=rf"fineweb_train_000002\.bin.*{message}"):
        read_shard(tmp_path / "fineweb_train_000002.bin")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["a_train_val_1.bin", "val_val_1_train_2.bin"])
def test_a_shard_that_would_be_trained_on_and_held_out_is_refused(tmp_path, split, name):
    for one in ("a_train_1.bin", "a_val_1.bin"):
        (tmp_path / one).write_bytes(shard([1]))
    assert [path.name for path in shard_paths(tmp_path, split)] == [f"a_{split}_1.bin"]
    (tmp_path / name).write_bytes(shard([1]))
    with pytest.raises(DataError, match=rf"{name} has the name of both splits.*Rename it"):
        shard_paths(tmp_path, split)
