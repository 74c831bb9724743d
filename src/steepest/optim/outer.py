"""Nesterov's look-ahead around a whole optimizer, along an average of what its steps have done: EMA-Nesterov.

Let A be one step of the inner optimizer, whatever it does. The outer one keeps an average m of moves, m_0 = 0, and

    y_t     = x_t + β_t m_t                       where the gradient is taken: what the model's weights are
    x_{t+1} = A(y_t)                              where the step leaves them
    m_{t+1} = decay m_t + (1 - decay) (x_{t+1} - x_t)
    β_t     = strength · (learning rate) / (its largest), 0 before step `start` and from step `end` on

The optimizer's own Nesterov looks ahead by one gradient, before the direction is found; this one by many directions.

Source: EMA-Nesterov, arXiv:2605.25395; strength 0.6 and decay 0.99 are those of the modded-nanogpt record with Muon.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Never, cast

import torch
from torch import Tensor

from steepest.checks import Check, number, optional, refusal
from steepest.optim.beside import checked_number, checked_state, count, lent, load_averages
from steepest.optim.descent import SteepestDescent
from steepest.optim.follow import Following, follow, opened
from steepest.optim.replay import kept
from steepest.ranks import local
from steepest.stages.stage import state_dtype

OPTIONS: Mapping[str, Check] = {
    "strength": number(),
    "decay": number(high=1.0),
    "start": count,
    "end": optional(count),
}
LARGEST = ("initial_lr", "max_lr")  # where schedulers keep what a learning rate is to be at most
KEYS = ("steps", "peaks", "ahead", "averages")
Number = float | Tensor


class OuterNesterov:
    """A look-ahead along the average of past moves, around any optimizer.

    Nothing else changes in a training loop: the object moves the weights after each step of the optimizer. In between
    they are the points y at which gradients are taken; evaluate and save the points x inside `with outer.base():`.

    Steps that are passed over, and parameters that a step leaves alone, leave everything as it was. Momo's losses and
    gradients are those of y, and its model of the loss, which is linear, goes along with the look-ahead: nothing starts
    again. With `rounding="kept"` so do the kept bits. Other weights of 16 bits lose what a look-ahead moves them by
    less than their rounding, or have it right on average with `rounding="stochastic"`.

    Memory is one copy of the parameters that require gradients, in float32 or wider, and another one during a step.
    Copies and pickles of the object go on with the optimizer that they hold; to copy both, copy them together.

    Args:
        optimizer: Of this library or any other, or what a host wraps one in.
        strength: Of the look-ahead, at the largest learning rate: how much of the average.
        decay: Weight of the old average, in [0, 1).
        start: First step, counted from 0, that looks ahead; the average is kept from the beginning on.
        end: First step that looks ahead no more; None: none.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of the wrong type, or there is no optimizer.

    Source:
        EMA-Nesterov, arXiv:2605.25395. There β is 0 in about the first and the last fifth of a training.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        strength: float = 0.6,
        decay: float = 0.99,
        start: int = 0,
        end: int | None = None,
    ) -> None:
        given = {"strength": strength, "decay": decay, "start": start, "end": end}
        checked = {name: OPTIONS[name](f"OuterNesterov: {name}", value) for name, value in given.items()}
        self.strength: float = checked["strength"]
        self.decay: float = checked["decay"]
        self.start: int = checked["start"]
        self.end: int | None = checked["end"]
        if self.end is not None and self.end <= self.start:
            raise ValueError(refusal("OuterNesterov: end", f"after start, which is {self.start}", end))
        inner = opened(optimizer)[-1]
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(refusal("OuterNesterov: optimizer", "a torch optimizer, or what wraps one", optimizer))
        self._optimizer = inner
        self._steps = torch.zeros((), dtype=torch.int64, device="cpu")
        self._peaks: list[Number] = []  # the largest learning rate of each group
        self._averages: dict[Tensor, Tensor] = {}
        self._ahead: dict[Tensor, Number] = {}  # β with which each parameter looks ahead now
        self._before: dict[Tensor, tuple[Tensor, tuple[int, int]]] = {}  # during a step: y, and a count of writes
        self._inside = False
        self._know()
        self._following: Following | None = self._follow()

    def _follow(self) -> Following:
        return follow(self._optimizer, self._note, self._after)

    @property
    def steps(self) -> int:
        """Number of steps so far; waits for the device."""
        return int(self._steps)

    def remove(self) -> None:
        """Go back to x, and look ahead no more; nor do copies that are made later.

        Raises:
            RuntimeError: If it is asked for inside `base()`.
        """
        if self._inside:
            raise RuntimeError("OuterNesterov: inside base() the weights are x already; remove it outside.")
        self._move([(p, self._averages[p], -beta) for p, beta in self._ahead.items()])
        self._ahead.update(dict.fromkeys(self._ahead, 0.0))
        if self._following is not None:
            self._following.remove()
        self._following = None

    @torch.no_grad()
    def _know(self) -> None:
        """Make what is kept of parameters that are new."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter not in self._averages:
                    with torch.inference_mode(False):
                        zeros = torch.zeros_like(parameter, dtype=state_dtype(parameter))
                    self._averages[parameter], self._ahead[parameter] = zeros.requires_grad_(False), 0.0
        for group in self._optimizer.param_groups[len(self._peaks) :]:
            self._peaks.append(_here(group["lr"]))

    @torch.no_grad()
    def _note(self) -> None:
        """A step begins."""
        if self._inside:
            raise RuntimeError(
                "OuterNesterov: a step was asked for inside base(), where weights are not those of steps."
            )
        self._know()
        self._before = {p: (self._exact(p), _writes(p)) for p in self._averages if p.requires_grad}

    def _exact(self, parameter: Tensor) -> Tensor:
        """A copy of what this rank keeps of a weight, with bits that are kept beside it."""
        if isinstance(self._optimizer, SteepestDescent):
            return self._optimizer.exact(parameter)
        return local([parameter])[0].detach().clone()

    @torch.no_grad()
    def _after(self, taken: bool | Tensor) -> None:
        """A step is over."""
        before, self._before = self._before, {}
        if taken is False:
            return
        if isinstance(taken, Tensor) and self._steps.device != taken.device:
            self._steps = torch.full((), int(self._steps), dtype=torch.int64, device=taken.device)
        self._steps.add_(taken)
        moves: list[tuple[Tensor, Tensor, Number]] = []
        for place, group in enumerate(self._optimizer.param_groups):
            ahead = self._next(place, group)
            for parameter in group["params"]:
                if parameter in before and _moved(parameter, before[parameter][1]):
                    moves.append(self._looked(parameter, before.pop(parameter)[0], ahead, taken))
        self._move(moves)

    def _looked(
        self, parameter: Tensor, point: Tensor, ahead: Number, taken: bool | Tensor
    ) -> tuple[Tensor, Tensor, Number]:
        """Average the move of a parameter, and say by what it goes ahead."""
        average, old = local([self._averages[parameter]])[0], self._ahead[parameter]
        move = self._exact(parameter).to(average.dtype).sub_(point).add_(average * _on(old, average))
        new = torch.lerp(average, move, 1 - self.decay)
        factor = ahead
        if isinstance(taken, Tensor):
            mask = taken.to(average.device)
            new = torch.where(mask, new, average)
            ahead, old = _scalar(ahead, average), _scalar(old, average)
            factor = torch.where(mask, ahead, torch.zeros_like(ahead))
            ahead = torch.where(mask, ahead, old)
        average.copy_(new)
        before = self._ahead[parameter]
        known = before if isinstance(before, Tensor) else None
        self._ahead[parameter] = kept(known, ahead) if isinstance(ahead, Tensor) else ahead
        return parameter, self._averages[parameter], factor

    def _next(self, place: int, group: Mapping[str, Any]) -> Number:
        """β of the step that comes, with the learning rate of now."""
        rates = [_here(group[key]) for key in ("lr", *LARGEST) if group.get(key) is not None]
        rate, peak = rates[0], self._peaks[place]
        away = [one for one in (*rates, peak) if isinstance(one, Tensor)]
        if not away:
            peak = max(peak, *rates)
            ratio = cast(float, rate) / peak if peak else 0.0
        else:
            largest = torch.stack([_scalar(one, away[0]) for one in (*rates, peak)]).amax()
            peak = kept(peak if isinstance(peak, Tensor) else None, largest)
            ratio = torch.where(largest > 0, _scalar(rate, away[0]) / largest, 0.0)
        self._peaks[place] = peak
        if self.start == 0 and self.end is None:
            return self.strength * ratio
        active = self._steps >= self.start
        if self.end is not None:
            active = active & (self._steps < self.end)
        if active.device.type == "cpu":
            return self.strength * ratio * float(active)
        return self.strength * ratio * active

    def _move(self, moves: list[tuple[Tensor, Tensor, Number]]) -> None:
        if isinstance(self._optimizer, SteepestDescent):
            self._optimizer.displace(moves)
            return
        with torch.no_grad():
            for parameter, average, factor in moves:
                own, add = local([parameter, average])
                own.copy_(own.to(add.dtype) + add * _on(factor, add))

    @contextmanager
    def base(self) -> Generator[None]:
        """Within it the weights are x; afterwards, also after an error, what they were, bit for bit.

        Evaluate and save what is deployed inside; save what training goes on from outside. x is y - β m, rounded.

        Raises:
            RuntimeError: If it is inside already, or somebody wrote to the weights inside.
        """
        if self._inside:
            raise RuntimeError("OuterNesterov: the weights are x already.")
        ahead = [p for p, beta in self._ahead.items() if isinstance(beta, Tensor) or beta != 0]
        contents = [partial(self._behind, parameter) for parameter in ahead]
        model = self._optimizer.model if isinstance(self._optimizer, SteepestDescent) else None
        self._inside = True
        try:
            with lent("OuterNesterov.base", local(ahead), contents, model):
                yield
        finally:
            self._inside = False

    def _behind(self, parameter: Tensor, weight: Tensor) -> Tensor:
        average, beta = local([self._averages[parameter]])[0], self._ahead[parameter]
        del weight
        return self._exact(parameter).to(average.dtype).sub_(average * _on(beta, average))

    def _named(self) -> dict[str, Tensor]:
        """Parameters by name."""
        groups = self._optimizer.param_groups
        if isinstance(self._optimizer, SteepestDescent):
            names = self._optimizer.names
        else:
            names = {
                parameter: name
                for index, group in enumerate(groups)
                for name, parameter in zip(
                    group.get("param_names") or [f"group {index}[{i}]" for i in range(len(group["params"]))],
                    group["params"],
                    strict=True,
                )
            }
        return {names[parameter]: parameter for parameter in self._averages if parameter in names}

    def state_dict(self) -> dict[str, Any]:
        """All that goes on: number of steps, the largest rates, averages and β by the names of parameters.

        Save it beside the optimizer's state and the weights as they are outside of `base()`. Waits for the device.

        Raises:
            RuntimeError: If it is asked for inside `base()`.
        """
        if self._inside:
            raise RuntimeError("OuterNesterov: inside base() the weights are x; ask for the state outside.")
        named = self._named()
        return {
            "steps": self.steps,
            "peaks": [float(peak) for peak in self._peaks],
            "ahead": {name: float(self._ahead[parameter]) for name, parameter in named.items()},
            "averages": {name: self._averages[parameter] for name, parameter in named.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, on these ranks or others; weights and optimizer are loaded apart.

        Args:
            state_dict: Of the same parameters.

        Raises:
            ValueError: If a name, shape or number does not fit. Nothing is changed then.
            TypeError: If something is of the wrong type. Nothing is changed then, either.
        """
        if self._inside:
            raise RuntimeError("OuterNesterov: inside base() the weights are x; load a state outside.")
        self._know()
        named = self._named()
        averages = {name: self._averages[parameter] for name, parameter in named.items()}
        found = checked_state("OuterNesterov", state_dict, KEYS, averages)
        ahead, peaks = found["ahead"], found["peaks"]
        if not isinstance(ahead, Mapping) or cast(Mapping[str, Any], ahead).keys() != averages.keys():
            raise ValueError(refusal("OuterNesterov: state_dict: ahead", "a mapping with the names of averages", ahead))
        if not isinstance(peaks, list) or len(cast(list[Any], peaks)) != len(self._peaks):
            expected = f"a list with one number for each of {len(self._peaks)} groups"
            raise ValueError(refusal("OuterNesterov: state_dict: peaks", expected, peaks))
        ahead = {n: checked_number(f"OuterNesterov: ahead[{n!r}]", beta) for n, beta in cast(Any, ahead).items()}
        peaks = [checked_number("OuterNesterov: peaks", peak) for peak in cast(list[Any], peaks)]
        load_averages(averages, found["averages"])
        self._ahead.update({parameter: ahead[name] for name, parameter in named.items()})
        self._peaks = list(peaks)
        self._steps = kept(self._steps, torch.full_like(self._steps, found["steps"]))

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: hooks are of this optimizer, so only whether there are any is told."""
        return {**self.__dict__, "_following": self._following is not None, "_before": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copy and pickle: copies of an optimizer have no hooks."""
        self.__dict__.update(state)
        self._following = self._follow() if state["_following"] else None

    def __copy__(self) -> Never:
        """Two of them would move the same weights twice."""
        raise TypeError("OuterNesterov: copy it with its optimizer: copy.deepcopy((model, optimizer, outer)).")


def _here(number: Any) -> Number:
    """A number, or one on a device, which is not read."""
    return float(number) if not isinstance(number, Tensor) or number.device.type == "cpu" else number.detach()


def _on(number: Number, like: Tensor) -> Number:
    """A factor for a tensor."""
    return number.to(like.device, like.dtype) if isinstance(number, Tensor) else number


def _scalar(number: Number, like: Tensor) -> Tensor:
    """0-d, on the device and of the type of a tensor."""
    if isinstance(number, Tensor):
        return number.to(like.device, like.dtype)
    return torch.full((), number, dtype=like.dtype, device=like.device)


def _writes(parameter: Tensor) -> tuple[int, int]:
    return parameter._version, local([parameter])[0]._version


def _moved(parameter: Tensor, writes: tuple[int, int]) -> bool:
    """Whether the step wrote to a parameter, as all ranks see it: one that keeps nothing of it goes by its gradient."""
    if local([parameter])[0].numel():
        return _writes(parameter) != writes
    return parameter.grad is not None
