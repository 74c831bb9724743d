"""Polynomials that drive singular values to one, each with its source and a computed certificate.

A set is a list of odd quintics p(x) = a x + b x³ + c x⁵ applied in turn to the singular values of a matrix whose
largest one is at most 1. What a set does to the interval [l, 1] is not a matter of opinion: a quintic's extremes
are roots of a quadratic, so images of intervals are computed here, not sampled.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from steepest.names import unknown_name

Triple = tuple[float, float, float]

# Frobenius normalisation puts the largest singular value at 1 for a rank-one matrix. Rounding the normalised matrix
# to bfloat16 moves it by at most 2^-8 (relative, in the Frobenius norm); the rest covers the norm's own rounding.
SLACK = 0.01
# Each step's three bfloat16 products may enlarge a singular value by about this much.
ROUNDING = 2.0**-7
# Sets in use stay below 2 in every step; a set whose worst case passes this is on its way to overflow.
LARGEST_PEAK = 4.0


@dataclass(frozen=True)
class Certificate:
    """What a set of coefficients does to singular values, computed from the extremes of each quintic.

    Attributes:
        lower: Lower end l of the interval that was mapped.
        image: Smallest and largest image of [l, 1], exact arithmetic.
        slope: Derivative of the whole map at 0: how much the smallest singular values grow.
        peak: Largest value any step can produce from (0, 1 + SLACK], each step enlarged by ROUNDING.
        smallest_gain: Smallest p(x)/x of any step on its reachable interval. Negative or zero means that a
            singular direction can change sign, and a step along it would climb.
    """

    lower: float
    image: tuple[float, float]
    slope: float
    peak: float
    smallest_gain: float

    @property
    def safe(self) -> bool:
        """Whether every singular value in (0, 1 + SLACK] stays positive and bounded, rounding included."""
        return self.smallest_gain > 0 and self.peak <= LARGEST_PEAK


@dataclass(frozen=True)
class Coefficients:
    """A named sequence of odd quintics x -> a x + b x³ + c x⁵, applied in turn.

    Args:
        name: How users ask for the set.
        steps: One (a, b, c) per step.
        source: Where the numbers come from.

    Raises:
        ValueError: If there is no step, a number is not finite, or the set is not safe: it can flip the sign of a
            singular value in (0, 1 + SLACK], or enlarge it beyond LARGEST_PEAK.
    """

    name: str
    steps: tuple[Triple, ...]
    source: str

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(f"Coefficients {self.name!r} has no steps; give at least one (a, b, c).")
        for step in self.steps:
            if len(step) != 3 or not all(math.isfinite(number) for number in step):
                raise ValueError(
                    f"Coefficients {self.name!r} has the step {step}; each step is three finite numbers (a, b, c)."
                )
        certificate = self.certify()
        if not certificate.safe:
            raise ValueError(
                f"Coefficients {self.name!r} are unsafe on the singular values (0, {1 + SLACK}]: the smallest p(x)/x "
                f"is {certificate.smallest_gain:.3g} (zero or less flips a direction, and the step climbs), the "
                f"largest value {certificate.peak:.3g} (at most {LARGEST_PEAK:g} is allowed). Choose a listed set, "
                "divide the argument of each step by 1.01, or design a set with minimax(lower, steps)."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map to singular values.

        Args:
            x: Any shape, singular values divided by the norm that the iteration divides by.

        Returns:
            The shape of `x`.
        """
        for a, b, c in self.steps:
            square = x * x
            x = x * (a + square * (b + c * square))
        return x

    def certify(self, lower: float = 1e-3) -> Certificate:
        """Compute the image of [lower, 1], the slope at 0, and the worst case over (0, 1 + SLACK].

        Args:
            lower: Lower end of the mapped interval, in (0, 1].

        Returns:
            The certificate.

        Raises:
            ValueError: If `lower` is not in (0, 1].
        """
        if not 0 < lower <= 1:
            raise ValueError(f"certify takes lower in (0, 1], got {lower}.")
        low, high = lower, 1.0
        for step in self.steps:
            low, high = _image(step, low, high)
        slope = math.prod(a for a, _, _ in self.steps)
        gain, reach, peak = math.inf, 1.0 + SLACK, 0.0
        for step in self.steps:
            gain = min(gain, _smallest_gain(step, reach))
            reach = _image(step, 0.0, reach)[1] * (1 + ROUNDING)
            peak = max(peak, reach)
        return Certificate(lower, (low, high), slope, peak, gain)


def _value(step: Triple, x: float) -> float:
    a, b, c = step
    return x * (a + x * x * (b + c * x * x))


def _stationary(step: Triple) -> list[float]:
    """Positive roots of p'(x) = a + 3 b x² + 5 c x⁴."""
    a, b, c = step
    if c == 0:
        squares = [-a / (3 * b)] if b != 0 else []
    else:
        discriminant = 9 * b * b - 20 * a * c
        # the root that does not cancel, and the other from the product of both
        half = -(3 * b + math.copysign(math.sqrt(max(discriminant, 0.0)), b)) / 2
        squares = [] if discriminant < 0 or half == 0 else [half / (5 * c), a / half]
    return [math.sqrt(square) for square in squares if square > 0]


def _image(step: Triple, low: float, high: float) -> tuple[float, float]:
    """Exact image of [low, high] under one quintic."""
    points = [low, high, *(x for x in _stationary(step) if low < x < high)]
    values = [_value(step, x) for x in points]
    return min(values), max(values)


def _smallest_gain(step: Triple, high: float) -> float:
    """Smallest p(x)/x = a + b u + c u² over u = x² in [0, high²]."""
    a, b, c = step
    points = [0.0, high * high]
    if c != 0 and 0 < -b / (2 * c) < high * high:
        points.append(-b / (2 * c))
    return min(a + u * (b + c * u) for u in points)


def minimax(lower: float, steps: int, *, cushion: float = 0.02407327424182761, safety: float = 1.01) -> Coefficients:
    """Design quintics whose composition is closest to 1 on [lower, 1], step by step.

    Each step is the odd quintic with the smallest largest error |1 - p(x)| on the interval that the steps before it
    reach, found by the exchange method: the error takes its extreme value with alternating sign at four points.

    Args:
        lower: Smallest singular value (relative to the norm) that must be mapped near 1, in (0, 1).
        steps: Number of quintics.
        cushion: Lower ends below `cushion` times the upper end are raised to it before fitting, and the quintic is
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
    if not 0 <= cushion < 1 or not 1 <= safety < 2:
        raise ValueError(f"minimax takes cushion in [0, 1) and safety in [1, 2), got {cushion} and {safety}.")
    low, high, designed = lower, 1.0, []
    for _ in range(steps):
        start = max(low, cushion * high)
        converged = start >= high * (1 - 5e-6)
        raw = _TAYLOR if converged else _best_quintic(start, high)
        centre = 2 / (_value(raw, low) + _value(raw, high))
        a, b, c = (number * centre for number in raw)
        low = _value((a, b, c), low)
        high = 2 - low
        designed.append(_divided((a, b, c), 1.0 if converged else safety))
    return Coefficients(
        name=f"minimax(lower={lower:g}, steps={steps}, cushion={cushion:g}, safety={safety:g})",
        steps=tuple(designed),
        source="arXiv:2505.16932, Algorithm 1",
    )


def _best_quintic(low: float, high: float) -> Triple:
    """Odd quintic closest to 1 on [low, high] in the largest error, by exchange of the two inner extremes."""
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    error, previous = math.inf, None
    coefficients: Triple = (0.0, 0.0, 0.0)
    for _ in range(100):
        points = torch.tensor([low, *inner, high], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        coefficients = (a, b, c)
        inner = sorted(_stationary(coefficients))
        if previous is not None and abs(error - previous) < 1e-15:
            break
        previous = error
    return coefficients


def _divided(step: Triple, factor: float) -> Triple:
    """The quintic x -> p(x / factor)."""
    a, b, c = step
    return (a / factor, b / factor**3, c / factor**5)


def _with_safety(steps: Iterable[Triple], factor: float) -> tuple[Triple, ...]:
    return tuple(_divided(step, factor) for step in steps)


_JORDAN: Triple = (3.4445, -4.7750, 2.0315)
_CUBIC: Triple = (2.0, -1.5, 0.5)
_TAYLOR: Triple = (1.875, -1.25, 0.375)  # the minimax quintic's limit as its interval shrinks to 1
# minimax(1e-3, 5, safety=1), as printed in arXiv:2505.16932, appendix G
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SPEEDRUN: tuple[Triple, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_CANS: tuple[Triple, ...] = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
_PAPER = "arXiv:2505.16932, appendix G (lower 1e-3, cushion 0.024)"

COEFFICIENTS: dict[str, Coefficients] = {
    entry.name: entry
    for entry in (
        Coefficients("jordan", (_JORDAN,) * 5, "https://kellerjordan.github.io/posts/muon/"),
        Coefficients(
            "quintic",
            (
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            "https://leloykun.github.io/ponder/muon-opt-coeffs/",
        ),
        Coefficients("polar_express", _with_safety(_POLAR_EXPRESS, 1.01), f"{_PAPER}, safety 1.01"),
        Coefficients(
            "polar_express_1.02",
            (_divided(_SPEEDRUN[0], 1.02), *_SPEEDRUN[1:]),
            "modded-nanogpt (safety 1.02, cushion 2; its norm's factor 1.02 is folded into the first step)",
        ),
        Coefficients("polar_express_1.05", _with_safety(_POLAR_EXPRESS, 1.05), f"{_PAPER}, safety 1.05"),
        # As published the set has no slack: a singular value that rounding lifts to 1.004 overflows in four steps.
        Coefficients(
            "cans",
            _with_safety(_CANS, 1.01),
            "Grishina, Smirnov and Rakhuba, arXiv:2506.10935; safety 1.01 is ours",
        ),
        Coefficients("deepseek_v4", (_JORDAN,) * 8 + (_CUBIC,) * 2, "DeepSeek-V4: eight fast steps, two that settle"),
        Coefficients("cubic12", (_CUBIC,) * 12, "modded-nanogpt, optimizer benchmark (track 3)"),
    )
}


def get_coefficients(coefficients: str | Coefficients | Sequence[Sequence[float]]) -> Coefficients:
    """Turn an option value into a certified set.

    Args:
        coefficients: A name in `COEFFICIENTS`, a `Coefficients`, or a sequence of (a, b, c).

    Returns:
        The set.

    Raises:
        ValueError: If the name is not known, or the numbers do not pass the certificate.
        TypeError: If it is none of the three.
    """
    if isinstance(coefficients, Coefficients):
        return coefficients
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(unknown_name("coefficients", coefficients, COEFFICIENTS))
        return COEFFICIENTS[coefficients]
    try:
        steps = tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"coefficients takes a name, a Coefficients or a sequence of (a, b, c), got {coefficients!r}."
        ) from error
    return Coefficients("custom", steps, "given by the caller")


def overshoot(coefficients: str | Coefficients | Sequence[Sequence[float]] | None) -> float:
    """κ, the largest singular value that a polynomial in place of the polar factor can produce.

    Exact arithmetic; products in bfloat16 add up to 2%.

    Args:
        coefficients: As for `get_coefficients`; None for the exact polar factor.

    Returns:
        The supremum of the map over (0, 1], but at least 1; 1 for the exact factor.

    Examples:
        >>> round(overshoot("jordan"), 4), overshoot(None)
        (1.2024, 1.0)
    """
    if coefficients is None:
        return 1.0
    return max(1.0, get_coefficients(coefficients).certify(sys.float_info.min).image[1])


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
    rows.append(f"{'step':>4} {'a':>10} {'b':>10} {'c':>10}   image of [{lower:g}, 1]")
    low, high = lower, 1.0
    for index, step in enumerate(chosen.steps, start=1):
        low, high = _image(step, low, high)
        a, b, c = step
        rows.append(f"{index:>4} {a:>10.4f} {b:>10.4f} {c:>10.4f}   [{low:.4f}, {high:.4f}]")
    seal = chosen.certify(lower)
    rows.append(
        f"slope at 0: {seal.slope:.4g}; smallest p(x)/x on (0, {1 + SLACK:g}], rounding included: "
        f"{seal.smallest_gain:.3g}; safe: {'yes' if seal.safe else 'no'}"
    )
    return "\n".join(rows)
