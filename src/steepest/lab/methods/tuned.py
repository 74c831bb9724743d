"""The one table of tuned options: what each method runs with by default on a task and preset, and how that was found.

A preset without an entry for a method takes the options of the preset demo, without the record: they were not searched
there. A method without an entry at demo runs with the defaults of its signature in `methods.py`, chosen by hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from steepest.lab.disk.fields import Count, Text

OptionValue = bool | int | float | str


@dataclass(frozen=True)
class Tuning:
    """How the options of a method were chosen.

    Args:
        trials: Number of tried settings; None when it is not known.
        source: Where the search is recorded; None when it is not.
        edge: Whether the best setting lay at the edge of what was tried.
    """

    trials: Count | None
    source: Text | None
    edge: bool = False


@dataclass(frozen=True)
class Tuned:
    """Options that were found, where they differ from the method's signature, and the record of the search."""

    options: Mapping[str, OptionValue] = field(default_factory=dict[str, OptionValue])
    tuning: Tuning | None = None


def _found(*, edge: bool = False, **options: OptionValue) -> Tuned:
    """Best of as many tried settings for every method, over both learning rates and all momenta."""
    return Tuned(options, Tuning(trials=16, source="results/tuning/README.md", edge=edge))


_JORDAN = _found(lr=0.0565685, other_lr=0.02, momentum=0.85, beta1=0.9, beta2=0.999, edge=True)

TUNED: Mapping[tuple[str, str], Mapping[str, Tuned]] = {
    ("text", "demo"): {
        "adamw": _found(lr=0.004, other_lr=0.032, beta1=0.6, beta2=0.8, edge=True),
        "muon": _found(lr=0.08, other_lr=0.02, momentum=0.7, beta1=0.9, beta2=0.95, edge=True),
        "muon-jordan": _JORDAN,
        "muon-nonic": _found(lr=0.08, other_lr=0.02, momentum=0.7, beta1=0.9, beta2=0.999, edge=True),
        "torch-muon": _JORDAN,  # the same step in bfloat16
        "muonadam": _found(lr=0.08, other_lr=0.02, momentum=0.5, beta2=0.95, edge=True),
        # of an older search over the learning rates alone, whose record no longer holds
        "newton-muon": Tuned({"lr": 0.04, "other_lr": 0.02}),
    },
    ("digits", "demo"): {
        "adamw": Tuned({"lr": 0.01, "other_lr": 0.02}),
        "muon": Tuned({"lr": 0.04, "other_lr": 0.01}),
        "muonadam": Tuned({"lr": 0.02, "other_lr": 0.02}),
    },
}
