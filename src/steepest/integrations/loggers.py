"""`diagnostics()` where people keep their records: TensorBoard, Weights & Biases, MLflow, or any function.

Names are "steepest/" and the keys of `diagnostics()`, such as "steepest/matrix/update_rms". For hosts that have loggers
of their own there are `LogDiagnostics` of `steepest.integrations.lightning` and `steepest.integrations.transformers`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from steepest.checks import refusal, whole
from steepest.integrations.wrapped import unwrapped
from steepest.optim import SteepestDescent
from steepest.optim.replay import recording
from steepest.ranks import world_size

Write = Callable[[dict[str, float], int], object]
"""What writes numbers, by name, of a step."""


class LogDiagnostics:
    """Reads an optimizer's `diagnostics()` after every so many of its steps, and writes them. No loop is changed.

    Steps are the optimizer's, and go on from a checkpoint's. Steps that were passed over write nothing, so no number is
    older than its step. Reading waits for an accelerator, so sample: not every step. Rank 0 alone reads and writes,
    unless `weights` are asked for, for which all ranks that keep a part read together.

    Args:
        optimizer: Of this library, or what a host wraps one in.
        write: From `to_tensorboard`, `to_wandb` or `to_mlflow`, or a function of numbers by name and a step; called on
            rank 0 only.
        every: Steps from one reading to the next.
        weights: Also look at the weights, see `diagnostics(weights=True)`.
        prefix: What names begin with.

    Raises:
        TypeError: If there is no optimizer of this library, or `write` is no function.
        ValueError: If `every` is not a whole number of at least 1.
    """

    def __init__(
        self, optimizer: Any, write: Write, *, every: int = 50, weights: bool = False, prefix: str = "steepest"
    ) -> None:
        if not callable(write):
            raise TypeError(refusal("write", "a function, such as to_tensorboard(writer)", write))
        self.every = whole(1)("every", every)
        self.weights, self.prefix, self._write = weights, prefix, write
        own = unwrapped(optimizer)
        self._last = _steps(own)
        self._handle = own.register_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        last, self._last = self._last, _steps(optimizer)
        if self._last != last and self._last % self.every == 0 and not recording():
            self.log(optimizer)

    def log(self, optimizer: SteepestDescent) -> None:
        """Read and write now, of the last step.

        Args:
            optimizer: Of this library.
        """
        first = world_size() == 1 or torch.distributed.get_rank() == 0
        if first or self.weights:
            numbers = optimizer.diagnostics(weights=self.weights)
            if first:
                self._write({f"{self.prefix}/{name}": number for name, number in numbers.items()}, _steps(optimizer))

    def close(self) -> None:
        """Write no more."""
        self._handle.remove()


def _steps(optimizer: SteepestDescent) -> int:
    return int(optimizer.param_groups[0]["steps_taken"])


def to_tensorboard(writer: Any) -> Write:
    """Write to TensorBoard.

    Args:
        writer: A `SummaryWriter`; None on ranks that write nothing.
    """

    def write(numbers: Mapping[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return write


def to_wandb(run: Any, prefix: str = "steepest") -> Write:
    """Write to Weights & Biases, with an axis "steepest/step" of its own: the run's own count of steps stays yours.

    Args:
        run: What `wandb.init()` returned; None on ranks that write nothing.
        prefix: That of `LogDiagnostics`.
    """
    axis = f"{prefix}/step"
    if run is None:
        return lambda numbers, step: None
    run.define_metric(axis, hidden=True)
    run.define_metric(f"{prefix}/*", step_metric=axis)
    return lambda numbers, step: run.log({**numbers, axis: step})


def to_mlflow(run_id: str | None = None) -> Write:
    """Write to MLflow.

    Args:
        run_id: Of a run; None: the active one.

    Raises:
        ImportError: If MLflow is not installed.
    """
    try:
        import mlflow
    except ImportError as error:
        raise ImportError("to_mlflow needs MLflow: pip install 'steepest[loggers]'") from error
    return lambda numbers, step: mlflow.log_metrics(dict(numbers), step=step, run_id=run_id)
