"""Real gloo processes: DDP in all its forms, and FSDP2, measure what one process does."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steepest import Adam, Muon
from steepest.batch_size.noise import NoiseScale
from steepest.batch_size.noise_collect import too_few
from tests.batch_size.noisy_loops import MICRO, PER, STEPS, loss_of, network
from tests.processes import join_ranks, leave_ranks

WORLD = 2
KINDS = ("euclidean", "l1", "nuclear", "alignment")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
METHODS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    "muon": lambda model: Muon(model, lr=0.01, polar="svd"),
    "adam": lambda model: Adam(model, lr=0.01),
}


def accumulate(model, optimizer, noise, indices, *, no_sync=False):
    """The micro-batches of one rank, step by step; the last one synchronises."""
    for step in range(STEPS):
        for index in indices:
            if no_sync and index != indices[-1]:
                with model.no_sync():
                    (loss_of(model, step, index) / len(indices)).backward()
            else:
                (loss_of(model, step, index) / len(indices)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return noise


def outcome(noise):
    order = sorted(range(len(noise._layers)), key=lambda place: noise._layers[place].name)
    values = torch.stack([record.values[order] for record in noise._records])
    return {"values": values, "read": noise.read().to_dict()}


def alone(method, per=PER):
    model = network()
    optimizer = METHODS[method](model)
    noise = NoiseScale(model, optimizer, every=1, samples=per, kinds=KINDS)
    return outcome(accumulate(model, optimizer, noise, range(MICRO)))


def ddp_main(rank, folder, method, options):
    join_ranks(rank, WORLD, folder)
    bucket_view, no_sync = options
    # unused branches and frozen parameters included
    model = DistributedDataParallel(network(), find_unused_parameters=True, gradient_as_bucket_view=bucket_view)
    optimizer = METHODS[method](model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=KINDS)
    share = MICRO // WORLD
    accumulate(model, optimizer, noise, range(rank * share, (rank + 1) * share), no_sync=no_sync)
    torch.save(outcome(noise), f"{folder}/{rank}.pt")
    leave_ranks()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [("sgd", (False, False)), ("sgd", (True, True)), ("muon", (False, True)), ("adam", (True, False))],
    ids=str,
)
def test_ddp_is_accumulation_in_one_process(tmp_path, method, options):
    """Ranks x micro-batches are samples, with bucket views or without, synchronised every time or once."""
    expected = alone(method)
    mp.spawn(ddp_main, args=(str(tmp_path), method, options), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    torch.testing.assert_close(first["values"], expected["values"], rtol=1e-5, atol=1e-12)
    assert torch.equal(first["values"], second["values"])
    assert first["read"] == second["read"]


class Small(nn.Module):
    """Uneven shards: 5 and 7 rows over two ranks."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 5, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def small():
    torch.manual_seed(3)
    return Small().double()


def example(step, index, rank):
    rng = torch.Generator().manual_seed(100 * step + 10 * index + rank)
    return torch.randn(PER, 6, generator=rng, dtype=torch.float64)


def small_loss(model, step, index, ranks):
    """Mean over the samples of some ranks."""
    return model(torch.cat([example(step, index, rank) for rank in ranks])).square().mean()


def train_small(model, ranks, zero, samples, losses, check=lambda noise: None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    noise = NoiseScale(model, optimizer, every=1, samples=samples, kinds=KINDS, losses=losses)
    for step in range(3):
        for index in range(3):
            share = 3 if losses == "divided" else 1
            (small_loss(model, step, index, ranks) / share).backward()
        check(noise)
        optimizer.step()
        optimizer.zero_grad(set_to_none=zero)
    return noise


def fsdp_main(rank, folder, zero):
    from torch.distributed.fsdp import fully_shard

    join_ranks(rank, WORLD, folder)
    model = small()
    fully_shard(model.up)
    fully_shard(model)
    torch.save(outcome(train_small(model, [rank], zero, PER, "divided")), f"{folder}/{rank}.pt")
    leave_ranks()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [True, False])
def test_fsdp_is_accumulation_of_all_ranks_samples(tmp_path, zero):
    """Sharded gradients are means over ranks already: three micro-batches of two ranks' samples each."""
    expected = outcome(train_small(small(), range(WORLD), True, WORLD * PER, "divided"))
    mp.spawn(fsdp_main, args=(str(tmp_path), zero), nprocs=WORLD)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["values"], expected["values"], rtol=1e-5, atol=1e-12)
        assert found["read"]["batch"] == expected["read"]["batch"] == 3 * WORLD * PER


def ddp_refusals_main(rank, folder):
    join_ranks(rank, WORLD, folder)
    model = DistributedDataParallel(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = NoiseScale(model, optimizer, every=1)
    for index in range(1 + rank):
        with model.no_sync():
            small_loss(model, 0, index, [rank]).backward()
    with pytest.raises(ValueError, match="between 1 and 2 micro-batches in one step"):
        optimizer.step()
    noise.close()
    optimizer.zero_grad()
    noise = NoiseScale(model, optimizer, every=1)
    small_loss(model, 0, 0, [rank]).backward()
    optimizer.step()  # one micro-batch on each of two ranks is enough
    assert noise.read().batch == 2
    leave_ranks()


def fsdp_refusals_main(rank, folder):
    from torch.distributed.fsdp import fully_shard

    join_ranks(rank, WORLD, folder)
    sharded = small()
    fully_shard(sharded)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    noise = NoiseScale(sharded, optimizer, every=1)
    small_loss(sharded, 0, 0, [rank]).backward()
    with pytest.raises(ValueError) as caught:
        optimizer.step()
    assert str(caught.value) == str(too_few(1))
    noise.close()

    mixed = nn.ModuleList([sharded, small()])
    with pytest.raises(ValueError, match=r"sharded parameters \(DTensor\) and plain ones"):
        NoiseScale(mixed, torch.optim.SGD(mixed.parameters(), lr=0.1))
    leave_ranks()


@pytest.mark.slow
@pytest.mark.parametrize("main", [ddp_refusals_main, fsdp_refusals_main])
def test_what_ranks_refuse(tmp_path, main):
    mp.spawn(main, args=(str(tmp_path),), nprocs=WORLD)


def weighted_main(rank, folder):
    join_ranks(rank, WORLD, folder)
    model = DistributedDataParallel(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = NoiseScale(model, optimizer, every=1, kinds=("euclidean", "l1"), losses="weighted")
    sizes = ((1, 2), (3, 6))
    for index in range(2):
        count = sizes[rank][index]
        noise.micro_batch(count)
        x = torch.randn(count, 6, generator=torch.Generator().manual_seed(10 * rank + index), dtype=torch.float64)
        (model(x).square().mean() * count / 12 * WORLD).backward()
    optimizer.step()
    torch.save(outcome(noise), f"{folder}/{rank}.pt")
    leave_ranks()


@pytest.mark.slow
def test_losses_weighted_over_ranks(tmp_path):
    mp.spawn(weighted_main, args=(str(tmp_path),), nprocs=WORLD)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = NoiseScale(model, optimizer, every=1, kinds=("euclidean", "l1"), losses="whole")
    for rank, index, count in ((0, 0, 1), (0, 1, 2), (1, 0, 3), (1, 1, 6)):
        noise.micro_batch(count)
        x = torch.randn(count, 6, generator=torch.Generator().manual_seed(10 * rank + index), dtype=torch.float64)
        model(x).square().mean().backward()
    optimizer.step()
    found = torch.load(tmp_path / "0.pt", weights_only=True)
    torch.testing.assert_close(found["values"], outcome(noise)["values"], rtol=1e-5, atol=1e-12)
