"""Whether a device computes what it should: polar factors within their certificates, steps as in float64 on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from steepest.lab.bench.shapes import Shape
from steepest.lab.methods import METHODS, build_optimizer, resolve
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.linalg import COEFFICIENTS, polar
from steepest.linalg.coefficients import bears
from steepest.linalg.iterations import Form
from steepest.optim import SteepestDescent

FORMS: tuple[Form, ...] = ("newton-schulz", "gram")
# How far products in a type may take a singular value out of the certified interval, which is that of exact arithmetic:
# those of the tests of `polar` on the CPU. A device that sums up in another order has no reason to need more.
MARGINS: dict[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 0.015, torch.bfloat16: 0.06}
LARGEST, LEAST = 1.0, 10**-1.5  # singular values of the matrices, in geometric progression
# How far three steps of a method may be from those in float64, relative to their own length: with products in float32,
# and in half precision, where directions are as far off as their singular values.
STEPS = 3
ALLOWED: dict[torch.dtype, float] = {torch.float32: 2e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Polar:
    """One set of coefficients in one type and form, on one matrix.

    Args:
        coefficients: Name of the set.
        dtype: Of the products.
        form: Of the iteration.
        matrix: Its sides.
        low: Lower end of the certified interval of its singular values.
        high: Upper end.
        smallest: Least singular value that was found; None where it was not tried, or is not finite.
        largest: Likewise the largest.
        beyond: Likewise, how far they are outside of the interval.
        allowed: How far they may be; None where it was not tried.
        reason: Why there are no numbers.
    """

    coefficients: str
    dtype: str
    form: str
    matrix: str
    low: float
    high: float
    smallest: float | None = None
    largest: float | None = None
    beyond: float | None = None
    allowed: float | None = None
    reason: str | None = None

    @property
    def fine(self) -> bool:
        """Whether it is within what is allowed; what the library refuses to compute is fine."""
        return self.allowed is None or (self.beyond is not None and self.beyond <= self.allowed)


@dataclass(frozen=True)
class Steps:
    """A few steps of one method on the device, beside those in float64 on the CPU.

    Args:
        method: Its name.
        products: Type of the device's products.
        parameter: The one that is farthest off.
        deviation: Of its move, relative to the move, beyond the rounding of weights; None: not finite.
        allowed: How far it may be.
    """

    method: str
    products: str
    parameter: str
    deviation: float | None
    allowed: float

    @property
    def fine(self) -> bool:
        """Whether it is within what is allowed."""
        return self.deviation is not None and self.deviation <= self.allowed


def check_polars(device: str, *, shapes: Sequence[Shape], seed: int = 0) -> list[Polar]:
    """Every set of coefficients in every type and form, against its certificate.

    Args:
        device: Where the products are.
        shapes: Of the matrices.
        seed: Of their singular vectors.
    """
    matrices = {shape: with_spectrum(shape, seed) for shape in shapes}
    return [
        _check_polar(name, dtype, form, *matrices[shape], device)
        for name in COEFFICIENTS
        for dtype in MARGINS
        for form in FORMS
        for shape in shapes
    ]


def with_spectrum(shape: Shape, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix in float64 with known singular values, and these.

    Args:
        shape: Its sides.
        seed: Of its singular vectors.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    k = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(side, k, generator=generator, dtype=torch.float64, device="cpu")).Q
        for side in shape
    )
    ends = math.log10(LEAST), math.log10(LARGEST)
    values = torch.logspace(*ends, k, dtype=torch.float64, device="cpu")
    return (left * values) @ right.mT, values


def _check_polar(name: str, dtype: torch.dtype, form: Form, matrix: Tensor, values: Tensor, device: str) -> Polar:
    chosen = COEFFICIENTS[name]
    norm = torch.linalg.vector_norm(values, ord={"frobenius": 2, "schatten8": 8}[chosen.norm])
    low, high = chosen.certify(float(values.min() / norm)).image
    rows, columns = matrix.shape
    known = Polar(name, _plain(dtype), form, f"{rows} x {columns}", low, high)
    if not bears(chosen, dtype):
        return replace(known, reason="refused: it needs products in a wider type")
    found = polar(matrix.float().to(device), method=form, coefficients=name, dtype=dtype)
    wide = found.cpu().double()
    if not bool(wide.isfinite().all()):
        return replace(known, allowed=MARGINS[dtype], reason="not finite")
    singular = torch.linalg.svdvals(wide)
    smallest, largest = float(singular[-1]), float(singular[0])
    beyond = max(0.0, low - smallest, largest - high)
    return replace(known, smallest=smallest, largest=largest, beyond=beyond, allowed=MARGINS[dtype])


def own_methods() -> list[str]:
    """The methods of this library, by name."""
    model = small_gpt(GPTConfig(vocabulary=16, layers=1, width=8, head_size=4))
    built = {name: build_optimizer(name, model, _options(name)) for name in METHODS}
    return [name for name, optimizer in built.items() if isinstance(optimizer, SteepestDescent)]


def small_gpt(config: GPTConfig) -> GPT:
    """A transformer whose weights are all random, those that begin at zero too."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, device="cpu"))
    return model


def check_steps(methods: Sequence[str], config: GPTConfig, *, tokens: Tensor, device: str) -> list[Steps]:
    """Three steps of each method on the device in float32 with its default products, against float64 on the CPU.

    Both are told the same losses and gradients, random ones, so that nothing but the step differs; what layers read is
    what each model makes of the tokens.

    Args:
        methods: Keys of `METHODS`.
        config: Of the model.
        tokens: A batch (batch, time + 1) of whole numbers below the vocabulary.
        device: Where.
    """
    return [_check_steps(method, config, tokens, device) for method in methods]


def _check_steps(method: str, config: GPTConfig, tokens: Tensor, device: str) -> Steps:
    start = small_gpt(config)
    exact, tried = copy.deepcopy(start).double(), copy.deepcopy(start).to(device)
    options = _options(method)
    optimizers = [build_optimizer(method, model, options) for model in (exact, tried)]
    generator = torch.Generator(device="cpu").manual_seed(0)
    for step in range(STEPS):
        drawn = [torch.randn(p.shape, generator=generator, device="cpu") for p in start.parameters()]
        for model, optimizer in zip((exact, tried), optimizers, strict=True):
            _backward(model, tokens.to(next(model.parameters()).device), drawn)
            cast("SteepestDescent", optimizer).step(loss=3.0 - step)
            optimizer.zero_grad()
    off: dict[str, float] = {}
    for (name, before), wide, narrow in zip(
        start.named_parameters(), exact.parameters(), tried.parameters(), strict=True
    ):
        off[name] = _deviation(narrow.detach().cpu().double(), wide.detach(), begun=before.detach().double())
    worst = max(off, key=lambda name: off[name])
    products = _products(device)
    found = off[worst] if math.isfinite(off[worst]) else None
    return Steps(method, _plain(products), worst, found, ALLOWED[products])


def _products(device: str) -> torch.dtype:
    """What a polar factor of float32 matrices is computed in by default."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def _deviation(found: Tensor, exact: Tensor, *, begun: Tensor) -> float:
    """Of a move relative to the exact one, beyond what rounding the weights to float32 at each step can do."""
    length = float((exact - begun).norm())
    off = float((found - exact).norm()) - STEPS * torch.finfo(torch.float32).eps * float(exact.norm())
    return math.inf if math.isnan(off) else max(0.0, off) / length if length else max(0.0, off)


def _backward(model: GPT, tokens: Tensor, gradients: Sequence[Tensor]) -> None:
    """Leave these gradients, by a backward pass that layers and hooks see."""
    logits = model(tokens[:, :-1])
    loss = 0.0 * F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        loss = loss + (parameter * gradient.to(parameter)).sum()
    loss.backward()


def _options(method: str) -> dict[str, bool | int | float | str]:
    """As the lab has tuned them; what refreshes does so at each step."""
    found = dict(resolve(method, task="text", preset="demo", options={}).options)
    return found | ({"every": 1, "first": 0} if "every" in found else {})


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
