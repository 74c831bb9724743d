"""The most memory that a piece of work holds at once beyond what was held before it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from steepest.lab.runs.device import extra_bytes

_SECOND = "steepest: second time"


def peak_extra_bytes(work: Callable[[], object], *, device: str = "cpu") -> int:
    """Do the work twice and watch the allocator the second time; the first makes what is kept from then on.

    Args:
        work: Called twice.
        device: "cpu", where the events of torch's allocator are added up, or an accelerator.

    Returns:
        Bytes. On the CPU, what libraries below torch allocate for themselves is not in it.
    """
    if device != "cpu":
        work()
        return extra_bytes(work, device=torch.device(device))
    # the first time is watched, too: the allocator reports the release only of what it saw being taken
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
        with record_function(_SECOND):
            work()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    start = next(event["ts"] for event in events if event.get("name") == _SECOND)
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    return highest(size for time, size in sorted(changes, key=lambda change: change[0]) if time >= start)


def highest(changes: Iterable[int]) -> int:
    """The highest level that changes lead to, from a start of zero.

    Examples:
        >>> highest([4, -4, 3, 2, -5])
        5
    """
    level = top = 0
    for change in changes:
        level += change
        top = max(top, level)
    return top
