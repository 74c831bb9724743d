"""The optimizer's share of a training step: all methods in turns, on copies of one model and the same batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.lab.bench.memory import peak_extra_bytes
from steepest.lab.bench.timing import Quartiles, order, quartiles
from steepest.lab.methods import build_optimizer, options_of, resolve
from steepest.lab.runs.device import Clock, Stopwatch
from steepest.lab.tasks.order import ExampleOrder, derive_seed
from steepest.lab.tasks.task import Batch, Task
from steepest.optim import SteepestDescent

Loss = Callable[[nn.Module, Batch], Tensor]

BASELINE = "muon"
# A method that refreshes something every so many steps does so in one step of four here, so that there are enough of
# them to take a median; they are weighed as one in `every`.
CYCLE = 4


@dataclass(frozen=True)
class Share:
    """What a method takes of a training step.

    Args:
        method: Its name.
        every: Steps from one refresh to the next for which the numbers hold; None if all steps are alike.
        forward_backward_ms: Median milliseconds.
        optimizer_ms: Likewise.
        step_ratio: Of the whole step to the baseline's in the same round.
        optimizer_ratio: Of the optimizer's part, likewise.
    """

    method: str
    every: int | None
    forward_backward_ms: Quartiles
    optimizer_ms: Quartiles
    step_ratio: Quartiles
    optimizer_ratio: Quartiles

    @property
    def share(self) -> float:
        """Of the optimizer in the sum of both medians."""
        return self.optimizer_ms.median / (self.optimizer_ms.median + self.forward_backward_ms.median)

    def columns(self) -> dict[str, Any]:
        """A line of a table; each median with its quartiles."""
        own = ("forward_backward_ms", "optimizer_ms", "step_ratio", "optimizer_ratio")
        found: dict[str, Any] = {"method": self.method, "every": self.every}
        for name in own:
            found |= getattr(self, name).columns(name)
        return {**found, "share": self.share}


@dataclass(frozen=True)
class Seconds:
    """Of one training step."""

    forward_backward: float
    optimizer: float

    @property
    def whole(self) -> float:
        """Of both."""
        return self.forward_backward + self.optimizer


class Trainer:
    """A model with an optimizer.

    Args:
        name: Of the method.
        model: Its own.
        loss: Of a model on a batch.
        optimizer: Of the model.
        device: Where the model is.
    """

    def __init__(self, name: str, model: nn.Module, loss: Loss, optimizer: Optimizer, *, device: str = "cpu") -> None:
        self.name = name
        self.device = torch.device(device)
        self._model = model
        self._loss = loss
        self.optimizer = optimizer

    @classmethod
    def of(cls, task: Task, method: str, *, device: str = "cpu") -> Trainer:
        """A copy of the task's model, with the optimizer of a method as the lab builds it.

        Args:
            task: Loaded.
            method: A key of `METHODS`; one that refreshes does it in the last step of each cycle.
            device: Where it trains.

        Raises:
            ValueError: If the method is unknown, or does not take the model.
        """
        model = task.build_model(0).to(device)
        cycle = {"every": CYCLE, "first": CYCLE - 1} if refreshes(method) else {}
        options = resolve(method, task=task.name, preset=task.preset, options=cycle).options
        torch.manual_seed(derive_seed("method", 0))
        return cls(method, model, task.loss, build_optimizer(method, model, options), device=device)

    def step(self, batch: Batch, clock: Clock = time.perf_counter) -> Seconds:
        """Train on a batch.

        Args:
            batch: Of the task.
            clock: Tells seconds on the CPU.

        Raises:
            ValueError: If the loss is not finite: what follows would not be a training step.
        """
        inputs, targets = (part.to(self.device) for part in batch)
        watch = Stopwatch(self.device, clock=clock)
        watch.mark()
        loss = self._backward((inputs, targets))
        value = loss.item()
        watch.mark()
        if not math.isfinite(value):
            raise ValueError(f"The loss of {self.name!r} became {value}. Take fewer steps, or leave the method out.")
        self._update(loss)
        self.optimizer.zero_grad()
        watch.mark()
        return Seconds(*watch.seconds())

    def extra_bytes(self, batch: Batch) -> int:
        """The most that one optimizer step holds beyond what was held before it."""
        loss = self._backward((batch[0].to(self.device), batch[1].to(self.device)))
        return peak_extra_bytes(lambda: self._update(loss), device=str(self.device))

    def _backward(self, batch: Batch) -> Tensor:
        loss = self._loss(self._model, batch)
        loss.backward()
        return loss

    def _update(self, loss: Tensor) -> None:
        if isinstance(self.optimizer, SteepestDescent):
            self.optimizer.step(loss=loss)
        else:
            self.optimizer.step()


def in_turns(
    trainers: Mapping[str, Trainer], batches: Iterable[Batch], *, clock: Clock = time.perf_counter
) -> dict[str, list[Seconds]]:
    """Each round is one step of everybody on one batch, in another order; the first cycle of rounds is not counted.

    Args:
        trainers: By name.
        batches: One for each round.
        clock: Tells seconds.

    Returns:
        By name, in order of the rounds.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in trainers}
    for index, batch in enumerate(batches):
        for name in order(list(trainers), index):
            seconds = trainers[name].step(batch, clock)
            if index >= CYCLE:
                found[name].append(seconds)
    return found


def refreshes(method: str) -> bool:
    """Whether some steps of a method do more than others."""
    return "every" in options_of(method)


def time_steps(
    task: Task, methods: Sequence[str], *, steps: int, device: str = "cpu", clock: Clock = time.perf_counter
) -> dict[str, list[Seconds]]:
    """Train with all methods in turns: each round is one step of each on one batch, in another order.

    A cycle of rounds comes first and is not counted.

    Args:
        task: Loaded.
        methods: Keys of `METHODS`, the baseline among them.
        steps: Rounds that count: whole cycles, at least two.
        device: Where they train.
        clock: Tells seconds on the CPU.

    Returns:
        By method, in order of the rounds.

    Raises:
        ValueError: If a method is unknown or there twice, or the baseline or steps are missing, or a loss is not
            finite.
    """
    if steps < 2 * CYCLE or steps % CYCLE:
        raise ValueError(f"steps takes whole cycles of {CYCLE}, at least two, got {steps}. Take {2 * CYCLE} or 32.")
    if BASELINE not in methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods takes different names, {BASELINE!r} among them, got {', '.join(methods)}.")
    trainers = {method: Trainer.of(task, method, device=device) for method in methods}
    examples = ExampleOrder(task.train_size, seed=0)
    batches = (task.batch(examples.take(task.budget.batch_size)) for _ in range(CYCLE + steps))
    return in_turns(trainers, batches, clock=clock)


def summarize(seconds: Mapping[str, Sequence[Seconds]], *, every: int) -> list[Share]:
    """Medians and paired ratios.

    Args:
        seconds: As `time_steps` returns them.
        every: Steps from one refresh to the next, as methods that refresh are used.

    Returns:
        One per method.
    """
    base = seconds[BASELINE]
    shares: list[Share] = []
    for method, own in seconds.items():
        period = every if refreshes(method) else None
        pairs = list(zip(own, base, strict=True))
        shares.append(
            Share(
                method,
                period,
                forward_backward_ms=weighed([1e3 * each.forward_backward for each in own], every=period),
                optimizer_ms=weighed([1e3 * each.optimizer for each in own], every=period),
                step_ratio=weighed([s.whole / b.whole for s, b in pairs], every=period),
                optimizer_ratio=weighed([s.optimizer / b.optimizer for s, b in pairs], every=period),
            )
        )
    return shares


def weighed(values: Sequence[float], *, every: int | None) -> Quartiles:
    """Quartiles of values of steps; with refreshes, those of ordinary steps and of refreshes in their proportion.

    A median over all steps would not see the refreshes at all.

    Args:
        values: Of whole cycles, in order; the last of each cycle refreshed.
        every: Steps of which one refreshes; None if none does.
    """
    if every is None:
        return quartiles(values)
    ordinary, refresh = map(quartiles, apart(values))
    pairs = zip(astuple(ordinary), astuple(refresh), strict=True)
    return Quartiles(*(((every - 1) * often + rare) / every for often, rare in pairs))


def apart(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Values of ordinary steps and of those that refresh, of whole cycles."""
    ordinary = [value for index, value in enumerate(values) if index % CYCLE != CYCLE - 1]
    return ordinary, list(values[CYCLE - 1 :: CYCLE])
