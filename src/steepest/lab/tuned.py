"""The one table of tuned options: what each method runs with by default on a task and preset, and how that was found.

A preset without an entry for a method takes the options of the preset demo, without the record: they were not searched
there. A method without an entry at demo runs with the defaults of its signature in `methods.py`, chosen by hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

OptionValue = bool | int | float | str


@dataclass(frozen=True)
class Tuning:
    """How the options of a method were chosen.

    Args:
        trials: Number of tried settings; None when it is not known.
        source: Where the search is recorded; None when it is not.
        edge: Whether the best setting lay at the edge of what was tried.
    """

    trials: int | None
    source: str | None
    edge: bool


@dataclass(frozen=True)
class Tuned:
    """Options that were found, where they differ from the method's signature, and the record of the search."""

    options: Mapping[str, OptionValue] = field(default_factory=dict[str, OptionValue])
    tuning: Tuning | None = None


def _demo(lr: float, other_lr: float) -> Tuned:
    """Best of a 3 x 4 grid over the two learning rates, inside of its edges, for every method alike."""
    return Tuned(
        {"lr": lr, "other_lr": other_lr}, Tuning(trials=12, source="docs/results/tuning/README.md", edge=False)
    )


# Twelve settings are recorded, the learning rate of the matrices times which layers are looked at and the exponent. The
# runs that came before, and Muon's search whose best it began at, are not counted.
_NEWTON_TUNING = Tuning(trials=None, source="docs/results/newton_muon/README.md", edge=False)
_NEWTON = Tuned({"lr": 0.04, "other_lr": 0.02}, _NEWTON_TUNING)

TUNED: Mapping[tuple[str, str], Mapping[str, Tuned]] = {
    ("text", "demo"): {
        "adamw": _demo(0.004, 0.008),
        "torch-muon": _demo(0.04, 0.02),
        "muon": _demo(0.04, 0.02),
        "muonadam": _demo(0.04, 0.02),
        "newton-muon": _NEWTON,
    },
    ("digits", "demo"): {
        "adamw": _demo(0.01, 0.02),
        "muon": _demo(0.04, 0.01),
        "muonadam": _demo(0.02, 0.02),
    },
}
