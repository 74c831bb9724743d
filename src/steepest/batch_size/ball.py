"""The ball that weight decay draws around zero, and what is bounded inside it.

A step with decoupled decay is W <- (1 - ηλ) W - η c O with ‖O‖_2 <= κ: c is the scale of the layer's step, κ how far
the polynomial in place of the polar factor overshoots 1. Whatever the gradients are, with a = |1 - ηλ|,

    ‖W_(t+1)‖_2 <= a ‖W_t‖_2 + η κ c,    thus    ‖W_t‖_2 <= a^t ‖W_0‖_2 + η κ c (1 + a + ... + a^(t-1)).

For ηλ <= 1 the step is a convex combination of W and of a point of the ball of radius κ c / λ, which it therefore never
leaves. For 1 < ηλ < 2 the bound tends to κ c η / (2 - ηλ), and alternating gradients attain it. From 2 on it grows
without end. Under a schedule, the largest lr decides.

torch's Muon and this library's decay with the scheduled lr and move by lr times a factor for the layer's shape: c is
that factor, and the radius is κ c / λ, not 1 / λ.

Source:
    Ours, in the spirit of Sato, Naganuma and Iiduka, arXiv:2507.01598v5 (boundedness under weight decay).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steepest.checks import check_fields, number

Regime = Literal["no decay", "ball holds", "bounded", "may diverge"]


_CHECKS = {"lr": number(above=True), "weight_decay": number(), "scale": number(above=True), "overshoot": number(1)}


@dataclass(frozen=True)
class Ball:
    """What decay says about the size of one layer's weight, whatever its gradients.

    Args:
        lr: η, the scheduled learning rate, at its largest; above 0.
        weight_decay: λ, decoupled; at least 0.
        scale: c, the factor of the layer's steps, above 0; see `steepest.geometry.scale_factor`.
        overshoot: κ, largest singular value of a direction, at least 1; see `steepest.linalg.overshoot`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If one is none.

    Examples:
        >>> Ball(lr=0.02, weight_decay=0.1).radius
        10.0
        >>> Ball(lr=15.0, weight_decay=0.1).regime
        'bounded'
    """

    lr: float
    weight_decay: float
    scale: float = 1.0
    overshoot: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS)

    @property
    def regime(self) -> Regime:
        """By the product of lr and decay: "ball holds" up to 1, "bounded" below 2, "may diverge" from there on."""
        product = self.lr * self.weight_decay
        if product == 0:
            return "no decay"
        if product <= 1:
            return "ball holds"
        return "bounded" if product < 2 else "may diverge"

    @property
    def radius(self) -> float:
        """κ c / λ, in weight units of the spectral norm; infinite without decay."""
        return self.overshoot * self.scale / self.weight_decay if self.weight_decay else math.inf

    @property
    def limit(self) -> float:
        """What ‖W_t‖_2 cannot stay above: the radius, or κ c η / (2 - ηλ), or infinity, by regime."""
        if self.regime == "bounded":
            return self.overshoot * self.scale * self.lr / (2 - self.lr * self.weight_decay)
        return self.radius if self.regime == "ball holds" else math.inf

    @property
    def step(self) -> float:
        """2 η κ c: what ‖W_(t+1) - W_t‖_2 cannot exceed inside the ball; η κ c without decay."""
        length = self.lr * self.overshoot * self.scale
        return 2 * length if self.weight_decay else length

    @property
    def sentence(self) -> str:
        """The regime in words, with the remedy where there should be one."""
        product, remedy = self.lr * self.weight_decay, f"keep lr below 1 / weight_decay = {_inverse(self.weight_decay)}"
        return {
            "no decay": "without decay nothing bounds the weights but the number of steps",
            "ball holds": f"lr * weight_decay = {product:.3g} <= 1: weights inside the ball stay there, surely",
            "bounded": f"1 < lr * weight_decay = {product:.3g} < 2: weights may leave the ball; {remedy}",
            "may diverge": f"lr * weight_decay = {product:.3g} >= 2: weights may grow without end; {remedy}",
        }[self.regime]

    def after(self, initial: float, steps: int) -> float:
        """Largest possible ‖W_t‖_2 after a number of steps, in every regime.

        Args:
            initial: ‖W_0‖_2, at least 0. The Frobenius norm works as well, with a scale √min(m, n) times as large.
            steps: t, at least 0.

        Returns:
            a^t ‖W_0‖_2 + η κ c (1 + a + ... + a^(t-1)); infinite if that passes the largest float.
        """
        kept, length = abs(1 - self.lr * self.weight_decay), self.lr * self.overshoot * self.scale
        try:
            power = kept**steps
        except OverflowError:
            return math.inf
        total = steps if kept == 1 else (1 - power) / (1 - kept)
        return power * initial + length * total

    def gradient(self, smoothness: float, *, minimiser: float, initial: float = 0.0) -> float:
        """Largest possible ‖∇f(W_t)‖_*, without assuming that gradients are bounded.

        Args:
            smoothness: L_*, from the spectral norm of a change to the nuclear norm of the gradient's change.
            minimiser: ‖W*‖_2 of some stationary point.
            initial: ‖W_0‖_2.

        Returns:
            L_* (max(‖W_0‖_2, R) + ‖W*‖_2) with R = `limit`, which is κ c / λ for ηλ <= 1; infinite where the weights
            are not bounded.
        """
        return smoothness * (max(initial, self.limit) + minimiser)


def frank_wolfe_gap(gradient: Tensor, weight: Tensor, *, weight_decay: float, scale: float = 1.0) -> Tensor:
    """𝒢 = ‖∇f‖_* + (λ / c) <∇f, W>: how far W is from stationary in the ball of radius c / λ.

    With decay the gradient itself need not vanish: if the minimiser is outside the ball, it stays away from zero. In
    the ball 𝒢 >= 0; 𝒢 is 0 exactly at the stationary points of min f over it; and ‖∇f‖_* <= 𝒢 / (1 - λ ‖W‖_2 / c).

    Args:
        gradient: ∇f (*batch, m, n), loss per weight.
        weight: W (*batch, m, n).
        weight_decay: λ, at least 0; with 0 the gap is ‖∇f‖_*.
        scale: κ c: spectral norm of the layer's steps at lr 1.

    Returns:
        (*batch,), loss per weight, in float64.

    Raises:
        ValueError: If the shapes differ.
    """
    if gradient.shape != weight.shape:
        raise ValueError(
            f"The gap takes a gradient of the weight's shape, got {tuple(gradient.shape)} and {tuple(weight.shape)}."
        )
    gradient, weight = gradient.detach().double(), weight.detach().double()
    inner = (gradient * weight).sum((-2, -1))
    return torch.linalg.matrix_norm(gradient, ord="nuc") + weight_decay / scale * inner


def _inverse(weight_decay: float) -> str:
    return f"{1 / weight_decay:.3g}" if weight_decay else "infinity"
