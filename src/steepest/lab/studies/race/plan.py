"""A race: every method through the same loop, data order and initial weights, with the options it is known to like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from steepest.lab.disk.fields import HUGE, Count, RunName, Text
from steepest.lab.methods import check_buildable
from steepest.lab.runs.config import RunConfig, configure
from steepest.lab.studies.records import Asked, Listed, check_baseline, named
from steepest.lab.studies.study import StudyPlan


@dataclass(frozen=True, kw_only=True)
class Race(StudyPlan):
    """Methods on one task, each with one setting of its options.

    Args:
        baseline: The method that others are compared with; one of `methods`. The rest as for every study.

    Raises:
        ValueError: If the baseline does not race, or as for every study.
    """

    kind: ClassVar[str] = "race"

    baseline: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_takes_part("The baseline", (self.baseline,))

    def configs(self) -> list[RunConfig]:
        """One run per seed and method, all methods of a seed together."""
        configs = [
            configure(self.task, method=method, seed=seed, options=self.options.get(method), steps=self.steps)
            for seed in self.seeds
            for method in self.methods
        ]
        for config in configs[: len(self.methods)]:  # before anything is written or trained
            check_buildable(config.method, self.task, config.options)
        return configs

    def own_fields(self) -> Mapping[str, object]:
        """The baseline."""
        return {"baseline": self.baseline}


class _Run(msgspec.Struct):
    method: Text
    seed: Count


class RaceStudy(Listed[Asked], frozen=True, kw_only=True):
    """Methods that run with the same seeds; `target` is a loss to reach.

    Raises:
        ValueError: If the fields contradict each other.
    """

    kind: Literal["race"]
    baseline: str
    target: Annotated[float, Meta(ge=-HUGE, le=HUGE)] | None = None
    runs: Mapping[RunName, _Run]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_baseline(self.baseline, self.methods)
        self.asked()

    def asked(self) -> Mapping[Asked, str | None]:
        """Each method with each seed."""
        among = f"one of the methods {list(self.methods)} with one of the seeds {list(self.seeds)}"
        asked = [Asked(method=method, seed=seed, lr=None) for method in self.methods for seed in self.seeds]
        runs = {name: Asked(method=run.method, seed=run.seed, lr=None) for name, run in self.runs.items()}
        return named(runs, asked, among)
