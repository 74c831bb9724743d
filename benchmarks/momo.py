"""What Momo costs: training steps of a method with and without it, in turns, in one process.

    python benchmarks/momo.py --preset demo --pairs 60 --out results/momo_cost

Each pair is one training step (forward, backward, optimizer) of the base method and one of its Momo version, on models
with the same weights and the same batch, in alternating order; the ratio is the median over pairs. Peak extra memory is
the most that one optimizer step had allocated at once beyond what it started with, from torch's profiler.
"""

import argparse
import csv
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from steepest import Momo, Muon, MuonAdam, MuonMax, PolarGrad, Scion, SteepestDescent
from steepest.lab.disk.ledger import write_whole
from steepest.lab.runs.environment import describe_environment
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import Task

RECIPES = {"Muon": Muon, "MuonAdam": MuonAdam, "Scion": Scion, "PolarGrad": PolarGrad, "MuonMax": MuonMax}
WARM_UP = 5
TINY = 1e-9  # learning rate: the weights stay where they are, so that every pair does the same work


class Trainer:
    """A model and an optimizer."""

    def __init__(self, task: Task, optimizer: type[SteepestDescent], **options: object) -> None:
        self.task = task
        self.model = task.build_model(0)
        self.optimizer = optimizer(self.model, TINY, **options)
        self.momo = "step_size" in options

    def backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Fill the gradients."""
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        return loss

    def seconds(self, batch: tuple[Tensor, ...]) -> tuple[float, float]:
        """Of one training step, and of the optimizer in it."""
        start = time.perf_counter()
        loss = self.backward(batch)
        middle = time.perf_counter()
        self.optimizer.step(loss=loss)
        end = time.perf_counter()
        return end - start, end - middle

    def peak_extra_bytes(self, batch: tuple[Tensor, ...]) -> int:
        """Of one optimizer step."""
        loss = self.backward(batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.optimizer.step(loss=loss)
        now, peak = 0, 0
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak


def compare(task: Task, name: str, dual: str, pairs: int) -> dict[str, object]:
    """One row of the table."""
    base = Trainer(task, RECIPES[name], **({"dual": dual} if name == "MuonMax" else {}))
    momo = Trainer(task, RECIPES[name], dual=dual, step_size=Momo())
    times: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for index in range(WARM_UP + pairs):
        batch = task.batch(torch.arange(task.budget.batch_size) + index)
        if index % 2:
            second, first = momo.seconds(batch), base.seconds(batch)
        else:
            first, second = base.seconds(batch), momo.seconds(batch)
        times.append((first, second))
    times = times[WARM_UP:]
    median = statistics.median
    quarters = statistics.quantiles([m[0] / b[0] for b, m in times], n=4)
    return {
        "method": name,
        "dual": dual,
        "pairs": pairs,
        "step_ms": round(1e3 * median(b[0] for b, _ in times), 2),
        "step_ratio": round(quarters[1], 4),
        "step_ratio_quarter": round(quarters[0], 4),
        "step_ratio_three_quarters": round(quarters[2], 4),
        "optimizer_ms": round(1e3 * median(b[1] for b, _ in times), 2),
        "optimizer_momo_ms": round(1e3 * median(m[1] for _, m in times), 2),
        "extra_memory_mb": round(base.peak_extra_bytes(batch) / 1e6, 2),
        "extra_memory_momo_mb": round(momo.peak_extra_bytes(batch) / 1e6, 2),
    }


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="where momo.csv and environment.json go")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = make_task("text", options.preset)
    rows = [compare(task, name, dual, options.pairs) for name in RECIPES for dual in ("stale", "cached")]
    print("  ".join(rows[0]))  # noqa: T201 - a command
    for row in rows:
        print("  ".join(map(str, row.values())))  # noqa: T201 - a command
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "momo.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["preset", "threads", *rows[0]])
            writer.writeheader()
            writer.writerows({"preset": options.preset, "threads": options.threads, **row} for row in rows)
        write_whole(options.out / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")


if __name__ == "__main__":
    main()
