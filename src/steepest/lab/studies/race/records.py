"""What the `study.json` of a race says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from steepest.lab.disk.fields import HUGE, Count, RunName, Text
from steepest.lab.studies.records import Asked, Listed, check_baseline, named


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
