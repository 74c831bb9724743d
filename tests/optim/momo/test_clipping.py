"""Gradients that were clipped between backward and step: the loss is clipped alike, or the step is refused."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steepest import Adam, Momo, Muon, MuonAdam, MuonMax, NonFiniteError, PolarGrad, Scion
from steepest.optim.momo.arrivals import ENTRIES, spaced
from steepest.optim.momo.clipping import _unread, compared
from tests.optim.training import backward, batch, network
from tests.processes import join_ranks, leave_ranks

WIDE, BOUND, BETA = torch.float64, 0.5, 0.95
METHODS = {
    "muon": lambda model, **o: Muon(model, 1.0, **o),
    "muon_adam": lambda model, **o: MuonAdam(model, 3.0, **o),
    "muon_max": lambda model, **o: MuonMax(model, 3.0, **o),
    "muon_max_stale": lambda model, **o: MuonMax(model, 3.0, dual="stale", **o),
    "polar_grad": lambda model, **o: PolarGrad(model, 3.0, **o),
    "scion": lambda model, **o: Scion(model, 3.0, **o),
    "adam": lambda model, **o: Adam(model, 1.0, betas=(BETA, 0.95), **o),
}
TOLD = pytest.mark.filterwarnings("ignore:Gradients were changed between backward and step .* as by clipping")


def norm_of(model):
    return torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt().item()


def plain_value(history, weights):
    """Value at the present weights of the average of F + c (f - F) + <c g, w - w_i>, by its definition."""
    total = 0.0
    for age, (loss, factor, past, gradients) in enumerate(reversed(history)):
        slope = sum(((w - p) * g).sum().item() for w, p, g in zip(weights, past, gradients, strict=True))
        weight = (1 - BETA) * BETA**age / (1 - BETA ** len(history))
        total += weight * (BOUND + factor * (loss - BOUND) + slope)
    return total


@pytest.mark.slow
@TOLD
@pytest.mark.parametrize("bookkeeping", ["recurrent", "direct"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limits", [(0.1,), (1e9, 0.02, 0.5, 0.1)], ids=["low", "mixed"])
def test_the_model_of_the_loss_is_clipped_with_the_gradients(method, bookkeeping, limits):
    model, history = network(WIDE), []
    optimizer = METHODS[method](model, step_size=Momo(BOUND, bookkeeping=bookkeeping))
    parameters = list(model.parameters())
    for step in range(8):
        optimizer.zero_grad()
        loss = backward(model, step, WIDE)
        before, limit = norm_of(model), limits[step % len(limits)]
        nn.utils.clip_grad_norm_(parameters, limit)
        factor = min(1.0, limit / (before + 1e-6))
        past, gradients = [p.detach().clone() for p in parameters], [p.grad.clone() for p in parameters]
        history.append((loss.item(), factor, past, gradients))
        expected = plain_value(history, past)
        optimizer.step(loss=loss)
        if not any(group["nesterov"] for group in optimizer.param_groups):
            assert optimizer.diagnostics()["gap"] == pytest.approx(expected - BOUND, abs=1e-8)


@TOLD
def test_a_first_clipped_step_is_as_long_as_one_that_was_not():
    lengths = []
    for limit in (1e9, 1e-2):
        model = network(WIDE)
        optimizer = MuonAdam(model, 30.0, step_size=Momo(BOUND))
        loss = backward(model, 0, WIDE)
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step(loss=loss)
        lengths.append(optimizer.diagnostics()["t"])
    assert 0 < lengths[0] < 1
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)  # Adam's eps counts


def clipped_loss(model, optimizer, scaler, limit, parts, step):
    optimizer.zero_grad()
    x, y = batch(step)
    total = 0.0
    for index in range(parts):
        rows = slice(index * 8 // parts, (index + 1) * 8 // parts)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        scaler.scale(loss / parts).backward()
        total = total + loss.detach() / parts
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), limit)
    return total


def run(*, scaler, limit, parts=1, within=False, bound=BOUND, copied=False, steps=6):
    """Train in parts, clipping at a norm; within: in a closure, as Lightning does."""
    model = network()
    optimizer = MuonAdam(model, 3.0, step_size=Momo(bound))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=scaler)
    lengths = []
    for step in range(steps):
        if copied and step == 3:
            model, optimizer = copy.deepcopy((model, optimizer))

        make = partial(clipped_loss, model, optimizer, scaler, limit, parts, step)
        if within:
            optimizer.step(make)
        else:
            scaler.step(optimizer, loss=make())
            scaler.update()
        lengths.append(optimizer.diagnostics()["t"])
    return lengths


@TOLD
def test_scaling_parts_closures_and_copies_do_not_matter():
    expected = run(scaler=False, limit=0.3)
    assert all(0 < t < 1 for t in expected)
    assert run(scaler=False, limit=0.3, copied=True) == expected
    for other in ({"parts": 2}, {"within": True}, {"scaler": True}, {"scaler": True, "parts": 2}):
        options = {"scaler": False, **other}
        assert run(**options, limit=0.3) == pytest.approx(expected, rel=2e-3), other


def test_a_limit_out_of_reach_changes_no_bit():
    assert run(scaler=False, limit=1e9) == run(scaler=False, limit=torch.inf)


@TOLD
def test_clipping_is_nothing_to_a_model_without_a_bound():
    assert run(scaler=False, limit=0.3, bound=float("-inf")) == [1.0] * 6


@pytest.mark.parametrize("factor", [1 / 3, 1 / 37, 2.0, 2**-16], ids=str)
def test_one_factor_at_every_step_belongs_to_the_loss(factor):
    lengths = []
    for own in (1.0, factor):
        model = network(WIDE)
        optimizer = MuonAdam(model, 3.0, step_size=Momo(BOUND))
        for step in range(4):
            optimizer.zero_grad()
            x, y = batch(step, WIDE)
            loss = nn.functional.cross_entropy(model(x), y)
            (loss / own).backward()
            for parameter in model.parameters():
                parameter.grad.mul_(own)
            optimizer.step(loss=loss)
            lengths.append(optimizer.diagnostics()["t"])
    assert lengths[:4] == pytest.approx(lengths[4:], rel=1e-9)


def change_values(model):
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def change_groups(model):
    for parameter in model.parameters():
        nn.utils.clip_grad_norm_([parameter], 1e-3)


def change_sign(model):
    for parameter in model.parameters():
        parameter.grad.neg_()


@pytest.mark.parametrize("change", [change_values, change_groups, change_sign])
@pytest.mark.parametrize("before", [0, 2])
def test_what_is_not_one_factor_is_refused_before_anything_changes(change, before):
    model = network()
    optimizer = MuonAdam(model, step_size=Momo())
    for step in range(before):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))
    optimizer.zero_grad()
    loss = backward(model, before)
    change(model)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"not by one factor, as by clipping of values.*max_grad_norm=0 in Trainer"):
        optimizer.step(loss=loss)
    weights, state = kept
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True))
    assert repr(optimizer.state_dict()) == repr(state)


def test_a_factor_that_contradicts_the_first_is_refused():
    model = network()
    optimizer = MuonAdam(model, step_size=Momo())
    for step, factor in enumerate((1 / 3, 1.7)):
        optimizer.zero_grad()
        loss = backward(model, step)
        for parameter in model.parameters():
            parameter.grad.mul_(factor)
        if step:
            with pytest.raises(ValueError, match=r"multiplied by 1\.7 between backward and step, and by 0\.33333"):
                optimizer.step(loss=loss)
        else:
            optimizer.step(loss=loss)


def test_a_first_factor_that_was_clipping_by_chance_is_not_held_against_the_next():
    model = network()
    optimizer = MuonAdam(model, step_size=Momo())
    for step, factor in enumerate((1 / 3, 0.77)):
        optimizer.zero_grad()
        loss = backward(model, step)
        for parameter in model.parameters():
            parameter.grad.mul_(factor)
        if step:
            with pytest.warns(UserWarning, match=r"by a factor of about 0\.77"):
                optimizer.step(loss=loss)
        else:
            optimizer.step(loss=loss)


def test_entries_set_to_zero_are_no_clipping():
    model = network()
    optimizer = MuonAdam(model, step_size=Momo())
    loss = backward(model, 0)
    for parameter in model.parameters():
        parameter.grad[0] = 0
    optimizer.step(loss=loss)
    optimizer.zero_grad()
    loss = backward(model, 1)
    for parameter in model.parameters():
        parameter.grad.zero_()
    optimizer.step(loss=loss)


@TOLD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_factor_too(dtype):
    model = network(dtype)
    optimizer = MuonAdam(model, 1e-3, step_size=Momo())
    for step, limit in enumerate((1e9, 0.3, 0.01)):
        optimizer.zero_grad()
        loss = backward(model, step, dtype)
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step(loss=loss)


@TOLD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.5, 0.3, 1 / 8, 0.1, 0.0147])
def test_in_half_precision_a_first_factor_below_one_is_clipping(dtype, factor):
    model = network(dtype)
    optimizer = MuonAdam(model, 1e-3, step_size=Momo(BOUND))
    loss = backward(model, 0, dtype)
    for parameter in model.parameters():
        parameter.grad.mul_(factor)
    optimizer.step(loss=loss)
    assert optimizer.diagnostics()["gap"] == pytest.approx(factor * (loss.item() - BOUND), rel=1e-2)


@pytest.mark.slow
@TOLD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("limit", [0.02, 0.05, 0.3])
def test_clipping_at_every_step_of_a_training_is_taken(dtype, limit):
    model = network(dtype)
    optimizer = Muon(model, momo=True)
    for step in range(40):
        optimizer.zero_grad()
        loss = backward(model, step % 7, dtype)
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step(loss=loss)


def test_on_an_accelerator_half_precision_is_clipped_too():
    factors = {0.0147: 0.0147, 0.26: 0.26, 0.5: 0.5, 1.0: 1.0, 2.0: 1.0}
    for factor, clipping in factors.items():
        given = torch.tensor(factor, dtype=WIDE)
        assert float(_unread(given, 4e-3, told=False, known=False)) == clipping
    assert float(_unread(torch.tensor(0.25, dtype=WIDE), 1e-6, told=False, known=True)) == 1
    assert float(_unread(torch.tensor(0.25, dtype=WIDE), 1e-6, told=True, known=True)) == 0.25


def test_where_nothing_is_finite_nothing_is_said():
    seen, now = torch.ones(4), torch.tensor([1.0, torch.nan, 2.0, torch.inf])
    ratio, common, there = compared([(seen, now)], torch.device("cpu"), 1e-6)
    assert (float(ratio), bool(common), bool(there)) == (1.0, True, False)


@pytest.mark.parametrize("shape", [(), (3,), (64, 64), (768, 768), (5, 7, 11)], ids=str)
def test_a_sample_is_a_spread_of_entries(shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    found = spaced(tensor)
    assert min(tensor.numel(), ENTRIES / 2) <= len(found) <= ENTRIES
    if len(shape) == 2:
        assert len(set((found % shape[1]).tolist())) > ENTRIES // 2  # of many columns
    if tensor.ndim:
        assert spaced(tensor.mT if tensor.ndim > 1 else tensor).untyped_storage().data_ptr() == tensor.data_ptr()


LIMITS = (0.3, 1e9, 0.1, 0.2)
WORLD = 4


def clipped_lengths(bare, model, mine, limits=LIMITS, whole=lambda loss: loss):
    """Parts of steps that are taken, with these rows of each batch."""
    optimizer = MuonAdam(bare, 3.0, step_size=Momo(BOUND))
    lengths = []
    for step, limit in enumerate(limits):
        optimizer.zero_grad()
        x, y = batch(step, WIDE)
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
        loss.backward()
        nn.utils.clip_grad_norm_(bare.parameters(), limit)
        optimizer.step(loss=loss)
        lengths.append(optimizer.diagnostics()["t"])
    return lengths


def narrow():
    """All but one of four ranks keep nothing of these weights."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Flatten(0)).to(
        WIDE
    )


def narrow_lengths(model, mine):
    """Parts of steps whose gradients are one third of the loss', and clipped; then those of a closure."""
    optimizer = MuonAdam(model, 300.0, step_size=Momo(0.4))
    lengths = []
    for step, factor in enumerate((1 / 3, 1 / 3, 0.1, 1 / 3, 1 / 30)):
        optimizer.zero_grad()
        x, _ = batch(step, WIDE)
        loss = model(x[mine]).sigmoid().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad.mul_(factor)
        optimizer.step(loss=loss)
        lengths.append(optimizer.diagnostics()["t"])
    return lengths


def refuse_stacked(model, mine):
    """A closure that adds to gradients which are there is told from one that clears them, by any means."""
    optimizer = MuonAdam(model, step_size=Momo())

    def part(step, clear=lambda: None):
        clear()
        x, y = batch(step, WIDE)
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
        loss.backward()
        return loss.detach()

    def to_none():
        for parameter in model.parameters():
            parameter.grad = None

    def to_zeros():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    for clear in (to_none, to_zeros, optimizer.zero_grad, lambda: optimizer.zero_grad(set_to_none=False)):
        optimizer.step(partial(part, 0, clear))
        for passes in (1, 2):
            part(passes)
            assert optimizer._losses._witness.arrivals.passes == passes
        to_none()
        part(3)
        assert optimizer._losses._witness.arrivals.passes == 1
        optimizer.step(partial(part, 3, clear))
    to_none()
    part(1)
    before = [p.to_local().clone() for p in model.parameters()]
    with pytest.raises((ValueError, NonFiniteError), match="gradients of earlier backward passes"):
        optimizer.step(partial(part, 2))
    assert all(torch.equal(p.to_local(), own) for p, own in zip(model.parameters(), before, strict=True))


def refuse_scattered(model, mine, rank):
    """Only the last rank clips values, and all pass over the step."""
    optimizer = MuonAdam(model, step_size=Momo())
    x, y = batch(0, WIDE)
    loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
    loss.backward()
    if rank == WORLD - 1:
        for parameter in model.parameters():
            parameter.grad.to_local().clamp_(-1e-3, 1e-3)
        with pytest.raises(ValueError, match="not by one factor"):
            optimizer.step(loss=loss)
    else:
        optimizer.step(loss=loss)
    assert optimizer.diagnostics()["skipped_steps"] == (rank < WORLD - 1)


def rank_main(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    join_ranks(rank, WORLD, folder)
    warnings.filterwarnings("ignore", message="Gradients were changed between backward and step")
    mine = slice(2 * rank, 2 * rank + 2)
    found = {}
    bare = network(WIDE)
    found["ddp"] = clipped_lengths(bare, DistributedDataParallel(bare), mine)
    line = init_device_mesh("cpu", (WORLD,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    for name, mesh in (("fsdp", line), ("hsdp", square)):
        model = network(WIDE)
        for layer in model[::5]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found[name] = clipped_lengths(model, model, mine)
    model = narrow()
    fully_shard(model, mesh=line)
    assert [len(p.to_local()) for p in model.parameters()] == 2 * [int(rank == 0)]
    found["narrow"] = narrow_lengths(model, mine)
    for check in (refuse_stacked, partial(refuse_scattered, rank=rank)):
        model = network(WIDE)
        fully_shard(model, mesh=line)
        check(model, mine)
    torch.save(found, f"{folder}/{rank}.pt")
    leave_ranks()


@pytest.mark.slow
@TOLD
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_four_ranks_clip_as_one_whatever_each_of_them_sees(tmp_path):
    alone = network(WIDE)
    whole = clipped_lengths(alone, alone, slice(None))
    expected = {"ddp": whole, "fsdp": whole, "hsdp": whole, "narrow": narrow_lengths(narrow(), slice(None))}
    assert all(0 < t < 1 for lengths in expected.values() for t in lengths)
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for layout, lengths in expected.items():
            assert found[layout] == pytest.approx(lengths, rel=1e-6), (layout, rank)
