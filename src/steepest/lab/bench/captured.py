"""The same steps, compiled by torch or captured into a CUDA graph, as contestants of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from steepest.lab.bench.contestants import Contestant, Settings, Step

WARM_UP = 3  # steps as usual before a capture


class Captured:
    """A step that is taken as usual a few times, then captured, and from then on replayed.

    Args:
        step: Reads and writes the same memory each time.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._taken = 0
        self._replay: Callable[[], object] | None = None

    def __call__(self) -> None:
        """Take one step."""
        if self._replay is None and self._taken < WARM_UP:
            self._beside()
            self._taken += 1
            return
        if self._replay is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self._replay = graph.replay
        self._replay()

    def _beside(self) -> None:
        """On another stream, as torch asks for before a capture."""
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            self._step()
        here.wait_stream(side)


def captured(contestant: Contestant) -> Contestant:
    """Likewise in a CUDA graph.

    Args:
        contestant: As it comes.
    """
    return _variant(contestant, "graph", "in a CUDA graph", lambda step: Captured(step))


def compiled(contestant: Contestant, *, backend: str = "inductor") -> Contestant:
    """Likewise through `torch.compile`.

    Args:
        contestant: As it comes.
        backend: Of `torch.compile`.
    """

    def wrap(step: Step) -> Step:
        torch.compiler.reset()  # compiled code of other shapes counts against a limit
        return torch.compile(step, backend=backend)

    return _variant(contestant, "compiled", f"torch.compile, {backend}", wrap)


def _variant(contestant: Contestant, ending: str, note: str, wrap: Callable[[Step], Step]) -> Contestant:
    def build(params: list[Tensor], settings: Settings) -> Step:
        return wrap(contestant.build(params, settings))

    notes = ", ".join(one for one in (contestant.note, note) if one)
    looked_at = contestant.examined_as or contestant.name
    return replace(contestant, name=f"{contestant.name}-{ending}", build=build, examined_as=looked_at, note=notes)
