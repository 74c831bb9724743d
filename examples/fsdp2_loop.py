"""FSDP2: a small transformer, sharded over ranks, with NewtonMuon and Momo; saved, and gone on with.

    torchrun --nproc-per-node 2 examples/fsdp2_loop.py
    python examples/fsdp2_loop.py        # the same, with two processes that it starts itself

Half a minute on two processor cores with gloo; where there are GPUs, it uses these and NCCL.
"""

import argparse
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import steepest

CONTEXT, WIDTH, HEADS = 64, 64, 4


class Block(nn.Module):
    """Attention and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        z = self.norm1(x)
        q, k, v = (each(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.query, self.key, self.value))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(self.up(self.norm2(x)).relu().square())


class Transformer(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x):
        x = self.tokens(x) + self.places(torch.arange(x.size(1), device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(device: torch.device) -> tuple[nn.Module, steepest.SteepestDescent]:
    """The sharded model, then the optimizer of it: shards are read off the parameters."""
    torch.manual_seed(0)
    model = Transformer().to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model, steepest.NewtonMuon(model, lr=0.05, step_size=steepest.Momo(lower_bound=1.0))


def train(model, optimizer, text, steps, *, micro_batches=2) -> float:
    """Train on these steps, and return the last loss; each rank draws texts of its own."""
    device = text.device
    for step in steps:
        total = torch.zeros((), device=device)
        for micro in range(micro_batches):
            seed = (step * micro_batches + micro) * dist.get_world_size() + dist.get_rank()
            starts = torch.randint(len(text) - CONTEXT - 1, (8,), generator=torch.Generator().manual_seed(seed))
            rows = torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])
            model.set_requires_gradient_sync(micro + 1 == micro_batches)  # gradients are averaged in the last one
            loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            optimizer.record_loss(loss, weight=1 / micro_batches)  # ranks' losses are averaged by the step
            (loss / micro_batches).backward()
            total += loss.detach() / micro_batches
        optimizer.step()
        optimizer.zero_grad()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def run(steps: int, folder: str | None) -> None:
    """What one rank does.

    Args:
        steps: All of them; half of them before the checkpoint.
        folder: For it, seen by all ranks; None: a temporary one.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    first = dist.get_rank() == 0
    with tempfile.TemporaryDirectory() as temporary:
        name = [folder or temporary]  # of the first rank
        dist.broadcast_object_list(name, device=device)
        train_twice(steps, name[0], device, first)
        dist.barrier()
    dist.destroy_process_group()


def train_twice(steps: int, folder: str, device: torch.device, first: bool) -> None:
    """Train, with a checkpoint halfway; then go on from that again, with a new model and optimizer."""
    source = "".join(path.read_text("utf-8") for path in sorted(Path(argparse.__file__).parent.glob("a*.py")))
    text = torch.tensor(list(source.encode()), dtype=torch.long, device=device)

    model, optimizer = build(device)
    if first:
        print(optimizer.plan)
    half = steps // 2
    begin = train(model, optimizer, text, range(1))
    train(model, optimizer, text, range(1, half))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=folder)
    end = train(model, optimizer, text, range(half, steps))

    model, optimizer = build(device)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"weights": weights, "state": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    again = train(model, optimizer, text, range(half, steps))
    if first:
        print(f"loss {begin:.3f} -> {end:.3f}; from the checkpoint {again:.3f}")


def spawned(rank: int, world: int, port: int, steps: int, folder: str | None) -> None:
    """What a process does that torchrun has not started."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    run(steps, folder)


def main() -> None:
    """Run as a rank of torchrun's, or start two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint", help="a folder that all ranks see; a temporary one if left out")
    options = parser.parse_args()
    if "RANK" in os.environ:
        run(options.steps, options.checkpoint)
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(spawned, (2, port, options.steps, options.checkpoint), nprocs=2)


if __name__ == "__main__":
    main()
