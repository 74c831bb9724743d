"""An average of the weights that steps leave behind, for evaluation: one copy of the weights, and no second model.

Let w_t be the weights after step t, and S the step `start`. The average is e_S = w_S, and from then on

    e_t = e_{t-1} + (w_t - e_{t-1}) / τ

    τ = max(1, (t - S) / parts)     looks back at about one of `parts` parts of the tail; 1 part: the mean of the tail
    τ = max(1, (T - S) / parts)     with `end` = T: of constant length
    τ = 1 / (1 - beta)              with `beta`: the usual exponential average

and what is evaluated is (1 - mix) w + mix e. Averages of the tail let a learning rate stay high for longer.
"""

import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steepest.anatomy.sites import distinct
from steepest.checks import Check, number, optional, refusal
from steepest.optim.beside import Contents, checked_state, count, lent, load_averages
from steepest.optim.follow import Following, follow
from steepest.optim.parameters import EMPTY, Parameters, named
from steepest.optim.replay import kept, recording
from steepest.ranks import local, scalar_type
from steepest.stages.stage import state_dtype

OPTIONS: Mapping[str, Check] = {
    "start": count,
    "end": optional(count),
    "parts": number(above=True),
    "beta": optional(number(high=1.0)),
    "mix": number(high=1.0, above=True, up_to=True),
}


class TailAverage:
    """An average of the last weights, beside any optimizer.

    Call `update()` after each step, or `follow(optimizer)` once; inside `with average.averaged():` the model has the
    averaged weights. With the defaults the average is the mean of all weights after the first step; `start`: of those
    of the last part of a training. Steps are counted by `update`, from 1 on.

    Only parameters are averaged, each once however often it is tied. Buffers stay what they are: with batch norms, call
    `torch.optim.swa_utils.update_bn` inside `averaged()`, and know that the old statistics do not come back.

    Memory is one copy of the parameters that require gradients, in float32 or wider. Inside `averaged()` weights and
    averages change places, so nothing more is needed; with `mix` below 1, or weights of 16 bits, the weights are copied
    for that time. DTensors are averaged where they are: nothing is sent. Of FSDP2 pass the module, not its parameters:
    what it gathered for an evaluation is then given back, so that no later pass works with it.

    Args:
        params: A module, or parameters, named or not.
        start: S, the step whose weights are the first of the average; until then the weights are their own average.
        end: T, the last step of the training, if the average shall look back equally far at all steps, (T - S) / parts.
        parts: Into how many the tail is divided. About so far the average looks back: 1, its mean; more, less far.
        beta: Weight of the old average in [0, 1), in place of `end` and `parts`.
        mix: Part of the average in what is evaluated, in (0, 1]; the rest is the present weights.

    Raises:
        ValueError: If an option is out of range, or two exclude each other; if there is no parameter.
        TypeError: If an option or a parameter is of the wrong type.

    Source:
        Polyak and Juditsky, 1992 (the mean); Shamir and Zhang, arXiv:1212.1824 (parts of the tail, growing); Izmailov
        et al., arXiv:1803.05407 (networks). The tail of constant length mixed with 0.6 is that of the modded-nanogpt
        record of 2730 steps, https://github.com/KellerJordan/modded-nanogpt/pull/325: τ = 150 from step 2400 on.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> average = TailAverage(layer)
        >>> following = average.follow(optimizer)
        >>> with torch.no_grad():
        ...     _ = layer.weight.zero_()
        >>> for _ in range(3):
        ...     layer.weight.grad = -torch.ones(1, 2)
        ...     optimizer.step()
        >>> with average.averaged():
        ...     print(layer.weight.tolist())  # of 1, 2 and 3
        [[2.0, 2.0]]
        >>> layer.weight.tolist()
        [[3.0, 3.0]]
    """

    def __init__(
        self,
        params: Parameters,
        *,
        start: int = 0,
        end: int | None = None,
        parts: float = 1.0,
        beta: float | None = None,
        mix: float = 1.0,
    ) -> None:
        given = {"start": start, "end": end, "parts": parts, "beta": beta, "mix": mix}
        checked = {name: OPTIONS[name](f"TailAverage: {name}", value) for name, value in given.items()}
        self.start: int = checked["start"]
        self.end: int | None = checked["end"]
        self.parts: float = checked["parts"]
        self.beta: float | None = checked["beta"]
        self.mix: float = checked["mix"]
        if self.end is not None and self.end <= self.start:
            raise ValueError(refusal("TailAverage: end", f"after start, which is {self.start}", end))
        if self.beta is not None and (self.end is not None or self.parts != 1):
            raise ValueError(
                f"TailAverage: beta={self.beta} says how far the average looks back, and so do end and parts. Leave "
                "out either."
            )
        self._model = weakref.ref(params) if isinstance(params, nn.Module) else None
        self._names, self._parameters = _collected(params)
        with torch.no_grad(), torch.inference_mode(False):
            self._averages = [p.detach().clone().to(state_dtype(p)) for p in self._parameters]
        self._steps = torch.zeros((), dtype=torch.int64, device="cpu")
        self._calls = 0  # at least as many as steps, and known without waiting
        self._inside = False

    @property
    def steps(self) -> int:
        """Number of steps so far; waits for the device."""
        return int(self._steps)

    def follow(self, optimizer: Any) -> Following:
        """Update after each step of an optimizer; one that is passed over, as something is not finite, is none.

        Args:
            optimizer: Of this library or any other, or what a host wraps one in.

        Returns:
            An object whose `remove()` ends it.

        Raises:
            TypeError: If it is no optimizer.
        """
        return follow(optimizer, None, self._after)

    @torch.no_grad()
    def update(self) -> None:
        """A step was taken: its weights go into the average.

        Raises:
            RuntimeError: If the averaged weights are in the model.
            ValueError: If a parameter has another shape or device than when the average was made.
        """
        self._after(True)

    @torch.no_grad()
    def _after(self, taken: bool | Tensor) -> None:
        """As `update`; where `taken` is False nothing changes."""
        if self._inside:
            raise RuntimeError("TailAverage: a step was taken inside averaged(), where weights are not those of steps.")
        if taken is False:
            return
        if isinstance(taken, Tensor) and self._steps.device != taken.device:
            self._steps = torch.full((), int(self._steps), dtype=torch.int64, device=taken.device)
        self._steps.add_(taken)
        self._calls += 1
        if self._calls < self.start and not recording():
            return
        weights, averages = self._pairs()
        part = self._part(self._steps)
        if isinstance(taken, Tensor):
            part = torch.where(taken, part, 0.0)
        known = float(part) if part.device.type == "cpu" else None
        alike = [a.dtype == w.dtype for w, a in zip(weights, averages, strict=True)]
        if known is not None and all(alike):
            if averages:
                torch._foreach_lerp_(averages, weights, known)
            return
        for weight, average in zip(weights, averages, strict=True):
            average.lerp_(weight.to(average.dtype), part.to(average.device, average.dtype) if known is None else known)

    def _part(self, steps: Tensor) -> Tensor:
        """1 / τ: the part of step `steps` in the average; 0-d."""
        tail = (steps - self.start).to(scalar_type(steps.device))
        if self.beta is not None:
            part = torch.full_like(tail, 1 - self.beta)
        elif self.end is not None:
            part = torch.full_like(tail, min(1.0, self.parts / (self.end - self.start)))
        else:
            part = (self.parts / tail.clamp(min=1.0)).clamp(max=1.0)
        return torch.where(tail <= 0, 1.0, part)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """What this rank keeps of weights and averages."""
        weights, averages = local(self._parameters), local(self._averages)
        for name, weight, average in zip(self._names, weights, averages, strict=True):
            if weight.shape != average.shape or weight.device != average.device:
                raise ValueError(
                    f"TailAverage: {name!r} has shape {tuple(weight.shape)} on {weight.device}, and its average "
                    f"{tuple(average.shape)} on {average.device}. Change the model first, then make the average."
                )
        return weights, averages

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Within it the model has the averaged weights; afterwards, also after an error, its own, bit for bit.

        Evaluate and save inside; do not train. On several ranks, all of them enter and leave.

        Raises:
            RuntimeError: If it is inside already, or somebody wrote to the weights inside.
            ValueError: If a parameter has another shape or device than when the average was made.
        """
        if self._inside:
            raise RuntimeError("TailAverage: the averaged weights are in the model already.")
        weights, averages = self._pairs()
        if int(self._steps) < self.start:
            weights, averages = [], []
        contents: list[Contents] = [
            average if self.mix == 1 and weight.dtype == average.dtype else partial(_mixed, average, self.mix)
            for weight, average in zip(weights, averages, strict=True)
        ]
        self._inside = True
        try:
            with lent("TailAverage.averaged", weights, contents, self._model() if self._model else None):
                yield
        finally:
            self._inside = False

    def state_dict(self) -> dict[str, Any]:
        """Number of steps, and the average of each parameter by its name: tensors that share memory with it."""
        if self._inside:
            raise RuntimeError("TailAverage: inside averaged() averages are in the model; ask for the state outside.")
        return {"steps": self.steps, "averages": self._named()}

    def _named(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, on these ranks or others. Options stay those of this object.

        Args:
            state_dict: With the same names and shapes.

        Raises:
            ValueError: If a name or shape differs, or the number of steps is none. Nothing is changed then.
            TypeError: If something is of the wrong type. Nothing is changed then, either.
        """
        if self._inside:
            raise RuntimeError("TailAverage: inside averaged() averages are in the model; load a state outside.")
        averages = self._named()
        found = checked_state("TailAverage", state_dict, ("steps", "averages"), averages)
        load_averages(averages, found["averages"])
        self._steps = kept(self._steps, torch.full_like(self._steps, found["steps"]))
        self._calls = found["steps"]

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: a copy is of no model."""
        return {**self.__dict__, "_model": None}


def _collected(params: Parameters) -> tuple[list[str], list[Tensor]]:
    """Names and parameters, each once; of a module, those that require gradients."""
    if isinstance(params, nn.Module):
        sites = [own[0] for own in distinct(params) if own[0].parameter.requires_grad]
        pairs = [(site.name, site.parameter) for site in sites]
    else:
        distinct_ones: dict[Tensor, str] = {}
        for name, parameter in named(params):
            distinct_ones.setdefault(parameter, name)
        pairs = [(name, parameter) for parameter, name in distinct_ones.items()]
    if not pairs:
        raise ValueError(EMPTY)
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"TailAverage: two parameters have the name {twice!r}; give each its own.")
    return names, [parameter for _, parameter in pairs]


def _mixed(average: Tensor, mix: float, weight: Tensor) -> Tensor:
    return torch.lerp(weight.to(average.dtype), average, mix)
