"""Brings given runs to their end, for studies that are written as a program."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from steepest.lab.disk.files import exists, make_directory, write_whole
from steepest.lab.disk.ours import refusal
from steepest.lab.engine.display import StudyDisplay
from steepest.lab.engine.pool import STOP_S, Pool, last_words
from steepest.lab.engine.stopping import attend
from steepest.lab.runs.config import RunConfig
from steepest.lab.studies.study import StudyMismatchError, run_directory


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
    for config in configs:
        directory = run_directory(out, config)
        make_directory(directory)
        if not exists(directory / "config.json"):
            write_whole(directory / "config.json", config.to_json())
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
