"""Times taken in turns: whatever slows a machine down for a while then slows everybody, and drops out of ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    def columns(self, name: str) -> dict[str, float]:
        """The median under a name, the quartiles beside it."""
        return {name: self.median, f"{name}_low": self.low, f"{name}_high": self.high}

    def span(self, form: str) -> str:
        """From quartile to quartile, as numbers are formatted."""
        return f"{self.low:{form}} to {self.high:{form}}"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of at least two values; those between two of them are interpolated."""
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios within each round, never a ratio of medians."""
    return quartiles([own / base for own, base in zip(times, baseline, strict=True)])


def order(names: Sequence[str], index: int) -> list[str]:
    """Who goes when in a round: another starts each time, and every second cycle runs backwards."""
    shift = index % len(names)
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if index // len(names) % 2 else turned


def take_turns(works: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Run everything once per round.

    Args:
        works: Each does its work and returns the seconds it took.
        rounds: That count.
        warm_up: Rounds before those.

    Returns:
        Seconds of each, by round.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for index in range(-warm_up, rounds):
        for name in order(names, index + warm_up):
            seconds = works[name]()
            if index >= 0:
                times[name].append(seconds)
    return times
