"""Real gloo processes measure what one process does: DDP in all its forms, FSDP2, HSDP, tensor and expert parallel."""

import functools

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


DDP = {  # method, gradients as views of buckets, synchronised once
    "sgd": ("sgd", False, False),
    "sgd with views, synchronised once": ("sgd", True, True),
    "muon synchronised once": ("muon", False, True),
    "adam with views": ("adam", True, False),
}


def ddp_main(rank, folder):
    join_ranks(rank, WORLD, folder)
    found = {}
    for name, (method, views, no_sync) in DDP.items():
        # unused branches and frozen parameters included
        model = DistributedDataParallel(network(), find_unused_parameters=True, gradient_as_bucket_view=views)
        optimizer = METHODS[method](model)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=KINDS)
        share = MICRO // WORLD
        accumulate(model, optimizer, noise, range(rank * share, (rank + 1) * share), no_sync=no_sync)
        found[name] = outcome(noise)
    found["weighted"] = weighted(DistributedDataParallel(small()), rank, WORLD)
    ddp_refusals(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    leave_ranks()


COUNTS = ((1, 2), (3, 6), (2, 2), (1, 3))  # samples of each rank's micro-batches


def some(rank, index):
    generator = torch.Generator().manual_seed(10 * rank + index)
    return torch.randn(COUNTS[rank][index], 6, generator=generator, dtype=torch.float64)


def weighted(model, rank, world):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = NoiseScale(model, optimizer, every=1, kinds=("euclidean", "l1"), losses="weighted")
    for index in range(2):
        count, total = COUNTS[rank][index], sum(map(sum, COUNTS[:world]))
        noise.micro_batch(count)
        (model(some(rank, index)).square().mean() * count / total * world).backward()
    optimizer.step()
    return outcome(noise)


def weighted_alone(batches):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = NoiseScale(model, optimizer, every=1, kinds=("euclidean", "l1"), losses="whole")
    for x in batches:
        noise.micro_batch(len(x))
        model(x).square().mean().backward()
    optimizer.step()
    return outcome(noise)


def ddp_refusals(rank):
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
    for _ in range(2 * rank):
        noise.micro_batch(PER)
    expected = "micro_batch was called 2 times" if rank else "another rank refuses what it saw in a measured step"
    with pytest.raises(ValueError, match=expected):  # one rank's error is everybody's
        optimizer.step()
    noise.close()
    optimizer.zero_grad()
    noise = NoiseScale(model, optimizer, every=1)
    small_loss(model, 0, 0, [rank]).backward()
    optimizer.step()  # one micro-batch on each of two ranks is enough
    assert noise.read().batch == 2


def compare(found, expected, name):
    torch.testing.assert_close(found["values"], expected["values"], rtol=1e-5, atol=1e-12, msg=lambda m: f"{name}: {m}")
    assert found["read"]["batch"] == expected["read"]["batch"], name


@pytest.mark.slow
def test_ddp_is_accumulation_in_one_process(tmp_path):
    """Ranks x micro-batches are samples, with bucket views or without, synchronised every time or once."""
    mp.spawn(ddp_main, args=(str(tmp_path),), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    expected = {name: alone(method) for name, (method, _, _) in DDP.items()}
    expected["weighted"] = weighted_alone([some(0, 0), some(0, 1), some(1, 0), some(1, 1)])
    assert first.keys() == expected.keys()
    for name in expected:
        compare(first[name], expected[name], name)
        assert torch.equal(first[name]["values"], second[name]["values"]), name
        assert first[name]["read"] == second[name]["read"], name


class Small(nn.Module):
    """Of 7 and 5 rows each of two ranks has others, and one of four none."""

    def __init__(self, hidden):
        super().__init__()
        self.up = nn.Linear(6, hidden)
        self.down = nn.Linear(hidden, 5, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def small(hidden=7):
    torch.manual_seed(3)
    return Small(hidden).double()


def example(step, index, rank):
    rng = torch.Generator().manual_seed(100 * step + 10 * index + rank)
    return torch.randn(PER, 6, generator=rng, dtype=torch.float64)


def small_loss(model, step, index, ranks):
    """Mean over the samples of some ranks."""
    return model(torch.cat([example(step, index, rank) for rank in ranks])).square().mean()


SMALL = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "adam": lambda model: Adam(model, lr=0.01),
    "muon": lambda model: Muon(model, lr=0.01, polar="svd"),
}


def train_small(model, ranks, samples, *, method="adamw", zero=True, loss=small_loss, kinds=KINDS, **options):
    optimizer = SMALL[method](model)
    noise = NoiseScale(model, optimizer, every=1, samples=samples, kinds=kinds, **options)
    for step in range(3):
        for index in range(3):
            (loss(model, step, index, ranks) / 3).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=zero)
    return outcome(noise)


class Experts(nn.Module):
    """Six small matrices, each on one rank; three ranks of four have two, the last has none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(1)).double())

    def forward(self, x):
        own = self.experts.to_local() if hasattr(self.experts, "to_local") else self.experts
        return torch.einsum("eon,tn->teo", own, x).tanh()


def expert_loss(model, step, index, ranks):
    """Of experts that tokens of all ranks are sent to: what a rank computes is its experts' part."""
    tokens = torch.cat([example(step, index, rank) for rank in ranks])
    return model(tokens).square().sum() / len(tokens)


class Gains(nn.Module):
    """Of activations whose tokens are divided: a rank's gradient is that of its tokens, to be added up."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(1, 2, 6).double())

    def forward(self, x):
        return (self.gain * x).tanh()


def divided_loss(model, step, index, ranks, place=lambda x: x):
    out = model(place(example(step, index, 0).repeat(4, 1))).square().sum()
    return getattr(out, "full_tensor", lambda: out)() / (24 * PER)


FOUR = 4
PLAIN = ("euclidean", "l1", "alignment")


def sharded_main(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    join_ranks(rank, FOUR, folder)
    line = init_device_mesh("cpu", (FOUR,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    alone_here = [dist.new_group([other]) for other in range(FOUR)][rank]

    def by_fsdp(mesh):
        model = small()
        fully_shard(model.up, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def by_tensor(mesh):
        return parallelize_module(small(8), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    found = {}
    for zero in (True, False):
        found[f"fsdp, to none {zero}"] = train_small(by_fsdp(line), [rank], PER, zero=zero)
    for method in ("adam", "muon"):
        found[f"fsdp, {method}"] = train_small(by_fsdp(line), [rank], PER, method=method)
    found["fsdp, weighted"] = weighted(by_fsdp(line), rank, FOUR)
    found["hsdp"] = train_small(by_fsdp(square), [rank], PER)
    assert [bool(len(own.to_local())) for own in by_fsdp(line).parameters()] == [True, True, rank < FOUR - 1]

    both = by_tensor(square["model"])
    fully_shard(both.up, mesh=square["data"])
    fully_shard(both, mesh=square["data"])
    assert any(type(own).__name__ == "_StridedShard" for own in both.up.weight.placements)
    found["fsdp and tensor parallel"] = train_small(both, [rank // 2], PER)
    found["tensor parallel"] = train_small(by_tensor(line), [0], PER, process_group=alone_here)

    experts = Experts()
    experts.experts = nn.Parameter(distribute_tensor(experts.experts.detach(), line, [Shard(0)]))
    found["experts"] = train_small(
        experts, range(FOUR), PER, loss=expert_loss, kinds=PLAIN, process_group=dist.group.WORLD
    )
    gains = Gains()
    gains.gain = nn.Parameter(distribute_tensor(gains.gain.detach(), line, [Replicate()]))
    divided = functools.partial(divided_loss, place=lambda x: distribute_tensor(x, line, [Shard(0)]))
    divided(gains, 0, 0, [0]).backward()
    assert gains.gain.grad.placements[0].is_partial()
    gains.gain.grad = None
    found["gains"] = train_small(gains, [0], PER, loss=divided, kinds=PLAIN, process_group=alone_here)
    sharded_refusals(rank, line, square, by_fsdp, by_tensor)
    torch.save(found, f"{folder}/{rank}.pt")
    leave_ranks()


def sharded_refusals(rank, line, square, by_fsdp, by_tensor):
    from torch.distributed.fsdp import fully_shard

    def refused(model, message, **options):
        with pytest.raises(ValueError, match=message):
            NoiseScale(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)

    model = by_fsdp(line)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = NoiseScale(model, optimizer, every=1)
    small_loss(model, 0, 0, [rank]).backward()
    with pytest.raises(ValueError) as caught:
        optimizer.step()
    assert str(caught.value) == str(too_few(1))
    noise.close()
    layout = r"'up\.weight' of shape \(8, 6\) is a DTensor with placements \('S\(0\)',\) on a mesh of \(4,\) \('all',\)"
    refused(by_tensor(line), layout + r", but not of a module that fully_shard .*Pass process_group=")
    here = [0, 1] if rank < 2 else [2, 3]
    message = rf"ranks \[{here[0]}, {here[1]}\], but process_group has \[0, 1, 2, 3\]"
    refused(by_tensor(square["model"]), message, process_group=dist.group.WORLD)
    refused(nn.ModuleList([by_fsdp(line), small()]), r"sharded parameters and plain ones: .*'1\.up\.weight' is not")
    apart = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    fully_shard(apart[0], mesh=line)
    fully_shard(apart[1], mesh=square["data"])
    refused(apart, r"averaged over the ranks \[0, 1, 2, 3\], and .*, averaged over \[.*not of the same samples")


@pytest.mark.slow
def test_sharded_gradients_are_of_the_samples_of_all_ranks_that_see_others(tmp_path):
    """They are means over these ranks already: three micro-batches with the samples of all of them."""
    mp.spawn(sharded_main, args=(str(tmp_path),), nprocs=FOUR)
    whole = functools.partial(train_small, ranks=range(FOUR), samples=FOUR * PER)
    expected = {
        "fsdp, to none True": whole(small()),
        "fsdp, to none False": whole(small()),
        "fsdp, adam": whole(small(), method="adam"),
        "fsdp, muon": whole(small(), method="muon"),
        "fsdp, weighted": weighted_alone([torch.cat([some(r, index) for r in range(FOUR)]) for index in range(2)]),
        "hsdp": whole(small()),
        "fsdp and tensor parallel": train_small(small(8), range(2), 2 * PER),
        "tensor parallel": train_small(small(8), [0], PER),
        "gains": train_small(Gains(), [0], PER, loss=divided_loss, kinds=PLAIN),
        "experts": whole(Experts(), loss=expert_loss, kinds=PLAIN),
    }
    for rank in range(FOUR):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name in expected:
            compare(found[name], expected[name], name)
