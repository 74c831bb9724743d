"""A look-ahead around an optimizer whose parameters several ranks share: the same points as on one."""

import pytest
import torch
import torch.distributed as dist

from steepest import OuterNesterov
from steepest.ranks import whole
from tests.parallel.training import built, give

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed"),
]
STEPS = 8


def wholes(tensors):
    with torch.no_grad():
        return {name: whole(tensor).clone() for name, tensor in tensors}


def trained(method, layout, folder):
    """Weights after some steps, those of the base, and Momo's numbers, with a checkpoint in between."""
    import torch.distributed.checkpoint as dcp

    laid, optimizer = built(method, layout)
    outer = OuterNesterov(optimizer, decay=0.8)
    found = []
    for step in range(STEPS):
        if step == STEPS // 2:
            dcp.save(outer.state_dict(), checkpoint_id=folder)
            state = outer.state_dict()
            for average in state["averages"].values():
                average.zero_()  # so that nothing is right by chance
            dcp.load(state, checkpoint_id=folder)
            outer.load_state_dict(state)
        optimizer.zero_grad()
        optimizer.step(loss=give(laid, layout, step))
        numbers = optimizer.diagnostics()
        found.append((wholes(laid.net.named_parameters()), numbers.get("t"), numbers.get("gap")))
    with outer.base():
        found.append((wholes(laid.net.named_parameters()), None, None))
    return found


@pytest.mark.parametrize("method", ["muon", "muon_max_momo", "muon_max_direct", "kept"])
def test_points_are_those_of_one_rank(world, tmp_path, method):
    (expected,) = world(1).run(trained, method, "alone", str(tmp_path / "alone"))
    if "momo" in method:
        assert any(t < 1 for _, t, _ in expected[:-1])
    for layout in ("fsdp", "tensor", "ddp", "experts"):
        for found in world(2).run(trained, method, layout, str(tmp_path / layout)):
            for (ours, t, gap), (theirs, other_t, other_gap) in zip(found, expected, strict=True):
                tolerance = {"rtol": 2e-2, "atol": 2e-3} if method == "kept" else {"rtol": 1e-4, "atol": 2e-5}
                for name, value in theirs.items():
                    torch.testing.assert_close(ours[name], value, **tolerance)
                assert (t is None) == (other_t is None)
                if t is not None:
                    assert t == pytest.approx(other_t, rel=1e-4)
                    assert gap == pytest.approx(other_gap, rel=1e-4)
