import re

import pytest
import torch

from steepest.lab.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

STATE = {"weights": torch.arange(5000.0), "nested": {"step": 3, "name": "x", "none": None, "list": [1.5, True]}}
REMEDY = "Delete this file and repeat the command: the run starts again from step 0, nothing else is lost"


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", STATE)
    return tmp_path / "checkpoint.pt"


def test_a_checkpoint_comes_back_as_it_was(path):
    loaded = load_checkpoint(path, keys={"weights", "nested"})
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert loaded["nested"] == STATE["nested"]


def refused(path, problem: str, keys=frozenset({"weights", "nested"})) -> None:
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: .*{problem}.*{REMEDY}"):
        load_checkpoint(path, keys=set(keys))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "cannot be used")


def test_one_wrong_bit_in_a_tensor_is_refused(path):
    content = bytearray(path.read_bytes())
    where = content.find(torch.arange(100.0, 110.0).numpy().tobytes())
    assert where > 0
    content[where] ^= 1
    path.write_bytes(content)
    refused(path, "the checksum of .* is wrong")


def test_a_file_that_would_run_code_is_refused(path):
    torch.save({"weights": print, "nested": 0}, path)
    refused(path, "cannot be used")


@pytest.mark.parametrize("content", [{"weights": 1}, {"weights": 1, "nested": 2, "more": 3}, [1, 2]])
def test_other_content_is_refused(path, content):
    torch.save(content, path)
    refused(path, r"it must hold \['nested', 'weights'\]")


def test_something_else_in_its_place_is_refused(path):
    path.unlink()
    path.mkdir()
    refused(path, "cannot be used")
