"""Which runs of a study may be held against each other, and whether their methods may be ranked at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from steepest.lab.config import RunConfig
from steepest.lab.records import Run, Study
from steepest.lab.tuned import Tuning

Refusal = Literal["unequal", "unknown"]


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
    shared = _most_common([_conditions(run.config) for run in ordered])
    by_method = {name: [run for run in ordered if run.config.method == name] for name in study.methods}
    kept: dict[str, tuple[Run, ...]] = {}
    aside: list[SetAside] = []
    for name, runs in by_method.items():
        differences = {run.name: _difference(_conditions(run.config), shared) for run in runs}
        candidates = [run for run in runs if not differences[run.name]]
        options = _most_common([_choices(run.config) for run in candidates])
        differences |= {run.name: _difference(_choices(run.config), options) for run in candidates}
        kept[name] = tuple(run for run in candidates if not differences[run.name])
        aside += [SetAside(run, differences[run.name]) for run in runs if differences[run.name]]
    tuning = {name: runs[0].config.tuning for name, runs in kept.items() if runs}
    return Comparable(kept, tuple(aside), tuning)


Description = tuple[tuple[str, str], ...]


def _conditions(config: RunConfig) -> Description:
    """What all runs of a race have in common."""
    return (
        ("task", config.task),
        ("preset", config.preset),
        ("data sha256", config.data.sha256),
        ("code", config.code),
        ("steps", str(config.steps)),
        ("batch size", str(config.batch_size)),
        ("evaluated every", str(config.eval_every)),
    )


def _choices(config: RunConfig) -> Description:
    """What all runs of a method have in common."""
    options = json.dumps(dict(config.options), sort_keys=True)
    return (("options", options), ("tuning", str(config.tuning)))


def _most_common(descriptions: Sequence[Description]) -> Description:
    return Counter(descriptions).most_common(1)[0][0] if descriptions else ()


def _difference(own: Description, expected: Description) -> tuple[tuple[str, str, str], ...]:
    return tuple((key, mine, other) for (key, mine), (_, other) in zip(own, expected, strict=True) if mine != other)
