"""What Momo costs: training steps of a method with and without it, in turns, in one process.

Each pair is one training step (forward, backward, optimizer) of the base method and one of its Momo version, on models
with the same weights and the same batch, in alternating order; the ratio is the median over pairs. Extra memory is
the most that one optimizer step holds at once beyond what was held before it.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from steepest import Momo, Muon, MuonAdam, MuonMax, PolarGrad, Scion, SteepestDescent
from steepest.lab.bench.memory import peak_extra_bytes
from steepest.lab.tasks.task import Batch, Task

RECIPES: Mapping[str, Callable[..., SteepestDescent]] = {
    "Muon": Muon,
    "MuonAdam": MuonAdam,
    "Scion": Scion,
    "PolarGrad": PolarGrad,
    "MuonMax": MuonMax,
}
WARM_UP = 5
TINY = 1e-9  # learning rate: the weights stay where they are, so that every pair does the same work


class Trainer:
    """A model and an optimizer."""

    def __init__(self, task: Task, optimizer: Callable[..., SteepestDescent], **options: object) -> None:
        self.task = task
        self.model = task.build_model(0)
        self.optimizer = optimizer(self.model, TINY, **options)

    def backward(self, batch: Batch) -> Tensor:
        """Fill the gradients."""
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        return loss

    def seconds(self, batch: Batch) -> tuple[float, float]:
        """Of one training step, and of the optimizer in it."""
        start = time.perf_counter()
        loss = self.backward(batch)
        middle = time.perf_counter()
        self.optimizer.step(loss=loss)
        end = time.perf_counter()
        return end - start, end - middle

    def extra_bytes(self, batch: Batch) -> int:
        """The most that one optimizer step holds beyond what was held before it."""
        loss = self.backward(batch)
        return peak_extra_bytes(lambda: self.optimizer.step(loss=loss))


def momo_cost(task: Task, name: str, dual: str, *, pairs: int) -> dict[str, object]:
    """One row of the table.

    Args:
        task: Whose model and batches.
        name: A key of `RECIPES`.
        dual: "cached" or "stale".
        pairs: Of training steps.
    """
    base = Trainer(task, RECIPES[name], **({"dual": dual} if name == "MuonMax" else {}))
    momo = Trainer(task, RECIPES[name], dual=dual, step_size=Momo())
    times: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for index in range(WARM_UP + pairs):
        batch = task.batch(torch.arange(task.budget.batch_size, device="cpu") + index)
        if index % 2:
            second, first = momo.seconds(batch), base.seconds(batch)
        else:
            first, second = base.seconds(batch), momo.seconds(batch)
        times.append((first, second))
    times = times[WARM_UP:]
    batch = task.batch(torch.arange(task.budget.batch_size, device="cpu"))
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
        "extra_memory_mb": round(base.extra_bytes(batch) / 1e6, 2),
        "extra_memory_momo_mb": round(momo.extra_bytes(batch) / 1e6, 2),
    }
