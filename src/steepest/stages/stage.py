"""What may stand around the search for a direction, and what that keeps: the protocol of a stage.

    gradient -> [gradient] -> average -> as matrices -> [observe] -> [before] -> lmo -> [after, beside] -> duals, move

The first stage of a list is the outermost: `observe` and `before` run in the order of the list, `after` in the reverse,
each followed by its `beside`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.anatomy import Load, PlanRow, Role
from steepest.ranks import Duties, kept_like

States = Mapping[Tensor, dict[str, Tensor]]


def state_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32: an average in half precision stops moving."""
    return torch.promote_types(parameter.dtype, torch.float32)


@dataclass(frozen=True)
class Entry:
    """One tensor that is kept of a parameter: what allocation, checkpoints and their checks need to know of it.

    Args:
        key: Its name in the optimizer's state of the parameter.
        shape: None: like the parameter, sharded as it is, if it is.
        dtype: None: `state_dtype`.
        least: What is below is damage; None: every number may stand there.
        infinite: Whether infinity may stand there.
        eager: Whether it is there from the first step on, as zeros; else it comes when there is something to keep.
        read: Whether its numbers are looked at when a state is loaded.
        divided: Whether the ranks that keep parts of the parameter keep parts of it, if it has a shape of its own; else
            each has a copy.
        travels: Whether it goes to the rank that works on the matrices and back, for `observe`, `before` and `after`;
            else the stage sees to it itself.
    """

    key: str
    shape: torch.Size | None = None
    dtype: torch.dtype | None = None
    least: float | None = None
    infinite: bool = False
    eager: bool = True
    read: bool = True
    divided: bool = True
    travels: bool = True

    def like(self, parameter: Tensor) -> Tensor:
        """A tensor that is laid out as the entry is.

        Args:
            parameter: Any shape.
        """
        return parameter if self.shape is None else self.zeros(parameter)

    def zeros(self, parameter: Tensor) -> Tensor:
        """The entry of a new parameter.

        Args:
            parameter: Any shape.
        """
        dtype = self.dtype or state_dtype(parameter)
        if self.shape is None:
            return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        if self.divided:
            return kept_like(parameter, self.shape, dtype)
        return torch.zeros(self.shape, dtype=dtype, device=parameter.device)


class Stage:
    """Something around the search for a direction, for whole matrices in norms that do not adapt; by default nothing.

    What is given to the optimizer is a stage with options; what it works with is what `attach` returns: the same object
    if all that it keeps is in the state of the parameters, as it is declared by `entries`.

    Attributes:
        prefix: With which the keys of its entries and of its numbers begin, and those of nobody else.
        kept: What its entries are, in words, for the warning that they are dropped where nobody needs them.
        option: How an optimizer is told to work with it, in words, likewise.
        group_keys: Where its `numbers` stand in every group, with the values of a new optimizer.
        roles: Of the parameters that it works on. Of others than matrices it may change gradients only, and the norms
            of these must look at each entry by itself.
    """

    prefix: ClassVar[str] = ""
    kept: ClassVar[str] = "entries of a stage"
    option: ClassVar[str] = "stages="
    group_keys: ClassVar[Mapping[str, Any]] = {}
    roles: Sequence[Role] = ("matrix",)

    @property
    def linear(self) -> bool:
        """Whether `after` of a multiple of directions is that multiple of `after` of them."""
        return False

    @property
    def keeps_ball(self) -> bool:
        """Whether `after` of what has norm one has at most norm one, so that weight decay keeps weights in a ball."""
        return False

    @property
    def replays(self) -> bool:
        """Whether a step does the same tensor operations whenever it is taken, and writes its state in place.

        Then a recording of it, as a CUDA graph is, stands for the steps that follow.
        """
        return False

    @property
    def no_duals(self) -> str | None:
        """Why momenta do not tell how the loss changes, which dual norms need, and the remedy; None: they do."""
        return None

    @property
    def may_climb(self) -> bool:
        """Whether -<M, D> may be below 0 for the directions that come of it; such a matrix does not move in that step.

        The optimizer sees to that, and counts it in `diagnostics`. A stage that says no is taken at its word.
        """
        return False

    @property
    def changes_gradients(self) -> bool:
        """Whether `gradient` does something."""
        return type(self).gradient is not Stage.gradient

    @property
    def observes(self) -> bool:
        """Whether `observe` does something: then the gradients go to those who work on the matrices, too."""
        return type(self).observe is not Stage.observe

    @property
    def sees_weights(self) -> bool:
        """Whether `beside` does something: then the weights go to those who work on the matrices, too."""
        return type(self).beside is not Stage.beside

    def attach(self, rows: Sequence[PlanRow]) -> "Stage":
        """Begin to work for one optimizer; `entries` is also asked of matrices that are added later.

        Args:
            rows: Of the plan: the trainable parameters of its roles.
        """
        del rows
        return self

    def added(self, rows: Sequence[PlanRow]) -> None:
        """Work on matrices, too, that a module brought later; nothing is seen of the coming step yet.

        Args:
            rows: Of the plan: the trainable parameters of its roles, with their sites.

        Raises:
            ValueError: If the stage cannot.
        """

    def assigned(self, duties: Duties) -> None:
        """Hear who works on which parameters; again when that changes.

        Args:
            duties: Of all parameters of the optimizer.
        """

    def entries(self, row: PlanRow) -> Sequence[Entry]:
        """What is kept of a parameter; nothing of those that the stage does not work on.

        Args:
            row: Of the plan, with a view.
        """
        del row
        return ()

    def observe(
        self,
        load: Load,
        gradients: tuple[Tensor, ...],
        averages: tuple[Tensor, ...],
        states: Sequence[dict[str, Tensor]],
        accept: Tensor | None,
    ) -> None:
        """Look at the gradients of the step, before `before`. Called once in a step, where `observes` says so.

        Args:
            load: Whose gradients these are.
            gradients: (B, m, n) each, as they were averaged, in the type of the averages; not to be written to. Finite,
                but not their squares; zeros where `accept` is False.
            averages: Likewise, what directions are sought for, each with weights that sum to one, this gradient's
                among them; with Nesterov's look ahead, if there is one.
            states: Of the load's parameters, with the declared entries; written to.
            accept: A 0-d boolean; where it is False, no entry may change. None means True.
        """

    def before(
        self, load: Load, batches: tuple[Tensor, ...], states: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor, ...]:
        """Change what a direction is sought for.

        Args:
            load: Whose averages these are.
            batches: (B, m, n) each, up to a factor above 0, not to be written to.
            states: Of the load's parameters, with the declared entries; only read.

        Returns:
            Likewise.
        """
        del load, states
        return batches

    def after(
        self,
        load: Load,
        directions: tuple[Tensor, ...],
        states: Sequence[dict[str, Tensor]],
        accept: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Change directions, which must still go down: -<M, D> is at least 0, or `may_climb`. Called once in a step.

        Args:
            load: Whose directions these are.
            directions: (B, m, n) each, not to be written to.
            states: Of the load's parameters, with the declared entries; written to.
            accept: A 0-d boolean; where it is False, no entry may change. None means True.

        Returns:
            Likewise.
        """
        del load, states, accept
        return directions

    def beside(self, load: Load, directions: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Change directions by the weights that they are added to; called after `after`, where `sees_weights` says so.

        Args:
            load: Whose directions these are.
            directions: (B, m, n) each, not to be written to.
            weights: Likewise, in the type of the averages.

        Returns:
            Directions that go down, or `may_climb`.
        """
        del load, weights
        return directions

    def gradient(self, load: Load, gradients: list[Tensor]) -> list[Tensor]:
        """Change gradients before they are averaged; a stage that does must say `no_duals`.

        Args:
            load: Whose gradients these are.
            gradients: Shaped like the parameters, not to be written to; of others than matrices, what this rank keeps.

        Returns:
            Likewise.
        """
        del load
        return gradients

    def allocate(self, states: States) -> None:
        """Make entries that are not zeros; called before `refresh` in every step.

        Args:
            states: Of the parameters; written to.
        """

    def refresh(self, states: States, present: Sequence[Tensor], accept: Tensor | None) -> None:
        """Prepare a step, before anything is averaged.

        Args:
            states: Of the parameters; written to.
            present: Parameters with a gradient.
            accept: A 0-d boolean; where it is False, no entry may change. None means True.
        """

    @property
    def exchanges(self) -> bool:
        """Whether the next `refresh` exchanges something with other ranks."""
        return False

    def passed(self, *, skipped: bool, idle: Callable[[], bool]) -> None:
        """A step is over.

        Args:
            skipped: Whether it was passed over.
            idle: Tells whether it was one that only makes the state, as distributed checkpoints take it.
        """

    def cleared(self) -> None:
        """Gradients were cleared."""

    def replaced(self, row: PlanRow, shape: tuple[int, ...], where: str) -> None:
        """Another parameter stands in the place of one, without `add_param_group`.

        Args:
            row: Of the one before.
            shape: Of the new one.
            where: Which group, for a message.

        Raises:
            ValueError: If the stage cannot go on so.
        """

    def complete(self, row: PlanRow) -> PlanRow:
        """A row of the plan, with what is kept for it.

        Args:
            row: Of any parameter.
        """
        return row

    def diagnostics(self) -> dict[str, float]:
        """Numbers for `SteepestDescent.diagnostics`."""
        return {}

    @property
    def numbers(self) -> dict[str, Any]:
        """What a checkpoint must hold besides entries, by keys of groups; plain values."""
        return {}

    def check(self, groups: Sequence[Mapping[str, Any]], states: States) -> None:
        """Refuse a saved state with which the stage cannot go on; nothing has changed yet.

        Args:
            groups: Of the state dict, with `group_keys`.
            states: Of the parameters, as saved.

        Raises:
            ValueError: If so.
        """

    def save(self, states: States) -> None:
        """Put into the state what a checkpoint between two micro-batches needs.

        Args:
            states: Of the parameters; written to.
        """

    def load(self, states: States, groups: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a loaded state.

        Args:
            states: Of the parameters, as loaded.
            groups: Of the state dict, with `group_keys`.
        """
