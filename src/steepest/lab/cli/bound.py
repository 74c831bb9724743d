"""`steepest critical-batch bound`: what the convergence bounds say about batch size, and weight decay about weights."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, cast

from steepest.lab.cli.command import Arg, Command
from steepest.lab.cli.options import AsJson, Count, Number, checking_usage
from steepest.lab.cli.outcome import DONE, print_json
from steepest.lab.errors import UsageError

if TYPE_CHECKING:
    from steepest.batch_size.ball import Ball
    from steepest.batch_size.bounds import Bound, Critical, Problem, Setting

Row = tuple[str, str, str]  # of the table: name, value, unit
Scale = Literal["original", "match_rms_adamw", "spectral", "none"]  # a test compares them with the library's rules
NOTE = (
    "An upper bound for exact polar factors, ours in the spirit of arXiv:2507.01598v5. "
    "Its b* need not be near the measured one."
)


class Found(NamedTuple):
    """All answers; the bound and its batch sizes are missing where there is no bound."""

    setting: Setting
    problem: Problem
    ball: Ball
    bound: Bound | None
    critical: Critical | None
    refusal: str


class BoundCommand(Command, AsJson):
    r"""Evaluate the convergence bound of Muon: batch sizes, steps, and the ball of weight decay.

    examples:
      steepest critical-batch bound --m 8 --n 16 --L 4.4 --nu 32 --lr 0.002 --momentum 0.9 \
        --eps 2 --gap 1.4 --gradient 3.3
      steepest critical-batch bound --m 64 --n 64 --L 10 --sigma 1 --rank 8 --lr 1e-3 --wd 0.1 \
        --eps 2 --gap 1 --gradient 5
    """

    m: Annotated[Count, Arg("rows of the weight, fan-out")]
    n: Annotated[Count, Arg("columns, fan-in")]
    L: Annotated[Number, Arg("smoothness, spectral to nuclear norm; loss/weight^2")]
    nu: Annotated[Number | None, Arg("noise of one sample in the nuclear norm; loss/weight", one_of="noise")] = None
    sigma: Annotated[
        Number | None, Arg("root mean square of its Frobenius norm; nu = sqrt(rank) sigma", one_of="noise")
    ] = None
    rank: Annotated[Number | None, Arg("of the noise, for --sigma; default: min(m, n), the worst case")] = None
    lr: Annotated[Number, Arg("learning rate")]
    momentum: Annotated[Number, Arg()] = 0.95
    nesterov: Annotated[bool, Arg("default: on")] = True
    wd: Annotated[Number, Arg("decoupled weight decay")] = 0.0
    scale: Annotated[Scale, Arg("of the step")] = "original"
    coefficients: Annotated[str, Arg("for the ball; default: %(default)s; or exact")] = "polar_express"
    star_convex: Annotated[bool, Arg("with --wd: bound the loss in place of the gap")] = False
    eps: Annotated[Number, Arg("target, in units of what is bounded")]
    gap: Annotated[Number, Arg("loss at the start above its infimum")]
    gradient: Annotated[Number, Arg("nuclear norm of the first gradient; loss/weight")]
    batch: Annotated[tuple[Count, ...], Arg("batch sizes to evaluate K at", "B")] = ()

    def run(self) -> int:
        """Evaluate it and print every answer."""
        with checking_usage():
            found = _find(self)
        batches = _batches(self, found)
        if self.json:
            return print_json(_content(self, found, batches))
        rows = [*_bound_rows(self, found), *_batch_rows(found, batches), *_ball_rows(self, found)]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for name, value, unit in rows:
            print(f"{name:<{widths[0]}}  {value:>{widths[1]}}  {unit}".rstrip())
        for line in (found.refusal, f"Regime: {found.ball.sentence}.", NOTE):
            if line:
                print(line)
        return DONE


def _find(options: BoundCommand) -> Found:
    from steepest.batch_size.ball import Ball
    from steepest.batch_size.bounds import Problem, Setting, bound
    from steepest.batch_size.ranks import noise_of_variance
    from steepest.geometry import scale_factor
    from steepest.linalg import overshoot

    if options.rank is not None and options.sigma is None:
        raise UsageError("--rank turns --sigma into --nu; leave it out with --nu")
    shortest = min(options.m, options.n)
    rank = shortest if options.rank is None else options.rank
    if rank > shortest:
        raise UsageError(f"--rank {rank:g} is above min(m, n) = {shortest}, the largest rank of the weight's shape")
    nu = cast("float", options.nu) if options.sigma is None else noise_of_variance(options.sigma, rank)
    problem = Problem(smoothness=options.L, noise=nu, gap=options.gap, gradient=options.gradient)
    scale = scale_factor(options.scale, options.m, options.n)
    setting = Setting(options.lr, options.momentum, options.nesterov, options.wd, scale)
    kappa = overshoot(None if options.coefficients == "exact" else options.coefficients)
    ball = Ball(lr=options.lr, weight_decay=options.wd, scale=scale, overshoot=kappa)
    if ball.regime in ("bounded", "may diverge"):
        refusal = f"No bound: it needs lr * weight_decay <= 1, got {options.lr * options.wd:.3g}."
        return Found(setting, problem, ball, None, None, refusal)
    chosen = bound(setting, problem, star_convex=options.star_convex)
    critical = chosen.critical(options.eps)
    refusal = "" if critical.status == "reachable" else f"No batch size: {critical.text}"
    return Found(setting, problem, ball, chosen, critical, refusal)


def _batches(options: BoundCommand, found: Found) -> list[tuple[int, float, float]]:
    """Batch size, K and SFO at the sizes asked for; infinite below b_min."""
    if found.bound is None or found.critical is None or found.critical.status != "reachable":
        return []
    curve = found.bound.curve(options.eps)
    return [(batch, curve.steps(batch), batch * curve.steps(batch)) for batch in options.batch]


def _bound_rows(options: BoundCommand, found: Found) -> list[Row]:
    if found.bound is None or found.critical is None:
        return []
    bound, critical = found.bound, found.critical
    unit = "loss" if bound.measure == "suboptimality" else "loss/weight"
    form = "X exp(-lr wd T) + Y/sqrt(b) + Z" if bound.shape == "geometric" else "X/T + Y/sqrt(b) + Z"
    measured = {
        "gradient": "mean nuclear norm of the gradient",
        "gap": "mean Frank-Wolfe gap",
        "suboptimality": "loss above its infimum after T steps",
    }[bound.measure]
    rows = [
        ("bound", form, f"on the {measured}, {unit}"),
        ("X", _number(bound.X), unit if bound.shape == "geometric" else f"{unit} * steps"),
        ("Y", _number(bound.Y), f"{unit} * sqrt(samples)"),
        ("Z", _number(bound.Z), f"{unit}; falls with lr only"),
        ("target", _number(options.eps), unit),
    ]
    if critical.least is None or critical.best is None or critical.steps is None or critical.sfo is None:
        return rows
    if critical.best < 1:  # the formula knows no whole samples
        unit = "samples; the formula's minimum is below a batch of one"
        steps = bound.steps(options.eps, 1)
        return [*rows, ("b*", "1", unit), ("K(1)", _number(steps), "steps, and gradients of samples")]
    return [
        *rows,
        ("b_min", _number(critical.least), "samples; not reached at or below it"),
        ("b*", _number(critical.best), "samples; where b K(b) of the bound is smallest"),
        ("K(b*)", _number(critical.steps), "steps"),
        ("SFO(b*)", _number(critical.sfo), "gradients of samples, b K(b)"),
    ]


def _batch_rows(found: Found, batches: list[tuple[int, float, float]]) -> list[Row]:
    rows: list[Row] = []
    for batch, steps, sfo in batches:
        if math.isinf(steps):
            rows.append((f"SFO({batch})", "never", "b is not above b_min"))
        else:
            rows.append((f"SFO({batch})", _number(sfo), f"gradients of samples in {_number(steps)} steps"))
    return rows


def _ball_rows(options: BoundCommand, found: Found) -> list[Row]:
    ball = found.ball
    rows = [
        ("nu", _number(found.problem.noise), "loss/weight, noise of one sample"),
        ("scale c", _number(ball.scale), f"{options.scale}, {options.m} x {options.n}"),
        ("overshoot", f"{ball.overshoot:.4f}", options.coefficients),
    ]
    if ball.regime == "no decay":
        return rows
    rows.append(("ball radius", _number(ball.radius), "weight, spectral norm"))
    if ball.regime == "bounded":
        rows.append(("limit", _number(ball.limit), "weight, spectral norm, for many steps"))
    if math.isfinite(ball.limit):
        gradient = ball.gradient(found.problem.smoothness, minimiser=ball.limit)
        rows.append(("gradient <=", _number(gradient), "loss/weight, if start and a minimiser are no larger than that"))
    return rows


def _content(options: BoundCommand, found: Found, batches: list[tuple[int, float, float]]) -> dict[str, object]:
    ball, critical = found.ball, found.critical
    return {
        "setting": dataclasses.asdict(found.setting),
        "problem": dataclasses.asdict(found.problem),
        "bound": None if found.bound is None else dataclasses.asdict(found.bound),
        "critical": None if critical is None else dataclasses.asdict(critical),
        "batches": [{"batch": batch, "steps": _finite(steps), "sfo": _finite(sfo)} for batch, steps, sfo in batches],
        "ball": {
            "regime": ball.regime,
            "radius": _finite(ball.radius),
            "limit": _finite(ball.limit),
            "overshoot": ball.overshoot,
            "scale": ball.scale,
            "largest_step": ball.step,
        },
        "shape": [options.m, options.n],
        "refusal": found.refusal or None,
        "note": NOTE,
    }


def _number(number: float) -> str:
    """Four digits that count, with commas, and with a power of ten only where it is very large or small."""
    rounded = float(f"{number:.4g}")
    return f"{rounded:,.0f}" if 1e3 <= rounded < 1e15 else f"{rounded:.4g}"


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
