"""Moments of both sides of gradients, turns, and what stands in the state: what bases and powers have in common."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from steepest import DiagonalMetric, Eigenbasis, Momo, Muon, MuonMax, RowScaling, ShampooPowers, View
from steepest.ranks import local
from steepest.stages.factors import blocks_of, product, relative, times
from steepest.testing import backward, network

STAGES = [Eigenbasis(every=3), ShampooPowers(every=3)]
MADE = {"basis_": "basis_left_vectors", "powers_": "powers_left_power"}


def noise(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("stage", STAGES, ids=repr)
def test_moments_are_moving_averages_of_products(stage):
    weight = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    optimizer = Muon([weight], stages=[stage])
    left = right = 0
    for step in range(5):
        weight.grad = noise((3, 5), step, torch.float64)
        left = 0.95 * left + 0.05 * weight.grad @ weight.grad.T
        right = 0.95 * right + 0.05 * weight.grad.T @ weight.grad
        optimizer.step()
    state = optimizer.state[weight]
    torch.testing.assert_close(state[f"{stage.prefix}left"].view(3, 3), left)
    torch.testing.assert_close(state[f"{stage.prefix}right"].view(5, 5), right)
    assert state[f"{stage.prefix}count"].tolist() == [5]


@pytest.mark.parametrize("stage", STAGES, ids=repr)
def test_each_parameter_has_its_turn_and_no_step_renews_all(stage):
    weights = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(6)]
    optimizer, key = Muon(weights, stages=[stage]), MADE[stage.prefix]
    renewed = []
    for step in range(9):
        before = [optimizer.state[w].get(key, torch.zeros(1)).clone() for w in weights]
        for place, w in enumerate(weights):
            w.grad = noise((4, 4), 10 * step + place)
        optimizer.step()
        after = [optimizer.state[w][key] for w in weights]
        renewed.append([place for place, own in enumerate(after) if not torch.equal(own, before[place])])
    assert renewed == [[0, 1, 2, 3, 4, 5], *[[2, 5], [1, 4], [0, 3]] * 2, [2, 5], [1, 4]]


def test_a_step_that_was_passed_over_was_nobodys_turn():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([weight], stages=[Eigenbasis(every=3)])
    for step in range(3):
        weight.grad = noise((4, 4), step)
        optimizer.step()
    weight.grad = torch.full((4, 4), torch.nan)
    kept = {key: value.clone() for key, value in optimizer.state[weight].items()}
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert all(torch.equal(value, kept[key]) for key, value in optimizer.state[weight].items())
    weight.grad = noise((4, 4), 3)
    optimizer.step()
    assert not torch.equal(optimizer.state[weight]["basis_left_vectors"], kept["basis_left_vectors"])


@pytest.mark.parametrize("stage", STAGES, ids=repr)
def test_a_first_gradient_that_is_masked_leaves_the_first_place_to_the_next(stage, monkeypatch):
    """On an accelerator what is not finite is masked, not looked at."""
    weight, twin = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer, plain = Muon([weight], stages=[stage]), Muon([twin], stages=[stage])
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._guard, "admit", lambda *_: torch.tensor(False))
        weight.grad = torch.full((4, 3), torch.nan)
        optimizer.step()
    assert not any(value.any() for value in optimizer.state[weight].values())
    for own, parameter in ((optimizer, weight), (plain, twin)):
        parameter.grad = noise((4, 3), 1)
        own.step()
    assert torch.equal(weight, twin)


@pytest.mark.parametrize("stage", STAGES, ids=repr)
def test_a_matrix_begins_with_its_first_gradient_that_is_not_zero(stage):
    """As an expert to which no token came: others of its parameter go on meanwhile."""
    weight = torch.nn.Parameter(torch.zeros(2, 3, 3))
    optimizer = Muon([{"params": [weight], "view": View(experts=True)}], stages=[stage])
    alone = torch.nn.Parameter(torch.zeros(3, 3))
    late = Muon([alone], stages=[stage])
    for step in range(4):
        weight.grad = noise((2, 3, 3), step)
        weight.grad[1] *= step >= 2
        optimizer.step()
        state = optimizer.state[weight]
        assert state[f"{stage.prefix}count"].tolist() == [step + 1, max(0, step - 1)]
        if step < 2:
            assert not weight.detach()[1].any()
        elif step == 2:
            alone.grad = weight.grad[1].clone()
            late.step()
            made = MADE[stage.prefix]
            assert torch.equal(state[made].view(2, 3, 3)[1], late.state[alone][made].view(3, 3))


@pytest.mark.parametrize("stage", STAGES, ids=repr)
def test_a_state_from_before_or_taken_away_begins_anew(stage):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.grad = noise((3, 2), 0)
    plain = Muon([weight])
    plain.step()
    optimizer = Muon([weight], stages=[stage])
    optimizer.load_state_dict(plain.state_dict())
    for step in range(3):
        if step == 2:
            del optimizer.state[weight]
        before = weight.detach().clone()
        optimizer.step()
        assert optimizer.state[weight][MADE[stage.prefix]].view(3, 3).det().abs() > 1e-3
        assert not torch.equal(weight, before)


@pytest.mark.parametrize("kind", [Eigenbasis, ShampooPowers])
def test_a_state_of_other_blocks_is_refused_by_name(kind):
    weight = torch.nn.Parameter(torch.ones(4, 3))
    whole, halves = Muon([weight], stages=[kind()]), Muon([weight], stages=[kind(block_size=2)])
    weight.grad = noise((4, 3), 0)
    whole.step()
    with pytest.raises(ValueError, match=f"{kind.prefix}left"):
        halves.load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("length", "size", "count"), [(6, 8, 1), (6, 6, 1), (6, 5, 2), (6, 2, 3), (7, 4, 7), (512, 128, 4)]
)
def test_a_side_is_cut_into_the_fewest_equal_blocks(length, size, count):
    assert blocks_of(length, size) == count


def test_products_with_blocks_are_those_with_whole_matrices():
    matrices, left, right = noise((2, 6, 4), 0), noise((2, 3, 2, 2), 1), noise((2, 2, 2, 2), 2)
    whole = [torch.stack([torch.block_diag(*own) for own in side]) for side in (left, right)]
    torch.testing.assert_close(times(matrices, left, right), whole[0] @ matrices @ whole[1])
    for side, whole in (("left", matrices @ matrices.mT), ("right", matrices.mT @ matrices)):
        found = product(matrices, side, 2)
        half = whole.size(-1) // 2
        torch.testing.assert_close(found[:, 0], whole[:, :half, :half])
        torch.testing.assert_close(found[:, 1], whole[:, half:, half:])


@pytest.mark.parametrize("stage", [Eigenbasis(block_size=12), ShampooPowers(block_size=12)], ids=repr)
def test_what_is_kept_is_in_the_plan(stage):
    plain, optimizer = Muon(network()), Muon(network(), stages=[stage])
    for ours, theirs in zip(optimizer.plan, plain.plan, strict=True):
        numbers = 0
        if ours.role == "matrix":
            blocks = ours.blocks()
            sides = sum(b * sum(k * k // blocks_of(k, 12) for k in (m, n)) for b, m, n in blocks)
            numbers = 2 * sides + sum(b for b, _, _ in blocks) + ours.numel * isinstance(stage, Eigenbasis)
        assert ours.state_bytes - theirs.state_bytes == 4 * numbers


def test_an_optimizers_stages_serve_another_one_from_the_start():
    model = network()
    optimizer = Muon(model, stages=[Eigenbasis()])
    backward(model, 0)
    optimizer.step()
    other = Muon(network(), stages=optimizer.stages)
    assert other.stages[0] is not optimizer.stages[0]
    assert other.stages[0].steps == 0
    assert repr(other.stages[0]) == repr(Eigenbasis())


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Muon(model, stages=[Eigenbasis(every=2)]),
        lambda model: MuonMax(model, lr=0.05, dual="stale", step_size=Momo(0.5), stages=[ShampooPowers(every=3)]),
        lambda model: Muon(model, stages=[RowScaling(), Eigenbasis(split=True)], momentum_dtype=torch.bfloat16),
    ],
    ids=["basis", "stale_momo", "split_with_rows"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_training_goes_on_bit_for_bit_after_saving_copying_and_pickling(make, dtype):
    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss = backward(model, step, dtype)
            optimizer.step(loss=loss.detach())

    model = network(dtype)
    optimizer = make(model)
    train(model, optimizer, range(4))
    kept = [v for state in optimizer.state.values() for k, v in state.items() if k.startswith(("basis_", "powers_"))]
    assert {v.dtype for v in kept} == {torch.float64 if dtype == torch.float64 else torch.float32}
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    again = copy.deepcopy(model)
    loaded = make(again)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    others = [(again, loaded), copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, range(4, 9))
    for other, own in others:
        train(other, own, range(4, 9))
        for one, expected in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, expected)


def test_moments_are_sized_to_a_largest_entry_of_one():
    found = relative(torch.tensor([[[[1e-30, 0.0], [0.0, 4e-30]]], [[[0.0, 0.0], [0.0, 0.0]]]]))
    torch.testing.assert_close(found[0, 0], torch.tensor([[0.25, 0.0], [0.0, 1.0]]))
    assert not found[1].any()


def test_a_mesh_of_one_rank_is_one_process(tmp_path):
    """FSDP2 of a single process: what stages keep are DTensors, and directions are plain."""
    init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for stage in (*STAGES, RowScaling(), DiagonalMetric()):
            plain = torch.nn.Parameter(torch.ones(4, 3))
            laid = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
            optimizers = Muon([plain], stages=[stage]), Muon([laid], stages=[stage])
            for step in range(4):
                plain.grad = noise((4, 3), step)
                laid.grad = distribute_tensor(plain.grad, mesh, [Shard(0)])
                for optimizer in optimizers:
                    optimizer.step()
            assert torch.equal(laid.full_tensor(), plain)
            for key, value in optimizers[0].state[plain].items():
                (kept,) = local([optimizers[1].state[laid][key]])
                assert torch.equal(kept, value), key
    finally:
        destroy_process_group()
