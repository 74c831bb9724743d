"""Branched training: fork one checkpoint at several batch sizes for a short while, and see which do as well.

Weights, optimizer state, random numbers and the order of the data are forked, and every fork sees the same examples,
so that they differ by the batch size and the learning rate that goes with it only. The fork at the run's own batch size
is the run itself, bit for bit.

Source:
    The procedure is that of Merrill et al., arXiv:2505.23971, with the optimizer's state and the data order forked, and
    the tolerance tested against the noise between repetitions on other stretches of the data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import torch

from steepest.lab.disk.fields import RecordError, Versioned, decode, read_text
from steepest.lab.disk.files import digest, exists, make_directory, one_line, write_whole
from steepest.lab.disk.ours import locked, refusal
from steepest.lab.errors import UsageError
from steepest.lab.runs.config import RunConfig, read_config, run_hash
from steepest.lab.runs.schedule import rate_factor
from steepest.lab.runs.train import Training, load_task, using_threads
from steepest.lab.runs.version import code_version
from steepest.lab.tasks.task import Task
from steepest.names import unknown_name

RateRule = Literal["sqrt", "linear", "constant"]
EXPONENTS: Mapping[RateRule, float] = {"sqrt": 0.5, "linear": 1.0, "constant": 0.0}
FORMAT = 1
_RUN = (
    "Give the directory of a run with a checkpoint: `steepest train --schedule constant --keep-checkpoint --out DIR`."
)
_BRANCH = "Delete this file: only this branch is trained again."


class NoBranchError(UsageError, ValueError):
    """The run cannot be forked as asked."""


@dataclass(frozen=True)
class Window:
    """How every fork goes on.

    Args:
        samples: Examples that each sees; a multiple of every batch size.
        rule: The learning rate is multiplied by k^(1/2), k or 1 at k times the batch size.
        repeats: On how many stretches of the data; the first is the one that the run would see next.

    Raises:
        ValueError: If the rule is unknown, or a number below 1.
    """

    samples: int
    rule: RateRule = "sqrt"
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.rule not in get_args(RateRule):
            raise ValueError(unknown_name("rate rule", self.rule, get_args(RateRule)))
        for name in ("samples", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Branch:
    """One fork.

    Args:
        batch_size: Of its steps.
        repeat: Which stretch of the data, from 0.
        losses: Training loss of every step; a fork whose loss is not finite ends there.
        final_loss: Validation loss at its end; None if it diverged.
    """

    batch_size: int
    repeat: int
    losses: tuple[float, ...]
    final_loss: float | None


class _Fork(Training):
    """A run that goes on from its checkpoint at another batch size."""

    def __init__(self, config: RunConfig, task: Task, checkpoint: Path, batch_size: int, rule: RateRule) -> None:
        self._start: int | None = None
        super().__init__(config, task)
        self.load(checkpoint)
        self._start = self.step
        self._times = Fraction(batch_size, config.batch_size)
        self._multiple = float(self._times) ** EXPONENTS[rule]
        self.config = dataclasses.replace(config, batch_size=batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._rate_factor(self._start)

    def _rate_factor(self, step: int) -> float:
        """The run's own schedule over the examples seen, times what the batch size asks for."""
        if self._start is None:
            return super()._rate_factor(step)
        own = self._start + (step - self._start) * self._times
        # as whole as it is, so that the run's own batch size gives the very numbers of the run
        reached = int(own) if own.denominator == 1 else float(own)
        return self._multiple * rate_factor(reached, steps=self.config.steps, schedule=self.config.schedule)


class _Losses:
    """Takes the place of the recorder: a fork leaves no rows behind but its losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def train(self, *, loss: float, **_: object) -> None:
        self.values.append(loss)


def train_branch(
    run_dir: Path, *, batch_size: int, window: Window, repeat: int = 0, data: Path | None = None
) -> Branch:
    """Fork a run and train the fork; nothing in the run's directory is changed.

    Args:
        run_dir: With config and checkpoint.
        batch_size: Of the fork.
        window: How long.
        repeat: Which stretch of the data.
        data: Of the user, for a run on such data.

    Raises:
        NoBranchError: If there is no checkpoint, the code is another, the schedule ends within the window, or the
            samples are no multiple of the batch size.
        CheckpointError: If the checkpoint is damaged or of another run.
        RecordError: If there is no config, or it is damaged.
        RunMismatchError: If the data differ from the run's.
    """
    config = read_parent(run_dir)
    _check_size(batch_size, window)
    task = load_task(config, data)
    with using_threads(None), torch.random.fork_rng(devices=[]):
        fork = _Fork(config, task, run_dir / "checkpoint.pt", batch_size, window.rule)
        own_steps = window.samples / config.batch_size
        if config.schedule == "cooldown" and fork.step + own_steps > config.steps:
            raise NoBranchError(
                f"The run's schedule ends at step {config.steps}, and the window goes from step {fork.step} to "
                f"{fork.step + own_steps:g}. Train the run with --schedule constant, or stop it earlier."
            )
        if repeat:
            fork.order.take(repeat * window.samples)
        rows = _Losses()
        for _ in range(window.samples // batch_size):
            fork.train_step(rows)  # pyright: ignore[reportArgumentType] - all that a step asks of a recorder
            if fork.diverged:
                return Branch(batch_size, repeat, tuple(rows.values[:-1]), None)
        fork.model.eval()
        loss = task.evaluate(fork.model, "report", whole=True).loss
    return Branch(batch_size, repeat, tuple(rows.values), loss if math.isfinite(loss) else None)


def _check_size(batch_size: int, window: Window) -> None:
    if window.samples % batch_size:
        raise NoBranchError(
            f"A window of {window.samples} samples is no whole number of batches of {batch_size}; give a multiple."
        )


def read_parent(run_dir: Path) -> RunConfig:
    """The config of a run that can be forked.

    Args:
        run_dir: Its directory.

    Raises:
        NoBranchError: If there is no checkpoint, or the code is another.
        RecordError: If there is no config, or it is damaged.
    """
    if not exists(run_dir / "config.json"):
        raise RecordError(run_dir / "config.json", "no run here", _RUN)
    config = read_config(run_dir, remedy=_RUN)
    if not exists(run_dir / "checkpoint.pt"):
        raise NoBranchError(f"{run_dir} holds no checkpoint. {_RUN}")
    if config.code != code_version():
        raise NoBranchError(
            f"The run was trained by the code {one_line(config.code)}, this is {code_version()}. {_RUN}"
        )
    return config


def train_branches(
    run_dir: Path,
    out: Path,
    *,
    batches: Sequence[int],
    window: Window,
    data: Path | None = None,
    tell: Callable[[Branch], None] = lambda _: None,
) -> list[Branch]:
    """Train every fork that `out` does not hold yet.

    Args:
        run_dir: As for `train_branch`.
        out: A file per fork, named by what it depends on; a finished fork is never trained again.
        batches: Batch sizes.
        window: How long.
        data: Of the user.
        tell: Called with each fork, old or new.

    Returns:
        All of them, by repetition and batch size.

    Raises:
        RunBusyError: If another process trains the run, or writes to `out`.
        RecordError: If a file of it is damaged; or as for `train_branch`.
    """
    config = read_parent(run_dir)
    for batch in batches:
        _check_size(batch, window)
    if (problem := refusal(out, "branches")) is not None:
        raise NoBranchError(problem)
    make_directory(out)
    branches: list[Branch] = []
    with locked(run_dir), locked(out):  # a run that is being trained would change its checkpoint between two forks
        checkpoint = digest(run_dir / "checkpoint.pt", remedy=_RUN)[:12]
        for repeat in range(window.repeats):
            for batch in batches:
                name = f"{run_hash(config)}-{checkpoint}-{batch}-{window.samples}-{window.rule}-{repeat}.json"
                branch = _read(out / name, batch, repeat)
                if branch is None:
                    branch = train_branch(run_dir, batch_size=batch, window=window, repeat=repeat, data=data)
                    record = {"format": FORMAT, **dataclasses.asdict(branch)}
                    write_whole(out / name, json.dumps(record, allow_nan=False) + "\n")
                branches.append(branch)
                tell(branch)
    return branches


@dataclass(frozen=True)
class LocalAnswer:
    """The local critical batch size: the largest one that loses no more than the tolerance to any smaller one.

    Args:
        best: It; the smallest one tried if the next is worse already.
        worse: The first batch size that is worse, None if none is: the answer is then "at least `best`".
        losses: Mean final loss by batch size; None where a fork diverged.
        sentence: All of it in words.
    """

    best: int
    worse: int | None
    losses: Mapping[int, float | None]
    sentence: str


def local_answer(branches: Sequence[Branch], *, tolerance: float, level: float = 0.95) -> LocalAnswer:
    """Compare the forks on the same stretches of data.

    A batch size is worse than a smaller one if its mean loss is higher by more than the tolerance, in a one-sided
    t-test at this level for all pairs together (Bonferroni), with the spread of the forks around stretch and batch
    size; with one repetition, if it simply is.

    Args:
        branches: Every batch size with the same repetitions.
        tolerance: In nats.
        level: Of the test: so often no batch size is called worse if all are alike.

    Raises:
        ValueError: If there are fewer than two batch sizes, or the tolerance is below 0 or not finite.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a finite number of nats of at least 0, got {tolerance}.")
    sizes = sorted({branch.batch_size for branch in branches})
    if len(sizes) < 2:
        raise ValueError(f"A local critical batch size needs two batch sizes to compare, got {sizes}.")
    by_size = {size: _by_repeat(branches, size) for size in sizes}
    alive = {size: own for size, own in by_size.items() if None not in own}
    means = {size: statistics.fmean(map(_known, own)) if size in alive else None for size, own in by_size.items()}
    repeats = len(by_size[sizes[0]])
    margin = tolerance + _margin([list(map(_known, own)) for own in alive.values()], level)
    worse: int | None = None
    lowest = math.inf
    for size in sizes:
        if (mean := _known(means[size])) > lowest + margin or means[size] is None:
            worse = size
            break
        lowest = min(lowest, mean)
    best = sizes[-1] if worse is None else sizes[max(0, sizes.index(worse) - 1)]
    basis = f"tolerance {tolerance:g}, {repeats} repetition{'s' if repeats > 1 else ', no test'}"
    basis += f", {level:.0%} for all pairs" if repeats > 1 else ""
    if worse is None:
        sentence = f"Local critical batch size: at least {best}, the largest that was tried ({basis})."
    elif worse == sizes[0]:
        sentence = f"No answer: the smallest batch size {worse} diverged ({basis})."
    elif best == sizes[0]:
        sentence = f"Local critical batch size: below {worse}, which is worse than {best}, the smallest ({basis})."
    else:
        sentence = f"Local critical batch size: {best}; {worse} is worse than a smaller one ({basis})."
    return LocalAnswer(best, worse, means, sentence)


def _margin(losses: Sequence[Sequence[float]], level: float) -> float:
    """What a difference of two means must exceed, by the residuals of a layout of sizes by stretches of data."""
    sizes, repeats = len(losses), len(losses[0]) if losses else 0
    if sizes < 2 or repeats < 2:
        return 0.0
    from scipy.stats import t

    rows, columns = (
        [statistics.fmean(own) for own in losses],
        [statistics.fmean(own) for own in zip(*losses, strict=True)],
    )
    grand = statistics.fmean(rows)
    free = (sizes - 1) * (repeats - 1)
    spread = (
        sum((losses[i][j] - rows[i] - columns[j] + grand) ** 2 for i in range(sizes) for j in range(repeats)) / free
    )
    one_pair = 1 - (1 - level) / (sizes * (sizes - 1) / 2)
    return float(t.ppf(one_pair, free)) * math.sqrt(2 * spread / repeats)


def _by_repeat(branches: Sequence[Branch], size: int) -> list[float | None]:
    own = {branch.repeat: branch.final_loss for branch in branches if branch.batch_size == size}
    return [own[repeat] for repeat in sorted(own)]


def _known(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _read(path: Path, batch: int, repeat: int) -> Branch | None:
    if not exists(path):
        return None
    text = read_text(path, remedy=_BRANCH)
    decode(Versioned, text, path, remedy=_BRANCH)
    stored = decode(Branch, text, path, remedy=_BRANCH)
    if (stored.batch_size, stored.repeat) != (batch, repeat):
        problem = f"batch_size must be {batch} and repeat {repeat}, got {stored.batch_size} and {stored.repeat}"
        raise RecordError(path, problem, _BRANCH)
    return stored
