"""One training run: from a config to a finished run directory, whatever happens in between.

The directory is the truth. A finished run is not run again; an interrupted one, even by `kill -9`, goes on from its
last checkpoint and ends with the numbers it would have had without the interruption.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import torch

from steepest.lab.disk.fields import parse_object, read_text
from steepest.lab.disk.files import exists, make_directory, one_line, remove, write_whole
from steepest.lab.disk.ledger import locked
from steepest.lab.disk.ours import refusal
from steepest.lab.errors import UsageError
from steepest.lab.runs.config import RunConfig, read_config, run_hash
from steepest.lab.runs.environment import describe_environment
from steepest.lab.runs.recorder import Recorder
from steepest.lab.runs.records import Result, read_result
from steepest.lab.runs.training import Training
from steepest.lab.runs.version import code_version
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import Task

__all__ = ["Interrupted", "Result", "RunMismatchError", "train_run"]


class Interrupted(Exception):  # noqa: N818 - like KeyboardInterrupt, it reports no error
    """The run was asked to stop; it is saved and goes on when `train_run` is called again."""


class RunMismatchError(UsageError, ValueError):
    """The directory, the data or the code is not what the config says."""


def train_run(
    config: RunConfig,
    run_dir: Path,
    *,
    data: Path | None = None,
    checkpoint_every: int = 25,
    keep_checkpoint: bool = False,
    diagnostics: bool = False,
    threads: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Bring a run to its end: return its stored result, or go on from its checkpoint, or start it.

    Args:
        config: The run.
        run_dir: Its directory; made if need be.
        data: Where the data of the user is, for a config that was made with it.
        checkpoint_every: Steps from one checkpoint to the next; at most so many are repeated after a crash.
        keep_checkpoint: Whether the last checkpoint, with the trained weights, outlives the run.
        diagnostics: Whether each evaluation also records what the optimizer says of itself and of the weights, see
            `SteepestDescent.diagnostics`; for methods of this library.
        threads: CPU threads; None for torch's present number. A run that goes on keeps the number it started with,
            because sums depend on it.
        stop: Asked after every step; True saves a checkpoint and raises `Interrupted`.

    Returns:
        The result, the same however often the run was interrupted, apart from times and memory.

    Raises:
        Interrupted: If `stop` returned True before the last step.
        RunBusyError: If another process is training this run.
        RunMismatchError: If the directory holds another run or is not ours, or data or code differ from the config.
        CheckpointError: If the checkpoint is damaged.
        RecordError: If another file of the run is damaged.
        ValueError: If `checkpoint_every` or `threads` is below 1, a name in the config is unknown, or the optimizer
            refuses an option.
        ModuleNotFoundError: If a package of the `lab` extra is missing.
    """
    for name, value in (("checkpoint_every", checkpoint_every), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if (problem := refusal(run_dir, "run")) is not None:
        raise RunMismatchError(problem)
    make_directory(run_dir)
    if (result := _stored_result(config, run_dir)) is not None:
        return result
    with locked(run_dir):
        if (result := _stored_result(config, run_dir)) is not None:  # finished while we came here
            return result
        if config.code != code_version():
            problem = f"The run was configured for the code {one_line(config.code)}, this is {code_version()}."
            raise RunMismatchError(f"{problem} Use that version, or make a new config in a new directory.")
        task = load_task(config, data)
        write_whole(run_dir / "config.json", config.to_json())
        checkpoint = run_dir / "checkpoint.pt"
        with using_threads(threads), torch.random.fork_rng(devices=[]):
            training = Training(config, task)
            if resuming := exists(checkpoint):
                training.load(checkpoint)
            _record_environment(run_dir, resuming=resuming)
            result = _train(training, run_dir, checkpoint_every, stop, diagnostics=diagnostics)
        write_whole(run_dir / "result.json", result.to_json())
        if not keep_checkpoint:
            remove(checkpoint)
        return result


def _train(
    training: Training, run_dir: Path, checkpoint_every: int, stop: Callable[[], bool] | None, *, diagnostics: bool
) -> Result:
    config = training.config
    with Recorder(run_dir, step=training.step) as recorder:

        def save() -> None:
            recorder.sync()  # rows first: a checkpoint without them could not be used
            training.save(run_dir / "checkpoint.pt")

        if training.step == 0:
            training.evaluate(recorder)
        while not training.ended:
            training.train_step(recorder)
            if training.evaluates:
                training.evaluate(recorder)
                if diagnostics:
                    training.diagnose(recorder)
            if training.ended:
                training.conclude(recorder)
                save()
            elif stop is not None and stop():
                save()
                message = f"Stopped after step {training.step} of {config.steps}, saved in {run_dir}."
                raise Interrupted(f"{message} Repeat the command to go on.")
            elif training.step % checkpoint_every == 0:
                save()
    return training.result(finished=datetime.now(UTC).isoformat(timespec="seconds"))


def _stored_result(config: RunConfig, run_dir: Path) -> Result | None:
    """The result of a finished run; refuses a directory that holds another run, finished or not."""
    if not exists(run_dir / "config.json"):
        return None
    stored = read_config(run_dir)
    if run_hash(stored) != run_hash(config):
        pairs = ((key, getattr(stored, key), getattr(config, key)) for key in RunConfig.__dataclass_fields__)
        changes = "; ".join(f"{key} is {old!r} there, {new!r} here" for key, old, new in pairs if old != new)
        raise RunMismatchError(f"{run_dir} holds another run: {changes}. Choose another directory, or delete it.")
    return read_result(run_dir / "result.json")


def load_task(config: RunConfig, data: Path | None) -> Task:
    """The task of a run, with the data it was configured for.

    Args:
        config: The run.
        data: Where the data of the user is; None for the task's own.

    Raises:
        RunMismatchError: If the data are others.
    """
    task = make_task(config.task, config.preset, data=data)
    identity = task.data_identity()
    if identity.sha256 != config.data.sha256:
        problem = f"The run reads {config.data.name!r} ({config.data.sha256[:12]}), here is {identity.name!r}"
        remedy = "Give the same --data, on the same Python version; runs on different data are never mixed."
        raise RunMismatchError(f"{problem} ({identity.sha256[:12]}). {remedy}")
    return task


@contextlib.contextmanager
def using_threads(threads: int | None) -> Generator[None]:
    """Set the number of threads for a while, and bring back the caller's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _record_environment(run_dir: Path, *, resuming: bool) -> None:
    """Record the machine: the first one, and each that took over. If the file is gone, this is the first one known."""
    path = run_dir / "environment.json"
    content = describe_environment()
    if resuming and exists(path):
        remedy = "Delete this file and repeat the command: only the description of the machine is lost."
        content = _taken_over(parse_object(read_text(path, remedy=remedy), path, remedy=remedy), content)
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _taken_over(started: Mapping[str, object], here: Mapping[str, object]) -> dict[str, object]:
    """The first environment, with those that took over under "resumed", `here` being the last of them."""
    first = {key: value for key, value in started.items() if key != "resumed"}
    resumed = started.get("resumed")
    sessions = [first, *(cast(list[object], resumed) if isinstance(resumed, list) else []), here]
    later = [new for old, new in itertools.pairwise(sessions) if _machine(new) != _machine(old)]
    return {**first, "resumed": later} if later else first


def _machine(session: object) -> object:
    """An environment without what may differ from session to session on one machine."""
    if not isinstance(session, dict):
        return session
    return {key: value for key, value in cast(dict[str, object], session).items() if key != "workers"}
