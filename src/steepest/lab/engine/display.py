"""What a study shows while it runs: a bar per method on a terminal, or a line per finished run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from steepest.lab.disk.files import exists
from steepest.lab.engine.pool import read_progress

GLANCE_S = 0.3


class StudyDisplay:
    """Progress of all runs. Use it as a context manager and call `update` now and then.

    Args:
        runs: Directories of the runs of each method, in order of seed.
        steps: Steps of a run.
        console: Where to print.
    """

    def __init__(self, runs: Mapping[str, Sequence[Path]], *, steps: int, console: Console) -> None:
        self._runs = runs
        self._steps = steps
        self._console = console
        self._reported = {run for members in runs.values() for run in members if exists(run / "result.json")}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f} steps"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._glanced = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            width = max(map(len, self._runs))
            for method, members in self._runs.items():
                name = escape(method.ljust(width))
                self._tasks[method] = self._bars.add_task(name, total=self._steps * len(members), loss="", start=False)
            count = sum(len(members) for members in self._runs.values())
            if count > 1:
                self._tasks[""] = self._bars.add_task("all".ljust(width), total=self._steps * count, loss="")
            self.update()
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def glance(self) -> None:
        """Update, but not more often than an eye can follow; for a caller that is busy with something else."""
        if time.monotonic() - self._glanced > GLANCE_S:
            self.update()
            self._glanced = time.monotonic()

    def update(self) -> None:
        """Read how far the runs are, and show it."""
        done_in_all = 0
        for method, members in self._runs.items():
            progress = [read_progress(run, steps=self._steps) for run in members]
            done = sum(run.step for run in progress)
            done_in_all += done
            under_way = [run for run in progress if run.step > 0]
            loss = under_way[-1].loss if under_way else None
            if method in self._tasks:
                task = self._tasks[method]
                if done and not self._bars.tasks[task].started:
                    self._bars.start_task(task)
                self._bars.update(task, completed=done, loss="" if loss is None else f"loss {loss:.4g}")
            self._report(method, members)
        if "" in self._tasks:
            self._bars.update(self._tasks[""], completed=done_in_all)

    def _report(self, method: str, members: Sequence[Path]) -> None:
        """Without a terminal: one line when a run ends."""
        for index, run in enumerate(members, start=1):
            if run not in self._reported and exists(run / "result.json"):
                self._reported.add(run)
                if not self._console.is_terminal:
                    self._console.print(
                        f"{method}: run {index} of {len(members)} finished", markup=False, highlight=False
                    )
