"""QK-clip: where attention logits have grown beyond a threshold, the weights that make them are scaled down.

After a step, with S_h the largest logit of head h since the step before and τ the threshold,

    γ_h = min(1, τ / S_h),    W_q rows of head h <- γ_h^½ W_q,    W_k rows <- γ^½ W_k

and biases likewise. A head of keys that several heads of queries share takes the γ of the largest S of these, so that
no logit that was seen is above τ afterwards: √(γ_h γ) S_h <= τ.

Source: Kimi K2, arXiv:2507.20534, as part of MuonClip; there τ is 100.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from steepest.anatomy.attention import Attention, Rows, attentions, check_attentions
from steepest.checks import number, refusal
from steepest.names import unknown_name
from steepest.notices import warn
from steepest.optim.descent import SteepestDescent
from steepest.optim.follow import Following, follow, opened
from steepest.ranks import Team, exchange_device, listeners, local, own_box
from steepest.stages.stage import state_dtype

SHOWN = 3  # names in a message


class QKClip:
    """Scales weights of queries and keys down after steps in which attention logits were too large.

    It needs the largest logit of each head, which fast attention never shows. Either the model computes it, and tells
    `record(name, maxima)` in each forward pass; or `watch()` looks at what the projections put out, and takes

        S_h <= max_i |q_i| max_j |k_j| / sqrt(head_dim)

    over all tokens: at the cost of two norms per layer, and never too low, but logits between tokens that do not point
    the same way, or that a mask hides, may be far below it, so that weights are clipped before they need be.
    Rotations of positions leave it as it is.

    What a model needs to have: logits that are products of these rows, and nothing between but rotations. Layers that
    norm queries or keys are not found, and need no clip; multi-head latent attention, whose parts are shared in other
    ways, is not known here.

    Args:
        attentions: A model, whose attention layers are then found (`steepest.anatomy.attentions`), or a list of
            `steepest.anatomy.Attention`.
        threshold: τ, above 0.

    Attributes:
        attentions: The layers, by name.

    Raises:
        ValueError: If there is no such layer, or the threshold is out of range.
        TypeError: If something is of the wrong type.

    Source:
        Kimi K2, arXiv:2507.20534.

    Example:
        >>> layer = nn.MultiheadAttention(8, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        >>> clip = QKClip(layer, threshold=100.0)
        >>> following = clip.follow(optimizer)
        >>> clip.record("attention", torch.tensor([400.0, 50.0]))
        >>> optimizer.step()
        >>> clip.diagnostics()
        {'clipped_heads': 1.0, 'max_logit': 400.0}
    """

    def __init__(self, attentions: nn.Module | Sequence[Attention], threshold: float = 100.0) -> None:
        self.threshold: float = number(above=True)("QKClip: threshold", threshold)
        self.attentions: Mapping[str, Attention] = {one.name: one for one in _found(attentions)}
        self._maxima: dict[str, Tensor] = {}
        self._last = torch.zeros(2, device="cpu")  # heads that were clipped, and the largest logit, in the last step
        self._optimizer: Optimizer | None = None
        self._rows: dict[Tensor, list[tuple[str, bool, Rows]]] = {}
        for name, one in self.attentions.items():
            for rows, is_key in [*((own, False) for own in one.query), *((own, True) for own in one.key)]:
                self._rows.setdefault(rows.parameter, []).append((name, is_key, rows))

    def record(self, name: str, maxima: Tensor) -> None:
        """Tell the largest logits of a forward pass, scaled as the softmax sees them; the largest since a step counts.

        Args:
            name: Of the attention layer, as in `attentions`.
            maxima: (heads,), over batch and tokens; a head that this rank does not have is 0. Other ranks' are heard of
                at the step. What is not finite counts as 0.

        Raises:
            ValueError: If the name is not known, or the shape is another.
            TypeError: If it is no tensor of real numbers.
        """
        if name not in self.attentions:
            raise ValueError(f"QKClip: {unknown_name('attention', name, self.attentions)}")
        if not isinstance(cast(object, maxima), Tensor) or not maxima.is_floating_point():
            raise TypeError(refusal(f"QKClip: maxima of {name!r}", "a tensor of real numbers", maxima))
        heads = self.attentions[name].heads
        if maxima.shape != (heads,):
            raise ValueError(
                f"QKClip: maxima of {name!r} must have shape ({heads},), one for each head, got {tuple(maxima.shape)}. "
                "Take amax over batch and both token dimensions."
            )
        new = maxima.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0.0)
        known = self._maxima.get(name)
        self._maxima[name] = new if known is None else torch.maximum(known, new.to(known.device))

    def watch(self) -> Following:
        """Record, in each forward pass in training mode, the bound above, from outputs of the projections.

        Hooks are Python: a compiled model needs `record`. Inside an activation checkpoint it is seen twice, and counts
        once. Copies of the model are not watched.

        Returns:
            An object whose `remove()` ends it.

        Raises:
            ValueError: If a layer has no projections of its own, as `torch.nn.MultiheadAttention`.
        """
        handles: list[Any] = []
        for name, one in self.attentions.items():
            if one.outputs is None:
                raise ValueError(
                    f"QKClip: {name!r} has no modules whose outputs are queries and keys; call record({name!r}, ...)."
                )
        for one in self.attentions.values():
            seen: dict[str, Tensor] = {}
            query, key = cast(tuple[nn.Module, nn.Module], one.outputs)
            for layer, parts in ((query, "qk"),) if query is key else ((query, "q"), (key, "k")):
                handles.append(layer.register_forward_hook(_Look(self.record, one, seen, parts)))
        return Following(tuple(handles))

    def follow(self, optimizer: Any) -> Following:
        """Clip after each step of an optimizer that is taken; what was recorded before one that is not is forgotten.

        With Momo its model of the loss, which is linear, goes along. On several ranks, all of them step together, and
        the largest logits of all count.

        Args:
            optimizer: Of the weights, of this library or any other, or what a host wraps one in.

        Returns:
            An object whose `remove()` ends it.

        Raises:
            TypeError: If it is no optimizer.
        """
        following = follow(optimizer, None, self._after)
        self._optimizer = inner = opened(optimizer)[-1]
        kept = inner.on_spheres(list(self._rows)) if isinstance(inner, SteepestDescent) else []
        if kept:
            more = ", ..." * (len(kept) > SHOWN)
            warn(
                f"QKClip: {', '.join(map(repr, kept[:SHOWN]))}{more} are kept at their norm by Sphere(), which takes a "
                "clip of all heads away at the next step. Give them another kind of weight decay, such as "
                "Decoupled(0.0), by families or groups."
            )
        return following

    @torch.no_grad()
    def clip(self) -> None:
        """Clip now, by what was recorded since the last time: for loops that do not `follow`."""
        self._after(True)

    @torch.no_grad()
    def _after(self, taken: bool | Tensor) -> None:
        maxima, self._maxima = self._maxima, {}
        if taken is False:
            return
        names = list(self.attentions)
        device = local([next(iter(self._rows))])[0].device
        own = [maxima.get(name, torch.zeros(self.attentions[name].heads, device=device)).to(device) for name in names]
        largest = dict(zip(names, self._shared(torch.cat(own)).split([len(one) for one in own]), strict=True))
        shrink = {name: (self.threshold / one.clamp(min=self.threshold)) for name, one in largest.items()}
        if isinstance(taken, Tensor):
            shrink = {name: torch.where(taken.to(device), one, torch.ones_like(one)) for name, one in shrink.items()}
        every = torch.cat(list(shrink.values()))
        self._last = torch.stack([(every < 1).sum().float(), torch.cat(list(largest.values())).amax()])
        if device.type == "cpu" and not bool((every < 1).any()):
            return
        moves: list[tuple[Tensor, Tensor, float | Tensor]] = []
        for parameter, parts in self._rows.items():
            weight = self._exact(parameter)
            along = parts[0][2].along
            change = torch.zeros(parameter.shape[along], dtype=state_dtype(parameter), device=weight.device)
            for name, is_key, rows in parts:
                one, factor = self.attentions[name], shrink[name]
                if is_key:
                    factor = factor.view(one.key_heads, -1).amin(1)
                index = rows.index.to(weight.device)
                change[index] = (factor.to(change).sqrt() - 1).unsqueeze(1).expand(index.shape)
            first, last = own_box(parameter)[along]
            change = change[first:last]
            if weight.ndim > 1:
                change = change.unsqueeze(1 - along)
            moves.append((parameter, weight.to(change.dtype) * change, 1.0))
        self._move(moves)

    def _exact(self, parameter: Tensor) -> Tensor:
        """What this rank keeps of a weight, with bits that are kept beside it."""
        if isinstance(self._optimizer, SteepestDescent):
            return self._optimizer.exact(parameter)
        return local([parameter])[0].detach()

    def _move(self, moves: Sequence[tuple[Tensor, Tensor, float | Tensor]]) -> None:
        if isinstance(self._optimizer, SteepestDescent):
            known = self._optimizer.names
            self._optimizer.displace([move for move in moves if move[0] in known])
            moves = [move for move in moves if move[0] not in known]
        for parameter, change, _ in moves:
            own = local([parameter])[0]
            own.copy_(own.to(change.dtype) + change)

    def _shared(self, maxima: Tensor) -> Tensor:
        """The largest of all ranks."""
        known = self._optimizer
        team = listeners(known.team if isinstance(known, SteepestDescent) else Team.of(list(self._rows), ()))
        if team.size == 1:
            return maxima
        there = maxima.to(exchange_device(maxima.device, team))
        torch.distributed.all_reduce(there, op=torch.distributed.ReduceOp.MAX, group=team.group)
        return there.to(maxima.device)

    def diagnostics(self) -> dict[str, float]:
        """Of the last step, waiting for the device.

        Returns:
            "clipped_heads", how many heads of queries were above the threshold, and "max_logit", the largest logit that
            was recorded.
        """
        return {"clipped_heads": float(self._last[0]), "max_logit": float(self._last[1])}


@dataclass(frozen=True)
class _Look:
    """A hook that looks at what a projection puts out.

    Args:
        record: Told the bound of each head, once queries and keys are seen.
        one: The attention layer.
        seen: Longest queries and keys, "q" and "k", of a pass of which only one is known yet; written to.
        parts: Which of them the projection makes.
    """

    record: Callable[[str, Tensor], None]
    one: Attention
    seen: dict[str, Tensor]
    parts: str

    def __call__(self, layer: nn.Module, _: Any, output: Any) -> None:
        if not layer.training or not isinstance(output, Tensor):
            return
        one, seen = self.one, self.seen
        for part in self.parts:
            index = (one.query if part == "q" else one.key)[0].index.to(output.device)
            lengths = local([output.detach()])[0].flatten(0, -2)[:, index].float().square().sum(-1).sqrt()
            seen[part] = lengths.amax(0) if len(lengths) else lengths.new_zeros(len(index))
        if len(seen) == 2:
            keys = seen.pop("k").repeat_interleave(one.heads // one.key_heads)
            self.record(one.name, seen.pop("q") * keys / one.query[0].index.shape[1] ** 0.5)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy of the layer takes along does nothing: its logits are not those of these weights."""
        return getattr, (nullcontext(), "__exit__")


def _found(given: object) -> list[Attention]:
    if isinstance(given, nn.Module):
        return check_attentions(attentions(given))
    if not isinstance(given, list | tuple):
        raise TypeError(refusal("QKClip: attentions", "a model, or a list of steepest.anatomy.Attention", given))
    return check_attentions(cast(Sequence[object], given))
