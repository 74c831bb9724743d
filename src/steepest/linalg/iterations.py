"""Polynomial iterations toward the polar factor, in terms of `Products`; nothing here knows how these are computed.

X has k <= l; R = X Xᵀ is k x k. A step takes X to Z X with Z = a I + b R + c R² (+ d R³ + e R⁴), which acts on the
singular values s of X as s -> a s + b s³ + c s⁵ (+ d s⁷ + e s⁹). The Gram form iterates on R alone, R -> Z R Z, and
multiplies X once at the end with the product of all Z.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from steepest.linalg.coefficients import Coefficients
from steepest.linalg.odd_polynomial import Step
from steepest.linalg.products import Products, X

Form = Literal["newton-schulz", "gram"]
# Rounding leaves an error of about eps in the null space of the Gram matrix, and a step with slope a enlarges it by
# a². The Gram form starts anew from X before that passes this bound: near 1 the eigenvalues that rounding made negative
# grow faster still, and the iteration diverges.
LARGEST_NOISE = 0.1


def newton_schulz(x: X, chosen: Coefficients, products: Products[X]) -> X:
    """Multiply X in every step.

    Args:
        x: Divided by its Frobenius norm, if that is the set's, else with entries of at most size one. As `products`
            takes it.
        chosen: The steps.
        products: How.

    Returns:
        Like `x`.
    """
    for index, step in enumerate(chosen.steps):
        gram = products.gram(x)
        wanted = index == 0 and chosen.norm == "schatten8"
        inverse, square = _normalise(gram, products) if wanted else (None, None)
        factor = _factor(step, gram, square, products)
        del gram, square
        if inverse is None:
            x = products.apply(factor, x, plus=step[0])
        else:
            x = products.apply(products.multiply(products.add_to_diagonal(factor, step[0]), inverse), x)
    return x


def gram_form(x: X, chosen: Coefficients, segments: Sequence[Sequence[Step]], products: Products[X]) -> X:
    """Multiply X once per segment.

    Args:
        x: As for `newton_schulz`.
        chosen: The set.
        segments: Its steps, as `segments` divides them.
        products: How.

    Returns:
        Like `x`.
    """
    wanted = chosen.norm == "schatten8"
    for steps in segments:
        gram = products.gram(x)
        total: Tensor | None = None
        for index, step in enumerate(steps, start=1):
            inverse, square = _normalise(gram, products) if wanted else (None, None)
            wanted = False
            factor = products.add_to_diagonal(_factor(step, gram, square, products), step[0])
            del square
            if index < len(steps):
                gram = products.product(
                    products.product(factor, gram), factor
                )  # Z R Z stays closer to symmetric than R Z²
            if inverse is not None:
                factor = products.multiply(factor, inverse)
            total = factor if total is None else products.product(factor, total)
        x = x if total is None else products.apply(total, x)
    return x


def segments(steps: Sequence[Step], eps: float) -> list[Sequence[Step]]:
    """Runs of steps between two formations of the Gram matrix.

    Args:
        steps: Of a set.
        eps: Machine epsilon of the products' dtype.
    """
    result: list[list[Step]] = []
    noise = math.inf
    for step in steps:
        if noise > LARGEST_NOISE:
            result.append([])
            noise = eps
        result[-1].append(step)
        noise *= step[0] ** 2
    return list(result)


def product_counts(form: Form, steps: Sequence[Step], *, eps: float) -> tuple[int, int, int]:
    """Numbers of matrix products that an iteration consists of.

    Args:
        form: Which.
        steps: Of a set.
        eps: Machine epsilon of the products' dtype; the Gram form's restarts depend on it.

    Returns:
        (Gram matrices X Xᵀ, products Z X, products of two symmetric k x k matrices).
    """
    own = sum(len(step) // 2 for step in steps)  # R², and R²(...) of a step of degree nine
    if form == "newton-schulz":
        return len(steps), len(steps), own
    count = len(segments(steps, eps))
    # Z Q in all steps of a segment but its first, R Z and (R Z) Z in all but its last
    return count, count, own + 3 * (len(steps) - count)


def _factor(step: Step, gram: Tensor, square: Tensor | None, products: Products[X]) -> Tensor:
    """Z - a I of a step, from R and, if it is there already, R²: in half precision, a does not fit beside the rest."""
    _, b, c, *more = step
    if not more and square is None:
        return products.product(gram, gram, alpha=c, plus=gram, beta=b)
    square = products.product(gram, gram) if square is None else square
    if not more:
        return torch.mul(square, c).add_(gram, alpha=b)
    d, e = more
    inner = products.add_to_diagonal(torch.mul(square, e).add_(gram, alpha=d), c)
    return products.product(square, inner, plus=gram, beta=b)


def _normalise(gram: Tensor, products: Products[X]) -> tuple[Tensor, Tensor]:
    """Divide R as if X had been divided by its Schatten 8-norm, (‖R²‖_F)^(1/4).

    Returns:
        What X is still to be multiplied with, one number for each matrix in float32 or wider, 1 for a zero matrix; and
        R².
    """
    first = _inverse(products.frobenius_norm(gram))  # so that R² stays in the range of float16
    products.multiply(gram, first)
    square = products.product(gram, gram)
    second = _inverse(products.frobenius_norm(square).sqrt())
    products.multiply(gram, second)
    products.multiply(square, second.square())
    return (first * second).sqrt(), square


def _inverse(bound: Tensor) -> Tensor:
    return 1 / torch.where(bound == 0, 1.0, bound)
