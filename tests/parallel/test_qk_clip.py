"""The largest logits of all ranks clip rows of weights wherever they are kept."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from steepest import Momo, Muon, QKClip
from steepest.anatomy import Attention
from steepest.ranks import laid_out, whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed"),
]


def clipped(layout):
    """Weights after two steps, in which each rank has seen other logits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 9), nn.Linear(5, 3))  # three heads that share one of keys
    rank, size = dist.get_rank(), dist.get_world_size()
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    options = {"process_group": dist.group.WORLD} if layout == "copies" else {}
    optimizer = Muon(model, lr=0.05, step_size=Momo(0.0), **options)
    clip = QKClip([Attention.of("x", model[0], model[1], heads=3, key_heads=1)])
    clip.follow(optimizer)
    gaps = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = laid_out(gradient, parameter)
        seen = torch.tensor([50.0, 400.0, 90.0] if rank == 0 else [300.0, 10.0, 0.0])
        clip.record("x", seen if size > 1 else torch.tensor([300.0, 400.0, 90.0]))
        optimizer.step(loss=2.0)
        gaps.append(optimizer.diagnostics()["gap"])
        assert clip.diagnostics() == {"clipped_heads": 2.0, "max_logit": 400.0}
    with torch.no_grad():
        return [whole(parameter).clone() for parameter in model.parameters()], gaps


def test_ranks_clip_alike_and_as_one(world):
    ((expected, gaps),) = world(1).run(clipped, "alone")
    for layout in ("fsdp", "copies"):
        for found, own in world(2).run(clipped, layout):
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            assert own == pytest.approx(gaps, rel=1e-4)
