"""A batch-size sweep: how many steps every method needs to reach a loss, at many batch sizes.

The learning rate is tuned anew for each batch size, on seeds of its own: among rates that are powers of two apart, the
search goes on past the best one until both of its neighbours are worse. Then the other seeds run with it. Runs have a
constant rate and end when the hardest target is reached, so that one run tells of all targets.

What `study.json` says of it is written and read here.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from steepest.batch_size.curve import Crossing, first_crossing
from steepest.lab.disk.fields import HUGE, Count, Positive, Rate, RunName, Text, Texts, wrong
from steepest.lab.disk.files import exists
from steepest.lab.disk.packed import RunFiles
from steepest.lab.methods import RATES, check_buildable, check_options, resolve
from steepest.lab.methods.tuned import OptionValue
from steepest.lab.runs.config import RunConfig, configure, run_hash
from steepest.lab.runs.records import Run, check_positive, read_run
from steepest.lab.runs.schedule import SMOOTHED
from steepest.lab.studies.records import Asked, Listed
from steepest.lab.studies.study import StudyPlan, rounded, run_directory

MOST_RATES = 9  # of one batch size; the search then ends, and the report flags the edge
TUNING_SEED = 1000  # and the following ones: other seeds than those that are reported
MOST_BATCHES = 40


@dataclass(frozen=True)
class Arm:
    """A method with some of its options changed.

    Args:
        method: A key of `METHODS`.
        changes: Options that differ between arms of one method, by name; of one that was read, their values as text.
    """

    method: str
    changes: tuple[tuple[str, OptionValue], ...] = ()

    @property
    def label(self) -> str:
        """The method, and what was changed."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.changes)])

    @property
    def name(self) -> str:
        """The label, shortened, so that arms with different values stay apart beside a curve."""
        return self.label.replace("weight_decay=", "wd=")


@dataclass(frozen=True)
class Cell:
    """One arm at one batch size: the exponents of two that its learning rate was tried with."""

    arm: Arm
    batch_size: int
    exponents: tuple[int, ...]
    best: int | None  # None while rates are still being tried

    @property
    def at_edge(self) -> bool:
        """Whether the search ended with the best rate at its edge."""
        return self.best is not None and self.best in (min(self.exponents), max(self.exponents))


@dataclass(frozen=True, kw_only=True)
class BatchSweep(StudyPlan):
    """Arms at several batch sizes; `methods` are those of the arms.

    Args:
        arms: At least one, each once.
        batches: Examples per step, rising.
        targets: Validation losses, falling; learning rates are tuned for the last.
        tuning_seeds: How many seeds each rate is tried with.
        most_steps: A run that has not reached the last target by then ends there.
        most_samples: Likewise, in examples.

    Raises:
        ValueError: If a list is empty or not in order, a number is not positive, a batch has more examples than there
            are, an arm occurs twice, varies lr or is of another method, or as for every study.
    """

    kind: ClassVar[str] = "critical-batch"

    arms: tuple[Arm, ...]
    batches: tuple[int, ...]
    targets: tuple[float, ...]
    most_steps: int
    most_samples: int
    tuning_seeds: int = 1
    _owners: dict[str, Arm] = field(default_factory=dict[str, Arm], init=False, repr=False, compare=False)  # of runs

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"Give each arm once and at least one, got {[arm.label for arm in self.arms]}.")
        if {arm.method for arm in self.arms} != set(self.methods):
            raise ValueError(f"The arms {[arm.label for arm in self.arms]} are not of the methods {self.methods}.")
        if not self.batches or list(self.batches) != sorted(set(self.batches)) or self.batches[0] < 1:
            raise ValueError(f"Batch sizes must be whole numbers of at least 1, rising, got {self.batches}.")
        if not self.targets or list(self.targets) != sorted(set(self.targets), reverse=True) or self.targets[-1] <= 0:
            raise ValueError(f"Targets must be losses above 0, falling, got {self.targets}.")
        for name in ("most_steps", "most_samples", "tuning_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.most_samples < self.batches[-1]:
            raise ValueError(f"most_samples={self.most_samples} is less than one batch of {self.batches[-1]}.")
        if self.batches[-1] > self.task.train_size:
            raise ValueError(
                f"A batch of {self.batches[-1]} would hold examples twice: {self.task.name!r} has "
                f"{self.task.train_size}. Leave it out."
            )
        self._check_arms()
        if any(seed >= TUNING_SEED for seed in self.seeds):
            raise ValueError(
                f"Seeds from {TUNING_SEED} on tune the learning rates; give seeds below, got {self.seeds}."
            )

    def configs(self) -> list[RunConfig]:
        """The runs that begin the search for learning rates."""
        for arm in self.arms:
            check_buildable(arm.method, self.task, self.rate(arm, 0))
        return [config for cell in self._first() for config in self._tuning(cell)]

    def grown(self, out: Path) -> list[RunConfig]:
        """The runs of `configs`, those that follow from the results in `out`, and, where a rate is found, the seeds."""
        configs: list[RunConfig] = []
        for cell in self.cells(out):
            configs += self._tuning(cell)
            if cell.best is not None:
                configs += [self._config(cell.arm, cell.batch_size, cell.best, seed) for seed in self.seeds]
        return configs

    def cells(self, out: Path) -> list[Cell]:
        """How far the search for learning rates is, by the results in `out`; the smallest batch sizes come last."""
        return [self._search(cell, out) for cell in self._first()]

    def rate(self, arm: Arm, exponent: int) -> dict[str, OptionValue]:
        """Options of an arm whose learning rates are its own times a power of two."""
        changes = dict(self.options.get(arm.method, {})) | dict(arm.changes)
        found = resolve(arm.method, task=self.task.name, preset=self.task.preset, options=changes).options
        rates = {name: rounded(float(found[name]) * 2.0**exponent) for name in RATES if name in found}
        return {**changes, **rates}

    def described(self, config: RunConfig) -> dict[str, object]:
        """With the arm, the batch size, the learning rate, and whether the run tunes it."""
        arm = self._owners[run_hash(config)]
        own = {"arm": arm.label, "batch_size": config.batch_size, "lr": config.options["lr"]}
        return super().described(config) | own | {"tunes": config.seed >= TUNING_SEED}

    def own_fields(self) -> Mapping[str, object]:
        """Everything that was asked for."""
        return {
            "arms": [arm.label for arm in self.arms],
            "batches": self.batches,
            "targets": self.targets,
            "tuning_seeds": self.tuning_seeds,
            "most_steps": self.most_steps,
            "most_samples": self.most_samples,
        }

    def _check_arms(self) -> None:
        known: dict[str, Arm] = {}
        for arm in self.arms:
            if "lr" in dict(arm.changes):
                raise ValueError(f"The arm {arm.label!r} varies lr, which is tuned at each batch size; leave it out.")
            config = self._config(arm, self.batches[0], 0, 0)
            if other := known.get(run_hash(config)):
                raise ValueError(f"The arms {other.label!r} and {arm.label!r} are the same; leave one out.")
            known[run_hash(config)] = arm

    def _first(self) -> list[Cell]:
        """Cells with the rates that are tried first: around the method's own times the root of the batch size."""
        cells: list[Cell] = []
        for batch in reversed(self.batches):  # long steps first, so that no core idles at the end
            centre = round(0.5 * math.log2(batch / self.task.budget.batch_size))
            cells += [Cell(arm, batch, (centre - 1, centre, centre + 1), None) for arm in self.arms]
        return cells

    def _search(self, cell: Cell, out: Path) -> Cell:
        """Go on with a cell as far as its results reach."""
        while True:
            scores = {exponent: self._score(cell, exponent, out) for exponent in cell.exponents}
            known = {exponent: score for exponent, score in scores.items() if score is not None}
            if len(known) < len(scores):
                return cell
            best = min(known, key=lambda exponent: (known[exponent], exponent))
            low, high = min(cell.exponents), max(cell.exponents)
            if low < best < high or len(cell.exponents) >= MOST_RATES:
                return Cell(cell.arm, cell.batch_size, cell.exponents, best)
            beyond = low - 1 if best == low else high + 1
            cell = Cell(cell.arm, cell.batch_size, tuple(sorted((*cell.exponents, beyond))), None)

    def _score(self, cell: Cell, exponent: int, out: Path) -> tuple[int, float] | None:
        """Lower is better: seeds that miss the target, then steps to it, or the loss; None while runs are missing."""
        missed, total = 0, 0.0
        for seed in self._tuning_seeds():
            config = self._config(cell.arm, cell.batch_size, exponent, seed)
            run = run_directory(out, config)
            if not exists(run / "result.json"):
                return None
            steps, loss = _outcome(run, self.targets[-1])
            missed += steps is None
            total += loss if steps is None else math.log(steps)
        return missed, total

    def _tuning(self, cell: Cell) -> list[RunConfig]:
        seeds = self._tuning_seeds()
        return [self._config(cell.arm, cell.batch_size, e, seed) for seed in seeds for e in cell.exponents]

    def _tuning_seeds(self) -> range:
        return range(TUNING_SEED, TUNING_SEED + self.tuning_seeds)

    def _config(self, arm: Arm, batch_size: int, exponent: int, seed: int) -> RunConfig:
        config = configure(
            self.task,
            method=arm.method,
            seed=seed,
            options=self.rate(arm, exponent),
            steps=max(1, min(self.most_steps, self.most_samples // batch_size)),
            batch_size=batch_size,
            eval_every=1,
            schedule="constant",
            target=self.targets[-1],
            watch_from=self.targets[0],
            part="tuning" if seed >= TUNING_SEED else "report",
        )
        self._owners[run_hash(config)] = arm
        return config


@functools.lru_cache(maxsize=100_000)  # finished runs do not change
def _outcome(run: Path, target: float) -> tuple[float | None, float]:
    """Steps to the target or None, and the last loss, infinite for a run that diverged."""
    files = RunFiles(run)
    record = read_run(files)
    check_positive(files, record)
    crossing = run_crossing(record, target)
    loss = None if record.result is None else record.result.final_loss
    return (crossing.steps if crossing.status == "reached" else None), math.inf if loss is None else loss


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes, from what was written behind `--batches`.

    Args:
        text: LOW:HIGH:xF for LOW, LOW·F, ... up to HIGH, or a list with commas.

    Raises:
        ValueError: If it is neither, or a size is not a whole number of at least 1 or occurs twice.

    Examples:
        >>> parse_batches("16:100:x2")
        (16, 32, 64)
        >>> parse_batches("8,24")
        (8, 24)
    """
    wrong = f"--batches {text}: write LOW:HIGH:xF, for example 16:1024:x2, or a list like 16,64,256"
    if match := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9}):x([0-9]{1,9})", text):
        low, high, factor = map(int, match.groups())
        if low < 1 or high < low or factor < 2:
            raise ValueError(f"{wrong}; LOW is at least 1 and at most HIGH, F at least 2.")
        sizes = [low * factor**k for k in range(MOST_BATCHES) if low * factor**k <= high]
    elif re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        sizes = sorted(map(int, text.split(",")))
    else:
        raise ValueError(f"{wrong}.")
    if sizes[0] < 1 or len(set(sizes)) < len(sizes) or len(sizes) > MOST_BATCHES:
        raise ValueError(f"{wrong}; each size once, from 1 on, at most {MOST_BATCHES} of them.")
    return tuple(sizes)


def make_arms(methods: Sequence[str], varied: Sequence[tuple[str, str, Sequence[OptionValue]]]) -> tuple[Arm, ...]:
    """Every method, or, where an option of it is varied, one arm for each value.

    Args:
        methods: Those that take part.
        varied: Method, option and values; several options of one method are varied one at a time.

    Raises:
        ValueError: If a method does not take part, no value is given, or an option is unknown or out of range.
        TypeError: If a value is of the wrong type.
    """
    for method, option, values in varied:
        if method not in methods or not values:
            raise ValueError(f"--vary {method}.{option}: give values, and a method among {', '.join(methods)}.")
    arms: list[Arm] = []
    for method in methods:
        own = [(option, value) for name, option, values in varied if name == method for value in values]
        changes = [tuple(check_options(method, {option: value}).items()) for option, value in own]
        arms += [Arm(method, change) for change in changes] or [Arm(method)]
    return tuple(arms)


def run_crossing(run: Run, target: float) -> Crossing:
    """Where the validation loss of a run first comes down to a target, as medians of five evaluations say.

    The median counts for the evaluation in the middle; the start counts as it is. So a run has crossed its own target
    exactly if it ended for that reason.

    Args:
        run: With one evaluation at least.
        target: Loss.
    """
    steps = [row.step for row in run.evals]
    losses = [float("inf") if row.loss is None else row.loss for row in run.evals]
    middle = SMOOTHED // 2
    medians = [statistics.median(losses[i - middle : i + middle + 1]) for i in range(middle, len(losses) - middle)]
    crossing = first_crossing([steps[0], *steps[middle : len(steps) - middle]], [losses[0], *medians], target)
    if crossing.status in ("reached", "at the start"):
        return crossing
    return replace(crossing, steps=steps[-1], status="stopped" if math.isfinite(losses[-1]) else "diverged")


@dataclass(frozen=True, kw_only=True)
class BatchAsked(Asked):
    """A run that a batch-size study lists.

    Args:
        lr: Learning rate.
        arm: Of which it is.
        batch_size: Examples per step.
        tunes: Whether it serves to find the learning rate only.
    """

    lr: float
    arm: Arm
    batch_size: int
    tunes: bool

    @property
    def name(self) -> str:
        """Of the arm."""
        return self.arm.name

    def check(self, run: Run, files: RunFiles) -> None:
        """As of any run, also comparing batch size and the options that were changed.

        Raises:
            RecordError: If they differ, or a loss is not above 0.
        """
        super().check(run, files)
        check_positive(files, run)
        own = {"batch_size": run.config.batch_size, **run.config.options}
        expected = {"batch_size": str(self.batch_size), **{key: str(value) for key, value in self.arm.changes}}
        both = [(key, str(own.get(key)), value) for key, value in expected.items()]
        if differing := [f"{key} {found} instead of {value}" for key, found, value in both if found != value]:
            raise files.error("config.json", f"the run has {', '.join(differing)}")


class _Run(msgspec.Struct):
    method: Text
    arm: Text
    batch_size: Count
    lr: Rate
    seed: Count
    tunes: bool


class BatchStudy(Listed[BatchAsked], frozen=True, kw_only=True):
    """Arms at several batch sizes; `targets` fall, `batches` rise. Runs that follow from results are listed later.

    Raises:
        ValueError: If the fields contradict each other.
    """

    kind: Literal["critical-batch"]
    labels: Texts = msgspec.field(name="arms")
    batches: Annotated[tuple[Positive, ...], Meta(min_length=1)]
    targets: Annotated[tuple[Annotated[float, Meta(gt=0, le=HUGE)], ...], Meta(min_length=1)]
    runs: Mapping[RunName, _Run]

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.batches) != sorted(set(self.batches)):
            raise wrong("batches", "a list of whole numbers of at least 1, rising", self.batches)
        if list(self.targets) != sorted(set(self.targets), reverse=True):
            raise wrong("targets", f"a list of losses above 0 and at most {HUGE:g}, falling", self.targets)
        if len(set(self.methods)) < len(self.labels):
            raise wrong("arms", "a list of arms with different names", self.labels)
        self.asked()

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What is compared.

        Raises:
            ValueError: If one is of another method.
        """
        return tuple(map(self._arm, self.labels))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the arms."""
        return tuple(arm.name for arm in self.arms)

    @property
    def baseline(self) -> str:
        """The first arm of AdamW, or the first one."""
        return next((arm.name for arm in self.arms if arm.method == "adamw"), self.methods[0])

    def asked(self) -> Mapping[BatchAsked, str | None]:
        """The runs that are listed, in the order of arms, batch sizes, rates and seeds."""
        arms = dict(zip(self.labels, self.arms, strict=True))
        found: dict[BatchAsked, str | None] = {}
        rates: dict[tuple[str, int], float] = {}
        for name, run in self.runs.items():
            if run.arm not in arms or run.method != arms[run.arm].method:
                raise wrong(f"runs.{name}.arm", f"one of the arms {list(arms)}, and of its method", run.arm)
            one = BatchAsked(
                method=run.method,
                seed=run.seed,
                lr=run.lr,
                arm=arms[run.arm],
                batch_size=run.batch_size,
                tunes=run.tunes,
            )
            if one.batch_size not in self.batches or (one.seed in self.seeds) == one.tunes:
                among = f"at one of the batch sizes {list(self.batches)}, with one of the seeds {list(self.seeds)}"
                raise wrong(f"runs.{name}", among, (one.batch_size, one.seed))
            if one in found:
                raise ValueError(f"runs.{name} must be the only run of its arm, batch size, learning rate and seed")
            if not one.tunes and (rate := rates.setdefault((run.arm, one.batch_size), one.lr)) != one.lr:
                raise wrong(f"runs.{name}.lr", f"{rate}, as for the other seeds of that batch size", one.lr)
            found[one] = name
        places = {arm: place for place, arm in enumerate(arms.values())}
        order = sorted(found, key=lambda one: (places[one.arm], one.batch_size, one.tunes, one.lr, one.seed))
        return {one: found[one] for one in order}

    def _arm(self, label: str) -> Arm:
        for method in self.listed_methods:
            if label == method or label.startswith(f"{method} "):
                return Arm(method, tuple(re.findall(r"(\w+)=(\S+)", label[len(method) :])))
        expected = f"a list of the methods {list(self.listed_methods)} with what was changed of them"
        raise wrong("arms", expected, self.labels)
