"""A sweep: every method at many learning rates, so that one sees how wide the range is in which it works."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import msgspec
from msgspec import Meta

from steepest.lab.disk.fields import HIGHEST_RATE, LOWEST_RATE, Count, Rate, RunName, Text, check_distinct
from steepest.lab.methods import RATES, check_buildable, resolve
from steepest.lab.methods.tuned import OptionValue
from steepest.lab.runs.config import RunConfig, configure
from steepest.lab.runs.records import Run
from steepest.lab.studies.records import Asked, Listed, check_baseline, named
from steepest.lab.studies.study import StudyPlan, rounded

MOST_RATES = 1000


@dataclass(frozen=True, kw_only=True)
class Sweep(StudyPlan):
    """Methods on one task, each at several learning rates.

    Other rates of a method, `other_lr` and `table_lr`, keep the ratio to `lr` that they have in its options.

    Args:
        lrs: Learning rates by method, rising, at least one each. The rest as for every study.

    Raises:
        ValueError: If a method has no rates, the rates are not positive and rising, or as for every study.
    """

    kind: ClassVar[str] = "sweep"

    lrs: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_takes_part("Learning rates are given for", self.lrs)
        for method in self.methods:
            if not (rates := self.lrs.get(method)):
                raise ValueError(f"No learning rates for {method!r}; add --lrs {method}=1e-3:1e-1:log5.")
            if (
                list(rates) != sorted(set(map(rounded, rates)))
                or not LOWEST_RATE <= rates[0] <= rates[-1] < HIGHEST_RATE
            ):
                raise ValueError(
                    f"The learning rates of {method!r} must be positive, rising and of 6 digits, got {rates}."
                )

    def configs(self) -> list[RunConfig]:
        """One run per seed, rate and method: the lowest rate of every method, then the next one, seed after seed."""
        options = {method: self._options(method) for method in self.methods}
        configs = [
            configure(self.task, method=method, seed=seed, options=options[method][index], steps=self.steps)
            for seed in self.seeds
            for index in range(max(map(len, self.lrs.values())))
            for method in self.methods
            if index < len(self.lrs[method])
        ]
        for method in self.methods:  # before anything is written or trained
            check_buildable(method, self.task, options[method][0])
        return configs

    def described(self, config: RunConfig) -> dict[str, object]:
        """With the learning rate."""
        return super().described(config) | {"lr": config.options["lr"]}

    def own_fields(self) -> Mapping[str, object]:
        """The learning rates, and the first method as what others are compared with."""
        return {"baseline": self.methods[0], "lrs": {method: self.lrs[method] for method in self.methods}}

    def _options(self, method: str) -> list[dict[str, OptionValue]]:
        """What differs from the method's defaults at each of its rates."""
        changes = dict(self.options.get(method, {}))
        found = resolve(method, task=self.task.name, preset=self.task.preset, options=changes).options
        own, others = float(found["lr"]), {name: float(found[name]) for name in RATES[1:] if name in found}
        for name, other in others.items():
            if own <= 0 or other < 0:
                raise ValueError(
                    f"{method} has lr {own:g} and {name} {other:g}, which have no ratio to keep; --set {method}.lr "
                    f"above 0 and {method}.{name} to at least 0."
                )
        return [
            {**changes, "lr": lr, **{name: rounded(lr * (other / own)) for name, other in others.items()}}
            for lr in self.lrs[method]
        ]


def rates_by_method(texts: Sequence[str], methods: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The learning rates of each method, from what was written behind `--lrs`.

    Args:
        texts: RATES for all methods, or METHOD=RATES for one; RATES as `parse_rates` takes them.
        methods: Those that take part.

    Raises:
        ValueError: If a text cannot be read, or says something about the same methods as another one.

    Examples:
        >>> rates_by_method(["0.1,0.01", "muon=1"], ["adamw", "muon"])
        {'adamw': (0.01, 0.1), 'muon': (1.0,)}
    """
    given: dict[str, tuple[float, ...]] = {}
    for text in texts:
        method, equals, rates = text.rpartition("=")
        if equals and not method:
            raise ValueError(f"--lrs {text}: write METHOD=RATES, for example muon=1e-3:1:log9.")
        if method in given:
            raise ValueError(f"--lrs gives rates for {method or 'all methods'} twice; write them as one list.")
        given[method] = parse_rates(rates)
    general = given.pop("", None)
    return (dict.fromkeys(methods, general) if general else {}) | given


def parse_rates(text: str) -> tuple[float, ...]:
    """Learning rates, rising, rounded to 6 digits so that a run's name does not depend on the last bit.

    Args:
        text: LOW:HIGH:logN for N rates evenly spaced logarithmically, both ends included; or a list with commas.

    Raises:
        ValueError: If it is neither, or a rate is not positive and finite or occurs twice.

    Examples:
        >>> parse_rates("1e-2:1:log3")
        (0.01, 0.1, 1.0)
        >>> parse_rates("0.3,0.1")
        (0.1, 0.3)
    """
    wrong = f"--lrs {text}: write LOW:HIGH:logN, for example 1e-4:1e1:log9, or a list like 0.001,0.01"
    low, colon, rest = text.partition(":")
    if not colon:
        rates = sorted(rounded(_rate(item, wrong)) for item in text.split(","))
        if len(set(rates)) < len(rates):
            raise ValueError(f"{wrong}; a rate occurs twice.")
        return tuple(rates)
    high, _, count = rest.partition(":")
    number = count.removeprefix("log")
    if number == count or not re.fullmatch("[0-9]{1,9}", number) or not 2 <= int(number) <= MOST_RATES:
        raise ValueError(f"{wrong}; N is a number from 2 to {MOST_RATES}.")
    first, last, steps = _rate(low, wrong), _rate(high, wrong), int(number) - 1
    rates = [rounded(first * (last / first) ** (index / steps)) for index in range(steps)] + [rounded(last)]
    if rates != sorted(set(rates)):
        raise ValueError(f"{wrong}; LOW is below HIGH, and N rates of 6 digits fit between them.")
    return tuple(rates)


def _rate(text: str, wrong: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not LOWEST_RATE <= rounded(rate) < HIGHEST_RATE:
        raise ValueError(f"{wrong}; {text!r} is not a positive number from {LOWEST_RATE:g} to below {HIGHEST_RATE:g}.")
    return rate


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
