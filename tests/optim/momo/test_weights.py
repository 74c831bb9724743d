"""Weights that something else wrote to are noticed; weights that came back the same are no change."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from steepest import Adam, Momo, Muon, MuonAdam, MuonMax, PolarGrad
from steepest.optim.momo.arrivals import ENTRIES
from steepest.optim.momo.weights import NEVER, Changes, total_size
from tests.optim.training import assert_same, backward, network, snapshot
from tests.processes import join_ranks, leave_ranks

METHODS = {
    "muon": lambda model: Muon(model, 3.0, weight_decay=0.01, step_size=Momo(0.5)),
    "muon_adam": lambda model: MuonAdam(model, 3.0, step_size=Momo(0.5)),
    "muon_max": lambda model: MuonMax(model, 3.0, step_size=Momo(0.5)),
    "polar_grad": lambda model: PolarGrad(model, 3.0, step_size=Momo(0.5)),
    "adam": lambda model: Adam(model, 1.0, betas=(0.9, 0.9), step_size=Momo(0.5)),
}


def swap_copy(model, other):
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(other)
        for parameter, own in zip(model.parameters(), kept, strict=True):
            parameter.copy_(own)


def swap_foreach(model, other):
    parameters = list(model.parameters())
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_mul_(parameters, other)
        torch._foreach_copy_(parameters, kept)


def swap_data(model, other):
    kept = [p.data for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data * other
    for parameter, own in zip(model.parameters(), kept, strict=True):
        parameter.data = own


def swap_data_clone(model, other):
    kept = [p.data.clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data.mul_(other)
    for parameter, own in zip(model.parameters(), kept, strict=True):
        parameter.data = own


def swap_vector(model, other):
    kept = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(kept * other, model.parameters())
    nn.utils.vector_to_parameters(kept, model.parameters())


def swap_state(model, other):
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: other * value for name, value in kept.items()})
    model.load_state_dict(kept)


SWAPS = {
    "copy": swap_copy,
    "foreach": swap_foreach,
    "data": swap_data,
    "data_clone": swap_data_clone,
    "vector": swap_vector,
    "state_dict": swap_state,
}


def trained(method, between=None, steps=6):
    model = network()
    optimizer = METHODS[method](model)
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))
        if between is not None and step % 2:
            between(model)
    return snapshot(model, optimizer), optimizer.diagnostics()


@pytest.mark.slow
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_come_back_the_same_are_no_change(method, swap):
    expected, numbers = trained(method)
    found, other = trained(method, lambda model: SWAPS[swap](model, 0.9))
    for ours, theirs in zip(expected, found, strict=True):
        assert_same(ours, theirs)
    assert numbers == other


def write(parameter):
    with torch.no_grad():
        parameter.mul_(1.01)


CHANGES = {
    "written": write,
    "data": lambda parameter: parameter.data.mul_(1.01),
    "data_assigned": lambda parameter: setattr(parameter, "data", parameter.data * 1.01),
    "transposed": lambda parameter: setattr(parameter, "data", (parameter.data.mT * 1.01).contiguous().mT),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_other_values_are_found_however_they_were_written(method, change):
    model = network()
    optimizer = METHODS[method](model)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))
    CHANGES[change](model[5].weight)
    optimizer.zero_grad()
    loss = backward(model, 3)
    with pytest.warns(UserWarning, match="Weights were changed since the last step") as told:
        optimizer.step(loss=loss)
    assert told[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_after_the_first_writing_a_single_entry_is_found(dtype):
    weight = torch.arange(10.0 * ENTRIES, dtype=dtype).reshape(ENTRIES, 10)
    changes = Changes()
    changes.note([weight])
    swap_copy(nn.ParameterList([weight]), 2.0)
    weight.copy_(weight.clone())
    assert not changes.here()
    changes.note([weight])
    assert not changes.here()
    weight[0, 1] += 1  # not among the entries looked at
    assert changes.here()
    changes.note([weight])
    weight[0, 1] -= 1
    weight[0, 1] += 1
    assert not changes.here()


def test_a_checkpoint_of_swapped_weights_starts_the_model_again():
    model = network()
    optimizer = METHODS["muon_adam"](model)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)  # as an average of weights, for evaluation
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[1]["param_groups"][0]["momo_weights"] == NEVER
    other = network()
    resumed = METHODS["muon_adam"](other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    loss = backward(other, 3)
    with pytest.warns(UserWarning, match="Weights were changed since the last step"):
        resumed.step(loss=loss)
    assert resumed.diagnostics()["gap"] == pytest.approx(loss.item() - 0.5, abs=1e-6)


def test_a_parameter_without_a_gradient_may_change_the_set_but_not_the_answer():
    model = network()
    optimizer = METHODS["muon_adam"](model)
    for step in range(4):
        optimizer.zero_grad()
        loss = backward(model, step)
        if step % 2:
            model[0].weight.grad = None
        optimizer.step(loss=loss)
        swap_foreach(model, 3.0)


def test_a_sum_of_many_weights_is_that_of_its_parts():
    """In float32 on the CPU it would be a percent less, and another one for each way to shard it."""
    weight = torch.randn(10**7)
    assert total_size([weight]) == pytest.approx(float(weight.abs().double().sum()), rel=1e-12)
    assert total_size(weight.chunk(4)) == pytest.approx(total_size([weight]), rel=1e-12)


SHAPES = [(5, 4), (1, 6), (8, 2), (13,), ()]  # uneven over four ranks, of one alone, even, and no part for any


def numbers(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def placed(mesh, placements):
    from torch.distributed.tensor import distribute_tensor

    own = [distribute_tensor(whole, mesh, placements) for whole in numbers()[:-1]]
    return [*own, numbers()[-1]]  # one that every rank has a copy of


def with_strides(mesh):
    """The weights of two layers, one of them by columns, the other by rows, with shards of these shards."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5)).double()
    whole = [p.detach().clone() for p in model.parameters()]
    parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["outer"])
    return whole, [p.detach() for p in model.parameters()]


def everywhere(flag):
    """What all ranks say, which have nothing else in common here."""
    every = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(every, torch.tensor(float(flag)))
    return [bool(one) for one in every]


def steps_of_one_whose_weights_were_written_to(rank, world):
    """Somebody writes to one rank's shard, then loads a checkpoint, with and without the weights."""
    from torch.distributed.fsdp import fully_shard

    def build():
        model = network(torch.float64)
        fully_shard(model)
        return model, MuonAdam(model, 3.0, step_size=Momo(0.5))

    def step(model, optimizer, index, warns=False):
        optimizer.zero_grad()
        loss = backward(model, index, torch.float64)  # the same on all ranks
        with pytest.warns(UserWarning, match="Weights were changed") if warns else contextlib.nullcontext():
            optimizer.step(loss=loss)
        gap = optimizer.diagnostics()["gap"]
        assert (gap == pytest.approx(loss.item() - 0.5)) is warns
        every = [None] * world
        dist.all_gather_object(every, gap)
        assert every == [gap] * world

    model, optimizer = build()
    optimizer.step(loss=backward(model, 0, torch.float64))
    for index in (1, 2):
        step(model, optimizer, index)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with torch.no_grad():
        if rank == world - 1:
            model[7].weight.to_local().mul_(1.01)
    step(model, optimizer, 3, warns=True)

    model, optimizer = build()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    step(model, optimizer, 3)
    optimizer.load_state_dict(saved[1])
    step(model, optimizer, 3, warns=True)


def shards_main(rank, folder, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    join_ranks(rank, world, folder)
    line = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    size = sum(float(whole.abs().sum()) for whole in numbers())
    layouts = {
        "shards": placed(line, [Shard(0)]),
        "copies of shards": placed(square, [Replicate(), Shard(0)]),
        "shards of shards": placed(square, [Shard(0), Shard(0)]),
    }
    for weights in layouts.values():
        last = world - 1  # which keeps nothing of some
        changes = Changes()
        changes.note(weights)
        assert everywhere(changes.here()) == [False] * world
        saved = changes.saved(weights)
        assert saved == pytest.approx(size, rel=1e-12)
        copied = copy.deepcopy((weights, changes))[1]
        assert not copied.here()
        assert copied.saved(weights) == pytest.approx(saved, rel=1e-12)

        kept = [p.to_local().clone() for p in weights[:-1]]
        for p in weights[:-1]:
            p.to_local().mul_(2)
        for p, own in zip(weights, kept, strict=False):
            p.to_local().copy_(own)
        assert everywhere(changes.here()) == [False] * world
        changes.note(weights)  # with sums from here on
        weights[2].mul_(1)
        assert everywhere(changes.here()) == [False] * world

        other = weights[2].to_local()  # eight rows: something for every rank
        if rank == last:
            other[-1, -1] += 1
        assert everywhere(changes.here()) == [rank == last for rank in range(world)]
        assert changes.saved(weights) == NEVER
        copied = copy.deepcopy(changes)
        assert everywhere(copied.here()) == [rank == last for rank in range(world)]
        if rank == last:
            other[-1, -1] -= 1

        for total, expected in ((saved, False), (saved * (1 + 1e-9), False), (saved + 1, True), (NEVER, True)):
            loaded = Changes()
            loaded.load(weights, total)
            assert loaded.saved(weights) == total
            found = loaded.found(loaded.here(), warn=False)
            assert everywhere(found) == [expected] * world
        loaded.load(weights, saved)
        if rank == last:  # the only one that was not loaded right
            other += 1
        assert everywhere(loaded.found(loaded.here(), warn=False)) == [True] * world
        loaded.note(weights)
        loaded.replaced()
        assert everywhere(loaded.here()) == [True] * world
    if world == 4:
        whole, parts = with_strides(square)
        assert {str(own) for p in parts for own in p.placements} >= {"S(0)", "S(1)", "_S(0, 2)"}
        assert total_size(parts) == pytest.approx(total_size(whole), rel=1e-12)
        changes = Changes()
        changes.note(parts)
        torch.save(changes.saved(parts), f"{folder}/{rank}.pt")
    steps_of_one_whose_weights_were_written_to(rank, world)
    leave_ranks()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_what_one_rank_finds_in_its_shards_is_found_by_all(tmp_path):
    mp.spawn(shards_main, args=(str(tmp_path), 4), nprocs=4)
    torch.manual_seed(3)
    weights = [p.detach() for p in nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5)).double().parameters()]
    for rank in range(4):  # saved by four ranks, loaded by one
        loaded = Changes()
        loaded.load(weights, torch.load(tmp_path / f"{rank}.pt", weights_only=True))
        assert not loaded.here()
