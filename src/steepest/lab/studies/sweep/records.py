"""What the `study.json` of a learning-rate sweep says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, cast

import msgspec
from msgspec import Meta

from steepest.lab.disk.fields import Count, Rate, RunName, Text, check_distinct
from steepest.lab.runs.records import Run
from steepest.lab.studies.records import Asked, Listed, check_baseline, named


class _Run(msgspec.Struct):
    method: Text
    lr: float
    seed: Count


class SweepStudy(Listed[Asked], frozen=True, kw_only=True):
    """Methods that run at several learning rates with the same seeds.

    Raises:
        ValueError: If the fields contradict each other.
    """

    kind: Literal["sweep"]
    baseline: str
    listed_lrs: Mapping[str, Annotated[tuple[Rate, ...], Meta(min_length=1)]] = msgspec.field(name="lrs")
    runs: Mapping[RunName, _Run]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_baseline(self.baseline, self.methods)
        for method in self.methods:
            if method not in self.listed_lrs:
                raise ValueError(f"lrs.{method} is missing")
            check_distinct(f"lrs.{method}", self.listed_lrs[method])
        self.asked()

    @property
    def lrs(self) -> Mapping[str, tuple[float, ...]]:
        """The learning rates of each method, rising."""
        return {method: tuple(sorted(self.listed_lrs[method])) for method in self.methods}

    def asked(self) -> Mapping[Asked, str | None]:
        """Each method at each of its learning rates with each seed."""
        among = "one of the methods with one of its learning rates and one of the seeds"
        runs = {name: Asked(method=run.method, lr=run.lr, seed=run.seed) for name, run in self.runs.items()}
        asked = [Asked(method=m, lr=lr, seed=seed) for m, lrs in self.lrs.items() for lr in lrs for seed in self.seeds]
        return named(runs, asked, among)


def rate(run: Run) -> float:
    """The learning rate of a run that a sweep has asked for."""
    return cast(float, run.config.options["lr"])
