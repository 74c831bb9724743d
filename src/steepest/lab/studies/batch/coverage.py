"""How often intervals for critical batch sizes contain the truth.

Each replication draws steps to a target for 3 seeds at 8 batch sizes from a known curve, with log-normal noise, and
asks for 90% intervals. "known" fits the family that the data are from. "AICc" is `estimate` as it is: the family is
chosen, and the answer may be a range instead of a number; `covered` is then over the answers that are numbers, and
`contained` over all answers. In some settings the runs at the two smallest batch sizes are stopped before the target,
because they were not given enough steps ("budget"), or because no number of steps is enough ("never").
"""

import math
from dataclasses import dataclass

import numpy as np

from steepest.batch_size.curve import FAMILIES, Answer, Point, bootstrap, estimate, fit, percentiles

SEEDS, LEVEL, SCALE = 3, 0.9, 1000.0
OCTAVES = tuple(16 * 2**k for k in range(8))  # 16 to 2048
HALVES = (16, 23, 32, 45, 64, 91, 128, 181)


@dataclass(frozen=True)
class Setting:
    """A true curve and what is asked of it."""

    family: str
    parameters: tuple[float, ...]
    sizes: tuple[int, ...]
    quantity: str  # b_star or knee
    sigma: float
    selection: str = "known"
    stopped: str = "none"


@dataclass(frozen=True)
class Tally:
    """Over replications; `bias` and `width` are medians in log b over the answers that are numbers."""

    numbers: int
    covered: int
    contained: int
    bias: float
    width: float


def settings() -> list[Setting]:
    """All rows of the table."""
    curves = [
        ("H", (130.0,), OCTAVES, "knee"),
        ("S", (14.0,), HALVES, "b_star"),
        ("I", (14.0,), HALVES, "b_star"),
        ("U", (13.0, 0.5, 2.0), OCTAVES, "b_star"),
    ]
    rows = [Setting(*curve, sigma, how) for curve in curves for how in ("known", "AICc") for sigma in (0.05, 0.1)]
    low = tuple(2**k for k in range(1, 9))
    rows += [Setting("P", (26.0, 1.2), low, "b_star", sigma, "AICc") for sigma in (0.1, 0.2)]
    for how in ("known", "AICc"):
        rows.append(Setting("H", (130.0,), OCTAVES, "knee", 0.1, how, "budget"))
        rows.append(Setting("S", (40.0,), OCTAVES, "b_star", 0.1, how, "never"))
        rows.append(Setting("U", (45.0, 0.5, 2.0), OCTAVES, "b_star", 0.1, how, "never"))
    return rows


def true_value(setting: Setting) -> float:
    """b* or B_crit of the true curve."""
    theta = np.log(setting.parameters)
    return (
        setting.parameters[0] if setting.quantity == "knee" else float(np.exp(FAMILIES[setting.family].log_best(theta)))
    )


def draw(setting: Setting, rng: np.random.Generator) -> list[Point]:
    """The runs of one replication."""
    theta, sizes = np.log(setting.parameters), np.array(setting.sizes, dtype=float)
    steps = SCALE * np.exp(FAMILIES[setting.family].log_shape(theta, np.log(sizes)))
    noise = np.exp(setting.sigma * rng.standard_normal((len(sizes), SEEDS)))
    # A budget between what the second and the third smallest batch size need; a curve with a pole ends there anyway.
    budget = math.inf
    if setting.stopped == "budget":
        budget = math.sqrt(steps[1] * steps[2])
    elif setting.stopped == "never":
        budget = 10 * steps[2]
    return [
        Point(size, seed, min(steps[row] * noise[row, seed], budget), bool(steps[row] * noise[row, seed] > budget))
        for row, size in enumerate(setting.sizes)
        for seed in range(SEEDS)
    ]


def ask(setting: Setting, points: list[Point], resamples: int, seed: int) -> Answer:
    """The answer of one replication."""
    if setting.selection == "AICc":
        found = estimate(points, level=LEVEL, resamples=resamples, seed=seed)
        return found.knee if setting.quantity == "knee" else found.b_star
    fitted = fit(points, setting.family)
    refits = bootstrap(fitted, resamples=resamples, seed=seed)
    if setting.quantity == "knee":
        return Answer("point", fitted.parameters["B_crit"], *percentiles(refits.first_parameters(), LEVEL))
    return Answer("point", fitted.best_batch, *percentiles(refits.best_batches(), LEVEL))


def measure(setting: Setting, *, replications: int, resamples: int) -> Tally:
    """Replicate one setting; replication r uses seed r everywhere."""
    truth = true_value(setting)
    answers = [ask(setting, draw(setting, np.random.default_rng(r)), resamples, r) for r in range(replications)]
    numbers = [one for one in answers if one.kind == "point"]
    errors = [math.log(one.value / truth) for one in numbers if one.value]
    widths = [math.log(one.high / one.low) for one in numbers if one.low and one.high]
    return Tally(
        numbers=len(numbers),
        covered=sum(one.contains(truth) for one in numbers),
        contained=sum(one.contains(truth) for one in answers),
        bias=float(np.median(errors)) if errors else math.nan,
        width=float(np.median(widths)) if widths else math.nan,
    )


def coverage_row(setting: Setting, tally: Tally, replications: int) -> dict[str, object]:
    """One line of the table."""
    share = tally.covered / tally.numbers if tally.numbers else math.nan
    error = math.sqrt(share * (1 - share) / tally.numbers) if tally.numbers else math.nan
    return {
        "family": setting.family,
        "parameters": " ".join(f"{value:g}" for value in setting.parameters),
        "batch_sizes": f"{setting.sizes[0]}..{setting.sizes[-1]}",
        "quantity": setting.quantity,
        "truth": f"{true_value(setting):.4g}",
        "sigma": setting.sigma,
        "selection": setting.selection,
        "stopped": setting.stopped,
        "replications": replications,
        "numbers": tally.numbers,
        "covered": f"{share:.3f}",
        "standard_error": f"{error:.3f}",
        "contained": f"{tally.contained / replications:.3f}",
        "median_log_bias": f"{tally.bias:.4f}",
        "median_log_width": f"{tally.width:.4f}",
    }
