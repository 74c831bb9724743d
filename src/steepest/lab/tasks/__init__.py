"""Tasks by name. A new task is one file beside this one and one line in `TASKS`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from steepest.names import unknown_name

if TYPE_CHECKING:
    from steepest.lab.tasks.task import Task

PRESETS = ("demo", "tiny", "small")
_WITH_TORCH = ("adamw", "muon", "torch-muon", "muonadam")  # torch's Muon takes no convolutions, and no matrix alone


@dataclass(frozen=True)
class Entry:
    """What is known of a task without loading it: commands and reports take their words from here.

    Args:
        place: Its class, as "module:Class", called with a preset and, if the task takes the user's data, `data=`.
        examples: What its batch sizes count.
        tokens: Whether an example holds many predictions, which records count as tokens.
        data: What `--data` takes; empty if the task has its own data only.
        methods: Those that race unless one says otherwise.
        shared: Whether ranks can train on it together, and on an accelerator.
        tracks: Presets beside `PRESETS`: published runs, and a rehearsal of each.
        shapes: Likewise: other models, at the size of "tiny".
    """

    place: str
    examples: str = "examples"
    tokens: bool = False
    data: str = ""
    methods: tuple[str, ...] = ("adamw", "muon", "muonadam")
    shared: bool = False
    tracks: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()

    @property
    def counted(self) -> str:
        """What its records count under the name of tokens."""
        return "tokens" if self.tokens else "samples"


TASKS: dict[str, Entry] = {
    "text": Entry(
        "steepest.lab.tasks.text:TextTask",
        "sequences",
        tokens=True,
        data="a file or folder",
        methods=_WITH_TORCH,
        shared=True,
        shapes=("deep",),
    ),
    "digits": Entry("steepest.lab.tasks.digits:DigitsTask", "images"),
    "quadratic": Entry("steepest.lab.tasks.quadratic:QuadraticTask"),
    "cifar10": Entry(
        "steepest.lab.tasks.cifar10:Cifar10Task",
        "images",
        data="a folder",
        shared=True,
        tracks=("resnet18", "resnet18-rehearsal"),
    ),
    "cifar100": Entry(
        "steepest.lab.tasks.cifar100:Cifar100Task",
        "images",
        data="a folder",
        shared=True,
        tracks=("vgg16", "vgg16-rehearsal"),
    ),
    "fineweb": Entry(
        "steepest.lab.tasks.fineweb:FinewebTask",
        "sequences",
        tokens=True,
        data="a folder",
        methods=_WITH_TORCH,
        shared=True,
        tracks=(
            "gpt2-short",
            "gpt2-short-rehearsal",
            "gpt2-medium",
            "gpt2-medium-rehearsal",
            "gpt2-fineweb1b",
            "gpt2-fineweb1b-rehearsal",
        ),
    ),
}


def presets_of(name: str) -> tuple[str, ...]:
    """The sizes of a task, other shapes of its model, and its tracks.

    Args:
        name: A key of `TASKS`.
    """
    return (*PRESETS, *TASKS[name].shapes, *TASKS[name].tracks)


def entry(name: str) -> Entry:
    """What is known of a task; of one that is not, which a record may name, only words that hold for any."""
    return TASKS.get(name, Entry("", tokens=True))


def make_task(name: str, preset: str = "demo", *, data: Path | None = None) -> Task:
    """Load a task at one of its sizes.

    Args:
        name: A key of `TASKS`.
        preset: "demo" (a minute on one core), "tiny" (several minutes), "small" (an hour or more), or a shape or a
            track of the task.
        data: A file or folder of the user's, for the tasks that take one; None for the task's own data.

    Raises:
        ValueError: If the name or the preset is unknown, or the task takes no data.
        FileNotFoundError: If there is no data to read.
    """
    if name not in TASKS:
        raise ValueError(unknown_name("task", name, TASKS))
    if preset not in presets_of(name):
        raise ValueError(unknown_name("preset", preset, presets_of(name)))
    known = TASKS[name]
    if data is not None and not known.data:
        raise ValueError(f"The task {name!r} has its own {known.examples}, got --data {str(data)!r}. Leave it out.")
    module, _, kind = known.place.partition(":")
    build = cast("Callable[..., Task]", getattr(importlib.import_module(module), kind))
    return build(preset, data=data) if known.data else build(preset)
