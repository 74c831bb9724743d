"""Design of coefficient sets, and their description."""

from collections.abc import Sequence
from typing import cast

from steepest.linalg.coefficients import SLACK, Coefficients, Normaliser, get_coefficients
from steepest.linalg.odd_polynomial import Step, best_fit, divided, image, times, value

# The best fits' limits as their interval shrinks to 1: what the binomial series of u^(-1/2) gives.
_LIMITS: dict[int, Step] = {
    5: (1.875, -1.25, 0.375),
    9: (315 / 128, -420 / 128, 378 / 128, -180 / 128, 35 / 128),
}
# Intervals so narrow that the fit is the limit to the precision of float64.
_CONVERGED = {5: 5e-6, 9: 5e-4}


def minimax(
    lower: float,
    steps: int,
    *,
    degree: int = 5,
    norm: Normaliser = "frobenius",
    cushion: float = 0.02407327424182761,
    safety: float = 1.01,
) -> Coefficients:
    """Design odd polynomials whose composition is closest to 1 on [lower, 1], step by step.

    Each step is the odd polynomial with the smallest largest error |1 - p(x)| on the interval that the steps before it
    reach, found by the exchange method: the error takes its extreme value with alternating sign at one point more than
    there are coefficients.

    Args:
        lower: Smallest singular value (relative to the norm) that must be mapped near 1, in (0, 1).
        steps: Number of polynomials.
        degree: Of each, 5 or 9. A step of degree nine costs one product of the short side more.
        norm: What matrices are divided by before.
        cushion: Lower ends below `cushion` times the upper end are raised to it before fitting, and the polynomial is
            then re-centred; keeps p(x)/x away from zero (arXiv:2505.16932, section 4.4).
        safety: Every step but the last of a converged run divides its argument by this, so that rounding cannot push a
            singular value out of the interval the step was fitted on.

    Returns:
        A certified set named after its parameters.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Amsel, Persson, Musco and Gower, "The Polar Express", arXiv:2505.16932, Algorithm 1 and Theorem 4.1.
    """
    if not 0 < lower < 1:
        raise ValueError(f"minimax takes lower in (0, 1), got {lower}.")
    if not isinstance(cast(object, steps), int) or steps < 1:
        raise ValueError(f"minimax takes a whole number of steps, at least one, got steps={steps}.")
    if degree not in _LIMITS:
        raise ValueError(f"minimax takes degree=5 or 9, got {degree}.")
    if not 0 <= cushion < 1 or not 1 <= safety < 2:
        raise ValueError(f"minimax takes cushion in [0, 1) and safety in [1, 2), got {cushion} and {safety}.")
    low, high, designed = lower, 1.0, []
    for _ in range(steps):
        start = max(low, cushion * high)
        converged = start >= high * (1 - _CONVERGED[degree])
        raw = _LIMITS[degree] if converged else best_fit(start, high, (degree + 1) // 2)
        step = times(raw, 2 / (value(raw, low) + value(raw, high)))
        low = value(step, low)
        high = 2 - low
        designed.append(divided(step, 1.0 if converged else safety))
    shape = f"lower={lower:g}, steps={steps}" + (f", degree={degree}" if degree != 5 else "")
    shape += f", norm={norm}" if norm != "frobenius" else ""
    return Coefficients(
        name=f"minimax({shape}, cushion={cushion:g}, safety={safety:g})",
        steps=tuple(designed),
        source="arXiv:2505.16932, Algorithm 1",
        norm=norm,
    )


def describe(coefficients: str | Coefficients | Sequence[Sequence[float]], *, lower: float = 1e-3) -> str:
    """Tabulate a set: each step's numbers, the image of [lower, 1] after it, and the certificate.

    Args:
        coefficients: As for `get_coefficients`.
        lower: Lower end of the mapped interval, in (0, 1].

    Returns:
        Text for a terminal.

    Examples:
        >>> print(describe("polar_express"))
        polar_express: arXiv:2505.16932, appendix G (lower 1e-3, cushion 0.024), safety 1.01
        step          a          b          c   image of [0.001, 1]
           1     8.2052   -22.9019    16.4607   [0.0082, 1.9917]
           2     4.0664    -2.8612     0.5184   [0.0334, 1.9660]
           3     3.9096    -2.8234     0.5250   [0.1303, 1.8657]
           4     3.2856    -2.4153     0.4853   [0.4229, 1.5604]
           5     2.2779    -1.6198     0.3985   [0.8462, 1.1236]
        slope at 0: 976.3; smallest p(x)/x on (0, 1.01], rounding included: 0.114; safe: yes
    """
    chosen = get_coefficients(coefficients)
    rows = [f"{chosen.name}: {chosen.source}"]
    terms = max(map(len, chosen.steps))
    rows.append(f"{'step':>4} " + " ".join(f"{name:>10}" for name in "abcde"[:terms]) + f"   image of [{lower:g}, 1]")
    low, high = lower, 1.0
    for index, step in enumerate(chosen.steps, start=1):
        low, high = image(step, low, high)
        numbers = " ".join(f"{number:>10.4f}" for number in step) + " " * 11 * (terms - len(step))
        rows.append(f"{index:>4} {numbers}   [{low:.4f}, {high:.4f}]")
    seal = chosen.certify(lower)
    rows.append(
        f"slope at 0: {seal.slope:.4g}; smallest p(x)/x on (0, {1 + SLACK:g}], rounding included: "
        f"{seal.smallest_gain:.3g}; safe: {'yes' if seal.safe else 'no'}"
    )
    return "\n".join(rows)
