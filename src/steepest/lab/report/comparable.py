"""Which runs of a study may be held against each other, and whether their methods may be ranked at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from steepest.lab.methods.tuned import Tuning
from steepest.lab.runs.config import RunConfig
from steepest.lab.studies.records import Run, Study

Refusal = Literal["unequal", "unknown"]
Description = tuple[tuple[str, str], ...]  # (field, value)


@dataclass(frozen=True)
class SetAside:
    """A run that is left out of every number and curve, and in which fields it differs: (name, its own, expected)."""

    run: Run
    differences: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Comparable:
    """The runs of a study that differ in method and seed only.

    Args:
        runs: By method, in the study's order and by seed; a method without runs has none.
        set_aside: All other runs.
        tuning: How each method that has runs was tuned; None where its options were chosen by hand.
    """

    runs: Mapping[str, tuple[Run, ...]]
    set_aside: tuple[SetAside, ...]
    tuning: Mapping[str, Tuning | None]

    @property
    def equally_tuned(self) -> bool:
        """Whether all methods had the same, known number of tried settings, so that they may be ranked."""
        return self.refusal is None

    @property
    def refusal(self) -> Refusal | None:
        """Why the methods may not be ranked: known numbers of tried settings differ, or some are not known."""
        budgets = {None if tuning is None else tuning.trials for tuning in self.tuning.values()}
        if len(self.runs) == 1 or (None not in budgets and len(budgets) <= 1):
            return None
        return "unequal" if len(budgets - {None}) > 1 else "unknown"


def comparable(study: Study) -> Comparable:
    """Choose the runs that agree on data, code and sizes, and within a method on its options.

    The conditions that most runs share count, the baseline's on a tie; the same for the options of each method.
    """
    ordered = sorted(study.runs, key=lambda run: (run.config.method != study.baseline, run.config.seed))
    agreed, aside = agreeing(ordered, conditions)
    kept: dict[str, tuple[Run, ...]] = {}
    for name in study.methods:
        own, others = agreeing([run for run in agreed if run.config.method == name], _choices)
        kept[name] = own
        aside += others
    tuning = {name: runs[0].config.tuning for name, runs in kept.items() if runs}
    return Comparable(kept, aside, tuning)


def agreeing(
    runs: Sequence[Run], describe: Callable[[RunConfig], Description]
) -> tuple[tuple[Run, ...], tuple[SetAside, ...]]:
    """The runs that share the most common description, the first one's on a tie; and the others."""
    descriptions = [describe(run.config) for run in runs]
    expected = Counter(descriptions).most_common(1)[0][0] if runs else ()
    both = list(zip(runs, descriptions, strict=True))
    kept = tuple(run for run, own in both if own == expected)
    return kept, tuple(SetAside(run, _difference(own, expected)) for run, own in both if own != expected)


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
    )


def fixed_options(config: RunConfig) -> Description:
    """What all runs of a method have in common where its learning rate is what varies."""
    fixed = {key: value for key, value in config.options.items() if key not in ("lr", "other_lr")}
    return (("options", json.dumps(fixed, sort_keys=True)),)


def finals(runs: Iterable[Run]) -> dict[int, float | None]:
    """Final loss by seed of the runs that have ended; None for a diverged one."""
    return {run.config.seed: run.result.final_loss for run in runs if run.result is not None}


def _choices(config: RunConfig) -> Description:
    """What all runs of a method have in common."""
    options = json.dumps(dict(config.options), sort_keys=True)
    return (("options", options), ("tuning", str(config.tuning)))


def _difference(own: Description, expected: Description) -> tuple[tuple[str, str, str], ...]:
    return tuple((key, mine, other) for (key, mine), (_, other) in zip(own, expected, strict=True) if mine != other)
