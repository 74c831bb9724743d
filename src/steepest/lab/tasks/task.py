"""What a task is: data, a model, a loss and a metric, at one of several sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor, nn

from steepest.lab.disk.fields import Count, Sha256, Text
from steepest.lab.tasks.held_out import Evaluation, Part

PresetName = str  # "demo", "tiny", "small", or a track of the task
Schedule = Literal[
    "cooldown", "warmup-long-cooldown", "constant", "late-cooldown", "warmup-cooldown", "cooldown-to-tenth"
]
Precision = Literal["fp32", "bf16"]
Batch = tuple[Tensor, Tensor]  # inputs and targets, first dimension: examples


@dataclass(frozen=True)
class DataIdentity:
    """Which data, exactly: runs are compared only if their `sha256` is the same."""

    name: Text
    sha256: Sha256
    bytes: Count


@dataclass(frozen=True)
class Budget:
    """How long a run is, and how it is trained unless its config says otherwise.

    Args:
        steps: Optimizer steps.
        batch_size: Examples per step, on all ranks together.
        eval_every: Steps from one evaluation to the next.
        schedule: Of the learning rate.
        precision: "bf16": forward passes of training under autocast; weights, gradients and state stay in float32.
        micro_batch: Examples that a rank takes at once, at most; None: its whole part of the batch.
        at_batch_size: Steps, and steps between evaluations, of a run with a certain batch size; None: those above.
        root_rates: Whether a run with batch size b has the learning rates times sqrt(b / batch_size).
    """

    steps: int
    batch_size: int
    eval_every: int
    schedule: Schedule = "cooldown"
    precision: Precision = "fp32"
    micro_batch: int | None = None
    at_batch_size: Callable[[int], tuple[int, int]] | None = None
    root_rates: bool = False


def folder_of(task: str, data: Path | None, remedy: str) -> Path:
    """The folder with the user's data, for a task that has none of its own.

    Args:
        task: Its name.
        data: What was given.
        remedy: Where data are had from; ends every error message.

    Raises:
        FileNotFoundError: If nothing was given, or no folder.
    """
    if data is None:
        raise FileNotFoundError(f"The task {task!r} has no data of its own. {remedy}")
    if not data.is_dir():
        raise FileNotFoundError(f"--data {str(data)!r} is not a folder. {remedy}")
    return data.resolve()


class Task(Protocol):
    """Data + model + loss + metric. Nothing in it depends on the method that trains the model."""

    @property
    def name(self) -> str:
        """Its key in `TASKS`."""
        ...

    @property
    def preset(self) -> PresetName:
        """Its size."""
        ...

    @property
    def budget(self) -> Budget:
        """The length of a run, unless its config says otherwise."""
        ...

    @property
    def train_size(self) -> int:
        """Number of training examples; a run walks through them in a seeded order."""
        ...

    @property
    def tokens_per_example(self) -> int:
        """Predictions that the loss of one example averages over."""
        ...

    @property
    def own_data(self) -> bool:
        """Whether the data is the task's own, not the user's; only for it are options tuned."""
        ...

    def data_identity(self) -> DataIdentity:
        """Which data, exactly."""
        ...

    def build_model(self, seed: int) -> nn.Module:
        """A fresh model whose weights depend on `seed` only."""
        ...

    def batch(self, examples: Tensor) -> Batch:
        """Inputs and targets of the training examples (B,), int64 indices below `train_size`."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the batch, 0-d, natural log."""
        ...

    def evaluate(self, model: nn.Module, part: Part, *, whole: bool) -> Evaluation:
        """Loss and metric over a part of what is held out, or the few of its examples that make a curve."""
        ...
