"""The quadratic surrogate of one layer's loss in three matrices, and the directions that minimise it.

For a layer y = W z with inputs Z = [z_1 ... z_N], a step W -> W - Q changes the loss by about

    J(Q) = -tr(Q Gᵀ) + tr(H Q K Qᵀ) / 2,    G gradient (m, n),    H output curvature (m, m),    K = Z Zᵀ / N (n, n)

if every token has the same output curvature H. Directions are what one *subtracts*. Everything is in float64;
msgn(X) = U Vᵀ over the nonzero singular values of X = U S Vᵀ.

Source:
    Du and Su, "The Newton-Muon optimizer", arXiv:2604.01472, eq. 1-4, Prop. 1 and 3, Theorem 1.
"""

import torch
from torch import Tensor

from steepest.linalg import polar
from steepest.linalg.spd import damped_power, ridge_unit


def surrogate(direction: Tensor, gradient: Tensor, curvature: Tensor, moment: Tensor) -> Tensor:
    """J(Q), the modelled change of the loss by the step -Q.

    Args:
        direction: Q (*batch, m, n), units of weight.
        gradient: G (*batch, m, n), loss per weight.
        curvature: H (*batch, m, m), symmetric, loss per squared output.
        moment: K (*batch, n, n), symmetric, squared inputs; H Q K has the units of G.

    Returns:
        (*batch,), units of the loss.

    Source:
        arXiv:2604.01472, eq. 2.
    """
    q, g, h, k = (part.double() for part in (direction, gradient, curvature, moment))
    return ((h @ q @ k / 2 - g) * q).sum((-2, -1))


def newton_step(gradient: Tensor, curvature: Tensor, moment: Tensor) -> Tensor:
    """H⁻¹ G K⁻¹, the minimiser of J.

    Args:
        gradient: G (*batch, m, n).
        curvature: H (*batch, m, m), positive definite.
        moment: K (*batch, n, n), positive definite.

    Returns:
        (*batch, m, n), units of weight.

    Raises:
        ValueError: If H or K is not positive definite in float64.
    """
    return preconditioned(preconditioned(gradient, moment).mT, curvature, what="curvature").mT


def minimiser(gradient: Tensor, moment: Tensor, *, factor: Tensor | None = None) -> Tensor:
    """M msgn(Mᵀ G K⁻¹): the minimiser of J without knowing H, from a second moment M Mᵀ of W - W*.

    At a minimum W* nearby, G = H (W - W*) K, so that G K⁻¹ = H D with the displacement D = W - W*. If M Mᵀ = D Dᵀ,
    then M = D O for a matrix O with orthonormal rows on the range of M, and Mᵀ H D = Oᵀ (Dᵀ H D): msgn sends the
    positive definite bracket to the identity, and what is left is D itself, Newton's step.

    Args:
        gradient: G (*batch, m, n), any scale: the result does not depend on it.
        moment: K (*batch, n, n), positive definite, any scale.
        factor: M (*batch, m, p), any factor of the displacement's second moment, such as `displacement_root`; None
            for the identity, which is Newton-Muon's proxy for what nobody knows.

    Returns:
        (*batch, m, n); in units of `factor`.

    Raises:
        ValueError: If K is not positive definite in float64.

    Source:
        arXiv:2604.01472, Prop. 1 (M a symmetric root), Prop. 3 (any M), Theorem 1 (M = I).
    """
    newton = preconditioned(gradient, moment)
    if factor is None:
        return polar(newton, method="svd")
    m = factor.double()
    return m @ polar(m.mT @ newton, method="svd")


def displacement_root(displacement: Tensor) -> Tensor:
    """The symmetric root of (W - W*)(W - W*)ᵀ, for `minimiser`.

    Args:
        displacement: W - W* (*batch, m, n).

    Returns:
        (*batch, m, m), of the rank of the displacement.
    """
    u, s, _ = torch.linalg.svd(displacement.double(), full_matrices=False)
    return (u * s.unsqueeze(-2)) @ u.mT


def muon_direction(gradient: Tensor, moment: Tensor, *, inner: float, outer: float = 0.0, ridge: float = 0.0) -> Tensor:
    """msgn(G K⁻ᵃ) K⁻ᵇ: (a, b) = (0, 0) is Muon, (1, 0) Newton-Muon, (1/2, 1/2) whitened Muon.

    Under a change of input coordinates z -> A z the weights become W A⁻¹, G becomes G Aᵀ and K becomes A K Aᵀ. Without
    a ridge, whitened Muon then takes the same step whatever the invertible A; the others only for orthogonal A,
    although before msgn Newton-Muon's G K⁻¹ becomes G K⁻¹ A⁻¹ for any A.

    Args:
        gradient: G (*batch, m, n).
        moment: K (*batch, n, n).
        inner: a.
        outer: b.
        ridge: Added to K, as a multiple of tr(K) / n.

    Returns:
        (*batch, m, n).

    Raises:
        ValueError: If K with its ridge is not positive definite in float64.

    Source:
        arXiv:2604.01472, Algorithm 1, for (1, 0); whitened Muon is steepest descent in the norm ‖Q K^(1/2)‖₂.
    """
    sign = polar(preconditioned(gradient, moment, power=inner, ridge=ridge), method="svd")
    return preconditioned(sign, moment, power=outer, ridge=ridge)


def preconditioned(
    gradient: Tensor, moment: Tensor, *, power: float = 1.0, ridge: float = 0.0, what: str = "moment"
) -> Tensor:
    """G (K + γ I)⁻ᵖ with γ = ridge tr(K) / n.

    Args:
        gradient: G (*batch, m, n).
        moment: K (*batch, n, n), symmetric.
        power: p; 0 gives G back.
        ridge: Relative to the mean of the eigenvalues, at least 0.
        what: What to call K in the error.

    Returns:
        (*batch, m, n).

    Raises:
        ValueError: If K + γ I is not positive definite in float64.
    """
    g, k = gradient.double(), moment.double()
    if power == 0:
        return g
    batch = k.reshape(-1, *k.shape[-2:])
    inverse = damped_power(batch, ridge * ridge_unit(batch), power, attempts=1)
    if not bool(inverse.ok.all()):
        raise ValueError(
            f"The {what} {tuple(moment.shape)} with a ridge of {ridge:g} times its mean eigenvalue is not positive "
            "definite in float64. Take more tokens than inputs, or a larger ridge."
        )
    return g @ inverse.power.reshape(k.shape)
