"""Weights within the ball of weight decay: the warning, the radius, the norm and the Frank-Wolfe gap."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steepest import Muon, MuonMax, Norm, Spectral, SteepestDescent, polar
from steepest.batch_size import frank_wolfe_gap
from steepest.optim.ball import largest_singular_values
from steepest.ranks import laid_out
from tests.processes import join_ranks, leave_ranks


def matrix(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(optimizer, parameter, gradient):
    parameter.grad = gradient
    optimizer.step()
    return optimizer.diagnostics(weights=True)


@given(seed=st.integers(0, 10_000), m=st.integers(1, 9), n=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_power_iteration_is_below_the_norm_and_close(seed, m, n):
    w = matrix(m, n, seed)
    exact = torch.linalg.matrix_norm(w, ord=2).item()
    found = largest_singular_values(w[None]).item()
    assert 0.97 * exact <= found <= exact * (1 + 1e-12)


def test_power_iteration_finds_a_norm_that_stands_out_in_each_matrix_of_a_batch_and_zero():
    w = torch.stack([matrix(30, 20, 1) + 9 * torch.outer(torch.ones(30), torch.ones(20)), torch.zeros(30, 20)])
    found = largest_singular_values(w)
    torch.testing.assert_close(found[0], torch.linalg.matrix_norm(w[0], ord=2), rtol=1e-10, atol=0)
    assert found[1] == 0


def test_the_numbers_of_a_layer_are_those_of_an_svd():
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False)).double()
    weight = model[0].weight
    optimizer = Muon([{"params": [weight], "name": "up"}], 0.1, weight_decay=0.5, polar="svd", momentum=0.9)
    before = [matrix(9, 6, seed) for seed in (1, 2)]
    for gradient in before:
        numbers = stepped(optimizer, weight, gradient)
    average = (0.09 / 0.1 * 0.1 * before[0] + 0.1 * before[1]) / (1 - 0.81)
    scale = math.sqrt(9 / 6)
    name = next(key for key in numbers if key.endswith("/spectral_norm")).removesuffix("/spectral_norm")
    assert numbers[f"{name}/spectral_norm"] == pytest.approx(torch.linalg.matrix_norm(weight, ord=2).item(), rel=0.02)
    assert numbers[f"{name}/ball_radius"] == pytest.approx(scale / 0.5)
    gap = frank_wolfe_gap(average, weight.detach(), weight_decay=0.5, scale=scale)
    assert numbers[f"{name}/frank_wolfe_gap"] == pytest.approx(gap.item(), rel=1e-6)


@pytest.mark.parametrize("method", ["svd", "auto"])
def test_inside_the_ball_the_gap_is_not_negative_and_the_norm_stays_below_the_radius(method):
    weight = nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    optimizer = Muon([weight], 0.5, weight_decay=1.5, momentum=0.0, polar=method)
    for seed in range(40):
        numbers = stepped(optimizer, weight, matrix(5, 8, seed))
        (norm,) = (value for key, value in numbers.items() if key.endswith("/spectral_norm"))
        (radius,) = (value for key, value in numbers.items() if key.endswith("/ball_radius"))
        (gap,) = (value for key, value in numbers.items() if key.endswith("/frank_wolfe_gap"))
        assert norm <= radius * (1 + 1e-12)
        assert gap >= 0


def test_nothing_is_said_about_a_ball_where_there_is_none():
    weight = nn.Parameter(torch.ones(3, 4))
    plain = stepped(Muon([weight], 0.1), weight, torch.ones(3, 4))
    assert not any(key.endswith("/ball_radius") for key in plain)
    grown = stepped(MuonMax([weight], 0.1, weight_decay=0.1), weight, torch.ones(3, 4))
    assert [key.rpartition("/")[2] for key in grown if key.startswith("weights/")] == ["spectral_norm"]
    assert not any(key.startswith("weights/") for key in Muon([weight], 0.1).diagnostics())


@pytest.mark.parametrize("lr", [2.0, torch.tensor(2.0)], ids=["number", "tensor"])
def test_a_rate_at_which_decay_leaves_the_ball_is_warned_of_once(lr):
    weight = nn.Parameter(torch.ones(3, 4))
    with pytest.warns(UserWarning, match=r"lr · weight_decay is 1\.2 for the role 'matrix'.*Lower lr") as caught:
        optimizer = SteepestDescent([weight], lr=lr, weight_decay=0.6)
    assert [warning.filename for warning in caught] == [__file__]
    weight.grad = torch.ones(3, 4)
    optimizer.step()  # warnings are errors here


def test_at_the_edge_nothing_is_warned_of_and_a_schedule_is_watched():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([weight], 1.0, weight_decay=1.0)
    weight.grad = torch.ones(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.5
    with pytest.warns(UserWarning, match="lr · weight_decay is 1.5") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


class Centred(Norm):
    """A norm of a user that knows of the whole contract: polar factors, and balls at no cost."""

    adapts, matrix, free_radius = False, True, True

    def primal(self, w, /, m=None, v=None):
        return torch.linalg.matrix_norm(w, ord=2)

    def dual(self, m, /, v=None):
        return torch.linalg.matrix_norm(m, ord="nuc")

    def lmo(self, m, /, v=None):
        return -polar(m, method="svd")

    def polar_scale(self, fan_out, fan_in):
        return 1.0


def test_a_users_norm_of_polar_factors_has_all_that_the_spectral_norm_has():
    found = []
    for norm in (Centred(), Spectral(scale="none", polar="svd")):
        weight = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        optimizer = SteepestDescent([weight], lr=0.1, weight_decay=0.5, norms={"matrix": norm})
        weight.grad = torch.eye(3, 4)
        optimizer.step()
        found.append((weight.detach(), optimizer.diagnostics(weights=True)))
    (weight, numbers), (expected, theirs) = found
    torch.testing.assert_close(weight, expected)
    assert numbers == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert {"matrix/orthogonality_error", "weights/params[0]/ball_radius"} <= numbers.keys()


def layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5, bias=False), nn.Linear(5, 1, bias=False)).double()


def looked_at(model):
    optimizer = Muon(model, 0.1, weight_decay=0.5, polar="svd")
    for seed in (1, 2):
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(seed)
            parameter.grad = laid_out(torch.randn(parameter.shape, generator=generator).double(), parameter)
        optimizer.step()
    return {name: value for name, value in optimizer.diagnostics(weights=True).items() if name.startswith("weights/")}


def ball_main(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    join_ranks(rank, 4, folder)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    both, copied = layers(), layers()
    parallelize_module(both, mesh["inner"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(both, mesh=mesh["outer"])
    fully_shard(copied, mesh=mesh)
    assert both[2].weight.device_mesh != both[1].weight.device_mesh  # one of them is not divided twice
    torch.save([looked_at(both), looked_at(copied)], f"{folder}/{rank}.pt")
    leave_ranks()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_each_rank_that_keeps_parts_of_weights_has_the_numbers_of_the_whole(tmp_path):
    mp.spawn(ball_main, args=(str(tmp_path),), nprocs=4)
    expected = looked_at(layers())
    assert len(expected) == 6
    for rank in range(4):
        for found in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            assert found == pytest.approx(expected, rel=1e-9)
