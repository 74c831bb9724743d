"""What is not finite on one rank is passed over by all of them, in real processes."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from steepest import Adam, Momo, Muon, MuonMax, NonFiniteError, Scion, SignDescent
from tests.ranks import join_ranks, leave_ranks

WORLD = 2
METHODS = {
    "muon": Muon,
    "muon_momo": lambda model, **options: Muon(model, momo=True, **options),
    "muon_max_direct": lambda model, **options: MuonMax(model, step_size=Momo(bookkeeping="direct"), **options),
    "scion": Scion,
    "adam": Adam,
}

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def give(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def alike(tensor):
    """Whether all ranks have the same."""
    every = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(every, tensor)
    return all(torch.equal(one, every[0]) for one in every)


def loss_main(rank, folder):
    join_ranks(rank, WORLD, folder)
    warnings.simplefilter("ignore")
    for make in METHODS.values():
        for bad in (math.inf, torch.tensor(math.nan)):
            for how in ("explicit", "closure", "recorded"):
                model = network()
                optimizer = make(model)
                for step in range(3):
                    loss = bad if rank == 1 and step == 1 else 1.0
                    before = [p.detach().clone() for p in model.parameters()]
                    give(model, step)
                    if how == "recorded":
                        optimizer.record_loss(loss)
                    optimizer.step(
                        (lambda own=loss: own) if how == "closure" else None,
                        **({"loss": loss} if how == "explicit" else {}),
                    )
                    moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
                    assert moved is (step != 1) or (moved is False and step == 2)  # Momo may stand still
                    assert all(alike(p.detach()) for p in model.parameters())
                assert optimizer.diagnostics()["skipped_steps"] == 1
        model = network()
        optimizer = make(model, on_nonfinite="raise")
        give(model, 0)
        with pytest.raises(NonFiniteError, match="the loss is not finite"):
            optimizer.step(loss=math.nan if rank == 0 else 1.0)
    leave_ranks()


def test_a_loss_that_is_not_finite_on_one_rank_counts_on_all(tmp_path):
    mp.spawn(loss_main, args=(str(tmp_path),), nprocs=WORLD)


def alone_main(rank, folder):
    join_ranks(rank, WORLD, folder)
    if rank == 0:  # the other rank trains nothing
        model = network()
        optimizer = Muon(model)
        for step in range(2):
            give(model, step)
            optimizer.step()
        model[0].weight.grad[0, 0] = torch.nan
        with pytest.warns(RuntimeWarning, match="the gradient of"):
            optimizer.step()
    leave_ranks()


def test_an_optimizer_of_one_rank_alone_does_not_wait_for_others(tmp_path):
    mp.spawn(alone_main, args=(str(tmp_path),), nprocs=WORLD)


def sharded_main(rank, folder):
    from torch.distributed.fsdp import fully_shard

    join_ranks(rank, WORLD, folder)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for make in (Adam, lambda model, **options: SignDescent(model, **options)):
        for bad in (math.nan, math.inf):
            model = network()
            fully_shard(model, mesh=mesh)
            optimizer = make(model)
            raising = make(model, on_nonfinite="raise")
            for step in range(3):
                for parameter in model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                if step == 1 and rank == 1:
                    model[0].weight.grad.to_local()[0, 0] = bad
                before = [p.to_local().detach().clone() for p in model.parameters()]
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    optimizer.step()
                moved = any(not torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
                assert moved is (step != 1)
                assert optimizer.diagnostics()["skipped_steps"] == (step > 0)
                if step == 1:
                    own = "the gradient of '0.weight'" if rank == 1 else "a gradient is not finite on another rank"
                    assert own in str(told[0].message)
                    with pytest.raises(NonFiniteError, match=own):
                        raising.step()
            assert all(p.to_local().isfinite().all() for p in model.parameters())
    leave_ranks()


def test_a_shard_that_is_not_finite_counts_on_all_ranks(tmp_path):
    mp.spawn(sharded_main, args=(str(tmp_path),), nprocs=WORLD)
