"""Which runs may be held against each other: those made under the same conditions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from steepest.lab.methods import RATES
from steepest.lab.runs.config import RunConfig
from steepest.lab.runs.records import Run

Description = tuple[tuple[str, str], ...]  # (field, value)
Describe = Callable[[RunConfig], Description]


@dataclass(frozen=True)
class SetAside:
    """A run that is left out of every number and curve, and in which fields it differs: (name, its own, expected)."""

    run: Run
    differences: tuple[tuple[str, str, str], ...]


def conditions(config: RunConfig) -> Description:
    """What all runs of a study have in common."""
    return (
        ("task", config.task),
        ("preset", config.preset),
        ("data sha256", config.data.sha256),
        ("code", config.code),
        ("steps", str(config.steps)),
        ("batch size", str(config.batch_size)),
        ("evaluated every", str(config.eval_every)),
        ("schedule", config.schedule),
        ("precision", config.precision),
    )


def agreeing(runs: Sequence[Run], describe: Describe) -> tuple[tuple[Run, ...], tuple[SetAside, ...]]:
    """The runs that share the most common description, the first one's on a tie; and the others."""
    descriptions = [describe(run.config) for run in runs]
    expected = Counter(descriptions).most_common(1)[0][0] if runs else ()
    both = list(zip(runs, descriptions, strict=True))
    kept = tuple(run for run, own in both if own == expected)
    return kept, tuple(SetAside(run, _difference(own, expected)) for run, own in both if own != expected)


def comparable(
    runs: Mapping[str, Sequence[Run]], own: Describe, *, first: str, shared: Describe = conditions
) -> tuple[dict[str, tuple[Run, ...]], tuple[SetAside, ...]]:
    """The runs that all agree on what they share, and with the others of their name on what is their own.

    What most runs say counts.

    Args:
        runs: By name of what is compared.
        own: What those of a name have in common.
        first: The name that decides on a tie.
        shared: What all have in common.

    Returns:
        Those that are kept, by name, and the others.
    """
    ordered = sorted(runs, key=lambda name: name != first)
    agreed, aside = agreeing([run for name in ordered for run in runs[name]], shared)
    names = {run.name for run in agreed}
    kept: dict[str, tuple[Run, ...]] = {}
    for name, found in runs.items():
        kept[name], others = agreeing([run for run in found if run.name in names], own)
        aside += others
    return kept, aside


def fixed_options(config: RunConfig) -> Description:
    """What all runs of a method have in common where its learning rates are what varies."""
    fixed = {key: value for key, value in config.counted_options.items() if key not in RATES}
    return (("options", json.dumps(fixed, sort_keys=True)),)


def _difference(own: Description, expected: Description) -> tuple[tuple[str, str, str], ...]:
    return tuple((key, mine, other) for (key, mine), (_, other) in zip(own, expected, strict=True) if mine != other)
