"""A run brought back from its directory: task, trained model, and the batch it would see next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.lab.disk.fields import RecordError
from steepest.lab.disk.files import exists
from steepest.lab.errors import UsageError
from steepest.lab.methods import CombinedOptimizer
from steepest.lab.runs.config import RunConfig, read_config
from steepest.lab.runs.train import Training, load_task, using_threads
from steepest.lab.runs.version import code_version
from steepest.lab.tasks.task import Batch, Task

_SECOND_MOMENTS = ("exp_avg_sq", "second_moment")  # torch's name and ours
_REMEDY = "Give the directory of a run, such as --out of `steepest train --keep-checkpoint`."


class NoCheckpointError(UsageError, ValueError):
    """The run's directory holds no trained weights."""


@dataclass(frozen=True)
class TrainedRun:
    """What a run has learned.

    Args:
        config: The run.
        task: Its task.
        model: With the weights of the checkpoint, in training mode.
        step: Steps they were trained for.
        second_moments: Averages of squared gradients by name of the parameter, for those that its optimizer adapts to.
        batch: Inputs and targets of the training examples that would come next.
        same_code: Whether this is the version of the code that trained it.
    """

    config: RunConfig
    task: Task
    model: nn.Module
    step: int
    second_moments: dict[str, Tensor]
    batch: Batch
    same_code: bool


def load_trained(run_dir: Path, *, examples: int, data: Path | None = None) -> TrainedRun:
    """Bring back a run from its checkpoint; nothing in the directory is changed.

    Args:
        run_dir: Its directory.
        examples: Size of the batch.
        data: Where the data of the user is, for a run on such data.

    Returns:
        The run.

    Raises:
        NoCheckpointError: If there is no checkpoint.
        CheckpointError: If it is damaged or of another run.
        RecordError: If there is no config, or it is damaged.
        RunMismatchError: If the data differ from the run's.
        ValueError: If its task or method is unknown here, or the task takes no data.
        FileNotFoundError: If `data` is not there.
    """
    checkpoint = run_dir / "checkpoint.pt"
    if not exists(run_dir / "config.json"):
        raise RecordError(run_dir / "config.json", "no run here", _REMEDY)
    config = read_config(run_dir, remedy=_REMEDY)
    if not exists(checkpoint):
        problem = f"{run_dir} holds no checkpoint: runs delete it when they are finished"
        raise NoCheckpointError(f"{problem}. Train into a new directory with `steepest train --keep-checkpoint`.")
    task = load_task(config, data)
    with using_threads(None), torch.random.fork_rng(devices=[]):  # loading sets both as the run had them
        training = Training(config, task)
        training.load(checkpoint)
    return TrainedRun(
        config=config,
        task=task,
        model=training.model,
        step=training.step,
        second_moments=dict(_second_moments(training.model, training.optimizer)),
        batch=task.batch(training.order.take(examples)),
        same_code=config.code == code_version(),
    )


def _second_moments(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    parts = optimizer.parts if isinstance(optimizer, CombinedOptimizer) else (optimizer,)
    for name, parameter in model.named_parameters():
        for part in parts:
            state = part.state.get(parameter, {})
            yield from ((name, state[key]) for key in _SECOND_MOMENTS if key in state)
