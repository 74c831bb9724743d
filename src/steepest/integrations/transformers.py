"""transformers' Trainer: an optimizer that sees the model, and a Trainer that tells it the loss.

`optimizer_cls_and_kwargs=(from_model(steepest.Muon), {"lr": 0.02})` makes the optimizer of the whole model. Momo also
needs the loss, and no callback is told it; `MomoTrainer` is Trainer with one method that passes it on.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from steepest.checks import shown
from steepest.integrations import loggers
from steepest.integrations.wrapped import unwrapped
from steepest.optim import SteepestDescent
from steepest.ranks import scalar_type

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "steepest.integrations.transformers needs transformers and accelerate: pip install 'steepest[transformers]'"
    ) from error


def from_model(recipe: type[SteepestDescent]) -> Callable[[], Callable[..., SteepestDescent]]:
    """Have Trainer make an optimizer of its model, with roles, names and views as from the model.

    Use it as `Trainer(optimizer_cls_and_kwargs=(from_model(steepest.Muon), {"lr": 0.02, "weight_decay": 0.1}))`. The
    optimizer's options are those of that mapping and no others: `learning_rate`, `weight_decay`, `adam_beta1` and the
    like of TrainingArguments are Trainer's own optimizers'. So "lr" must be there. Schedules, clipping and accumulation
    are those of TrainingArguments as ever.

    Args:
        recipe: A class such as `steepest.Muon`.

    Returns:
        What Trainer calls, without arguments, for a function of a model and options.

    Raises:
        TypeError: If it is no class of optimizers of this library.
    """
    given = cast(object, recipe)
    if not isinstance(given, type) or not issubclass(given, SteepestDescent):
        raise TypeError(f"recipe must be a class such as steepest.Muon, got {shown(recipe)}.")

    def build(model: Any, **options: Any) -> SteepestDescent:
        if "lr" not in options:
            raise ValueError(
                f"{recipe.__name__} was given no lr, and TrainingArguments(learning_rate=...) does not reach it: write "
                f'optimizer_cls_and_kwargs=(from_model({recipe.__name__}), {{"lr": ...}}).'
            )
        return recipe(model, **options)

    return lambda: build


class MomoTrainer(Trainer):
    """Trainer that tells the optimizer the loss of each step, which Momo needs.

    Use it in place of Trainer, or before another one: `class Finetuning(MomoTrainer, trl.SFTTrainer): ...`.

    The loss is what `training_step` returns, summed since the gradients were new: what Trainer calls backward with, so
    that the sum is of what the gradient is of, whatever divides it by micro-batches, tokens or ranks.
    """

    _told: Tensor | float = 0.0
    _ended = True  # whether a step was made of all gradients so far, or passed over

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; takes and returns the same.

        Raises:
            TypeError: If the optimizer is none of this library.
        """
        optimizer = unwrapped(self.optimizer)
        # Also where a training was interrupted within a window, or Trainer begins anew with smaller batches.
        fresh = not any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        if fresh or (self._ended and self.accelerator.optimizer_step_was_skipped):
            optimizer.zero_grad()  # forgets losses, too, of gradients that are gone
        if fresh or self._ended:
            self._told = 0.0
        loss = super().training_step(*args, **kwargs)
        self._told = self._told + loss.detach().to(scalar_type(loss.device))
        self._ended = self.accelerator.sync_gradients
        if self._ended:
            optimizer.record_loss(self._told)
        return loss


class LogDiagnostics(TrainerCallback):
    """Writes the optimizer's `diagnostics()` through `Trainer.log`: `trainer.add_callback(LogDiagnostics(trainer))`.

    Whatever `report_to` names gets them, and `state.log_history`, on the first process. Names begin with "steepest/".

    Args:
        trainer: Whose `log` is called.
        every: Steps of the optimizer from one reading to the next.
        weights: Also look at the weights, see `diagnostics(weights=True)`.
    """

    def __init__(self, trainer: Trainer, every: int = 50, *, weights: bool = False) -> None:
        self.trainer, self.every, self.weights = trainer, every, weights
        self._read: dict[str, float] = {}
        self._log: loggers.LogDiagnostics | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer.

        Raises:
            TypeError: If the optimizer is none of this library.
            ValueError: If `every` is not a whole number of at least 1.
        """
        self.on_train_end(args, state, control)
        optimizer = kwargs["optimizer"]
        self._log = loggers.LogDiagnostics(optimizer, self._keep, every=self.every, weights=self.weights)

    def _keep(self, numbers: dict[str, float], step: int) -> None:
        self._read = numbers

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, when it has counted the step."""
        read, self._read = self._read, {}
        if read:
            self.trainer.log(read)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        if self._log is not None:
            self._log.close()
