"""The second moment of one layer's inputs as tensors: its structure, its size, and sums over tokens."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steepest.anatomy import Role
from steepest.stages.inputs.feeds import Rows
from steepest.stages.inputs.options import WIDEST, InputMoment, Structure


@dataclass(frozen=True)
class MomentLayout:
    """Which entries of the moments of a stack are kept.

    Args:
        structure: "full", "block" or "diagonal".
        stack: S, matrices of the stack.
        fan_in: n, features of each.
        block: Size of a diagonal block; n for "full", 1 for "diagonal".
        table: Whether inputs are one-hot, and told by the number of the one.
    """

    structure: Structure
    stack: int
    fan_in: int
    block: int
    table: bool = False

    def __str__(self) -> str:
        if self.table:
            return f"frequencies of {self.fan_in}"
        stack = f"{self.stack} x " if self.stack > 1 else ""
        if self.structure == "block":
            return f"{stack}{self.fan_in // self.block} blocks of {self.block}"
        return f"{stack}{self.structure} {self.fan_in}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the moment, and of each power of it: (S n/b, b, b), or (S, n) for a diagonal."""
        if self.structure == "diagonal":
            return (self.stack, self.fan_in)
        return (self.stack * self.fan_in // self.block, self.block, self.block)

    @property
    def mass_shape(self) -> tuple[int, ...]:
        """Of what belongs to each matrix of the shape as a whole."""
        return self.shape[:1]

    @property
    def numel(self) -> int:
        """Numbers of one such tensor."""
        return math.prod(self.shape)

    def sums(self, rows: Rows, weights: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Sum of z zᵀ over tokens.

        Args:
            rows: Of one call.
            weights: Broadcast over the token dimensions of the rows, from the first on; None: 1 each.
            dtype: Of the sums.

        Returns:
            The sum, of `shape`; and the sum of weights, of `mass_shape`.
        """
        values = rows.values
        tokens = values.shape[:-2]
        x = values.reshape(-1, *values.shape[-2:])
        x = x if self.table else x.to(dtype)
        if weights is None and rows.chosen is None and not self.table:
            mass = torch.full((self.stack,), len(x), dtype=dtype, device=x.device)
            total = self._products(x.expand(-1, self.stack, -1))
        else:
            own = torch.ones(tokens, dtype=dtype, device=x.device) if weights is None else weights.to(x.device, dtype)
            own = own.reshape(own.shape + (1,) * (len(tokens) - own.ndim)).expand(tokens).reshape(-1, 1)
            chosen = 1.0 if rows.chosen is None else rows.chosen.reshape(-1, self.stack).to(dtype)
            own = (own * chosen).expand(-1, self.stack)  # (tokens, S)
            mass = own.sum(0)
            if self.table:
                return own.new_zeros(self.fan_in, 1).index_add(0, x.flatten(), own).mT, mass
            # One matrix after the other, each with its own tokens: S copies of all would be too many, and what is
            # left out may be no number.
            alone = zip(x.expand(-1, self.stack, -1).split(1, dim=1), own.unbind(1), strict=True)
            total = torch.cat([self._products(z[w != 0] * w[w != 0].sqrt()[:, None, None]) for z, w in alone])
        return total, mass if self.structure == "diagonal" else mass.repeat_interleave(self.fan_in // self.block)

    def _products(self, x: Tensor) -> Tensor:
        """Sum of z zᵀ over (tokens, matrices, n), as `shape` says for these matrices."""
        if self.structure == "diagonal":
            return x.square().sum(0)
        parts = x.reshape(len(x), x.size(1) * self.fan_in // self.block, self.block).transpose(0, 1)
        return parts.mT @ parts


def given_rows(layout: MomentLayout, name: str, x: Tensor, weight: Tensor | None) -> Rows:
    """Inputs that were given by hand.

    Args:
        layout: Of the moment they belong to.
        name: Of the parameter, for messages.
        x: (*tokens, n), or (S, *tokens, n) for a stack of S; of a table the numbers, (*tokens).
        weight: Of the tokens, likewise without n, at least 0; None: 1.

    Raises:
        ValueError: If a shape does not fit, or a table has no such rows.
    """
    if layout.table:
        if x.is_floating_point() or (x.numel() and not 0 <= int(x.min()) <= int(x.max()) < layout.fan_in):
            raise ValueError(
                f"record_input: {name!r} takes numbers of its {layout.fan_in} rows, got {x.dtype} {tuple(x.shape)}"
                f"{'' if x.is_floating_point() else f' from {int(x.min())} to {int(x.max())}'}."
            )
        x = x.unsqueeze(-1)
        layout = replace(layout, fan_in=1)
    stacked = layout.stack > 1
    if x.ndim < 1 + stacked or x.size(-1) != layout.fan_in or (stacked and x.size(0) != layout.stack):
        needed = f"({layout.stack}, *tokens, {layout.fan_in})" if stacked else f"(*tokens, {layout.fan_in})"
        raise ValueError(f"record_input: {name!r} takes inputs {needed}, got {tuple(x.shape)}.")
    if weight is not None and weight.shape != x.shape[:-1]:
        raise ValueError(
            f"record_input: the weight of {name!r} must have the shape {tuple(x.shape[:-1])} of the tokens, got "
            f"{tuple(weight.shape)}."
        )
    values = x.detach().movedim(0, -2) if stacked else x.detach().unsqueeze(-2)
    if weight is None:
        return Rows(values)
    return Rows(values, weight.detach().movedim(0, -1) if stacked else weight.detach().unsqueeze(-1))


def layout_for(
    options: InputMoment,
    name: str,
    *,
    stack: int,
    fan_in: int,
    fan_out: int,
    readers: int,
    heads: int = 1,
    role: Role = "matrix",
) -> MomentLayout | None:
    """The layout of a layer's moment.

    Args:
        options: Of all layers.
        name: Of the parameter.
        stack: S.
        fan_in: n.
        fan_out: m of this parameter.
        readers: Outputs of all parameters that read the same inputs.
        heads: Into how many matrices the view cuts the fan-in. Each is orthogonalised alone, and a moment that mixed
            their columns could make a step ascend; so these are blocks at most.
        role: Of the parameter.

    Returns:
        The layout; None if the layer is left as it is.

    Raises:
        ValueError: If blocks do not divide the fan-in.
    """
    structure = options.structure_for(name)
    if role == "embedding" and structure != "none":
        return MomentLayout("diagonal", stack, fan_in, 1, table=True)
    if role == "head" and structure == "wide":
        structure = "auto"
    if structure in ("wide", "auto"):
        wide = fan_in >= 2 * readers
        otherwise = "none" if structure == "wide" else "full" if fan_in <= WIDEST else "diagonal"
        structure = "diagonal" if wide else otherwise
    if structure == "none":
        return None
    if structure == "diagonal":
        return MomentLayout("diagonal", stack, fan_in, 1)
    block = fan_in // heads
    if structure == "block":
        block = min(options.block_size or fan_out, block)
        if fan_in % block:
            raise ValueError(
                f"InputMoment: blocks of {block} do not divide the fan-in {fan_in} of {name!r}; set block_size to a "
                f"divisor, or give {name!r} the structure 'diagonal' or 'full'."
            )
    return MomentLayout("full" if block == fan_in else "block", stack, fan_in, block)
