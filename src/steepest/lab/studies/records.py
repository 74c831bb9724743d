"""Stored records of runs and of a race, read back and validated: what is in the files, or an error, never a guess.

A study directory holds `study.json` and one directory per run under `runs/`, or all of that in one packed file. The
files may have been edited, cut short or sent by a stranger, so every field is checked before anything is computed from
it, and what two files both say is compared. Text is kept as it is: whoever displays it escapes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from steepest.lab.disk.fields import (
    HUGE,
    Count,
    Counts,
    Positive,
    RecordError,
    RunName,
    Seconds,
    Text,
    Texts,
    check_distinct,
    decode,
    parse_object,
    wrong,
)
from steepest.lab.disk.packed import RunFiles, StudyFiles
from steepest.lab.runs.config import RunConfig, names_of, run_hash
from steepest.lab.runs.result import Final, Result, parse_result
from steepest.lab.studies import KINDS

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Status = Literal["finished", "diverged", "unfinished"]


class _Row(msgspec.Struct, frozen=True, tag_field="kind"):
    """One line of `metrics.jsonl`."""


class TrainRow(_Row, frozen=True, tag="train"):
    """One optimizer step, counted from 1. Seconds; `train_s` is cumulative and leaves evaluations out."""

    step: Positive
    tokens: Count
    loss: float | None
    lr: float
    forward_backward_s: Seconds
    optimizer_s: Seconds
    train_s: Seconds

    def __post_init__(self) -> None:
        force_setattr(self, "loss", _bounded(self.loss))


class EvalRow(_Row, frozen=True, tag="eval"):
    """One evaluation after `step` steps; `loss` is None where it was not finite."""

    step: Count
    tokens: Count
    loss: float | None
    accuracy: float | None
    train_s: Seconds

    def __post_init__(self) -> None:
        force_setattr(self, "loss", _bounded(self.loss))


class Diagnostics(_Row, frozen=True, tag="diagnostics"):
    """Numbers of an optimizer, for the eye: no report reads them."""

    numbers: dict[str, object]


@dataclass(frozen=True)
class Run:
    """One training run. `name` is its directory under `runs/`; `result` is None while it has not ended."""

    name: str
    config: RunConfig
    environment: Mapping[str, object]
    train: tuple[TrainRow, ...]
    evals: tuple[EvalRow, ...]
    result: Result | None

    @property
    def status(self) -> Status:
        """Whether the run has ended, and how."""
        return "unfinished" if self.result is None else self.result.status


@dataclass(frozen=True)
class Absent:
    """A run the study asks for that cannot be used; `problem` is None when it has simply not been started.

    `lr` is the learning rate where the study asks for several.
    """

    method: str
    seed: int
    problem: str | None
    lr: float | None = None


@dataclass(frozen=True)
class Study:
    """A race: what was asked for (`study.json`), the runs that exist, and those that do not."""

    task: str
    preset: str
    methods: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...]
    target: float | None
    command: str
    created: datetime
    runs: tuple[Run, ...]
    absent: tuple[Absent, ...]


class Listed(msgspec.Struct, frozen=True):
    """What `study.json` says of all kinds of study.

    Raises:
        ValueError: If a method or a seed is there twice.
    """

    task: Text
    preset: Text
    methods: Texts
    seeds: Counts
    command: Text
    created: datetime
    runs: Mapping[RunName, object]

    def __post_init__(self) -> None:
        check_distinct("methods", self.methods)
        check_distinct("seeds", self.seeds)


class _RaceRun(msgspec.Struct):
    method: Text
    seed: Count


class _Race(Listed, frozen=True, kw_only=True):
    kind: Literal["race"]
    baseline: str
    target: Annotated[float, Meta(ge=-HUGE, le=HUGE)] | None = None
    runs: Mapping[RunName, _RaceRun]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_baseline(self.baseline, self.methods)
        self.names()

    def names(self) -> Mapping[tuple[str, int], str]:
        """The directories of the runs."""
        among = f"one of the methods {list(self.methods)} with one of the seeds {list(self.seeds)}"
        asked = set(itertools.product(self.methods, self.seeds))
        return by_content({name: (run.method, run.seed) for name, run in self.runs.items()}, asked, among)


class _Head(msgspec.Struct):
    format: Literal[1]
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise wrong("kind", f"one of {', '.join(KINDS)}", self.kind)


def read_study(study_dir: Path) -> Study:
    """Read a race and all of its runs.

    A run that cannot be read does not spoil the others: it is listed in `absent` with what is wrong with it.

    Args:
        study_dir: The directory that holds `study.json`, or a packed study.

    Raises:
        RecordError: If `study.json` is missing, damaged, or not a race.
    """
    files = StudyFiles(study_dir)
    study = open_study(files, _Race)
    names = study.names()
    runs: list[Run] = []
    absent: list[Absent] = []
    for method in study.methods:
        for seed in study.seeds:
            found = find_run(files, names.get((method, seed)), method=method, seed=seed)
            if isinstance(found, Run):
                runs.append(found)
            else:
                absent.append(Absent(method, seed, found))
    return Study(
        task=study.task,
        preset=study.preset,
        methods=study.methods,
        baseline=study.baseline,
        seeds=study.seeds,
        target=study.target,
        command=study.command,
        created=study.created,
        runs=tuple(runs),
        absent=tuple(absent),
    )


def open_study(files: StudyFiles, kind: type[T]) -> T:
    """The content of `study.json`, of a known format and kind.

    Args:
        files: The records of the study.
        kind: Of the record that it is read as.

    Raises:
        RecordError: If the file is damaged, or of another format or kind.
    """
    files.study(_Head)
    return files.study(kind)


def read_kind(study_dir: Path) -> str:
    """What a study directory holds.

    Raises:
        RecordError: As `open_study`, or if there is no study.
    """
    return StudyFiles(study_dir).study(_Head).kind


def by_content(runs: Mapping[str, K], asked: Collection[K], among: str) -> dict[K, str]:
    """The names of runs by what is asked for.

    Args:
        runs: What each is, by name.
        asked: What they may be, each once.
        among: The same in words, for error messages.

    Raises:
        ValueError: If a run is nothing of that, or what another one is already.
    """
    names: dict[K, str] = {}
    for name, content in runs.items():
        if content not in asked:
            raise wrong(f"runs.{name}", among, content)
        if content in names:
            raise ValueError(f"runs.{name} must be the only run of {content}, which {names[content]} is already")
        names[content] = name
    return names


def check_baseline(baseline: str, methods: Sequence[str]) -> None:
    """Refuse to compare with a method that does not take part.

    Raises:
        ValueError: If it is not one of the methods.
    """
    if baseline not in methods:
        raise wrong("baseline", f"one of the methods {list(methods)}", baseline)


def find_run(
    study: StudyFiles, name: str | None, *, method: str, seed: int, lr: float | None = None
) -> Run | str | None:
    """The run that a study asks for, or what is wrong with it, or None if it has not been started.

    Args:
        study: Whose run it is.
        name: Of its directory under `runs/`; None if the study names none.
        method: What its `config.json` must say; with `seed`.
        seed: See `method`.
        lr: Likewise, unless None.

    Raises:
        RecordError: If the study is packed, and the packed file damaged.
    """
    if name is None or not (files := study.run(name)).has("config.json"):
        return None
    try:
        run = read_run(files)
        rate = None if lr is None else run.config.options.get("lr")
        if (run.config.method, run.config.seed, rate) != (method, seed, lr):
            actual, expected = _described(run.config.method, run.config.seed, rate), _described(method, seed, lr)
            raise files.error("config.json", f"the run is {actual}, study.json says {expected}")
        if name not in names_of(run.config):
            changed = f"changed since the run began, its content belongs to a run named {run_hash(run.config)}"
            raise files.error("config.json", changed)
    except RecordError as problem:
        return study.told(problem)
    return run


def read_run(files: RunFiles) -> Run:
    """Read one run, finished or not. A run that ended at a loss above `HUGE` counts as diverged.

    Raises:
        RecordError: If a file is damaged, or `result.json` does not follow from the rows of `metrics.jsonl`.
    """
    config = RunConfig.from_json(files.text("config.json"), path=files.path / "config.json", remedy=files.remedy)
    result_path = files.path / "result.json"
    result = (
        parse_result(files.text("result.json"), path=result_path, remedy=files.remedy)
        if files.has("result.json")
        else None
    )
    train, evals, final = _metrics(files) if files.has("metrics.jsonl") or result else ((), (), None)
    _agree(files, result, config, evals, final)
    environment = _environment(files) if files.has("environment.json") else {}
    return Run(files.path.name, config, environment, train, evals, _diverged_if_huge(result))


def check_positive(files: RunFiles, run: Run) -> None:
    """Refuse a run with an evaluation that has no logarithm, for studies that go by it.

    Raises:
        RecordError: It names the line.
    """
    if all(row.loss is None or row.loss > 0 for row in run.evals):
        return
    for number, row in enumerate(_rows(files), start=1):
        if isinstance(row, EvalRow) and row.loss is not None and row.loss <= 0:
            needed = f"line {number}: loss must be above 0, as steps to a loss are found by its logarithm"
            raise files.error("metrics.jsonl", f"{needed}, got {row.loss}")


def _rows(files: RunFiles) -> Iterator[TrainRow | EvalRow | Final | Diagnostics]:
    """The rows of a run; a last line without its line end is still being written, and left out."""
    kinds = cast("type[TrainRow | EvalRow | Final | Diagnostics]", TrainRow | EvalRow | Final | Diagnostics)
    path = files.path / "metrics.jsonl"
    for number, line in enumerate(files.lines("metrics.jsonl"), start=1):
        yield decode(kinds, line, path, remedy=files.remedy, where=f"line {number}: ")


def _environment(files: RunFiles) -> Mapping[str, object]:
    return parse_object(files.text("environment.json"), files.path / "environment.json", remedy=files.lost)


def _bounded(loss: float | None) -> float | None:
    return None if loss is None or abs(loss) > HUGE else loss


def _diverged_if_huge(result: Result | None) -> Result | None:
    if result is None or _bounded(result.final_loss) == result.final_loss:
        return result
    return dataclasses.replace(result, status="diverged", final_loss=None, final_accuracy=None)


def _described(method: str, seed: int, lr: object) -> str:
    return f"{method!r} with seed {seed}" + ("" if lr is None else f" and lr {lr}")


def _metrics(files: RunFiles) -> tuple[tuple[TrainRow, ...], tuple[EvalRow, ...], Final | None]:
    train: list[TrainRow] = []
    evals: list[EvalRow] = []
    final: Final | None = None
    for number, row in enumerate(_rows(files), start=1):
        if isinstance(row, Final):
            final = row
        elif not isinstance(row, Diagnostics):
            before = train if isinstance(row, TrainRow) else evals
            if before and row.step <= before[-1].step:
                order = f"step must be larger than {before[-1].step}, the one before it, got {row.step}"
                raise files.error("metrics.jsonl", f"line {number}: {order}")
            train.append(row) if isinstance(row, TrainRow) else evals.append(row)
    return tuple(train), tuple(evals), final


def _agree(
    files: RunFiles, result: Result | None, config: RunConfig, evals: tuple[EvalRow, ...], final: Final | None
) -> None:
    """Refuse a finished run whose result is not what the last rows of its own metrics say."""
    if result is None or result.status == "diverged":
        return
    last = evals[-1] if evals else None
    early = config.target is not None and 0 < result.steps <= config.steps
    if last is None or last.step != result.steps or not (early or result.steps == config.steps):
        got = f"the last evaluation is at step {last.step if last else None}, the result at step {result.steps}"
        raise files.error("result.json", f"the run counts as finished with {config.steps} steps, but {got}")
    if (final is None) != (result.tuning_loss is None):
        there, missing = ("result.json", "metrics.jsonl") if final is None else ("metrics.jsonl", "result.json")
        raise files.error("result.json", f"{there} has the evaluation of a whole part, {missing} has not")
    if final is not None and (final.tuning_loss, final.blocks) != (result.tuning_loss, result.final_blocks):
        raise files.error("result.json", "tuning_loss or final_blocks are not those of the final row in metrics.jsonl")
    own, recorded = _bounded(result.final_loss), _bounded(final.loss) if final is not None else last.loss
    if recorded != own and (recorded is None or own is None or not math.isclose(recorded, own, rel_tol=1e-6)):
        problem = f"final_loss is {result.final_loss}, but the last evaluation in metrics.jsonl is {recorded}"
        raise files.error("result.json", problem)
