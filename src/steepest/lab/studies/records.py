"""Stored records of runs and of a race, read back and validated: what is in the files, or an error, never a guess.

A study directory holds `study.json` and one directory per run under `runs/`, or all of that in one packed file. The
files may have been edited, cut short or sent by a stranger, so every field is checked before anything is computed from
it, and what two files both say is compared. Text is kept as it is: whoever displays it escapes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from steepest.lab.disk.fields import Fields, RecordError, parse_object
from steepest.lab.disk.packed import NAME, RunFiles, StudyFiles
from steepest.lab.runs.config import RunConfig, names_of, run_hash
from steepest.lab.runs.result import Final, Result, blocks, parse_result
from steepest.lab.studies import KINDS

FORMAT = 1
HUGE = 1e100  # float64 holds larger numbers, but not their sums; a loss above it has diverged

Status = Literal["finished", "diverged", "unfinished"]


@dataclass(frozen=True)
class TrainRow:
    """One optimizer step, counted from 1. Seconds; `train_s` is cumulative and leaves evaluations out."""

    step: int
    tokens: int
    loss: float | None
    lr: float
    forward_backward_s: float
    optimizer_s: float
    train_s: float


@dataclass(frozen=True)
class EvalRow:
    """One evaluation after `step` steps; `loss` is None where it was not finite."""

    step: int
    tokens: int
    loss: float | None
    accuracy: float | None
    train_s: float


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


def read_study(study_dir: Path) -> Study:
    """Read a race and all of its runs.

    A run that cannot be read does not spoil the others: it is listed in `absent` with what is wrong with it.

    Args:
        study_dir: The directory that holds `study.json`, or a packed study.

    Raises:
        RecordError: If `study.json` is missing, damaged, or not a race.
    """
    files = StudyFiles(study_dir)
    study = open_study(files)
    study.expect("kind", "race")
    methods, seeds = study.texts("methods"), study.counts("seeds")
    names = _run_names(study, methods, seeds)
    runs: list[Run] = []
    absent: list[Absent] = []
    for method in methods:
        for seed in seeds:
            found = find_run(files, names.get((method, seed)), method=method, seed=seed)
            if isinstance(found, Run):
                runs.append(found)
            else:
                absent.append(Absent(method, seed, found))
    return Study(
        task=study.text("task"),
        preset=study.text("preset"),
        methods=methods,
        baseline=baseline(study, methods),
        seeds=seeds,
        target=_target(study),
        command=study.text("command"),
        created=time_of(study, "created"),
        runs=tuple(runs),
        absent=tuple(absent),
    )


def open_study(files: StudyFiles) -> Fields:
    """The content of `study.json`, of a known format and kind.

    Raises:
        RecordError: If the file is damaged, or of another format or kind.
    """
    study = files.study()
    study.expect("format", FORMAT)
    if study.values.get("kind") not in KINDS:
        raise study.error("kind", f"one of {', '.join(KINDS)}")
    return study


def read_kind(study_dir: Path) -> str:
    """What a study directory holds.

    Raises:
        RecordError: As `open_study`, or if there is no study.
    """
    return open_study(StudyFiles(study_dir)).text("kind")


def baseline(study: Fields, methods: tuple[str, ...]) -> str:
    """The method that the others are compared with.

    Raises:
        RecordError: If it is not one of the methods.
    """
    if study.text("baseline") not in methods:
        raise study.error("baseline", f"one of the methods {list(methods)}")
    return study.text("baseline")


def time_of(study: Fields, key: str) -> datetime:
    """A time, ISO 8601.

    Raises:
        RecordError: If it is not one.
    """
    try:
        return datetime.fromisoformat(study.text(key))
    except ValueError:
        raise study.error(key, "a time such as 2025-01-31T12:00:00+00:00") from None


def named_runs(study: Fields) -> dict[str, Fields]:
    """The entries under "runs" by the names of their directories.

    Raises:
        RecordError: If a name could not have been given to a run; it becomes a path.
    """
    runs = study.inner("runs")
    for name in runs.values:
        if not NAME.fullmatch(name):
            raise runs.error(name, "named by 16 hexadecimal digits")
    return {name: runs.inner(name) for name in runs.values}


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
    for fields in _rows(files):
        loss = fields.real_or_none("loss") if fields.text("kind") == "eval" else None
        if loss is not None and loss <= 0:
            raise fields.error("loss", "above 0, as steps to a loss are found by its logarithm")


def _rows(files: RunFiles) -> Iterator[Fields]:
    path = files.path / "metrics.jsonl"
    for number, line in enumerate(files.lines("metrics.jsonl"), start=1):
        yield parse_object(line, path, remedy=files.remedy, where=f"line {number}: ")


def _environment(files: RunFiles) -> Mapping[str, object]:
    path = files.path / "environment.json"
    return parse_object(files.text("environment.json"), path, remedy=files.lost).values


def _bounded(loss: float | None) -> float | None:
    return None if loss is None or abs(loss) > HUGE else loss


def _diverged_if_huge(result: Result | None) -> Result | None:
    if result is None or _bounded(result.final_loss) == result.final_loss:
        return result
    return dataclasses.replace(result, status="diverged", final_loss=None, final_accuracy=None)


def _target(study: Fields) -> float | None:
    target = study.real_or_none("target") if "target" in study.values else None
    if target != _bounded(target):
        raise study.error("target", f"a loss of at most {HUGE:g}")
    return target


def _seconds(fields: Fields, key: str) -> float:
    if fields.seconds(key) > HUGE:
        raise fields.error(key, f"a number of seconds of at most {HUGE:g}")
    return fields.seconds(key)


def _run_names(study: Fields, methods: tuple[str, ...], seeds: tuple[int, ...]) -> dict[tuple[str, int], str]:
    runs = study.inner("runs")
    names: dict[tuple[str, int], str] = {}
    for name, run in named_runs(study).items():
        key = run.text("method"), run.count("seed")
        if key[0] not in methods or key[1] not in seeds:
            raise runs.error(name, f"one of the methods {list(methods)} with one of the seeds {list(seeds)}")
        if key in names:
            raise runs.error(name, f"the only run of {key[0]!r} with seed {key[1]}, which {names[key]} is already")
        names[key] = name
    return names


def _described(method: str, seed: int, lr: object) -> str:
    return f"{method!r} with seed {seed}" + ("" if lr is None else f" and lr {lr}")


def _metrics(files: RunFiles) -> tuple[tuple[TrainRow, ...], tuple[EvalRow, ...], Final | None]:
    """The rows of a run; a last line without its line end is still being written, and left out."""
    train: list[TrainRow] = []
    evals: list[EvalRow] = []
    final: Final | None = None
    for fields in _rows(files):
        match fields.text("kind"):
            case "train":
                train.append(_train_row(fields))
                _check_order(fields, [row.step for row in train[-2:]])
            case "eval":
                evals.append(_eval_row(fields))
                _check_order(fields, [row.step for row in evals[-2:]])
            case "final":
                final = _final(fields)
            case "diagnostics":  # for the eye: no report reads them
                fields.inner("numbers")
            case _:
                raise fields.error("kind", "'train', 'eval', 'final' or 'diagnostics'")
    return tuple(train), tuple(evals), final


def _check_order(fields: Fields, steps: list[int]) -> None:
    if len(steps) == 2 and steps[1] <= steps[0]:
        raise fields.error("step", f"larger than {steps[0]}, the one before it")


def _train_row(fields: Fields) -> TrainRow:
    return TrainRow(
        step=fields.count("step", least=1),
        tokens=fields.count("tokens"),
        loss=_bounded(fields.real_or_none("loss")),
        lr=fields.real("lr"),
        forward_backward_s=_seconds(fields, "forward_backward_s"),
        optimizer_s=_seconds(fields, "optimizer_s"),
        train_s=_seconds(fields, "train_s"),
    )


def _eval_row(fields: Fields) -> EvalRow:
    return EvalRow(
        step=fields.count("step"),
        tokens=fields.count("tokens"),
        loss=_bounded(fields.real_or_none("loss")),
        accuracy=fields.real_or_none("accuracy"),
        train_s=_seconds(fields, "train_s"),
    )


def _final(fields: Fields) -> Final:
    accuracy = fields.real_or_none("accuracy")
    return Final(fields.real("loss"), accuracy, blocks(fields, "blocks"), fields.real("tuning_loss"))


def _agree(
    files: RunFiles, result: Result | None, config: RunConfig, evals: tuple[EvalRow, ...], final: Final | None
) -> None:
    """Refuse a finished run whose result is not what the last rows of its own metrics say."""
    for key, value in (("train_s", result and result.train_s), ("final_accuracy", result and result.final_accuracy)):
        if value is not None and abs(value) > HUGE:
            raise files.error("result.json", f"{key} must be at most {HUGE:g}, got {value:g}")
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
