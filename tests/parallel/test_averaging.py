"""Averages of weights on several ranks: shards are averaged where they are, saved, and loaded."""

import pytest
import torch
import torch.distributed as dist

from steepest import TailAverage
from steepest.ranks import whole
from tests.parallel.training import BATCH, batch, built, give

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed"),
]
STEPS = 6


def wholes(tensors):
    with torch.no_grad():
        return {name: whole(tensor).clone() for name, tensor in tensors}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def averaged(average, laid):
    """The weights inside, where the model is called, too: FSDP gathers what it needs for that."""
    rank, ranks = laid.part
    *seen, _ = batch(0)
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    before = wholes(laid.net.named_parameters())
    with average.averaged():
        found = wholes(laid.net.named_parameters())
        with torch.no_grad():
            laid.model(*(part[rows] for part in seen))
    assert same(before, wholes(laid.net.named_parameters()))
    assert not same(before, found)
    return found


def evaluated(layout, folder, mix):
    """What the averages of a layout are; also after they were saved in parts, and loaded whole."""
    import torch.distributed.checkpoint as dcp

    laid, optimizer = built("muon_max_momo", layout)
    options = {"start": 1, "parts": 2.0, "mix": mix}
    average = TailAverage(laid.model, **options)
    average.follow(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.step(loss=give(laid, layout, step))
    found = averaged(average, laid)
    dcp.save(average.state_dict(), checkpoint_id=folder)
    other = TailAverage(laid.model, **options)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state)
    assert other.steps == STEPS
    assert same(averaged(other, laid), found)
    full = wholes(average.state_dict()["averages"].items())
    other.load_state_dict({"steps": STEPS, "averages": {name: tensor + 1 for name, tensor in full.items()}})
    shifted = wholes(other.state_dict()["averages"].items())
    assert same(shifted, {name: tensor + 1 for name, tensor in full.items()})
    return found


@pytest.mark.parametrize("mix", [1.0, 0.6])
def test_shards_are_averaged_as_whole_tensors_are(world, tmp_path, mix):
    (expected,) = world(1).run(evaluated, "alone", str(tmp_path / "alone"), mix)
    for layout in ("fsdp", "tensor", "ddp"):
        for found in world(2).run(evaluated, layout, str(tmp_path / layout), mix):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
