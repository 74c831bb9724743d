"""Trains the runs of a study with as many workers as there are, here and elsewhere, until none is left."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from sqlalchemy.engine import URL

from steepest.lab.disk.files import check_regular, exists, make_directory, one_line
from steepest.lab.disk.ours import RunBusyError, locked, refusal
from steepest.lab.engine.display import StudyDisplay
from steepest.lab.engine.pool import STOP_S, Pool, last_words
from steepest.lab.engine.queue import Queue, damaged_runs, missing_runs, open_queue
from steepest.lab.engine.stopping import attend
from steepest.lab.engine.storage import GRACE_S, StorageError, default_url, parse_url
from steepest.lab.errors import Failure
from steepest.lab.runs.config import RunConfig
from steepest.lab.runs.version import code_version
from steepest.lab.studies.report import write_report
from steepest.lab.studies.study import (
    StudyMismatchError,
    StudyPlan,
    read_listed,
    read_listing,
    run_directory,
    write_configs,
    write_study,
)
from steepest.lab.tasks import make_task

IDLE_S = 1.0  # until a worker without a run looks again: another one may have died
QUIET_S = 5.0  # without a run of its own, until a command says what it waits for
PATIENCE_S = 120.0  # a database that does not answer for so long is given up; runs go on meanwhile


class FailedRunsError(Failure, RuntimeError):
    """Some runs ended with an error; the others are complete and in the report."""


def default_workers() -> int:
    """One per CPU core that this process may use, a container's quota included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores


def run_study(
    plan: StudyPlan,
    out: Path,
    *,
    command: str,
    workers: int,
    threads: int = 1,
    data: Path | None = None,
    storage: str | None = None,
    console: Console | None = None,
) -> Path:
    """Train what is missing, and write the report.

    Args:
        plan: A race or a sweep; one that grows with its results goes on until it asks for no more runs.
        out: Directory of the study.
        command: How to repeat it, for the report.
        workers: Runs that are trained at once here, at least 1. Times per step are compared fairly only if no more
            than the machine has cores.
        threads: CPU threads of each, at least 1.
        data: Data of the user, for a task that takes it.
        storage: URL of the database that hands the runs out; None for a file in `out`.
        console: Where to show progress.

    Returns:
        Path of `report.html`.

    Raises:
        KeyboardInterrupt: If the user stopped it; every run is saved and goes on with the same command.
        FailedRunsError: If a run ended with an error. The report is written first, from what there is.
        StorageError: If the database does not answer though runs are missing; every run is saved, too, and the report
            is written from those that have ended.
        StudyMismatchError: If `out` holds another study, or lies inside of `data`.
        RecordError: If a file in `out` is damaged.
        RunBusyError: If another study is going on in `out`.
        ValueError: If a number is below 1, an option is unknown or out of range, or a method does not fit the task.
        TypeError: If an option is of the wrong type.
        OSError: If `out` cannot be written.
        ModuleNotFoundError: If the driver of the database is not installed.
    """
    pool, console = _pool(workers, threads, data), console or Console()
    if data is not None and data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise StudyMismatchError(
            f"--out {out} lies inside --data {data}, which would change while it is read; choose another."
        )
    if (problem := refusal(out, "study")) is not None:
        raise StudyMismatchError(problem)
    url = _database(out, storage)
    configs = plan.grown(out)
    make_directory(out)
    with locked(out):
        known, failed = 0, list[Path]()
        while len(configs) > known:
            write_study(out, plan, configs, command=command)
            try:
                with open_queue(out, url, create=True) as queue:
                    queue.fill(retry=known == 0)
                    failed = _train(queue, pool, console, steps=max(config.steps for config in configs))
            except StorageError as error:
                if missing_runs(out):
                    raise _with_report(error, out, len(configs)) from None
                failed = damaged_runs(out)
                _say(console, f"{error} All runs have ended without it.")
            known, configs = len(configs), plan.grown(out)
        report = write_report(out)
    if failed:
        raise FailedRunsError(
            f"{len(failed)} of {len(configs)} runs ended with an error:\n{_reasons(failed)}\nThe report at {report} "
            "has the others. Mend the cause and repeat the command to try them again."
        )
    return report


def join_study(
    out: Path,
    *,
    workers: int,
    threads: int = 1,
    data: Path | None = None,
    storage: str | None = None,
    console: Console | None = None,
) -> int:
    """Help with a study that somebody has started, until none of its runs is left.

    Args:
        out: Directory of the study, as this machine sees it.
        workers: Runs that are trained at once here, at least 1.
        threads: CPU threads of each, at least 1.
        data: Data of the user, if the study was started with it.
        storage: As it was started with.
        console: Where to show progress.

    Returns:
        How many runs the study has; all of them are finished.

    Raises:
        KeyboardInterrupt: If the user stopped it; every run is saved.
        FailedRunsError: If a run ended with an error, here or elsewhere.
        StorageError: If the database does not answer, or does not know the study.
        StudyMismatchError: If code or data differ from those of the study.
        RecordError: If there is no study in `out`, or a file of it is damaged.
        ValueError: If a number is below 1, or the storage is no database.
        FileNotFoundError: If `data` is not there.
        ModuleNotFoundError: If the driver of the database is not installed.
    """
    pool = _pool(workers, threads, data)
    url = _database(out, storage)
    listing = read_listing(out)
    if not listing.runs:
        raise StudyMismatchError(f"The study in {out} has no runs. Start it again with steepest sweep or race.")
    _check_same(out, listing.runs, data)
    steps = read_listed(out / "runs" / next(iter(listing.runs))).steps
    with open_queue(out, url, create=False) as queue:
        failed = _train(queue, pool, console or Console(), steps=steps)
        while _led(out):  # whoever leads adds runs when results ask for them
            time.sleep(IDLE_S)
            if queue.fill():
                failed = _train(queue, pool, console or Console(), steps=steps)
    if failed:
        raise FailedRunsError(
            f"{len(failed)} of {len(listing.runs)} runs ended with an error:\n{_reasons(failed)}\nMend the cause and "
            "repeat the command that started the study to try them again."
        )
    return len(read_listing(out).runs)


def _database(out: Path, storage: str | None) -> URL:
    """Where the runs are handed out; the file in a study's directory is opened by others, so it is looked at before."""
    if storage is not None:
        return parse_url(storage)
    url = default_url(out)
    for suffix in ("", "-journal", "-wal", "-shm"):
        check_regular(out / f"optuna.db{suffix}", remedy="Delete it and repeat the command: no run is lost by that.")
    return url


def _with_report(error: StorageError, out: Path, number: int) -> StorageError:
    """The error, and where what there is can be read."""
    ended = number - len(missing_runs(out))
    if not ended:
        return error
    with contextlib.suppress(OSError):  # as on a disk that is full
        report = write_report(out)
        return StorageError(f"{error}\nThe report at {report} has the {ended} of {number} runs that have ended.")
    return error


def _led(out: Path) -> bool:
    """Whether the process that started the study is still there."""
    try:
        with locked(out):
            return False
    except RunBusyError:
        return True


def _pool(workers: int, threads: int, data: Path | None) -> Pool:
    for name, value in (("workers", workers), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    return Pool(workers, threads, data, threading.Event())


def _check_same(out: Path, names: Iterable[str], data: Path | None) -> None:
    """Refuse to help where every run would fail: with another version of the code or other data."""
    unfinished = (out / "runs" / name for name in names if not exists(out / "runs" / name / "result.json"))
    if (run := next(unfinished, None)) is None:
        return
    config = read_listed(run)  # all runs have the same code and data
    if config.code != code_version():
        raise StudyMismatchError(
            f"The runs in {out} are configured for the code {one_line(config.code)}, this is {code_version()}. "
            "Install the same version of steepest on every machine."
        )
    here = make_task(config.task, config.preset, data=data).data_identity()
    if here.sha256 != config.data.sha256:
        raise StudyMismatchError(
            f"The runs in {out} read {config.data.name!r} ({config.data.sha256[:12]}), here is {here.name!r} "
            f"({here.sha256[:12]}). Give the same --data, on the same Python version."
        )


def _train(queue: Queue, pool: Pool, console: Console, *, steps: int) -> list[Path]:
    """Bring every run to its end; returns the directories of those that failed."""
    runs: dict[str, list[Path]] = {}
    for name, method in (listed := read_listing(queue.out).runs).items():
        runs.setdefault(method, []).append(queue.out / "runs" / name)
    workers = min(pool.workers, max(1, len(listed)))
    pool = replace(pool, workers=workers, stop=threading.Event())  # of this round
    waiting = _Waiting(pool, queue, console)
    with StudyDisplay(runs, steps=steps, console=console) as display:

        def update() -> None:
            display.update()
            waiting.update()

        with ThreadPoolExecutor(workers) as threads:
            slots = [threads.submit(_work, queue, pool) for _ in range(workers)]
            attend(slots, pool, update=update, tell=partial(_say, console), patience_s=STOP_S)
        display.update()
    for slot in slots:
        slot.result()
    return queue.failures()


class _Waiting:
    """Says once what a command waits for that has no run of its own."""

    def __init__(self, pool: Pool, queue: Queue, console: Console) -> None:
        self._pool, self._queue, self._console = pool, queue, console
        self._since = time.monotonic()
        self._told = False

    def update(self) -> None:
        if self._pool.under_way:
            self._since = time.monotonic()
        elif not self._told and not self._pool.stop.is_set() and time.monotonic() - self._since > QUIET_S:
            self._told = True
            if number := len(missing_runs(self._queue.out)):
                _say(
                    self._console,
                    f"Waiting for {number} runs: other processes train them, or are gone; a run whose process shows no "
                    f"sign of life is taken over after {GRACE_S} s.",
                )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _work(queue: Queue, pool: Pool) -> None:
    """One worker: trains whatever waits, until every run of the study has come to an end."""
    silent_since: float | None = None
    filled = False
    while not pool.stop.is_set():
        try:
            if queue.take(pool.train):
                filled = False
                continue
            if queue.fill() == 0:
                return
            silent_since = None
            if not filled:  # what was put there just now is taken at once
                filled = True
                continue
        except StorageError as error:
            if queue.complete():
                return  # by the directories, which need no database
            silent_since = silent_since or time.monotonic()
            if error.lasting or time.monotonic() - silent_since > PATIENCE_S:
                raise
        pool.stop.wait(IDLE_S)


def _reasons(failed: Sequence[Path]) -> str:
    return "\n".join(f"  {run / 'worker.log'}: {last_words(run)}" for run in failed)


def train_runs(runs: Mapping[str, Sequence[RunConfig]], out: Path, *, workers: int) -> None:
    """Train what has no result yet; an interrupted run goes on from its checkpoint.

    Args:
        runs: Under the labels that the display shows.
        out: Each run gets a directory in `out/runs`, named by its content.
        workers: Runs at once, one CPU thread each.

    Raises:
        RuntimeError: If a run did not end; the message says which, and its last words.
        StudyMismatchError: If `out` holds what is not ours.
        KeyboardInterrupt: If the user stopped it; every run is saved.
    """
    if (problem := refusal(out, "study")) is not None:
        raise StudyMismatchError(problem)
    configs = [config for labelled in runs.values() for config in labelled]
    write_configs(out, configs)
    shown = {label: [run_directory(out, config) for config in labelled] for label, labelled in runs.items()}
    missing = [run for config in configs if not exists((run := run_directory(out, config)) / "result.json")]
    pool = Pool(workers, threads=1, data=None, stop=threading.Event())
    steps = max(config.steps for config in configs)
    console = Console()
    with StudyDisplay(shown, steps=steps, console=console) as display, ThreadPoolExecutor(workers) as threads:
        outcomes = {run: threads.submit(pool.train, run) for run in missing}
        attend(list(outcomes.values()), pool, update=display.update, tell=console.print, patience_s=STOP_S)
    if failed := [run for run, outcome in outcomes.items() if outcome.result() != "finished"]:
        raise RuntimeError("Not finished: " + "; ".join(f"{run}: {last_words(run)}" for run in failed))
