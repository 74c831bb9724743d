"""Tasks by name. A new task is one file beside this one and one line in `TASKS`."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from steepest.lab.tasks.cifar10 import Cifar10Task
from steepest.lab.tasks.digits import DigitsTask
from steepest.lab.tasks.fineweb import FinewebTask
from steepest.lab.tasks.held_out import Evaluation, Part
from steepest.lab.tasks.quadratic import QuadraticTask
from steepest.lab.tasks.task import Batch, Budget, DataIdentity, PresetName, Task
from steepest.lab.tasks.text import TextTask
from steepest.names import unknown_name

__all__ = ["TASKS", "Batch", "Budget", "DataIdentity", "Evaluation", "Part", "PresetName", "Task", "make_task"]


def _digits(preset: PresetName, data: Path | None) -> Task:
    if data is not None:
        raise ValueError(f"The task 'digits' has its own images, got --data {str(data)!r}. Leave it out.")
    return DigitsTask(preset)


def _quadratic(preset: PresetName, data: Path | None) -> Task:
    if data is not None:
        raise ValueError(f"The task 'quadratic' draws its own examples, got --data {str(data)!r}. Leave it out.")
    return QuadraticTask(preset)


TASKS: dict[str, Callable[[PresetName, Path | None], Task]] = {
    "text": lambda preset, data: TextTask(preset, data=data),
    "digits": _digits,
    "quadratic": _quadratic,
    "cifar10": lambda preset, data: Cifar10Task(preset, data=data),
    "fineweb": lambda preset, data: FinewebTask(preset, data=data),
}


def make_task(name: str, preset: str = "demo", *, data: Path | None = None) -> Task:
    """Load a task at one of its sizes.

    Args:
        name: A key of `TASKS`.
        preset: "demo" (a minute on one core), "tiny" (several minutes) or "small" (an hour or more).
        data: A file or folder of the user's, for the tasks that take one; None for the task's own data.

    Raises:
        ValueError: If the name or the preset is unknown, or the task takes no data.
        FileNotFoundError: If there is no data to read.
    """
    if name not in TASKS:
        raise ValueError(unknown_name("task", name, TASKS))
    for valid in get_args(PresetName):
        if preset == valid:
            return TASKS[name](valid, data)
    raise ValueError(unknown_name("preset", preset, get_args(PresetName)))
