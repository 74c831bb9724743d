"""Lightning: Momo hears the loss of every step of automatic optimization, whatever Lightning makes of it before.

For `lightning.pytorch`; the Trainer of the older package `pytorch_lightning` takes these callbacks as well.
"""

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "steepest.integrations.lightning needs Lightning, which is not installed: pip install 'steepest[lightning]'"
    ) from error

from torch import Tensor

from steepest.integrations import loggers
from steepest.optim import SteepestDescent


class RecordLoss(Callback):
    """Tells the optimizer the loss of every micro-batch: `Trainer(callbacks=[RecordLoss()])`.

    For automatic optimization, in which Lightning calls `step` with a closure: that returns the last micro-batch's loss
    alone, divided by their number, and with a GradScaler there is none. Right with any `accumulate_grad_batches`, also
    where an epoch ends within a window or `training_step` returns None; in mixed precision, with clipping, on many
    ranks. Optimizers of others are let be, and without Momo the loss serves to skip steps where it is not finite.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning.

        Raises:
            ValueError: If the module optimizes by itself.
        """
        if stage == "fit" and not pl_module.automatic_optimization:
            raise ValueError(
                f"RecordLoss is for automatic optimization, but {type(pl_module).__name__}.automatic_optimization is "
                "False: which loss is which optimizer's is not known then. Leave the callback out and pass the loss "
                "yourself: self.optimizers().step(loss=loss), or record_loss(loss, weight=1 / micro_batches) on what "
                "self.optimizers() returns before each manual_backward()."
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Called by Lightning, with the loss as backward is called on it: divided, and scaled by a GradScaler."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, SteepestDescent):
                weight = 1 / trainer.accumulate_grad_batches
                optimizer.record_loss(loss, weight, already_divided=True, scale=scale)


class LogDiagnostics(Callback):
    """Writes the optimizers' `diagnostics()` to the trainer's loggers: `Trainer(callbacks=[LogDiagnostics()])`.

    Names begin with "steepest/", and for further optimizers of this library with "steepest-1/" and so on. Numbers stand
    at the same step as what `self.log` writes for the batch.

    Args:
        every: Steps of an optimizer from one reading to the next.
        weights: Also look at the weights, see `diagnostics(weights=True)`.
    """

    def __init__(self, every: int = 50, *, weights: bool = False) -> None:
        self.every, self.weights = every, weights
        self._logs: list[loggers.LogDiagnostics] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by Lightning.

        Raises:
            TypeError: If there is no optimizer of this library.
            ValueError: If there is no logger, or `every` is not a whole number of at least 1.
        """
        if not trainer.loggers:
            raise ValueError(
                "LogDiagnostics writes to the trainer's loggers, and it has none: set Trainer(logger=...)."
            )

        def write(numbers: dict[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

        found = [one for one in trainer.optimizers if isinstance(one, SteepestDescent)]
        for place, optimizer in enumerate(found or trainer.optimizers):
            name = f"steepest-{place}" if place else "steepest"
            log = loggers.LogDiagnostics(optimizer, write, every=self.every, weights=self.weights, prefix=name)
            self._logs.append(log)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called by Lightning, also after an error."""
        for log in self._logs:
            log.close()
        self._logs = []
