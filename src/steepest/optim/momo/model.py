"""How much of a step is taken: all of it, or no more than brings a model of the loss down to its lower bound.

Momo keeps the average of the linear models f_i + <g_i, w - w_i> that past losses and gradients made, with the weights
of the momentum, so that its slope is the momentum m. With V its value at the present weights, F the lower bound and Q
what the whole step is predicted to gain (Q = <m, -Δ>: N for constrained, N² for regularised descent),

    t = clamp((V - F) / Q, 0, 1)

is the minimiser of the model truncated at F. V costs no pass over the weights: the model is linear, so its value
after a step is known, and the next loss is averaged in,

    V_{t+1} = (β (1-β^t) (V_t - predicted decrease of step t) + (1-β) f_{t+1}) / (1-β^{t+1}).

Where the step follows several averages of gradients, Σ w_i m_i, each has a model, whose slope it is, and whose value
goes on by what that average says the step gained. Their sum V = Σ w_i V_i with the weights of the step is then exact,
however weights change.

Where averages hold gradients from before the first loss, as after a run without Momo, the model begins as if all their
losses had been the first one: with its value, and with the number of gradients.

Source: Crawshaw, Modi, Liu and Gower, arXiv:2510.09827, and Schaipp et al., arXiv:2305.07583 (the truncated model and
the online lower bound); the recurrence and the clamp at 0 are derived here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from steepest.checks import choice, number, refusal
from steepest.optim.momentum import MOST, Averages, debias
from steepest.optim.replay import kept
from steepest.ranks import scalar_type

Bookkeeping = Literal["recurrent", "direct"]
LowerBound = float | Callable[[int], float] | Literal["auto"]
# What a checkpoint holds, as plain numbers in every group: distributed checkpoints keep nothing else that is global.
SCALARS = {"momo_value": "value", "momo_intercept": "intercept", "momo_bound": "bound", "momo_steps": "steps"}
MODEL_KEYS = (*SCALARS, "momo_calls", "momo_direct", "momo_weights")
OF_EACH = ("momo_value", "momo_intercept")  # of several averages: one for each, momo_value_2 of the second
FURTHER_KEYS = tuple(f"{key}_{place}" for key in OF_EACH for place in range(2, MOST + 1))
FLOOR = 0.0  # of the estimated lower bound: where it starts, and never below


@dataclass(frozen=True)
class Fixed:
    """The whole step, always: the plain method."""


@dataclass(frozen=True)
class Momo:
    """Steps no longer than a model of the loss says is useful; needs the loss of every step.

    Args:
        lower_bound: What the loss cannot get below, in units of the loss that is passed: a number, a function of the
            number of steps so far, or "auto" for an online estimate that starts at 0 (experimental: its theory is
            Euclidean). Too low only gives up robustness to large learning rates; above what can be reached, training
            stops there. -inf is the plain method, bit for bit.
        bookkeeping: How the model's value is known. "recurrent": from scalars alone; if weights are changed by anything
            but this optimizer it starts again from the present loss. "direct": from inner products with the weights at
            every step, right whoever wrote to them, but exact only as far as a small difference of large numbers is.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If the lower bound is of the wrong type.
    """

    lower_bound: LowerBound = 0.0
    bookkeeping: Bookkeeping = "recurrent"

    def __post_init__(self) -> None:
        choice(get_args(Bookkeeping))("Momo: bookkeeping", self.bookkeeping)
        if not (isinstance(self.lower_bound, str) and self.lower_bound == "auto") and not callable(self.lower_bound):
            _checked_bound(self.lower_bound)

    @property
    def direct(self) -> bool:
        """Whether inner products with the weights are needed."""
        return self.bookkeeping == "direct"

    def bound(self, step: int) -> float:
        """The lower bound at a step.

        Args:
            step: Number of steps so far.

        Returns:
            The bound; where it is estimated, its least possible value.

        Raises:
            TypeError: If a function returned something that is no number.
            ValueError: If it is NaN or infinity.
        """
        if self.lower_bound == "auto":
            return FLOOR
        return _checked_bound(self.lower_bound(step) if callable(self.lower_bound) else self.lower_bound)


StepSize = Fixed | Momo
"""How much of a step is taken."""


def check_step_size(step_size: object) -> StepSize:
    """Refuse what is no step size.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(step_size, Fixed | Momo):
        raise TypeError(refusal("step_size", "Fixed() or Momo(...)", step_size))
    return step_size


def truncated(gap: Tensor, decrease: Tensor) -> Tensor:
    """Part of a step that brings a linear model down to its lower bound, in [0, 1].

    Args:
        gap: 0-d, the model's value over the bound.
        decrease: 0-d, what the whole step is predicted to gain.

    Returns:
        0-d; 0 for 0/0, and where the step is predicted to lose.
    """
    part = gap / decrease.abs()  # -0.0 would turn the sign
    return torch.where((gap <= 0) | (decrease < 0) | part.isnan(), 0.0, part).clamp(0.0, 1.0)


def clipped(loss: Tensor, factor: Tensor | float, bound: Tensor | float) -> Tensor:
    """The loss that a clipped gradient belongs to: c g is the gradient of F + c (f - F), which F is below, too.

    Args:
        loss: 0-d, f.
        factor: c, in (0, 1].
        bound: F; where it is -inf, or c is 1, the loss stays what it is.

    Returns:
        0-d.
    """
    below = torch.as_tensor(bound, dtype=loss.dtype, device=loss.device)
    return torch.where(below.isfinite(), loss + (factor - 1) * (loss - below), loss)


@dataclass(frozen=True)
class LossModel:
    """The state of Momo: scalars on the device, float64 where the device has it.

    Args:
        value: Value of the averaged model at the weights that the last step left; (averages,) where there are several.
        intercept: With direct bookkeeping, the average of f_i - <g_i, w_i>, its weights summing to 1 - β^steps;
            likewise.
        bound: The estimated lower bound.
        steps: Number of losses averaged so far, with gradients from before the first.
        calls: Number of steps so far as the host knows it: on an accelerator, skipped ones count.
    """

    value: Tensor
    intercept: Tensor
    bound: Tensor
    steps: Tensor
    calls: int = 0

    @classmethod
    def new(cls, device: torch.device, averages: int = 1) -> "LossModel":
        """Before the first step.

        Args:
            device: Of the numbers.
            averages: How many of gradients.
        """
        zero = torch.zeros((), dtype=scalar_type(device), device=device)
        each = zero if averages == 1 else zero.expand(averages)
        return cls(each.clone(), each.clone(), zero + FLOOR, zero.clone())

    @classmethod
    def restored(cls, saved: Mapping[str, float], device: torch.device, averages: int = 1) -> "LossModel":
        """From what `numbers` returned.

        Args:
            saved: The numbers.
            device: Of the model.
            averages: How many of gradients.
        """
        new = cls.new(device, averages)
        scalars: dict[str, Tensor] = {}
        for key, name in SCALARS.items():
            numbers = [torch.full_like(new.bound, saved[own]) for own in _keys(key, getattr(new, name))]
            scalars[name] = torch.stack(numbers).reshape(getattr(new, name).shape)
        return cls(**scalars, calls=round(saved["momo_calls"]))

    def kept(self, new: "LossModel") -> "LossModel":
        """Another model's numbers in the memory of this one.

        Args:
            new: After the step.
        """
        pairs = ((getattr(self, name), getattr(new, name)) for name in SCALARS.values())
        return LossModel(*(kept(old, now) for old, now in pairs), calls=new.calls)

    def numbers(self) -> dict[str, float]:
        """As plain numbers, for a checkpoint; waits for the device."""
        known = {key: getattr(self, name) for key, name in SCALARS.items()}
        scalars = {
            own: float(one)
            for key, value in known.items()
            for own, one in zip(_keys(key, value), value.reshape(-1), strict=True)
        }
        return {**scalars, "momo_calls": float(self.calls)}

    def after(self, chosen: "Chosen", gained: Tensor, accept: Tensor | None) -> "LossModel":
        """After the step: the model is linear, so its value at the new weights is known.

        Args:
            chosen: The decision.
            gained: What step and weight decay were predicted to gain, like the value.
            accept: A 0-d boolean; where it is False only `calls` changes. None means True.
        """
        new = (chosen.value - gained, chosen.intercept, chosen.next_bound, chosen.steps)
        if accept is not None:
            old = (self.value, self.intercept, self.bound, self.steps)
            new = [torch.where(accept.to(one.device), one, other) for one, other in zip(new, old, strict=True)]
        return LossModel(*new, calls=self.calls + 1)


@dataclass(frozen=True)
class Inner:
    """Inner products with the weights, summed over all parameters, 0-d each; zero where nobody needs them.

    Args:
        average: <m, w>, the debiased momentum; (averages,) where there are several.
        gradient: <g, w>.
        decay: Sum of lr · weight_decay · <m, w>: what weight decay is predicted to gain; likewise.
        decay_ahead: The same for the averages that steps follow: m, or Nesterov's, or what is made of several.
    """

    average: Tensor
    gradient: Tensor
    decay: Tensor
    decay_ahead: Tensor


@dataclass(frozen=True)
class Chosen:
    """What Momo decided, 0-d each.

    Args:
        t: Part of the step that is taken.
        gap: Model's value, after weight decay, over the lower bound.
        bound: The lower bound that was used.
        value: Value of the model with the momentum's own weights, before the step; (averages,) where there are several.
        next_bound: The estimated lower bound after this step.
        intercept: With direct bookkeeping, the new average of f_i - <g_i, w_i>; likewise.
        steps: Number of losses averaged, this one included.
    """

    t: Tensor
    gap: Tensor
    bound: Tensor
    value: Tensor
    next_bound: Tensor
    intercept: Tensor
    steps: Tensor


def choose(
    momo: Momo,
    model: LossModel,
    loss: Tensor,
    *,
    lower_bound: float,
    decrease: Tensor,
    inner: Inner,
    beta: float,
    averages: Averages | None = None,
    ahead: bool,
    restart: bool | Tensor,
    resync: bool,
) -> Chosen:
    """Average the loss into the model and say how much of the step to take.

    Args:
        momo: Options.
        model: State before this step.
        loss: 0-d.
        lower_bound: Of this step; where it is estimated, its least possible value.
        decrease: 0-d, what the whole step is predicted to gain, weight decay not counted.
        inner: Inner products with the weights.
        beta: Weight of the old average, of gradients and losses alike; the first, if there are several.
        averages: Several, with their weights; None: one.
        ahead: Whether steps follow Nesterov's averages.
        restart: Whether the weights are not those that the last step left; 0-d where that is on a device.
        resync: Whether direct bookkeeping begins here: its intercept is then made from the model's value.

    Returns:
        The decision; nothing is written.
    """
    steps = model.steps + 1
    rate: float | Tensor = beta
    if averages is not None:
        rate = torch.stack([torch.full_like(steps, own) for own in averages.betas_from(beta)])

    def mass(counts: Tensor) -> Tensor:
        if averages is None:
            return debias(beta, counts)
        return torch.stack([debias(own, counts) for own in averages.betas_from(beta)])

    weight = mass(steps)
    intercept = model.intercept
    if momo.direct and not resync:
        intercept = intercept + (1 - rate) * (loss - inner.gradient - intercept)
        plain = intercept / weight + inner.average
    else:
        before = model.value
        if isinstance(restart, Tensor):
            before = torch.where(restart, loss, before)
        elif restart:
            before = loss
        plain = (rate * mass(model.steps) * before + (1 - rate) * loss) / weight
        if momo.direct:
            intercept = weight * (plain - inner.average)
    looking = (rate * weight * plain + (1 - rate) * loss) / mass(steps + 1)
    followed = looking if ahead else plain
    if averages is not None:
        followed = (torch.stack(averages.weights_at(steps)) * followed).sum()
    value = followed - inner.decay_ahead
    bound = floor = torch.full_like(value, lower_bound)
    if momo.lower_bound == "auto":
        bound = torch.where(value < model.bound, torch.maximum(value / 2, floor), model.bound)
    t = truncated(value - bound, decrease)
    next_bound = torch.maximum(value - t * decrease / 2, floor) if momo.lower_bound == "auto" else bound
    return Chosen(t, value - bound, bound, plain, next_bound, intercept, steps)


def _keys(key: str, value: Tensor) -> list[str]:
    """Under which a scalar stands in checkpoints, or each of those of several averages."""
    return [key if place == 1 else f"{key}_{place}" for place in range(1, value.numel() + 1)]


def _checked_bound(bound: object) -> float:
    try:
        return number(-math.inf, infinite=True)("Momo: lower_bound", bound)
    except TypeError as error:
        raise TypeError(refusal("Momo: lower_bound", "a number, a function or 'auto'", bound)) from error
    except ValueError as error:
        raise ValueError(refusal("Momo: lower_bound", "below the loss, and not infinity", bound)) from error
