"""`steepest bench train`: which part of a training step the optimizer takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from steepest.lab.cli.bench.measured import BenchCommand, Measured
from steepest.lab.cli.command import Arg
from steepest.lab.cli.options import Count, File, Names, OnThreads, checking_usage, racers
from steepest.lab.cli.outcome import Table
from steepest.lab.tasks import TASKS

if TYPE_CHECKING:
    from steepest.lab.bench.train_share import Share

OTHERS = ("newton-muon", "muonadam-momo", "muonmax", "muonmax-momo")  # timed besides the methods that race
COLUMNS = ("method", "fwd+bwd ms", "optimizer ms", "quartiles", "share", "step / muon's", "optimizer / muon's")
_METHODS = f"of %(known)s; default: {','.join(racers('text'))},{','.join(OTHERS)} on text"


class TrainBench(BenchCommand, OnThreads):
    """Time training steps of several methods in turns, and tell the optimizer's share.

    examples:
      steepest bench train
      steepest bench train --preset demo small --methods muon,newton-muon,muonadam-momo --threads 2 --out out/share

    Every round trains each method for one step on the same batch, in another order; ratios are taken within rounds. A
    method that refreshes something every N steps does it in one step of four here; medians of ordinary steps and of
    refreshes are weighed as (N - 1) : 1.
    """

    name = "train"

    task: Annotated[str, Arg(", ".join(TASKS))] = "text"
    preset: Annotated[tuple[str, ...], Arg("demo, tiny and small; default: demo")] = ("demo",)
    data: Annotated[File | None, Arg("a file or folder for text, cifar10, fineweb", "PATH")] = None
    methods: Annotated[Names | None, Arg(_METHODS)] = None
    steps: Annotated[Count, Arg("of each method", "N")] = 32
    every: Annotated[Count, Arg("steps per refresh", "N")] = 32

    def measure(self) -> Measured:
        """Every preset."""
        from steepest.lab.bench.train_share import summarize, time_steps
        from steepest.lab.tasks import make_task

        methods = self.methods or (*racers(self.task), *OTHERS)
        with checking_usage():
            tasks = [make_task(self.task, preset, data=self.data) for preset in dict.fromkeys(self.preset)]
            seconds = {task.preset: time_steps(task, methods, steps=self.steps) for task in tasks}
            shares = {preset: summarize(own, every=self.every) for preset, own in seconds.items()}

        def draw() -> bytes:
            from steepest.lab.bench.train_png import train_png

            return train_png(shares)

        rows = [_row(self.task, preset, share) for preset, own in shares.items() for share in own]
        raw = {
            preset: {method: list(map(dataclasses.asdict, own)) for method, own in by_method.items()}
            for preset, by_method in seconds.items()
        }
        title = f"{self.steps} training steps of each method, {self.threads} thread(s)"
        tables = [
            Table(f"{self.task} {preset}: {title}", COLUMNS, list(map(_cells, own))) for preset, own in shares.items()
        ]
        content = {"steps": self.steps, "rows": rows, "seconds": raw}
        return Measured(content, rows, tables, draw, {"methods": methods})


def _row(task: str, preset: str, share: Share) -> dict[str, object]:
    """A line of the CSV; each median with its quartiles."""
    return {
        "task": task,
        "preset": preset,
        "method": share.method,
        "every": share.every,
        **share.forward_backward_ms.columns("forward_backward_ms"),
        **share.optimizer_ms.columns("optimizer_ms"),
        **share.step_ratio.columns("step_ratio"),
        **share.optimizer_ratio.columns("optimizer_ratio"),
        "share": share.share,
    }


def _cells(share: Share) -> list[str]:
    return [
        share.method + (f" (a refresh in {share.every})" if share.every else ""),
        f"{share.forward_backward_ms.median:.2f}",
        f"{share.optimizer_ms.median:.2f}",
        share.optimizer_ms.span(".2f"),
        f"{share.share:.1%}",
        f"{share.step_ratio.median:.3f}",
        f"{share.optimizer_ratio.median:.3f}",
    ]
