"""What a module's arguments say about the inputs of its weight: the rows z of y = W z, for every kind of module.

A weight is read as a stack of S matrices m x n (its `View`, fused parts and heads left together, since they read the
same features). Its inputs are then rows of n features, per token and matrix of the stack.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from steepest.anatomy.plan import PlanRow
from steepest.anatomy.sites import Site, kinds
from steepest.anatomy.views import View

Arguments = Sequence[Any]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Inputs of one call.

    Args:
        values: (*tokens, S or 1, n); of a table the numbers of its rows, (*tokens, 1, 1).
        chosen: (*tokens, S), which token goes to which matrix of the stack; None: every token to all.
    """

    values: Tensor
    chosen: Tensor | None = None


@dataclass(frozen=True)
class Feed:
    """How calls of a module feed a weight.

    Args:
        stack: S.
        fan_in: n.
        pick: The tensors of a call that matter, the inputs first; None if the call does not feed the weight.
        rows: The inputs in those tensors.
        numbers: Whether inputs are numbers of rows, which have no gradient: then that of the output is waited for.
    """

    stack: int
    fan_in: int
    pick: Callable[[Arguments, Options], tuple[Tensor, ...] | None]
    rows: Callable[[tuple[Tensor, ...]], Rows]
    numbers: bool = False


_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
_FORWARDS = (
    nn.Linear.forward,
    nn.Conv1d.forward,
    nn.Conv2d.forward,
    nn.Conv3d.forward,
    nn.Embedding.forward,
)


def joined(view: View) -> View:
    """The view without what only divides the outputs, or the inputs into heads: one matrix for each input vector.

    Args:
        view: Of a parameter.
    """
    return replace(view, split=(), interleave=1, heads=None, heads_dim="out")


def find_feed(site: Site, row: PlanRow) -> Feed | str:
    """The feed of a weight at a site.

    Args:
        site: Where the parameter sits.
        row: Its row of the plan, with a view.

    Returns:
        The feed, or the reason why hooks on the module do not show the inputs.
    """
    if is_parametrized(site.module):
        return "the weight is computed by a parametrization"
    feed = _of_kind(site, row)
    if isinstance(feed, str):
        return feed
    view = cast(View, row.view)
    ((stack, _, fan_in),) = joined(view).blocks(row.shape)
    stored = feed.numbers or "Conv1D" in kinds(site.module)
    other_way = view.transposed != stored and not view.experts
    if other_way or (stack, fan_in) != (feed.stack, feed.fan_in):
        return f"the view '{row.view}' is not the one that {kinds(site.module)[0]} multiplies with"
    return feed


def _of_kind(site: Site, row: PlanRow) -> Feed | str:
    module, names = site.module, kinds(site.module)
    view = cast(View, row.view)
    ((stack, _, fan_in),) = joined(view).blocks(row.shape)
    if isinstance(module, nn.Linear) and isinstance(site.owner, nn.MultiheadAttention):
        return "MultiheadAttention multiplies with it without calling the module"
    if isinstance(module, nn.Linear | _CONVOLUTIONS | nn.Embedding) and type(module).forward not in _FORWARDS:
        return f"{names[0]} has a forward() of its own, which may change the inputs first"
    if site.leaf == "weight" and (isinstance(module, nn.Linear) or "Conv1D" in names):
        return Feed(1, fan_in, _first_tensor, lambda tensors: Rows(tensors[0].unsqueeze(-2)))
    if site.leaf == "weight" and isinstance(module, _CONVOLUTIONS):
        return _convolution(module)
    if row.role == "embedding" and isinstance(module, nn.Embedding):
        return _table(module, fan_in)
    if isinstance(module, nn.MultiheadAttention) and site.leaf == "in_proj_weight":
        return Feed(1, fan_in, _self_attention, lambda tensors: Rows(tensors[0].unsqueeze(-2)))
    if view.experts:
        return _experts(site, stack, fan_in)
    return f"no rule says what {names[0] if names else type(module).__name__} multiplies {site.leaf!r} with"


def _first_tensor(arguments: Arguments, options: Options) -> tuple[Tensor, ...] | None:
    for value in (*arguments, *options.values()):
        if isinstance(value, Tensor):
            return (value,)
    return None


def _table(module: nn.Embedding, rows: int) -> Feed:
    padding = module.padding_idx

    def of(tensors: tuple[Tensor, ...]) -> Rows:
        values = tensors[0].unsqueeze(-1)
        return Rows(values.unsqueeze(-1), None if padding is None else values != padding)

    return Feed(1, rows, _first_tensor, of, numbers=True)


def _self_attention(arguments: Arguments, options: Options) -> tuple[Tensor, ...] | None:
    """Only if queries, keys and values are made of the same inputs, one moment serves the three fused maps."""
    query, key, value = (
        arguments[index] if len(arguments) > index else options.get(name)
        for index, name in enumerate(("query", "key", "value"))
    )
    return (query,) if isinstance(query, Tensor) and query is key and query is value else None


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Feed:
    """Patches: what the kernel sees at each position of the output."""
    dims, groups = len(module.kernel_size), module.groups
    fan_in = module.in_channels // groups
    for size in module.kernel_size:
        fan_in *= size

    def rows(tensors: tuple[Tensor, ...]) -> Rows:
        x = tensors[0]
        x = x.unsqueeze(0) if x.ndim == dims + 1 else x
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = list(module._reversed_padding_repeated_twice)
        x = F.pad(x, padding, mode=mode) if any(padding) else x
        for dim, (size, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
        ):
            x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        x = x.movedim(1, 1 + dims)  # (batch, *positions, channels, *kernel)
        return Rows(x.reshape(*x.shape[: 1 + dims], groups, fan_in))

    return Feed(groups, fan_in, _first_tensor, rows)


# Stacks that read the module's inputs, by the beginning of their names; others read what these made.
_OUTER = ("gate", "up", "w1", "w3", "fc1", "wi", "in_proj", "linear_in")


def _experts(site: Site, stack: int, fan_in: int) -> Feed | str:
    stacks = [name for name, parameter in site.module.named_parameters(recurse=False) if parameter.ndim == 3]
    if len(stacks) > 1 and not site.leaf.startswith(_OUTER):
        return "it reads what other experts' weights of the same module made"

    def pick(arguments: Arguments, options: Options) -> tuple[Tensor, ...] | None:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        if not tensors or tensors[0].size(-1) != fan_in:
            return None
        routes = [t for t in tensors[1:] if t.ndim == 2 and t.dtype in (torch.int32, torch.int64)]
        if routes:  # before the shape is asked: a batch may be as large as the stack
            return (tensors[0], routes[0]) if tensors[0].shape[:-1].numel() == routes[0].size(0) else None
        return (tensors[0],) if tensors[0].ndim == 3 and tensors[0].size(0) == stack else None

    def rows(tensors: tuple[Tensor, ...]) -> Rows:
        x = tensors[0]
        if len(tensors) == 1:
            return Rows(x.transpose(0, 1))  # (tokens, experts, n)
        experts = torch.arange(stack, device=x.device)
        chosen = (tensors[1].unsqueeze(-1) == experts).any(1)
        return Rows(x.reshape(-1, 1, fan_in), chosen)

    return Feed(stack, fan_in, pick, rows)
