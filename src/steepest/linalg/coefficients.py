"""Polynomials that drive singular values to one, each with its source and a computed certificate.

A set is a list of odd polynomials, quintics p(x) = a x + b x³ + c x⁵ or of degree nine, applied in turn to the singular
values of a matrix that was divided by a norm, so that the largest is at most 1. What a set does to the interval [l, 1]
is not a matter of opinion: a polynomial's extremes are roots of another, so images of intervals are computed here, not
sampled.
"""

import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from steepest.checks import check_fields, choice, instance, number, refusal, shown
from steepest.linalg.odd_polynomial import Step, divided, image, smallest_gain

# What a matrix is divided by: ‖X‖_F, or its Schatten 8-norm (Σ s⁸)^(1/8) = ‖(X Xᵀ)²‖_F^(1/4), which costs nothing more
# where (X Xᵀ)² is computed anyway, is also at least the largest singular value, and seldom far above it.
Normaliser = Literal["frobenius", "schatten8"]
"""The norm that a matrix is divided by before the first step."""

TERMS = (3, 5)  # of a quintic, and of a polynomial of degree nine

# Either norm puts the largest singular value at 1 for a rank-one matrix. Rounding the normalised matrix to bfloat16
# moves it by at most 2^-8 (relative, in the Frobenius norm); the rest covers the norm's own rounding.
SLACK = 0.01
# Each step's three or four bfloat16 products may enlarge a singular value by about this much.
ROUNDING = 2.0**-7
# Sets in use stay below 2 in every step; a set whose worst case passes this is on its way to overflow.
LARGEST_PEAK = 4.0


@dataclass(frozen=True)
class Certificate:
    """What a set of coefficients does to singular values, computed from the extremes of each step.

    Attributes:
        lower: Lower end l of the interval that was mapped.
        image: Smallest and largest image of [l, 1], exact arithmetic.
        slope: Derivative of the whole map at 0: how much the smallest singular values grow.
        peak: Largest value any step can produce from (0, 1 + SLACK], each step enlarged by ROUNDING.
        smallest_gain: Smallest p(x)/x of any step on its reachable interval. Negative or zero means that a
            singular direction can change sign, and a step along it would climb.
        cancellation: Largest (|a| + |b x²| + |c x⁴| + ...) / (p(x)/x) of any step on its reachable interval, on a
            fine grid: by how much rounding errors of the terms are larger than those of their sum.
    """

    lower: float
    image: tuple[float, float]
    slope: float
    peak: float
    smallest_gain: float
    cancellation: float

    @property
    def safe(self) -> bool:
        """Whether every singular value in (0, 1 + SLACK] stays positive and bounded, rounding included."""
        return self.smallest_gain > 0 and self.peak <= LARGEST_PEAK

    def bears(self, dtype: torch.dtype) -> bool:
        """Whether the terms of each step, rounded to a dtype, still add up to something positive.

        Args:
            dtype: Of the products.
        """
        return self.cancellation * torch.finfo(dtype).eps / 2 < 1


def check_steps(name: str, value: object) -> tuple[Step, ...]:
    """Check of the polynomials of a set: a sequence of (a, b, c) or (a, b, c, d, e), finite numbers.

    Args:
        name: Of the option.
        value: What was given.

    Returns:
        Tuples of plain numbers.
    """
    expected = "a name, a Coefficients or a sequence of (a, b, c) or (a, b, c, d, e)"
    if name.endswith("steps"):
        expected = "a sequence of (a, b, c) or (a, b, c, d, e)"
    if not _iterable(value):
        raise TypeError(refusal(name, expected, value))
    one = number(-math.inf)
    found: list[Step] = []
    for step in cast(Iterable[object], value):
        if not _iterable(step):
            raise TypeError(refusal(name, expected, value))
        numbers = list(cast(Iterable[object], step))
        try:
            found.append(tuple(one(name, entry) for entry in numbers))
        except (TypeError, ValueError) as error:
            remedy = f"The step {shown(step)} must be three finite numbers, or five: each step is three finite numbers."
            raise type(error)(refusal(name, expected, value, remedy)) from error
        if len(numbers) not in TERMS:
            remedy = f"Each step is three finite numbers (a, b, c), or five (a, b, c, d, e), not {shown(step)}."
            raise ValueError(refusal(name, expected, value, remedy))
    if not found:
        raise ValueError(refusal(name, expected, value, "It has no steps; give at least one (a, b, c)."))
    return tuple(found)


def _iterable(value: object) -> bool:
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        return False
    return not (isinstance(value, Tensor) and value.ndim == 0)


@dataclass(frozen=True)
class Coefficients:
    """A named sequence of odd polynomials x -> a x + b x³ + c x⁵ (+ d x⁷ + e x⁹), applied in turn.

    Args:
        name: How users ask for the set.
        steps: One (a, b, c) or (a, b, c, d, e) per step.
        source: Where the numbers come from.
        norm: What a matrix is divided by first: "frobenius" or "schatten8".

    Raises:
        ValueError: If there is no step, a number is not finite, the norm is unknown, or the set is not safe: it can
            flip the sign of a singular value in (0, 1 + SLACK], or enlarge it beyond LARGEST_PEAK.
    """

    name: str
    steps: tuple[Step, ...]
    source: str
    norm: Normaliser = "frobenius"

    def __post_init__(self) -> None:
        text = instance(str, "a text")
        check_fields(self, {"name": text, "source": text, "norm": choice(get_args(Normaliser)), "steps": check_steps})
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
        for step in self.steps:
            square, gain = x * x, 0.0 * x
            for coefficient in reversed(step):
                gain = gain * square + coefficient
            x = x * gain
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
            low, high = image(step, low, high)
        slope = math.prod(step[0] for step in self.steps)
        gain, reach, peak, cancellation = math.inf, 1.0 + SLACK, 0.0, 0.0
        for step in self.steps:
            gain = min(gain, smallest_gain(step, reach))
            cancellation = max(cancellation, _cancellation(step, reach))
            reach = image(step, 0.0, reach)[1] * (1 + ROUNDING)
            peak = max(peak, reach)
        return Certificate(lower, (low, high), slope, peak, gain, cancellation)


def _cancellation(step: Step, high: float) -> float:
    squares = torch.linspace(0, high * high, 4001, dtype=torch.float64, device="cpu")
    powers = torch.stack([squares**index for index in range(len(step))])
    numbers = torch.tensor(step, dtype=torch.float64, device="cpu")
    sums = numbers @ powers
    return float((numbers.abs() @ powers / torch.where(sums > 0, sums, 0.0)).max())


def _with_safety(steps: Iterable[Step], factor: float) -> tuple[Step, ...]:
    return tuple(divided(step, factor) for step in steps)


_JORDAN: Step = (3.4445, -4.7750, 2.0315)
_CUBIC: Step = (2.0, -1.5, 0.5)
# minimax(1e-3, 5, safety=1), as printed in arXiv:2505.16932, appendix G
_POLAR_EXPRESS: tuple[Step, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SPEEDRUN: tuple[Step, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_CANS: tuple[Step, ...] = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
# minimax(2.5e-3, 3, degree=9, norm="schatten8")
_NONIC: tuple[Step, ...] = (
    (14.16596460205251, -126.6341695368691, 404.28424283225826, -504.1138909219407, 213.6807066041463),
    (6.485643710860185, -15.026984723586338, 12.434311891773154, -4.018626187240139, 0.44149751149682903),
    (3.9008284569228437, -7.770215841888038, 6.949685233633108, -2.5907970226993577, 0.33737127162587016),
)
DEFAULT = "polar_express"  # needs fewer steps than nonic: results/coefficients
_PAPER = "arXiv:2505.16932, appendix G (lower 1e-3, cushion 0.024)"

COEFFICIENTS: dict[str, Coefficients] = {
    entry.name: entry
    for entry in (
        Coefficients("nonic", _NONIC, "minimax(2.5e-3, 3, degree=9, norm='schatten8'), ours", "schatten8"),
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
            (divided(_SPEEDRUN[0], 1.02), *_SPEEDRUN[1:]),
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
"""The sets that have a name, by that name."""


def get_coefficients(
    coefficients: str | Coefficients | Sequence[Sequence[float]], dtype: torch.dtype = torch.float32
) -> Coefficients:
    """Turn an option value into a certified set.

    Args:
        coefficients: "auto" for `DEFAULT`; a name in `COEFFICIENTS`; a `Coefficients`; or a sequence of (a, b, c) or
            (a, b, c, d, e), for matrices divided by their Frobenius norm.
        dtype: Of the products.

    Returns:
        The set.

    Raises:
        ValueError: If the name is not known, the numbers do not pass the certificate, or they need products in a
            wider type.
        TypeError: If it is none of the three.
    """
    if isinstance(coefficients, str):
        choice(("auto", *COEFFICIENTS))("coefficients", coefficients)
        chosen = COEFFICIENTS[DEFAULT if coefficients == "auto" else coefficients]
    elif isinstance(coefficients, Coefficients):
        chosen = coefficients
    else:
        chosen = _custom(check_steps("coefficients", coefficients))
    if not bears(chosen, dtype):
        raise ValueError(
            f"Coefficients {chosen.name!r} need products in a wider type than {dtype}: their terms are up to "
            f"{chosen.certify().cancellation:.3g} times as large as their sum, whose sign rounding could turn. Use "
            f"{DEFAULT!r}, or dtype=torch.float32."
        )
    return chosen


@functools.cache
def _custom(steps: tuple[Step, ...]) -> Coefficients:
    return Coefficients("custom", steps, "given by the caller")


@functools.cache
def bears(chosen: Coefficients, dtype: torch.dtype) -> bool:
    """Whether products in this dtype do for a set; computed once for each."""
    return chosen.certify().bears(dtype)


def overshoot(
    coefficients: str | Coefficients | Sequence[Sequence[float]] | None, dtype: torch.dtype = torch.float32
) -> float:
    """κ, the largest singular value that a polynomial in place of the polar factor can produce.

    Exact arithmetic; products in bfloat16 add up to 2%.

    Args:
        coefficients: As for `get_coefficients`; None for the exact polar factor.
        dtype: Of the products.

    Returns:
        The supremum of the map over (0, 1], but at least 1; 1 for the exact factor.

    Examples:
        >>> round(overshoot("jordan"), 4), overshoot(None)
        (1.2024, 1.0)
    """
    if coefficients is None:
        return 1.0
    return max(1.0, get_coefficients(coefficients, dtype).certify(sys.float_info.min).image[1])
