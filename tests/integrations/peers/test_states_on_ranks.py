"""Averages that one process made, or ranks that kept different parts, go onto ranks that shard their parameters."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from steepest.integrations.peers import import_state
from tests.integrations.peers.test_states import MATRICES, REST, backward, decayed, keller_jordan, made, train
from tests.processes import join_ranks, leave_ranks

WORLD = 2


def sharded_rank(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    join_ranks(rank, WORLD, folder)
    alone = made()
    old = keller_jordan(alone, sorts=True)
    train(alone, [old], range(10))
    shared = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in shared[::2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(shared, mesh=mesh)
    optimizer = decayed(shared)
    saved = [old.state_of_rank(owner, WORLD) for owner in range(WORLD)]
    report = import_state(optimizer, saved, "KellerJordan", [[REST, MATRICES]] * WORLD, steps=10)
    assert report.missing == ()
    for step in range(10, 15):
        backward(alone, step)
        old.step()
        backward(shared, step)  # of the same batch on each rank
        optimizer.step()
    for there, here in zip(alone.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(here.detach().full_tensor(), there.detach())
    kept = optimizer.state[shared[0].weight]["momentum_buffer"]
    assert type(kept).__name__ == "DTensor"
    leave_ranks()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_averages_go_onto_ranks_that_shard_their_parameters(tmp_path):
    mp.spawn(sharded_rank, (str(tmp_path),), nprocs=WORLD)
