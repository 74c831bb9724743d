"""The one table of tuned options: what each method runs with by default on a task and preset, and how that was found.

A method without an entry runs with the defaults of its signature in `methods.py`, chosen by hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from steepest.lab.records import Tuning

OptionValue = bool | int | float | str


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
