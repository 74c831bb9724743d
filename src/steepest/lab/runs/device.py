"""The device that numbers are computed on: which one, its clock, its memory, and whether it repeats to the bit.

An accelerator works while Python goes on. So its own events are the clock there: nothing is waited for until seconds
are asked for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

import torch

from steepest.lab.errors import UsageError
from steepest.lab.runs.memory import peak_memory

Clock = Callable[[], float]
AUTO = "auto"
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS may take another order of sums in each call
_REPEATS = ":4096:8"


def find_device(name: str) -> torch.device:
    """A device by what stands behind --device.

    Args:
        name: "cpu", the kind of this machine's accelerator, or "auto" for the accelerator if there is one.

    Raises:
        UsageError: If this machine has no such device.
    """
    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ("cpu", *(() if own is None else (own.type,)))
    if name == AUTO:
        return torch.device(known[-1])
    if name not in known:
        raise UsageError(f"--device {name}: this machine has {' and '.join(known)}. Give one of them, or {AUTO}.")
    return torch.device(name)


class Event(Protocol):
    """A mark in what a device is to do."""

    def record(self) -> None:
        """Put it there."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has come to it."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this one to a later one."""
        ...


def timing_event() -> Event:
    """Of the current CUDA stream."""
    return torch.cuda.Event(enable_timing=True)


class Stopwatch:
    """Marks, and the seconds between them.

    Args:
        device: Whose work is timed. On CUDA marks are events, so that setting one waits for nothing; on other
            accelerators each mark waits for what was begun before it.
        clock: Tells seconds, where there are no events.
        event: Makes one, on CUDA.
    """

    def __init__(
        self, device: torch.device, *, clock: Clock = time.perf_counter, event: Callable[[], Event] = timing_event
    ) -> None:
        self._device = device
        self._clock = clock
        self._event = event
        self._events: list[Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Now, or when the device has done all that was asked of it before."""
        if self._device.type == "cuda":
            event = self._event()
            event.record()
            self._events.append(event)
            return
        synchronize(self._device)
        self._times.append(self._clock())

    def seconds(self) -> list[float]:
        """Between marks that follow each other; waits for the last one."""
        if self._events:
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            return [one.elapsed_time(other) / 1e3 for one, other in pairs]
        return [other - one for one, other in zip(self._times, self._times[1:], strict=False)]


def clocked(work: Callable[[], object], *, device: torch.device | str) -> float:
    """Seconds that the work took, with everything it left to the device; nothing else is on the device's mind then."""
    where = torch.device(device)
    synchronize(where)
    watch = Stopwatch(where)
    watch.mark()
    work()
    watch.mark()
    (seconds,) = watch.seconds()
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def most_bytes(device: torch.device) -> int:
    """The most memory held at once so far: by this process, or by its tensors on an accelerator."""
    return peak_memory() if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def forget_most_bytes(device: torch.device) -> None:
    """Count the most bytes from now on; those of a process on the CPU cannot be forgotten."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def extra_bytes(work: Callable[[], object], *, device: torch.device) -> int:
    """The most that tensors on an accelerator hold at once while some work is done, beyond what they held before.

    Args:
        work: Called once.
        device: Not the CPU.
    """
    forget_most_bytes(device)
    before = torch.accelerator.memory_allocated(device)
    work()
    return torch.accelerator.max_memory_allocated(device) - before


@contextlib.contextmanager
def deterministic(asked: bool) -> Generator[None]:
    """Within it, the same work gives the same bits on the same device, or torch says what cannot; slower on CUDA.

    Args:
        asked: Whether to; else nothing changes.
    """
    if not asked:
        yield
        return
    backend = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), backend.deterministic, backend.benchmark
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, _REPEATS)
    torch.use_deterministic_algorithms(True)
    backend.deterministic, backend.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        backend.deterministic, backend.benchmark = before[1:]
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
