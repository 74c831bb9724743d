"""The passes over memory in a step, momentum and decay with the move, against the two calls that are the least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import steepest
from steepest.anatomy import Load
from steepest.lab.bench.contestants import Settings
from steepest.lab.bench.shapes import Shape
from steepest.lab.bench.timing import Quartiles, paired_ratio, quartiles, take_turns
from steepest.lab.runs.device import clocked
from steepest.optim.decay import Decoupled
from steepest.optim.momentum import average_
from steepest.optim.packing import Packing
from steepest.optim.sharing import Sharing

PLAIN = "plain"
WARM_UP = 3


class Pass(NamedTuple):
    """What is done to the parameters of one load, or of all: with these momenta, gradients and moves."""

    parameters: list[Tensor]
    momenta: list[Tensor]
    gradients: list[Tensor]
    moves: list[Tensor]


@dataclass(frozen=True)
class Row:
    """Milliseconds of one way to do the passes, and its time relative to the plain calls' in the same round."""

    way: str
    ms: Quartiles
    ratio: Quartiles


@dataclass(frozen=True)
class Passes:
    """Of one set of shapes; `seconds` are those of every round."""

    matrices: int
    entries: int
    loads: int
    rows: tuple[Row, ...]
    seconds: dict[str, list[float]]


def measure_passes(shapes: Sequence[Shape], *, pairs: int, seed: int = 0) -> Passes:
    """Time all ways in turns, on the same tensors.

    Args:
        shapes: Of the parameters, float32.
        pairs: Rounds, at least 2.
        seed: Of the tensors.

    Raises:
        ValueError: If there are too few rounds for quartiles.
    """
    if pairs < 2:
        raise ValueError(f"Passes are measured in at least 2 pairs, for their quartiles, got pairs={pairs}.")
    by_load = make_passes(shapes, seed=seed)
    seconds = take_turns(ways(by_load), rounds=pairs, warm_up=WARM_UP)
    rows = [
        Row(way, quartiles([1e3 * one for one in own]), paired_ratio(own, seconds[PLAIN]))
        for way, own in seconds.items()
    ]
    entries = sum(parameter.numel() for one in by_load for parameter in one.parameters)
    return Passes(len(shapes), entries, len(by_load), tuple(rows), seconds)


def make_passes(shapes: Sequence[Shape], *, seed: int) -> list[Pass]:
    """Normal numbers, packed into loads as the optimizer packs them.

    Args:
        shapes: Of the parameters.
        seed: Of the numbers.

    Returns:
        One for each load, in the optimizer's order; moves lie in memory as its directions do.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, device="cpu")

    parameters = [draw(shape).requires_grad_() for shape in shapes]
    found: list[Pass] = []
    for load in loads_of(parameters):
        momenta, gradients, moves = ([draw(one.shape) for one in load.parameters] for _ in range(3))
        # what follows is timed outside of a step, where parameters are written to without their history
        weights = [parameter.detach() for parameter in load.parameters]
        found.append(Pass(weights, momenta, gradients, load.parameter_shaped(load.matrices(moves))))
    return found


def loads_of(parameters: list[Tensor]) -> list[Load]:
    """The loads of a step of Muon, as it comes, on matrices and convolutions."""
    optimizer = steepest.Muon(parameters)
    rows = {row.parameter: row for row in optimizer.plan}
    present = [(group, group["params"]) for group in optimizer.param_groups]
    norms = [optimizer.norm_of(group) for group in optimizer.param_groups]
    packing = Packing(None)
    packing.fits(present)
    packed, _ = packing.of(present, rows, norms, [()] * len(norms), Sharing(None, None), bounded=True)
    return [portion.load for own in packed for portion in own]


def merged(passes: Sequence[Pass]) -> Pass:
    """All as one."""
    return Pass(*(list(itertools.chain(*own)) for own in zip(*passes, strict=True)))


def ways(by_load: Sequence[Pass], settings: Settings | None = None) -> dict[str, Callable[[], float]]:
    """The ways to do the passes, each a function that does them and returns its seconds.

    Args:
        by_load: One for each load.
        settings: Momentum, learning rate and decay; None for those of all contestants.
    """
    chosen = settings or Settings()
    beta, lr, decay = chosen.momentum, chosen.lr, chosen.lr * chosen.weight_decay
    everything = merged(by_load)

    def plain(passes: Sequence[Pass]) -> None:
        for one in passes:
            torch._foreach_lerp_(one.momenta, one.gradients, 1 - beta)
            torch._foreach_add_(one.parameters, one.moves, alpha=-lr)

    def own(decay: float) -> None:
        for one in by_load:
            average_(one.momenta, one.gradients, beta)
            if decay:
                Decoupled().apply_(one.parameters, one.moves, length=lr, decay=decay, pull=True)
            else:
                Decoupled().apply_(one.parameters, one.moves, length=lr, decay=0.0)

    works: dict[str, Callable[[], object]] = {
        PLAIN: lambda: plain([everything]),
        "plain, load by load": lambda: plain(by_load),
        "steepest, no decay": lambda: own(0.0),
        "steepest, with decay": lambda: own(decay),
    }
    return {name: (lambda work=work: clocked(work, device="cpu")) for name, work in works.items()}
