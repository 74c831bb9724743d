"""Two real processes under DistributedDataParallel take the step that one process takes on the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steepest import Momo, Muon, MuonMax
from tests.processes import join_ranks, leave_ranks

WORLD, STEPS, EXAMPLES = 2, 4, 8


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3)).double()


METHODS = {
    "muon": lambda model: Muon(model, weight_decay=0.1),
    "muon_max_momo": lambda model: MuonMax(model, 30.0, weight_decay=1e-3, step_size=Momo(0.01)),
}


def train(model, rows, method):
    optimizer = METHODS[method](model)
    for step in range(STEPS):
        x = torch.randn(EXAMPLES, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = model(x[rows]).square().mean()  # each rank has its own
        loss.backward()
        optimizer.step(loss=loss)
        assert method == "muon" or 0 < optimizer.diagnostics()["t"] < 1
        optimizer.zero_grad()
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    return names, [p.detach().clone() for p in model.parameters()]


def rank_main(rank, folder, method):
    join_ranks(rank, WORLD, folder)
    share = EXAMPLES // WORLD
    result = train(DistributedDataParallel(network()), slice(rank * share, (rank + 1) * share), method)
    torch.save(result, f"{folder}/{rank}.pt")
    leave_ranks()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_two_ranks_are_one_process(tmp_path, method):
    names, expected = train(network(), slice(None), method)
    mp.spawn(rank_main, args=(str(tmp_path), method), nprocs=WORLD)
    for rank in range(WORLD):
        ours, weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert ours == names  # without the wrapper's prefix
        for weight, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight, other, rtol=0, atol=1e-11)
