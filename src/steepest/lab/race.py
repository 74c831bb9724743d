"""A race: every method through the same loop, data order and initial weights, then a report from the records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from steepest.lab.config import RunConfig
from steepest.lab.display import RaceDisplay
from steepest.lab.ledger import locked
from steepest.lab.pool import Pool
from steepest.lab.report import write_report
from steepest.lab.study import Race, StudyMismatchError, run_directory, write_study


class FailedRunsError(RuntimeError):
    """Some runs ended with an error; the others are complete and in the report."""


def default_workers() -> int:
    """One per CPU core that this process may use, a container's quota included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores


def run_race(
    race: Race,
    out: Path,
    *,
    command: str,
    workers: int,
    threads: int = 1,
    data: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Train what is missing, and write the report.

    Args:
        race: What to compare.
        out: Directory of the study.
        command: How to repeat it, for the report.
        workers: Runs that are trained at once, at least 1. Times per step are compared fairly only if no more than the
            machine has cores.
        threads: CPU threads of each, at least 1.
        data: Data of the user, for a task that takes it.
        console: Where to show progress.

    Returns:
        Path of `report.html`.

    Raises:
        KeyboardInterrupt: If the user stopped it; every run is saved and goes on with the same command.
        FailedRunsError: If a run ended with an error. The report is written first, from what there is.
        StudyMismatchError: If `out` holds another study, or lies inside of `data`.
        RecordError: If a file in `out` is damaged.
        RunBusyError: If another race is going on in `out`.
        ValueError: If a number is below 1, an option is unknown or out of range, or a method does not fit the task.
        TypeError: If an option is of the wrong type.
        OSError: If `out` cannot be written.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if data is not None and data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise StudyMismatchError(
            f"--out {out} lies inside --data {data}, which would change while it is read; choose another."
        )
    configs = race.configs()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        return _run_locked(race, configs, out, command, Pool(workers, threads=threads, data=data), console)


def _run_locked(
    race: Race, configs: Sequence[RunConfig], out: Path, command: str, pool: Pool, console: Console | None
) -> Path:
    write_study(out, race, configs, command=command)
    runs = {
        method: [run_directory(out, config) for config in configs if config.method == method] for method in race.methods
    }
    in_order = [run_directory(out, config) for config in configs]
    with RaceDisplay(runs, steps=configs[0].steps, console=console or Console()) as display:
        failed = pool.train(in_order, tick=display.update)
    report = write_report(out)
    if failed:
        reasons = "\n".join(f"  {run / 'worker.log'}: {_last_line(run / 'worker.log')}" for run in failed)
        raise FailedRunsError(
            f"{len(failed)} of {len(in_order)} runs ended with an error:\n{reasons}\nThe report at {report} has the "
            "others. Mend the cause and repeat the command to try them again."
        )
    return report


def _last_line(log: Path) -> str:
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no reason was recorded"])[-1]
