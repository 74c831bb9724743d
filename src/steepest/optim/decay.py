"""What weight decay takes away from the weights: asked by the move, by Momo's model of the loss, and by the ball.

A step is W <- W - lr · weight_decay · removed(W, D) + length · D, where `removed` is what a kind of decay says. Groups
hold the rate, which schedulers may write, and the kind as a text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from steepest.checks import check_fields, flag, number, refusal, shown
from steepest.geometry.text import text_of
from steepest.optim.groups import Group

NOTHING_TO_DECAY = "weights that keep their radius do not decay"


@runtime_checkable
class Decay(Protocol):
    """A kind of weight decay: a frozen dataclass whose field `rate` is the `weight_decay` of the groups."""

    @property
    def rate(self) -> float:
        """What stands in the groups as "weight_decay" until somebody writes there."""
        ...

    @property
    def needs_directions(self) -> bool:
        """Whether what is removed depends on the directions."""
        ...

    @property
    def keeps_norms(self) -> bool:
        """Whether the optimizer, after `apply_`, brings each matrix back to the Frobenius norm that it had at first."""
        ...

    @property
    def relative(self) -> bool:
        """Whether directions are then made as long as that norm before."""
        ...

    def radius(self, rate: float) -> float | None:
        """Of the ball that weights are kept in by steps of norm one; None: decay keeps them in none.

        Args:
            rate: The group's, above 0.
        """
        ...

    def removed(self, weights: Sequence[Tensor], directions: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """What is taken away per unit of lr · weight_decay.

        Args:
            weights: Of a load, in the dtype of its averages.
            directions: Tells the directions that are added, shaped like the weights.
        """
        ...

    def apply_(
        self,
        parameters: Sequence[Tensor],
        moves: Sequence[Tensor],
        *,
        directions: Sequence[Tensor] = (),
        length: float | Tensor,
        decay: float | Tensor,
        accept: Tensor | None = None,
        pull: bool = False,
    ) -> None:
        """Decay and move the weights.

        Args:
            parameters: Written to.
            moves: One per parameter, float32 or wider: directions, times what Momo and the product norm say.
            directions: As `removed` saw them, if it needs them; else nothing.
            length: What moves are multiplied by, a number or a 0-d tensor.
            decay: lr · weight_decay.
            accept: A 0-d boolean on the device; where it is False nothing decays, and the moves must be zero. None
                means True.
            pull: Whether moves are points of the ball of `radius`, toward which weights go the part `decay` of the way.
        """
        ...

    def stay_finite(
        self,
        parameters: Sequence[Tensor],
        moves: Sequence[Tensor],
        *,
        length: float | Tensor,
        decay: float | Tensor,
        pull: bool,
    ) -> Tensor:
        """Whether `apply_` would leave only finite weights; takes what it takes, and memory for one parameter.

        Args:
            parameters: Read only.
            moves: One per parameter.
            length: As for `apply_`, in the range of their type.
            decay: As for `apply_`, likewise.
            pull: As for `apply_`.

        Returns:
            0-d boolean on their device.
        """
        ...


@dataclass(frozen=True)
class Decoupled:
    """W <- (1 - lr · weight_decay) W + length · D: every weight shrinks, whatever its gradient is.

    Args:
        rate: The weight decay.

    Raises:
        ValueError: If the rate is negative or not finite.
        TypeError: If it is no number.

    Source:
        Loshchilov and Hutter, arXiv:1711.05101.
    """

    rate: float = 0.0

    keeps_norms = relative = needs_directions = False

    def __post_init__(self) -> None:
        check_fields(self, {"rate": number()})

    def radius(self, rate: float) -> float | None:
        """1 / rate: a step of norm lr on weights on that sphere takes away as much as it adds."""
        return 1 / rate

    def removed(self, weights: Sequence[Tensor], directions: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """The weights themselves."""
        del directions
        return weights

    def apply_(
        self,
        parameters: Sequence[Tensor],
        moves: Sequence[Tensor],
        *,
        directions: Sequence[Tensor] = (),
        length: float | Tensor,
        decay: float | Tensor,
        accept: Tensor | None = None,
        pull: bool = False,
    ) -> None:
        """W <- (1 - decay) W + length · move, rounded once; or, in one pass, W <- (1 - decay) W + decay · move."""
        del directions
        if pull:
            torch._foreach_lerp_(list(parameters), list(moves), cast(float, decay))
            return
        decay, length = masked(decay, accept), masked(length, accept)
        shrink = 1 - (decay if accept is None else decay * accept.to(moves[0].dtype))
        direct = parameters[0].dtype == moves[0].dtype
        wide = list(parameters) if direct else [p.to(moves[0].dtype) for p in parameters]
        if isinstance(shrink, Tensor) or shrink != 1:
            torch._foreach_mul_(wide, shrink)
        if isinstance(length, Tensor):
            torch._foreach_add_(wide, torch._foreach_mul(list(moves), length))
        else:
            torch._foreach_add_(wide, list(moves), alpha=length)
        if not direct:  # half precision: decay and move together, else both would be lost to rounding one by one
            torch._foreach_copy_(list(parameters), wide)

    def stay_finite(
        self,
        parameters: Sequence[Tensor],
        moves: Sequence[Tensor],
        *,
        length: float | Tensor,
        decay: float | Tensor,
        pull: bool,
    ) -> Tensor:
        """Whether `apply_` would leave only finite weights."""
        finite: list[Tensor] = []
        for parameter, move in zip(parameters, moves, strict=True):
            wide = parameter.detach().to(move.dtype)
            after = torch.lerp(wide, move, decay) if pull else wide * (1 - decay) + move * length
            finite.append(after.to(parameter.dtype).isfinite().all())
        return torch.stack(finite).all()


@dataclass(frozen=True)
class Cautious:
    """W <- W - lr · weight_decay · W∘[W∘D < 0] + length · D: only weights shrink that the step makes smaller, too.

    Decay never works against the direction, and no ball keeps the weights.

    Args:
        rate: The weight decay.

    Raises:
        ValueError: If the rate is negative or not finite.
        TypeError: If it is no number.

    Source:
        Chen et al., Cautious Weight Decay, arXiv:2510.12402.
    """

    rate: float = 0.0

    keeps_norms = relative = False
    needs_directions = True

    def __post_init__(self) -> None:
        check_fields(self, {"rate": number()})

    def radius(self, rate: float) -> None:
        """There is no ball."""
        del rate

    def removed(self, weights: Sequence[Tensor], directions: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """The weights whose signs are not those of their directions; zeros for the others."""
        return [_against(weight, own) for weight, own in zip(weights, directions(), strict=True)]

    def apply_(
        self,
        parameters: Sequence[Tensor],
        moves: Sequence[Tensor],
        *,
        directions: Sequence[Tensor] = (),
        length: float | Tensor,
        decay: float | Tensor,
        accept: Tensor | None = None,
        pull: bool = False,
    ) -> None:
        """Decay and move the weights, rounded once."""
        del pull  # which is asked of those with a ball
        length = masked(length, accept)
        part = decay if accept is None else torch.where(accept, decay, 0.0)
        for parameter, move, own in zip(parameters, moves, directions, strict=True):
            wide = parameter.to(move.dtype)
            parameter.copy_(wide - part * _against(wide, own) + move * length)

    def stay_finite(
        self,
        parameters: Sequence[Tensor],
        moves: Sequence[Tensor],
        *,
        length: float | Tensor,
        decay: float | Tensor,
        pull: bool,
    ) -> Tensor:
        """Whether decay of all weights, and decay of none, would leave only finite ones: of each, one is done."""
        all_or_none = [
            Decoupled().stay_finite(parameters, moves, length=length, decay=d, pull=pull) for d in (decay, 0.0)
        ]
        return torch.stack(all_or_none).all()


@dataclass(frozen=True)
class Sphere(Decoupled):
    """W <- r (W + length · D) / ‖W + length · D‖_F: each matrix keeps the Frobenius norm r that it had at first.

    What is one matrix is what is one for the norm: each head, expert or fused part by itself; for norms of entries,
    such as Adam's, the whole parameter. A matrix that is zero in its first step has no radius: it moves freely. The
    radii are in the optimizer's state as "radius".

    Args:
        relative: Make each direction as long as r before, so that lr is the step relative to the weight, in radians
            while it is small; directions without a radius stay as they are.
        rate: 0: there is nothing left to decay; steps are otherwise those of `Decoupled`.

    Raises:
        ValueError: If the rate is not 0.
        TypeError: If an option is of the wrong type.

    Source:
        Wen, Dang, Lyu, Ma and Liang, Hyperball Optimization, 2025,
        https://whenwen.github.io/blog/2025/weight-decay-hyperball-part-1/, where steps are relative.
    """

    relative: bool = False

    keeps_norms = True

    def __post_init__(self) -> None:
        check_fields(self, {"rate": number(), "relative": flag})
        if self.rate != 0:
            raise ValueError(refusal("Sphere: rate", f"0, as {NOTHING_TO_DECAY}", self.rate))

    def radius(self, rate: float) -> None:
        """There is no ball of the norm, but a sphere."""
        del rate


def _against(weight: Tensor, direction: Tensor) -> Tensor:
    """Weights that a direction makes smaller, zeros for the others."""
    return torch.where(weight.sign() * direction.sign() < 0, weight, 0.0)


class Decays:
    """The kinds of decay of one optimizer, by the texts that stand for them in its groups."""

    def __init__(self) -> None:
        self._known: dict[str, Decay] = {text_of(Decoupled()): Decoupled()}

    def text(self, decay: float | Decay) -> str:
        """The text that stands for a kind of decay from now on; two that print alike, but differ, have two.

        Args:
            decay: A rate, of decoupled decay, or a kind with its rate.

        Raises:
            TypeError: If the kind is no dataclass with a rate.
        """
        kind: Any = decay if isinstance(decay, Decay) else Decoupled()
        if not is_dataclass(kind):
            raise TypeError(refusal("weight_decay", "a number, or a kind of decay that is a dataclass", kind))
        kind = replace(cast(Any, kind), rate=0.0)
        text = first = text_of(kind)
        count = 1
        while (known := self._known.setdefault(text, kind)) is not kind and not (
            type(known) is type(kind) and known == kind
        ):
            count += 1
            text = f"{first}#{count}"
        return text

    def settle(self, group: Group, where: str) -> None:
        """Turn a kind of decay that somebody wrote as a group's weight decay into its rate and its text.

        Args:
            group: Written to.
            where: Which group, for the message.

        Raises:
            ValueError: If the text stands for no kind of decay of this optimizer, or the rate is out of range.
            TypeError: If the kind is no dataclass.
        """
        decay, text = group["weight_decay"], group.get("decay_kind")
        if isinstance(decay, Decay) and not isinstance(decay, type):
            group["decay_kind"] = self.text(decay)
            group["weight_decay"] = rate_of(f"{where}: weight_decay", decay)
        elif text is None:
            group["decay_kind"] = self.text(0.0)
        elif not isinstance(text, str) or text not in self._known:
            raise ValueError(
                f"{where}: decay_kind is {shown(text)}, which stands for no kind of weight decay that this optimizer "
                f"knows ({', '.join(self._known)}). Write the kind itself: weight_decay=Decoupled(0.1)."
            )
        rate = group["weight_decay"]
        if self.of(group).keeps_norms and (isinstance(rate, Tensor) or rate != 0):
            raise ValueError(
                f"{where}: weight_decay is {shown(rate)}, and its kind is {group['decay_kind']}: {NOTHING_TO_DECAY}. "
                "Write 0, or another kind, such as Decoupled(0.1)."
            )

    def of(self, group: Mapping[str, Any]) -> Decay:
        """The decay of a group."""
        return self._known[group["decay_kind"]]


def rate_of(name: str, decay: object) -> float:
    """The rate of a weight decay that is given as a number or an object.

    Args:
        name: Of the option, for messages.
        decay: What was given.

    Raises:
        ValueError: If it is negative or not finite.
        TypeError: If it is neither.
    """
    if isinstance(decay, Decay) and not isinstance(decay, type):
        return number()(f"{name}: rate", decay.rate)
    try:
        return number()(name, decay)
    except TypeError as error:
        raise TypeError(refusal(name, "a number, or a kind of decay such as Decoupled(0.1)", decay)) from error


def masked(value: float | Tensor, accept: Tensor | None) -> float | Tensor:
    """A rate by which nothing happens where a step is not taken: 0 times what is not finite would be NaN.

    Args:
        value: A number, or a 0-d tensor.
        accept: A 0-d boolean on the device. None means True.
    """
    return value if accept is None or not isinstance(value, Tensor) else torch.where(accept, value, 0.0)
