"""Upper bounds on how far Muon is from stationary after T steps of batch size b, in four settings, and their b*.

    C_t = average of the batches' gradients (weights (1 - β) β^k, from zero; with Nesterov, one more look at the newest)
    W_(t+1) = (1 - ηλ) W_t - η c polar(C_t)

**Assumed.** f is bounded below by f*, ‖∇f(X) - ∇f(Y)‖_* <= L_* ‖X - Y‖_2, noise is unbiased and independent with ν =
tr(C^(1/2)) for its covariance (see `ranks`), the polar factor is exact; with decay, ηλ <= 1 and ‖W_0‖_2 <= c / λ.

**The average's error.** ∇f(W_t) - C_t has three parts. What was missing at the start fades as β^(t+1) ‖∇f(W_0)‖_*; what
the gradient moved since is at most L_* d δ if no step is longer than δ; noise is at most s ν/√b, s² the sum of squared
weights. Nesterov multiplies the first two by β.

    without Nesterov    s² = (1-β)/(1+β)                          d = β/(1-β)
    with                s² = (1-β)/(1+β) [(1-β)(1+β)³ + β⁴]       d = β²/(1-β)

**The bounds.** The descent lemma, with <∇f, polar(C)> >= ‖∇f‖_* - 2 ‖∇f - C‖_* and δ = ηc, or 2ηc with decay:

    no decay         mean of ‖∇f(W_t)‖_*       <= X/T + Y/√b + Z    Z = L_* ηc (1/2 + 2 d)
    decay            mean of the gap 𝒢(W_t)    <= X/T + Y/√b + Z    Z = L_* ηc (2 + 4 d)
                     with X = (f(W_0) - f*)/(ηc) + 2 d ‖∇f(W_0)‖_*,  Y = 2 s ν in both
    decay and a star-convex f whose minimiser is in the ball
                     f(W_T) - f*  <= X exp(-ηλT) + Y/√b + Z
                     with X = f(W_0) - f*,  Y = 2 s ν c/λ,  Z = ηc [2 (L_* c/λ) (1 + 2 d) + 2 d ‖∇f(W_0)‖_*]

These are upper bounds. Their b* says how β and λ enter, not which batch size a measurement will find best.

Source:
    Ours, in the spirit of Sato, Naganuma and Iiduka, arXiv:2507.01598v5; shape of the star-convex bound after Cesista,
    leloykun.github.io/ponder/steepest-descent-crit-bz (2025).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from steepest.checks import check_fields, choice, flag, number


@dataclass(frozen=True)
class PowerCurve:
    """K(b) = K_∞ (1 - (b_min / b)^p)^-q.

    (p, q) = (1/2, 1): the 1/√b bound, b* = 9/4 b_min, K(b*) = 3 K_∞. (1, 1): the 1/b bound, 2 b_min, 2 K_∞. (1/2, 2):
    steps of the best length without momentum, whose gain is in proportion to (1 - √(b_min / b))²: 4 b_min, 4 K_∞.

    Args:
        limit: K_∞, steps with infinitely large batches.
        least: b_min, in samples; at and below it no number of steps is enough. 0 without noise.
        p: Exponent of b_min / b, above 0.
        q: Exponent of the bracket, above 0.
    """

    limit: float
    least: float
    p: float = 0.5
    q: float = 1.0

    @property
    def best(self) -> float:
        """b*, in samples: where b K(b) is smallest."""
        return self.least * (1 + self.p * self.q) ** (1 / self.p)

    @property
    def steps_at_best(self) -> float:
        """K(b*) = K_∞ ((1 + p q) / (p q))^q; K_∞ without noise."""
        return self.limit * (1 + 1 / (self.p * self.q)) ** self.q if self.least else self.limit

    def steps(self, batch: float) -> float:
        """K(b).

        Args:
            batch: b, in samples, above 0.

        Returns:
            Steps, not rounded; infinite at and below b_min.
        """
        if batch <= self.least:
            return math.inf
        return self.limit * (1 - (self.least / batch) ** self.p) ** -self.q


@dataclass(frozen=True)
class LogCurve:
    """K(b) = ln(X / (c - Y/√b)) / r = (ln(X / c) - ln(1 - √(b_min / b))) / r.

    With s = √(b_min / b) and v = 1 / (1 - s), b K(b) is smallest where 2 ln(X / c) + 2 ln v = v - 1; there is one such
    v above 2. In terms of Lambert's W: v = -2 W_-1(-c exp(-1/2) / (2 X)).

    Args:
        rate: r, the share of the start that a step removes.
        ratio: X / c, above 1: else the start is good enough and no step is needed.
        least: b_min = (Y / c)², in samples.
    """

    rate: float
    ratio: float
    least: float

    @property
    def best(self) -> float:
        """b*, in samples: where b K(b) is smallest."""
        constant = 1 + 2 * math.log(self.ratio)
        v = 4.0
        for _ in range(60):  # Newton on v - 2 ln v = constant, convex: from the second iterate on it falls to the root
            v -= (v - 2 * math.log(v) - constant) / (1 - 2 / v)
        return self.least * (v / (v - 1)) ** 2

    @property
    def steps_at_best(self) -> float:
        """K(b*)."""
        return self.steps(self.best) if self.least else math.log(self.ratio) / self.rate

    def steps(self, batch: float) -> float:
        """K(b).

        Args:
            batch: b, in samples, above 0.

        Returns:
            Steps, not rounded; infinite at and below b_min.
        """
        if batch <= self.least:
            return math.inf
        return (math.log(self.ratio) - math.log1p(-math.sqrt(self.least / batch))) / self.rate


Shape = Literal["1/sqrt(b)", "1/b", "geometric"]
Measure = Literal["gradient", "gap", "suboptimality"]
Status = Literal["reachable", "below the floor", "already there"]

_AT_LEAST_0, _ABOVE_0, _MOMENTUM = number(), number(above=True), number(0, 1)


@dataclass(frozen=True)
class Setting:
    """How the optimizer is set.

    Args:
        lr: η, above 0.
        momentum: β, in [0, 1).
        nesterov: Whether the newest gradient is looked at once more.
        weight_decay: λ, decoupled, at least 0.
        scale: c, the factor of the layer's steps, above 0; see `steepest.geometry.scale_factor`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If one is none.
    """

    lr: float
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        checks = {"lr": _ABOVE_0, "momentum": _MOMENTUM, "nesterov": flag, "weight_decay": _AT_LEAST_0}
        check_fields(self, {**checks, "scale": _ABOVE_0})


@dataclass(frozen=True)
class Problem:
    """What the bounds must know about the loss; only for constructed problems is all of it known.

    Args:
        smoothness: L_*, loss per weight² from the spectral norm of a change to the nuclear norm of the gradient's; at
            most min(m, n) times the usual constant in the Frobenius norm.
        noise: ν of one sample, loss per weight; see `ranks`.
        gap: f(W_0) - f*, units of the loss.
        gradient: ‖∇f(W_0)‖_*, loss per weight.

    Raises:
        ValueError: If a number is negative or not finite.
        TypeError: If one is none.
    """

    smoothness: float
    noise: float
    gap: float
    gradient: float

    def __post_init__(self) -> None:
        check_fields(self, dict.fromkeys(vars(self), _AT_LEAST_0))


@dataclass(frozen=True)
class Critical:
    """Batch sizes and steps that a bound names for a target.

    Args:
        target: ε.
        status: Whether there are any: not if ε is at or below Z, nor if the start is good enough already.
        text: The status in words, with the remedy.
        least: b_min, samples; smaller batches never get there by this bound.
        best: b*, samples: where b K(b) is smallest. Below 1: single samples are large enough.
        steps: K(b*).
        sfo: b* K(b*), samples' gradients evaluated in all.
    """

    target: float
    status: Status
    text: str
    least: float | None = None
    best: float | None = None
    steps: float | None = None
    sfo: float | None = None


@dataclass(frozen=True)
class Bound:
    """X/T + Y/√b + Z, or a shape of its kind, on a measure of how far an optimizer is from done.

    Args:
        X: What more steps remove, at least 0.
        Y: What larger batches remove, at least 0.
        Z: What neither removes, only smaller learning rates, at least 0.
        shape: "1/sqrt(b)"; "1/b": X/T + Y/b + Z; "geometric": X exp(-rate T) + Y/√b + Z.
        measure: What is bounded: the mean of "gradient" ‖∇f(W_t)‖_* or of "gap" 𝒢(W_t) over the steps, or
            "suboptimality" f(W_T) - f*. The unit of X, Y and Z is its unit; X is that times a number of steps, except
            in the geometric shape.
        rate: Of the geometric shape, in (0, 1].

    Raises:
        ValueError: If a number is out of range or the shape unknown.
        TypeError: If one is of the wrong type.
    """

    X: float
    Y: float
    Z: float
    shape: Shape = "1/sqrt(b)"
    measure: Measure = "gradient"
    rate: float = 0.0

    def __post_init__(self) -> None:
        words = {"shape": choice(get_args(Shape)), "measure": choice(get_args(Measure))}
        check_fields(self, {**dict.fromkeys(("X", "Y", "Z", "rate"), _AT_LEAST_0), **words})
        if not (0 < self.rate <= 1 if self.shape == "geometric" else self.rate == 0):
            raise ValueError(f"A bound takes a rate in (0, 1] with shape='geometric' only, got {self.rate!r}.")

    def at(self, steps: float, batch: float) -> float:
        """The bound's value.

        Args:
            steps: T, above 0.
            batch: b, samples, above 0.

        Returns:
            In units of the measure.

        Raises:
            ValueError: If T or b is not above 0.
        """
        if not (steps > 0 and batch > 0):
            raise ValueError(f"A bound takes steps and a batch size above 0, got {steps!r} and {batch!r}.")
        start = self.X * math.exp(-self.rate * steps) if self.shape == "geometric" else self.X / steps
        return start + self.Y / (batch if self.shape == "1/b" else math.sqrt(batch)) + self.Z

    def critical(self, target: float) -> Critical:
        """b_min, b*, K(b*) and b* K(b*), or why there are none.

        Args:
            target: ε, in units of the measure, above 0.

        Returns:
            A status, and numbers if it is "reachable".

        Raises:
            ValueError: If ε is not a finite number above 0.
        """
        if not 0 < target < math.inf:
            raise ValueError(f"A target must be a finite number above 0, got {target!r}.")
        room = target - self.Z
        if room <= 0:
            remedy = f"Z is in proportion to lr: lower lr to less than {target / self.Z:.3g} times its value"
            text = f"no batch size is large enough: the target {target:g} is not above Z = {self.Z:.3g}; {remedy}"
            return Critical(target, "below the floor", f"{text}, or raise the target.")
        if self.shape == "geometric" and room >= self.X:
            text = f"the bound meets {target:g} before the first step if batches are large; lower the target."
            return Critical(target, "already there", text)
        curve = self._curve(room)
        steps = curve.steps_at_best
        return Critical(target, "reachable", "reachable", curve.least, curve.best, steps, curve.best * steps)

    def curve(self, target: float) -> PowerCurve | LogCurve:
        """K(b) for a target.

        Args:
            target: ε, in units of the measure, above 0.

        Returns:
            The curve.

        Raises:
            ValueError: If the target is not "reachable" by this bound; the text says what to change.
        """
        found = self.critical(target)
        if found.status != "reachable":
            raise ValueError(f"This bound has no batch size to offer: {found.text}")
        return self._curve(target - self.Z)

    def steps(self, target: float, batch: float) -> float:
        """K(b): steps after which the bound is at the target; infinite for b at or below b_min, else as `curve`."""
        return self.curve(target).steps(batch)

    def sfo(self, target: float, batch: float) -> float:
        """b K(b): gradients of samples evaluated until the bound is at the target; errors as `curve`."""
        return batch * self.steps(target, batch)

    def best_batch(self, target: float) -> float:
        """b*, samples: where b K(b) is smallest; errors as `curve`."""
        return self.curve(target).best

    def _curve(self, room: float) -> PowerCurve | LogCurve:
        if self.shape == "1/b":
            return PowerCurve(self.X / room, self.Y / room, p=1.0)
        least = (self.Y / room) ** 2
        return (
            LogCurve(self.rate, self.X / room, least) if self.shape == "geometric" else PowerCurve(self.X / room, least)
        )


def noise_factor(momentum: float, *, nesterov: bool) -> float:
    """s: the average's noise over that of one batch, root of the sum of squared weights.

    Args:
        momentum: β, in [0, 1).
        nesterov: Whether the newest gradient is looked at once more.

    Returns:
        From 1 (β = 0) down to 0.

    Raises:
        ValueError: If β is out of range.
        TypeError: If it is no number.

    Examples:
        >>> round(noise_factor(0.9, nesterov=False) ** 2, 5), round(noise_factor(0.9, nesterov=True) ** 2, 5)
        (0.05263, 0.07063)
    """
    beta = _MOMENTUM("noise_factor: momentum", momentum)
    squared = (1 - beta) / (1 + beta)
    return math.sqrt(squared * ((1 - beta) * (1 + beta) ** 3 + beta**4) if nesterov else squared)


def lag(momentum: float, *, nesterov: bool) -> float:
    """d: how many steps the average is behind; also the sum over all steps of what its start from zero is missing.

    Args:
        momentum: β, in [0, 1).
        nesterov: Whether the newest gradient is looked at once more.

    Returns:
        β/(1-β), or β²/(1-β) with Nesterov.

    Raises:
        ValueError: If β is not in [0, 1).
        TypeError: If it is no number.
    """
    return _MOMENTUM("lag: momentum", momentum) ** (2 if nesterov else 1) / (1 - momentum)


def bound(setting: Setting, problem: Problem, *, star_convex: bool = False) -> Bound:
    """The bound of a setting: which of the four it is follows from `nesterov` and `weight_decay`.

    Args:
        setting: Of the optimizer.
        problem: The loss and its noise.
        star_convex: With decay: f is star-convex around a minimiser inside the ball, and f(W_T) - f* is bounded in
            place of the mean gap.

    Returns:
        The bound.

    Raises:
        ValueError: If lr times decay is above 1, where there is no bound, or `star_convex` comes without decay.
    """
    lr, decay = setting.lr * setting.scale, setting.weight_decay / setting.scale  # of the ball of radius c / λ
    rate = setting.lr * setting.weight_decay
    if rate > 1:
        remedy = f"lower lr to at most 1 / weight_decay = {1 / setting.weight_decay:.3g}"
        raise ValueError(f"There is no bound for lr * weight_decay = {rate:.3g} above 1; {remedy}.")
    if star_convex and not decay:
        raise ValueError("The star-convex bound needs weight_decay above 0; give one, or leave star_convex out.")
    noise = 2 * noise_factor(setting.momentum, nesterov=setting.nesterov) * problem.noise
    behind = lag(setting.momentum, nesterov=setting.nesterov)
    missing = 2 * behind * problem.gradient
    if star_convex:
        floor = lr * (2 * problem.smoothness / decay * (1 + 2 * behind) + missing)
        return Bound(problem.gap, noise / decay, floor, "geometric", "suboptimality", rate)
    start = problem.gap / lr + missing
    if decay:
        return Bound(start, noise, problem.smoothness * lr * (2 + 4 * behind), measure="gap")
    return Bound(start, noise, problem.smoothness * lr * (0.5 + 2 * behind))


def inverse_batch_noise(setting: Setting, *, sigma: float) -> float:
    """Y of the older shape X/T + Y/b + Z: [(2β+1)(1-β) + λ] σ²/2, for `Bound(X, Y, Z, shape="1/b")`.

    Earlier versions of the paper had this shape. Its Y is a squared gradient where Z is a gradient, so that b* = 2 Y/c
    depends on the unit of the loss, and what belongs in Z depended on b; kept for comparison only.

    Args:
        setting: β and λ count; lr, Nesterov and scale do not.
        sigma: σ, root of E‖ξ‖_F² for one sample, loss per weight, at least 0.

    Returns:
        Y.

    Raises:
        ValueError: If σ is negative or not finite.
        TypeError: If it is no number.

    Source:
        Cesista, leloykun.github.io/ponder/steepest-descent-crit-bz (2025, first version), after arXiv:2507.01598v3-v4.
    """
    sigma, beta = _AT_LEAST_0("inverse_batch_noise: sigma", sigma), setting.momentum
    return ((2 * beta + 1) * (1 - beta) + setting.weight_decay) * sigma**2 / 2
