"""Least squares whose inputs have one large direction: how many steps three methods need, as its variance grows.

f(W) = ‖(W - W*) Z‖² / 2 with Z Zᵀ = U diag(κ, 1, ..., 1) Uᵀ and W_0 = 0. The target W* has rank r, with orthonormal
v_i and the columns u_i of U:

    W* = v_1 (a u_1 + b u_(r+1))ᵀ + c (v_2 u_2ᵀ + ... + v_r u_rᵀ),

one mode that mixes spike and bulk, and r - 1 modes in the bulk.

**What is reduced, and why.** The error E = W* - W keeps this form, so three numbers (a, b, c) say everything. Its modes
are orthogonal on both sides, hence msgn acts on each alone and divides it by its length. With Q the step's direction:

    gradient descent   E Z Zᵀ              (a, b, c) -> (κ a, b, c)
    Muon               msgn(E Z Zᵀ)        (a, b, c) -> (κ a / l, b / l, sign c),  l = √(κ² a² + b²)
    Newton-Muon        msgn(E)             the same with κ = 1

**Greedy steps on a bound.** If |a|, |b|, |c| <= ρ, Muon's step η leaves each at most max(η, ρ - η / s), s = √(κ² + 1):
a coefficient below η overshoots by η at most, a larger one shrinks by no less than η b / l, which is smallest at
a = b = ρ. The best η makes both equal: η = ρ s / (s + 1), and that is the next bound. Newton-Muon has s = √2, thus
η = (2 - √2) ρ. Gradient descent has η = 2 / (κ + 1) and contracts every coefficient by (κ - 1) / (κ + 1).

**Real matrices.** In exact arithmetic they do the same. In floating point Muon's bulk modes do not stay separate:
while c << η, msgn multiplies what rounding puts antisymmetrically between two of them by about η / c, up to s, in every
second step. For κ = 2 and 4 that is harmless. For κ = 16, 64 and 256 it has reached 1e-6 after 48, 12 to 16, and 8
steps, and the step at which all coefficients are small at once for the first time (`Steps.reached`) then depends on
rounding. After as many steps as the bound guarantees, the error is small all the same.

Source:
    arXiv:2604.01472, section 3.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from steepest.names import unknown_name

SpikeMethod = Literal["gradient-descent", "muon", "newton-muon"]
SPIKE_METHODS: tuple[SpikeMethod, ...] = get_args(SpikeMethod)
LONGEST = 1_000_000  # steps; beyond, the bound says all there is to say
Coefficients = tuple[float, float, float]


@dataclass(frozen=True)
class SpikePath:
    """The way of one method to the target.

    Args:
        coefficients: (steps + 1, 3), a, b and c of W* - W before each step and after the last.
        bounds: (steps + 1,), what their sizes cannot exceed.
    """

    coefficients: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class Steps:
    """Numbers of steps of one method.

    Args:
        reached: Until all coefficients are within eps for the first time; for Muon, that may be by chance.
        settled: Until they are and remain there.
        guaranteed: Until the bound is; what the theory promises.
    """

    reached: int
    settled: int
    guaranteed: int


def contraction(method: SpikeMethod, kappa: float) -> float:
    """Factor of the bound per step.

    Args:
        method: Which.
        kappa: κ, at least 1.

    Returns:
        From 0 to below 1.

    Raises:
        ValueError: If the method is unknown or κ is not a finite number of at least 1.
    """
    if not 1 <= kappa < math.inf:
        raise ValueError(f"kappa must be a finite number of at least 1, got {kappa:g}.")
    if method == "gradient-descent":
        return (kappa - 1) / (kappa + 1)
    if method == "muon":
        s = math.hypot(kappa, 1)
        return s / (s + 1)
    if method == "newton-muon":
        return 2 - math.sqrt(2)
    raise ValueError(unknown_name("method", method, SPIKE_METHODS))


def path(method: SpikeMethod, kappa: float, *, eps: float = 1e-3, start: Coefficients = (1.0, 1.0, 1.0)) -> SpikePath:
    """Follow a method until its bound is at most `eps`.

    Args:
        method: Which.
        kappa: κ, at least 1.
        eps: Where to stop, above 0.
        start: a, b and c of W*.

    Returns:
        The path; its last bound is the first within `eps`.

    Raises:
        ValueError: If an argument is out of range, or the bound takes more than a million steps.
    """
    factor = contraction(method, kappa)
    bound = max(map(abs, start))
    if not eps > 0 or not bound < math.inf:
        raise ValueError(f"A path takes eps above 0 and finite coefficients, got {eps:g} and {start}.")
    if factor and bound > eps and math.log(bound / eps) / -math.log(factor) > LONGEST:
        problem = f"{method} would take more than {LONGEST:,} steps for kappa={kappa:g} and eps={eps:g}"
        raise ValueError(f"{problem}. Take a smaller kappa or a larger eps.")
    step = _steps(kappa)[method]
    coefficients, bounds = [start], [bound]
    while bounds[-1] > eps:
        coefficients.append(step(coefficients[-1], factor * bounds[-1]))
        bounds.append(factor * bounds[-1])
    return SpikePath(
        torch.tensor(coefficients, dtype=torch.float64, device="cpu"),
        torch.tensor(bounds, dtype=torch.float64, device="cpu"),
    )


def iterations(kappa: float, *, eps: float = 1e-3) -> dict[SpikeMethod, Steps]:
    """Steps of each method from a = b = c = 1 to `eps`.

    Args:
        kappa: κ, at least 1.
        eps: Size of the largest coefficient to reach, above 0.

    Returns:
        By method.

    Raises:
        ValueError: As for `path`.

    Examples:
        >>> iterations(4.0)["newton-muon"]
        Steps(reached=13, settled=13, guaranteed=13)
    """
    return {method: _count(path(method, kappa, eps=eps), eps) for method in SPIKE_METHODS}


def _steps(kappa: float) -> Mapping[SpikeMethod, Callable[[Coefficients, float], Coefficients]]:
    """By method, the function from coefficients and next bound, which is the step size of the two signs."""

    def descend(now: Coefficients, bound: float) -> Coefficients:
        a, b, c = now
        eta = 2 / (kappa + 1)
        return a - eta * kappa * a, b - eta * b, c - eta * c

    return {
        "gradient-descent": descend,
        "muon": lambda now, bound: _sign_step(now, bound, kappa),
        "newton-muon": lambda now, bound: _sign_step(now, bound, 1.0),
    }


def _sign_step(now: Coefficients, eta: float, weight: float) -> Coefficients:
    a, b, c = now
    length = math.hypot(weight * a, b) or 1.0
    return a - eta * weight * a / length, b - eta * b / length, c - math.copysign(eta, c) if c else c


def _count(way: SpikePath, eps: float) -> Steps:
    within = (way.coefficients.abs().amax(dim=1) <= eps).tolist()
    outside = [step for step, inside in enumerate(within) if not inside]
    settled = outside[-1] + 1 if outside else 0
    return Steps(reached=within.index(True), settled=settled, guaranteed=len(way.bounds) - 1)
