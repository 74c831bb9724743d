"""How good a direction is: the decrease of a quadratic model along it after an exact line search.

Along -t Q a loss with gradient G and curvature c = <Q, H_W Q> falls by t <G, Q> - t² c / 2, at best by half of

    s(Q) = <G, Q>² / c,

which does not depend on the length of Q. Newton's direction has the largest score of all.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Status = Literal["positive", "zero curvature", "negative curvature", "zero direction"]
# a product with the Hessian is a sum of thousands of float64 terms: below this share of ‖Q‖ ‖H Q‖ its sign is noise
NOISE = 1e-12


@dataclass(frozen=True)
class Score:
    """A direction against the exact Hessian of one weight; both G and Q count with unit Frobenius norm.

    Args:
        alignment: <G, Q> / (‖G‖ ‖Q‖), from -1 to 1; 0 where either is zero.
        curvature: <Q, H_W Q> / ‖Q‖², loss per squared weight.
        gradient_norm: ‖G‖, loss per weight.
        status: The sign of the curvature. Only "positive" has a best step; with negative curvature the quadratic model
            has no minimum along the direction, and with zero curvature no finite one.
    """

    alignment: float
    curvature: float
    gradient_norm: float
    status: Status

    @property
    def value(self) -> float | None:
        """alignment² / curvature, squared weight per loss; None unless the curvature is positive."""
        return self.alignment**2 / self.curvature if self.status == "positive" else None

    @property
    def decrease(self) -> float | None:
        """Best decrease of the quadratic model along the direction, units of the loss; None without a `value`."""
        return None if self.value is None else self.gradient_norm**2 * self.value / 2


def surrogate_score(direction: Tensor, gradient: Tensor, curvature: Tensor, moment: Tensor) -> Tensor:
    """tr(Q Gᵀ)² / tr(H Q K Qᵀ), twice the best decrease of the surrogate along Q.

    Args:
        direction: Q (*batch, m, n), not zero.
        gradient: G (*batch, m, n).
        curvature: H (*batch, m, m).
        moment: K (*batch, n, n).

    Returns:
        (*batch,), units of the loss.

    Raises:
        ValueError: If the curvature along a direction is not positive.

    Source:
        arXiv:2604.01472, eq. 19.
    """
    q, g, h, k = (part.double() for part in (direction, gradient, curvature, moment))
    along = (h @ q @ k * q).sum((-2, -1))
    if not bool((along > 0).all()):
        raise ValueError(
            f"A direction has the curvature tr(H Q K Qᵀ) = {along.min().item():g} and so no best step. Give a "
            "direction that is not zero, a positive definite curvature and a positive definite moment."
        )
    return (q * g).sum((-2, -1)).square() / along


def hessian_score(direction: Tensor, gradient: Tensor, weight: Tensor) -> Score:
    """Score of a direction against the exact Hessian of the loss in one weight, by one Hessian-vector product.

    Args:
        direction: Q, shape of the weight.
        gradient: d loss / d weight, from `torch.autograd.grad(loss, weight, create_graph=True)`; its graph is kept.
        weight: The leaf, float64.

    Returns:
        The score.

    Raises:
        TypeError: If the weight is not in float64.
        ValueError: If direction or gradient has another shape than the weight, or something is not finite.

    Source:
        arXiv:2604.01472, eq. 20.
    """
    _check(direction, gradient, weight)
    q, g = direction.detach(), gradient.detach()
    q_norm, g_norm = torch.linalg.vector_norm(q).item(), torch.linalg.vector_norm(g).item()
    if q_norm == 0:
        return Score(0.0, 0.0, g_norm, "zero direction")
    q = q / q_norm
    product = torch.zeros_like(q)
    if gradient.requires_grad:  # else the loss is linear in the weight
        (product,) = torch.autograd.grad((gradient * q).sum(), weight, retain_graph=True, materialize_grads=True)
    curvature = (product * q).sum().item()
    length = torch.linalg.vector_norm(product).item()
    if not length < torch.inf:
        raise ValueError(
            "The Hessian along a direction is not finite. The loss overflows, or has no second derivative."
        )
    alignment = (g * q).sum().item() / g_norm if g_norm else 0.0
    return Score(alignment, curvature, g_norm, _status(curvature, length))


def _status(curvature: float, length: float) -> Status:
    if abs(curvature) <= NOISE * length:
        return "zero curvature"
    return "positive" if curvature > 0 else "negative curvature"


def _check(direction: Tensor, gradient: Tensor, weight: Tensor) -> None:
    if weight.dtype != torch.float64:
        raise TypeError(f"The weight is {weight.dtype}; second derivatives are taken in float64. Use model.double().")
    for name, tensor in (("direction", direction), ("gradient", gradient)):
        if tensor.shape != weight.shape:
            raise ValueError(
                f"The {name} has shape {tuple(tensor.shape)}, the weight {tuple(weight.shape)}; they must agree."
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"The {name} {tuple(tensor.shape)} is not finite. Has the run diverged?")
