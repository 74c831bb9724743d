"""What is not finite on one rank is passed over by all of them, in real processes."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from steepest import (
    Adam,
    InputMoment,
    MissingInputsError,
    Momo,
    Muon,
    MuonMax,
    NewtonMuon,
    NonFiniteError,
    Scion,
    SignDescent,
)
from tests.processes import join_ranks, leave_ranks

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
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


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
                    loss = bad if rank == 1 and step == 1 else 100.0  # so high that Momo does not stand still
                    before = [p.detach().clone() for p in model.parameters()]
                    give(model, step)
                    if how == "recorded":
                        optimizer.record_loss(loss)
                    optimizer.step(
                        (lambda own=loss: own) if how == "closure" else None,
                        **({"loss": loss} if how == "explicit" else {}),
                    )
                    moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
                    assert moved is (step != 1)
                    assert all(alike(p.detach()) for p in model.parameters())
                assert optimizer.diagnostics()["skipped_steps"] == 1
        model = network()
        optimizer = make(model, on_nonfinite="raise")
        give(model, 0)
        with pytest.raises(NonFiniteError, match="the loss is not finite"):
            optimizer.step(loss=math.nan if rank == 0 else 1.0)
    leave_ranks()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_counts_on_all(tmp_path):
    mp.spawn(loss_main, args=(str(tmp_path),), nprocs=WORLD)


def none(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = None


def spoil(model, optimizer):
    model[0].weight.grad[0, 0] = torch.nan


def rate(model, optimizer):
    optimizer.param_groups[0]["lr"] = -1.0


def shape(model, optimizer):
    model[0].bias.grad.resize_(1)


def forget(model, optimizer):
    optimizer.record_loss(1.0, weight=0.5)


def divide(model, optimizer):
    """Recorded after it was divided, as `check_weights` finds."""
    optimizer.zero_grad()
    loss = model(torch.ones(3, 6)).square().mean() / 4
    optimizer.record_loss(loss)
    (4 * loss).backward()


def factor(model, optimizer):
    model(torch.ones(3, 6)).square().mean().backward()
    for parameter in model.parameters():
        parameter.grad.mul_(1.7)


STRAYS = {
    none: None,
    spoil: None,
    rate: (ValueError, "lr"),
    shape: (ValueError, "has shape"),
    forget: (ValueError, "weights that sum to 0.5"),
    divide: (ValueError, "told weight=1"),
    factor: (ValueError, r"multiplied by 1\.7"),
}


def stray_main(rank, folder):
    join_ranks(rank, WORLD, folder)
    warnings.simplefilter("ignore")
    exchanges, plain = [], dist.all_reduce

    def counted(*args, **options):
        exchanges.append(args)
        return plain(*args, **options)

    dist.all_reduce = counted
    for stray, error in STRAYS.items():
        for on_nonfinite in ("skip", "raise"):
            model = network()
            optimizer = Muon(model, momo=True, on_nonfinite=on_nonfinite)
            for step in range(3):
                optimizer.zero_grad()
                give(model, step)
                rates = [group["lr"] for group in optimizer.param_groups]
                here = step == 1 and rank == 1
                if here:
                    stray(model, optimizer)
                before, exchanges[:] = [p.detach().clone() for p in model.parameters()], []
                expected = None
                if step == 1 and stray is not none and (on_nonfinite == "raise" or (here and error)):
                    own = error if here else (NonFiniteError, "on another rank, or the step was refused there")
                    expected = own or (NonFiniteError, "the gradient of")
                told = {} if here and stray in (forget, divide) else {"loss": 100.0 + rank}
                if expected:
                    with pytest.raises(expected[0], match=expected[1]):
                        optimizer.step(**told)
                else:
                    optimizer.step(**told)
                assert len(exchanges) == 1, (stray, step)
                moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
                assert moved is (step != 1 or (stray is none and rank == 0)), (stray, step)
                if stray is not none:
                    assert all(alike(p.detach()) for p in model.parameters())
                    assert not moved or alike(torch.tensor(optimizer.diagnostics()["gap"]))
                for group, lr in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = lr
    dist.all_reduce = plain
    leave_ranks()


@pytest.mark.slow
def test_a_rank_that_refuses_a_step_tells_the_others_which_pass_over_it(tmp_path):
    mp.spawn(stray_main, args=(str(tmp_path),), nprocs=WORLD)


def lacking_main(rank, folder):
    join_ranks(rank, WORLD, folder)
    model = network()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="full", every=1))
    for step in range(3):
        optimizer.zero_grad()
        if step == 1:  # no rank saw inputs, and one has gradients all the same
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1.0 - rank)
            with pytest.raises(MissingInputsError, match="its inputs since the last step are missing"):
                optimizer.step()
        else:
            model(torch.randn(3, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        assert all(alike(p.detach()) for p in model.parameters())
    leave_ranks()


@pytest.mark.slow
def test_ranks_miss_inputs_together(tmp_path):
    mp.spawn(lacking_main, args=(str(tmp_path),), nprocs=WORLD)


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


@pytest.mark.slow
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


def edge_main(rank, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    join_ranks(rank, WORLD, folder)
    warnings.simplefilter("ignore")
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    most = torch.finfo(torch.float32).max
    for full, moves in ((0.9, False), (0.5, True)):
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
        with torch.no_grad():
            model[0].weight.fill_(0)
            model[0].weight[2:] = full * most  # of the last rank
        fully_shard(model, mesh=mesh)
        optimizer = SignDescent(model, lr=0.3 * most)
        weight = model[0].weight
        weight.grad = torch.full_like(weight, -1.0)
        before = weight.to_local().detach().clone()
        optimizer.step()
        assert torch.equal(weight.to_local(), before) is not moves
        assert optimizer.diagnostics()["skipped_steps"] == (not moves)
    for dtype in (torch.bfloat16, torch.float16):
        for make in (Adam, Muon):
            whole = network().to(dtype)
            model = copy.deepcopy(whole)
            fully_shard(model, mesh=mesh)
            sharded, copied = make(model), make(whole)
            for step in range(3):
                give(whole, step)
                for parameter, part in zip(whole.parameters(), model.parameters(), strict=True):
                    part.grad = distribute_tensor(parameter.grad, mesh, part.placements)
                sharded.step()
                copied.step()
            for parameter, part in zip(whole.parameters(), model.parameters(), strict=True):
                assert torch.equal(part.full_tensor(), parameter)
    leave_ranks()


@pytest.mark.slow
def test_ranks_that_keep_shards_move_together(tmp_path):
    mp.spawn(edge_main, args=(str(tmp_path),), nprocs=WORLD)


@pytest.mark.slow
def test_a_shard_that_is_not_finite_counts_on_all_ranks(tmp_path):
    mp.spawn(sharded_main, args=(str(tmp_path),), nprocs=WORLD)
