"""The loop that hosts are compared with, in plain sight, and what a step was told of its loss."""

import contextlib
import copy
import math
import os
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from steepest import SteepestDescent
from steepest.integrations.wrapped import unwrapped
from steepest.optim.momo.losses import Losses


@dataclass
class Trained:
    """What a loop leaves: of each step the loss that Momo used and the weights after it; inputs' moments at the end."""

    losses: list[float] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)


def windows(batches, accumulation=1, *, divisor=None):
    """Micro-batches with their weights, those of a step together; the last window may be short.

    Args:
        batches: Micro-batches.
        accumulation: How many make a step.
        divisor: What each loss is divided by; None: the number of the window's micro-batches.
    """
    cut = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    return [[(batch, 1 / (divisor or len(window))) for batch in window] for window in cut]


def train(model, optimizer, windows, loss_of, *, clip=None):
    """Train with the mean loss of each window, told in the one way that leaves nothing to find out.

    Weights that sum to less than 1 leave that part c of the mean loss' gradient: of F + c (f - F), with Momo's bound F.

    Args:
        windows: Of micro-batches with their weights.
        loss_of: Of a model and a micro-batch.
        clip: The largest norm of all gradients together.
    """
    trained = Trained()
    momo = unwrapped(optimizer)._losses.momo
    for window in windows:
        model.zero_grad()
        total = 0.0
        for batch, weight in window:
            loss = loss_of(model, batch)
            (loss * weight).backward()
            total += loss.item() * weight
        part = math.fsum(weight for _, weight in window)
        bound = momo.lower_bound if momo else 0.0
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step(loss=bound + total - part * bound)
        trained.losses.append(total / part)
        trained.weights.append(copied(model))
    trained.moments = moments(model, optimizer)
    return trained


def true_losses(model, trained, windows, loss_of):
    """The mean loss of each window, with the weights that its step found: those of `model` in the first."""
    model, found = copy.deepcopy(model), []
    for weights, window in zip([{}, *trained.weights], windows, strict=False):
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            total = sum(loss_of(model, batch).double() * weight for batch, weight in window)
        found.append(float(total / math.fsum(weight for _, weight in window)))
    return found


class Watched:
    """What a host's training comes to: the losses that its steps used, and the weights after each.

    A context: the host may make the optimizer in it. `optimizer` is the last that took a step.
    """

    def __init__(self):
        self.losses, self.weights, self.optimizer = [], [], None

    def __enter__(self):
        agreed = Losses.agreed

        def noted(losses, heard):
            self.losses.append(None if heard.loss is None else float(heard.loss))
            return agreed(losses, heard)

        self.stack = contextlib.ExitStack()
        self.stack.enter_context(mock.patch.object(Losses, "agreed", noted))
        self.stack.callback(register_optimizer_step_post_hook(self.stepped).remove)
        return self

    def __exit__(self, *_):
        self.stack.close()

    def stepped(self, optimizer, *_):
        if isinstance(optimizer, SteepestDescent):
            self.optimizer = optimizer
            members = [p for group in optimizer.param_groups for p in group["params"]]
            self.weights.append({optimizer._rows[p].name: whole(p) for p in members})

    def trained(self, model):
        """As `train` returns it."""
        return Trained(self.losses, self.weights, moments(model, self.optimizer))


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def copied(model):
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def moments(model, optimizer):
    """The second moment of each layer's inputs, by the name of its weight; none without `precondition`."""
    state = unwrapped(optimizer).state
    named = [(name, state.get(p, {}).get("input_moment")) for name, p in model.named_parameters()]
    return {name: whole(moment) for name, moment in named if moment is not None}


def assert_alike(found, expected, *, loss=1e-5, rtol=1e-4, atol=1e-5):
    """That two trainings have the same losses, weights after each step and moments.

    Args:
        loss: Relative tolerance of losses.
        rtol: Of weights and moments.
        atol: Likewise.
    """
    assert len(found.losses) == len(expected.losses)
    torch.testing.assert_close(
        torch.tensor(found.losses).double(), torch.tensor(expected.losses).double(), rtol=loss, atol=0
    )
    assert len(found.weights) == len(expected.weights)
    for step, (one, other) in enumerate(zip(found.weights, expected.weights, strict=True)):
        assert one.keys() == other.keys()
        for name in other:
            torch.testing.assert_close(
                one[name], other[name], rtol=rtol, atol=atol, msg=lambda t, at=f"step {step}, {name}: ": at + t
            )
    assert found.moments.keys() == expected.moments.keys()
    for name, moment in expected.moments.items():
        torch.testing.assert_close(found.moments[name], moment, rtol=rtol, atol=atol, msg=lambda t, n=name: n + t)


def as_rank():
    """What launchers tell a process of its place, for hosts that ask the environment."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
