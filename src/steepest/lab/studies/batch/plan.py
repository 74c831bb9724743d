"""A batch-size sweep: how many steps every method needs to reach a loss, at many batch sizes.

The learning rate is tuned anew for each batch size, on seeds of its own: among rates that are powers of two apart, the
search goes on past the best one until both of its neighbours are worse. Then the other seeds run with it. Runs have a
constant rate and end when the hardest target is reached, so that one run tells of all targets.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from steepest.lab.disk.files import exists
from steepest.lab.disk.packed import RunFiles
from steepest.lab.methods import check_buildable, check_options, resolve
from steepest.lab.methods.tuned import OptionValue
from steepest.lab.runs.config import RunConfig, configure, run_hash
from steepest.lab.runs.records import check_positive, read_run
from steepest.lab.studies.batch.results import run_crossing
from steepest.lab.studies.study import StudyPlan, rounded, run_directory

MOST_RATES = 9  # of one batch size; the search then ends, and the report flags the edge
TUNING_SEED = 1000  # and the following ones: other seeds than those that are reported
MOST_BATCHES = 40


@dataclass(frozen=True)
class Arm:
    """A method with some of its options changed.

    Args:
        method: A key of `METHODS`.
        changes: Options that differ between arms of one method, by name.
    """

    method: str
    changes: tuple[tuple[str, OptionValue], ...] = ()

    @property
    def label(self) -> str:
        """The method, and what was changed."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.changes)])


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
        rates = {name: rounded(float(found[name]) * 2.0**exponent) for name in ("lr", "other_lr") if name in found}
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
