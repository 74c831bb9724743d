"""One contestant on its own: whether it steps at all, what it computes, holds and gets right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from steepest.lab.bench.accuracy import Accuracy, Oracle, Spectrum, accuracy, draw_oracles
from steepest.lab.bench.contestants import Contestant, Settings
from steepest.lab.bench.memory import peak_extra_bytes
from steepest.lab.bench.shapes import Shape, matrix_shape
from steepest.lab.runs.device import clocked
from steepest.linalg import flops

SPECTRA: tuple[Spectrum, ...] = ("gaussian", "decaying")
FIRST_STEPS = 2  # the first makes the state


@dataclass(frozen=True)
class Workload:
    """What everybody steps on: weights to copy, gradients, and the memory that gradients are handed over in."""

    weights: Sequence[Tensor]
    gradients: list[Tensor]
    handed: list[Tensor]
    oracles: Mapping[Spectrum, Sequence[Oracle]]
    device: str
    settings: Settings


@dataclass(frozen=True)
class Examined:
    """A contestant that steps: one step on the clock, its operations, its memory, its directions."""

    step: Callable[[], float]
    flops: int
    peak_bytes: int
    accuracy: Mapping[Spectrum, Accuracy]


def make_workload(
    shapes: Sequence[Shape], *, dtype: torch.dtype, device: str, seed: int, settings: Settings, exact: bool = True
) -> Workload:
    """Seeded normal weights and gradients of the given shapes; if `exact`, with oracles, which take decompositions."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    weights, gradients = (
        [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes] for _ in range(2)
    )
    oracles: dict[Spectrum, list[Oracle]] = {
        one: draw_oracles(one, shapes, dtype=dtype, device=device, seed=seed) for one in SPECTRA if exact
    }
    return Workload(weights, gradients, [torch.empty_like(one) for one in gradients], oracles, device, settings)


def examine(contestant: Contestant, work: Workload) -> Examined | str:
    """Build it, let it step, and look at it.

    Args:
        contestant: Who.
        work: On what.

    Returns:
        What was found; of a peer that cannot be imported or fails, the reason. Our own failures are raised.
    """
    if contestant.ours:
        return _examine(contestant, work)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of others, about themselves
            return _examine(contestant, work)
    except Exception as failure:  # noqa: BLE001 - whatever others raise is what their row says
        first = (str(failure).strip().splitlines() or ["no message"])[0]
        return first if isinstance(failure, ModuleNotFoundError) else f"{type(failure).__name__}: {first}"


def _examine(contestant: Contestant, work: Workload) -> Examined:
    looked_at = contestant.examined()
    found: dict[Spectrum, Accuracy] = {one: accuracy(looked_at, oracles) for one, oracles in work.oracles.items()}
    counted = own_flops(contestant, work) if contestant.ours else count_flops(_stepping(looked_at, work))
    step = _stepping(contestant, work)
    for _ in range(FIRST_STEPS):
        step()
    return Examined(step, counted, peak_extra_bytes(step, device=work.device), found)


def _stepping(contestant: Contestant, work: Workload) -> Callable[[], float]:
    """Its own copy of the weights, and a function that hands over gradients, takes a step and returns its seconds."""
    shaped = [one.flatten(1) for one in work.handed] if contestant.matrices_only else list(work.handed)
    weights = (weight.clone().view_as(one) for weight, one in zip(work.weights, shaped, strict=True))
    params = [weight.requires_grad_() for weight in weights]
    step = contestant.build(list(params), work.settings)

    def hand_over_and_step() -> float:
        torch._foreach_copy_(work.handed, work.gradients)  # some contestants write to gradients, or drop them
        for param, gradient in zip(params, shaped, strict=True):
            param.grad = gradient
        return clocked(step, device=work.device)

    return hand_over_and_step


def own_flops(contestant: Contestant, work: Workload) -> int:
    """Operations of the products of a step of ours, matrix by matrix, as they are done.

    torch does not count all products that we ask it for: neither those in place nor those of oneDNN.
    """
    dtype = contestant.products_dtype(work.weights[0].dtype, work.device)
    sides = [matrix_shape(weight.shape) for weight in work.weights]
    return sum(flops(m, n, coefficients=contestant.coefficients, dtype=dtype, device=work.device) for m, n in sides)


def count_flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products that torch is asked for, a multiply-add counted as two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
