"""How the time and memory of a step grow with width, with layers and with aspect ratio, and what the model predicts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from steepest.lab.bench.cost_model import cost
from steepest.lab.bench.machine import Machine, calibrate, typical
from steepest.lab.bench.memory import peak_extra_bytes
from steepest.lab.bench.shapes import gpt2
from steepest.lab.bench.timing import Quartiles, order, quartiles
from steepest.optim import Muon

Varied = Literal["width", "layers", "aspect"]
Clock = Callable[[], float]

WIDTHS = (128, 192, 256, 384, 512, 768, 1024, 1536)
LAYERS = (1, 2, 4, 8, 16)
ASPECTS = (1, 2, 4, 8, 16)
SIDE, OF_ASPECT = 256, 4  # width of the models of several layers; short side and number of matrices along the aspect
ROUNDS, LEAST, SECONDS = 15, 3, 16.0  # turns of a point: as many as rounds, unless those take longer than the seconds
WARM_UP = 2


@dataclass(frozen=True)
class Point:
    """One size.

    Args:
        axis: What varies.
        value: How much of it.
        shapes: Of all matrices, (out, in) each.
    """

    axis: Varied
    value: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """Axis and value."""
        return f"{self.axis} {self.value}"


@dataclass(frozen=True)
class Row:
    """What was found at a point.

    Args:
        point: Which.
        ms: Milliseconds of a step.
        predicted_ms: By the cost model, from the machine alone.
        peak_extra_bytes: The most that a step holds beyond weights, gradients and state.
        state_bytes: Of the optimizer, from step to step.
        seconds: Of every step that counts.
    """

    point: Point
    ms: Quartiles
    predicted_ms: float
    peak_extra_bytes: int
    state_bytes: int
    seconds: tuple[float, ...]

    @property
    def error(self) -> float:
        """Of the prediction, relative to the measured median."""
        return self.predicted_ms / self.ms.median - 1

    def columns(self) -> dict[str, Any]:
        """A line of a table; the seconds are counted."""
        return {
            "axis": self.point.axis,
            "value": self.point.value,
            "matrices": len(self.point.shapes),
            "parameters": sum(rows * columns for rows, columns in self.point.shapes),
            **self.ms.columns("ms"),
            "predicted_ms": self.predicted_ms,
            "error": self.error,
            "peak_extra_bytes": self.peak_extra_bytes,
            "state_bytes": self.state_bytes,
            "steps": len(self.seconds),
        }


@dataclass
class Subject:
    """Matrices with gradients, and their optimizer."""

    point: Point
    optimizer: Muon
    stride: int = 1  # a step in every so many rounds
    seconds: list[float] = field(default_factory=list)


def points(
    *, widths: Sequence[int] = WIDTHS, layers: Sequence[int] = LAYERS, aspects: Sequence[int] = ASPECTS
) -> list[Point]:
    """All sizes.

    Args:
        widths: Of one layer of a transformer.
        layers: Of such layers at one small width.
        aspects: Of a few matrices with one and the same short side: long side / short side.
    """
    wide = [Point("width", width, _layers(width, 1)) for width in widths]
    deep = [Point("layers", count, _layers(SIDE, count)) for count in layers]
    long = [Point("aspect", aspect, ((SIDE, aspect * SIDE),) * OF_ASPECT) for aspect in aspects]
    return [*wide, *deep, *long]


def _layers(width: int, count: int) -> tuple[tuple[int, int], ...]:
    return tuple((rows, columns) for rows, columns in gpt2(width, count))


def measure_scaling(
    at: Sequence[Point], *, rounds: int = ROUNDS, clock: Clock = time.perf_counter
) -> tuple[list[Row], Machine]:
    """Time steps of `Muon` at all points in turns, another first in each round, and the machine's kernels before them.

    Each timed step follows another of the same point, so that it finds its own data in the caches, as kernels do that
    are timed again and again; after forward and backward passes it would take a little longer.
    A point whose steps are long takes part in fewer rounds, spread evenly, and in no fewer than three.

    Args:
        at: Which points.
        rounds: Most steps of a point that count, at least three.
        clock: Tells seconds.

    Returns:
        One row per point, in order, and the machine that the predictions are made from.

    Raises:
        ValueError: If there are too few rounds, or a point is there twice.
    """
    if rounds < LEAST:
        raise ValueError(f"measure_scaling takes rounds of at least {LEAST}, got {rounds}.")
    subjects = {point.name: _subject(point) for point in at}
    if len(subjects) < len(at):
        twice = next(name for name, times in Counter(point.name for point in at).items() if times > 1)
        raise ValueError(f"measure_scaling takes each point once, got {twice!r} twice.")
    for subject in subjects.values():
        warm = [_seconds(subject, clock) for _ in range(WARM_UP)]
        subject.stride = stride(warm[-1], rounds=rounds)
    machines: list[Machine] = []
    for index in range(rounds):
        machines.append(calibrate(clock=clock))
        for name in order(list(subjects), index):
            if index % subjects[name].stride == 0:
                subject = subjects[name]
                subject.optimizer.step()  # caches and allocator are then as a step leaves them, not its neighbour
                subject.seconds.append(_seconds(subject, clock))
    machine = typical(machines)
    return [_row(subject, machine) for subject in subjects.values()], machine


def stride(seconds: float, *, rounds: int) -> int:
    """In every how many rounds a point takes part.

    Args:
        seconds: Of one of its steps.
        rounds: How many there are.
    """
    wanted = min(rounds, max(LEAST, int(SECONDS / (2 * seconds)) if seconds > 0 else rounds))
    return max(1, rounds // wanted)


def predict(point: Point, machine: Machine) -> float:
    """Seconds of a step by the cost model, with a bucket for each shape."""
    return cost([(count, *shape) for shape, count in Counter(point.shapes).items()], machine)


def _subject(point: Point) -> Subject:
    generator = torch.Generator(device="cpu").manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator, device="cpu")) for shape in point.shapes]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator, device="cpu")
    return Subject(point, Muon(weights, weight_decay=0.1))


def _seconds(subject: Subject, clock: Clock) -> float:
    start = clock()
    subject.optimizer.step()
    return clock() - start


def _row(subject: Subject, machine: Machine) -> Row:
    state = [value for of_one in subject.optimizer.state.values() for value in of_one.values()]
    return Row(
        subject.point,
        ms=quartiles([1e3 * seconds for seconds in subject.seconds]),
        predicted_ms=1e3 * predict(subject.point, machine),
        peak_extra_bytes=peak_extra_bytes(subject.optimizer.step),
        state_bytes=sum(value.nbytes for value in state),
        seconds=tuple(subject.seconds),
    )
