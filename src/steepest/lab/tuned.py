"""The one table of tuned options: what each method runs with by default on a task and preset, and how that was found.

A method without an entry runs with the defaults of its signature in `methods.py`, chosen by hand.
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


TUNED: Mapping[tuple[str, str], Mapping[str, Tuned]] = {
    ("text", "demo"): {
        "adamw": Tuned({"lr": 0.004, "other_lr": 0.016}),
        "torch-muon": Tuned({"lr": 0.04, "other_lr": 0.01}),
        "muon": Tuned({"lr": 0.04, "other_lr": 0.01}),
        "muon-plain": Tuned({"lr": 0.04, "other_lr": 0.01}),
    },
    ("digits", "demo"): {},
}
