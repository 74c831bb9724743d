"""A stored parameter as batches of matrices, and back, exactly.

Every matrix is written fan-out by fan-in: m rows that a layer computes, n columns that it reads, so that norms and
learning-rate scales mean the same for every layer. A layer rarely stores just that: a convolution has a kernel, a
grouped one is block diagonal, GPT-2's `Conv1D` is transposed, experts are stacked, q, k and v are fused. A `View`
writes such a layout down as data.

Rules for odd shapes:

* dimensions after the first two (kernel positions) join the fan-in: a conv weight (out, in, *k) is out x (in * prod k);
* a unit dimension is kept: (1, n) and (m, 1) are matrices of rank one, and whether they should be optimised as
  matrices is a question of role (`routing`), not of layout;
* no aspect ratio is refused, and nothing is transposed to become wide or tall;
* an empty parameter has empty blocks, with B * m * n = 0, and merges to an empty tensor.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, NamedTuple, Self, cast, get_args

from torch import Tensor

from steepest.checks import check_fields, choice, flag, refusal, shown
from steepest.geometry.text import Textual

LARGEST = 2**63 - 1  # number that a dimension can have

HeadsDim = Literal["out", "in"]
Shape = tuple[int, ...]


class _Layout(NamedTuple):
    """The dimensions of a parameter; `rows` are those of one of the `interleave` chunks, all fused parts together."""

    stack: int
    groups: int
    interleave: int
    rows: int
    fan_in: int
    kernel: int


class _Part(NamedTuple):
    """One fused part: which rows of every chunk, and how chunks, rows and fan-in fall into heads."""

    start: int
    rows: int
    chunk_heads: int
    row_heads: int
    fan_in_heads: int

    def sizes(self, layout: _Layout) -> Shape:
        """(stack, groups, heads x3 | chunks, rows | fan_in, kernel): five batch, two row, two column dimensions."""
        chunks = layout.interleave // self.chunk_heads
        fan_in = layout.fan_in // self.fan_in_heads
        heads = (self.chunk_heads, self.row_heads, self.fan_in_heads)
        return (layout.stack, layout.groups, *heads, chunks, self.rows // self.row_heads, fan_in, layout.kernel)


@dataclass(frozen=True, eq=False)
class View(Textual):
    """How one stored tensor is a set of matrices.

    Args:
        transposed: Stored (in, out, *kernel) instead of (out, in, *kernel): `Conv1D`, `ConvTranspose`, some experts.
        experts: The first dimension is a stack of independent weights.
        groups: Groups of a convolution, each a matrix of its own.
        split: Fan-out of the parts of a fused weight, in order, for example (q, k, v) or (gate, up). Empty: one part.
        interleave: The fan-out consists of this many equal chunks and every part has an equal share of each. 1: the
            parts follow one another. The head count for weights laid out (heads, 3, head_dim); the fan-out of one
            part for gate and up rows that alternate.
        heads: Number of equal blocks into which each part is cut, one for all parts or one per part. None: uncut.
        heads_dim: "out" cuts the fan-out (q, k, v projections), "in" the fan-in (the projection that reads the heads).

    Raises:
        ValueError: If a number is not positive, or options exclude one another.
        TypeError: If a number is not whole.

    Example:
        >>> qkv = View(split=(64, 32, 32), heads=(4, 2, 2))  # grouped-query attention, one matrix per head
        >>> qkv.blocks((128, 96))
        ((4, 16, 96), (2, 16, 96), (2, 16, 96))
        >>> str(qkv)
        'split=64+32+32 heads=4+2+2'
    """

    transposed: bool = False
    experts: bool = False
    groups: int = 1
    split: tuple[int, ...] = ()
    interleave: int = 1
    heads: int | tuple[int, ...] | None = None
    heads_dim: HeadsDim = "out"

    def __post_init__(self) -> None:
        for option in ("split", "heads"):  # a list would not be hashable
            if isinstance(getattr(self, option), list):
                object.__setattr__(self, option, tuple(getattr(self, option)))
        check_fields(self, {"transposed": flag, "experts": flag, "heads_dim": choice(get_args(HeadsDim))})
        if not isinstance(cast(object, self.split), tuple):
            raise TypeError(refusal("View split", "a tuple of fan-outs such as (64, 32, 32)", self.split))
        heads = self._heads()
        counts = {"groups": (self.groups,), "split": self.split, "interleave": (self.interleave,), "heads": heads}
        for option, values in counts.items():
            given = getattr(self, option)
            if any(isinstance(value, bool) or not isinstance(cast(object, value), Integral) for value in values):
                raise TypeError(f"View {option} must hold whole numbers, got {shown(given)}.")
            if any(not 1 <= value <= LARGEST for value in values):
                raise ValueError(f"View {option} must be positive, got {shown(given)}. Leave it out for none.")
        if self.heads_dim == "in" and not heads:
            raise ValueError("View heads_dim='in' says where heads lie, but heads is None. Give heads as well.")
        if self.interleave > 1 and not self.split:
            raise ValueError(f"View interleave={self.interleave} mixes the parts of split, which is empty. Give split.")
        if self.groups > 1 and (self.split or heads):
            raise ValueError(f"View groups={self.groups} cannot be combined with split or heads. Keep one of them.")
        if isinstance(self.heads, tuple) and len(heads) != max(1, len(self.split)):
            raise ValueError(
                f"View heads={self.heads} has {len(heads)} entries for {max(1, len(self.split))} parts. "
                "Give one number per part of split, or a single one for all."
            )

    def blocks(self, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """Shapes (B, m, n) of the batches that `split_tensor` returns.

        Args:
            shape: Shape of the stored parameter.

        Returns:
            One (B, m, n) per part of `split`, or a single one.

        Raises:
            ValueError: If the view does not fit the shape.
        """
        layout = self._layout(tuple(shape))
        return tuple(_batch_shape(part.sizes(layout)) for part in self._parts(layout, tuple(shape)))

    def split_tensor(self, t: Tensor) -> tuple[Tensor, ...]:
        """The batches of matrices in `t`; they share its memory wherever strides can express them.

        Args:
            t: The parameter, or a tensor of its shape (gradient, momentum), any dtype, device and strides.

        Returns:
            Tensors (B_i, m_i, n_i), as given by `blocks`.

        Raises:
            ValueError: If the view does not fit the shape.
        """
        if self == LINEAR and t.ndim == 2:  # the common case, without a dozen reshapes
            return (t.unsqueeze(0),)
        return tuple(part.reshape(_batch_shape(part.shape)) for part in self._strided(t))

    def merge(self, batches: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of `split_tensor`: every number goes back to where it came from.

        Args:
            batches: Tensors (B_i, m_i, n_i) of one dtype and device, as given by `blocks(shape)`.
            shape: Shape of the stored parameter.

        Returns:
            A new contiguous tensor of that shape.

        Raises:
            ValueError: If the batches are not those of the shape, or the view does not fit it.
        """
        expected = self.blocks(shape)
        got = tuple(tuple(batch.shape) for batch in batches)
        if got != expected:
            raise ValueError(
                f"View '{self}' merges batches {expected} into shape {tuple(shape)}, got {got}. "
                "Pass what split_tensor returned, in its order."
            )
        merged = batches[0].new_empty(tuple(shape))
        for target, batch in zip(self._strided(merged), batches, strict=True):
            target.copy_(batch.reshape(target.shape))
        return merged

    def within(self, shape: Sequence[int], box: Sequence[tuple[int, int]]) -> Self | None:
        """The view of a part of the parameter that is a whole number of its matrices.

        Args:
            shape: Shape of the stored parameter.
            box: First and one past the last index of each dimension.

        Returns:
            The view; None if the part cuts a matrix, or matrices of fused parts are not all of equal share in it.

        Example:
            >>> View(heads=4).within((32, 16), ((0, 16), (0, 16)))
            View(transposed=False, experts=False, groups=1, split=(), interleave=1, heads=2, heads_dim='out')
        """
        shape = tuple(shape)
        cut = [
            place for place, (size, (start, stop)) in enumerate(zip(shape, box, strict=True)) if stop - start != size
        ]
        if not cut:
            return self
        (place, *others), first = cut, int(self.experts)
        if others:
            return None
        if self.experts and place == 0:
            return self
        heads, (start, stop) = self._heads(), box[place]
        if self.groups > 1 and place == first:
            width = shape[place] // self.groups
            return replace(self, groups=(stop - start) // width) if start % width == stop % width == 0 else None
        along = first + (self.transposed != (self.heads_dim == "in"))
        if len(heads) != 1 or self.split or self.interleave > 1 or self.groups > 1 or place != along:
            return None
        width = shape[place] // heads[0]
        return replace(self, heads=(stop - start) // width) if start % width == stop % width == 0 else None

    def __str__(self) -> str:
        tokens = [option for option in ("transposed", "experts") if getattr(self, option)]
        if self.groups > 1:
            tokens.append(f"groups={self.groups}")
        if self.split:
            tokens.append("split=" + "+".join(map(str, self.split)))
        if self.interleave > 1:
            tokens.append(f"interleave={self.interleave}")
        if self.heads is not None:
            where = "@in" if self.heads_dim == "in" else ""
            tokens.append("heads=" + "+".join(map(str, self._heads())) + where)
        return " ".join(tokens) or "linear"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The view that prints as `text`, for state dicts, configs and command lines.

        Args:
            text: What `str(view)` gives, for example "experts split=64+64".

        Returns:
            The view.

        Raises:
            ValueError: If a word is not one of a view.
        """
        options: dict[str, bool | int | tuple[int, ...] | str] = {}
        for token in [] if text.strip() == "linear" else text.split():
            word = _WORD.fullmatch(token)
            if word is None:
                raise ValueError(f"View text {text!r} has the word {token!r}. {_GRAMMAR}")
            if word["flag"]:
                options[word["flag"]] = True
            elif word["count"]:
                options[word["count"]] = int(word["number"])
            else:
                several = word["parts"] == "split" or "+" in word["numbers"]
                numbers = word["numbers"].split("+")
                options[word["parts"]] = tuple(map(int, numbers)) if several else int(word["numbers"])
                if word["where"]:
                    options["heads_dim"] = word["where"]
        return cls(**options)  # pyright: ignore[reportArgumentType] - the pattern admits names and types of fields only

    def _heads(self) -> tuple[int, ...]:
        if self.heads is None:
            return ()
        return self.heads if isinstance(self.heads, tuple) else (self.heads,)

    def _strided(self, t: Tensor) -> list[Tensor]:
        """Parts with the nine dimensions of `_Part.sizes`, as strided views where `t` has the strides for it."""
        shape = tuple(t.shape)
        layout = self._layout(shape)
        stack, groups, interleave, rows, fan_in, kernel = layout
        if self.transposed:
            x = t.reshape(stack, groups, fan_in, interleave * rows, kernel).transpose(2, 3)
        else:
            x = t.reshape(stack, groups, interleave * rows, fan_in, kernel)
        x = x.unflatten(2, (interleave, rows))
        parts: list[Tensor] = []
        for part in self._parts(layout, shape):
            *_, chunks, part_rows, part_fan_in, _ = part.sizes(layout)
            y = x.narrow(3, part.start, part.rows)
            y = y.unflatten(4, (part.fan_in_heads, part_fan_in)).unflatten(3, (part.row_heads, part_rows))
            y = y.unflatten(2, (part.chunk_heads, chunks))
            parts.append(y.permute(0, 1, 2, 4, 6, 3, 5, 7, 8))  # S g (H c) (H r) (H i) k -> S g H H H c r i k
        return parts

    def _layout(self, shape: Shape) -> _Layout:
        stack, rest = (shape[0], shape[1:]) if self.experts and shape else (1, shape)
        if len(rest) < 2:
            need = "3 dimensions (experts, out, in)" if self.experts else "2 dimensions (out, in)"
            raise ValueError(self._misfit(shape, f"it needs at least {need}", "Give a vector the role 'vector'"))
        if rest[0] % self.groups:
            detail = f"groups={self.groups} does not divide the first dimension {rest[0]}"
            raise ValueError(self._misfit(shape, detail, "Use the groups of the convolution"))
        rows, fan_in = (rest[1], rest[0] // self.groups) if self.transposed else (rest[0] // self.groups, rest[1])
        if self.split and sum(self.split) != rows:
            detail = f"split adds up to {sum(self.split)}, the fan-out is {rows}"
            remedy = "Give the fan-out of every part; set transposed if the fan-out is the other dimension"
            raise ValueError(self._misfit(shape, detail, remedy))
        for part in self.split:
            if part % self.interleave:
                detail = f"interleave={self.interleave} does not divide the part of {part} rows"
                raise ValueError(self._misfit(shape, detail, "Use a number that divides every part"))
        return _Layout(stack, self.groups, self.interleave, rows // self.interleave, fan_in, math.prod(rest[2:]))

    def _parts(self, layout: _Layout, shape: Shape) -> list[_Part]:
        sizes = [size // self.interleave for size in self.split] or [layout.rows]
        heads = self._heads() or (1,)
        heads = heads * len(sizes) if len(heads) == 1 else heads
        parts: list[_Part] = []
        for rows, count in zip(sizes, heads, strict=True):
            cut = self._cut(layout, rows, count)
            if cut is None:
                size = layout.fan_in if self.heads_dim == "in" else rows * layout.interleave
                chunks = f" in chunks of interleave={layout.interleave}" if layout.interleave > 1 else ""
                detail = f"heads={count} does not divide the fan-{self.heads_dim} {size}{chunks}"
                raise ValueError(self._misfit(shape, detail, "Use the head count of the layer"))
            parts.append(_Part(sum(sizes[: len(parts)]), rows, *cut))
        return parts

    def _cut(self, layout: _Layout, rows: int, heads: int) -> tuple[int, int, int] | None:
        """Heads along (chunks, rows of a chunk, fan-in), whose product is `heads`; None if they do not fit."""
        chunks = layout.interleave
        if self.heads_dim == "in":
            return (1, 1, heads) if layout.fan_in % heads == 0 else None
        if chunks % heads == 0:
            return (heads, 1, 1)
        return (chunks, heads // chunks, 1) if heads % chunks == 0 and rows % (heads // chunks) == 0 else None

    def _misfit(self, shape: Shape, detail: str, remedy: str) -> str:
        return f"View '{self}' does not fit shape {shape}: {detail}. {remedy}."


def _batch_shape(sizes: Sequence[int]) -> tuple[int, int, int]:
    return math.prod(sizes[:5]), math.prod(sizes[5:7]), math.prod(sizes[7:])


_WORD = re.compile(
    r"(?P<flag>transposed|experts)|(?P<count>groups|interleave)=(?P<number>\d+)"
    r"|(?P<parts>split|heads)=(?P<numbers>\d+(\+\d+)*)((?<=\d)@(?P<where>out|in))?"
)
_GRAMMAR = "Words are linear, transposed, experts, groups=N, split=N+N, interleave=N, heads=N or N+N, heads=N@in."

LINEAR = View()
"""nn.Linear, nn.Conv*d without groups, nn.Bilinear: (out, in, *kernel)."""

CONV1D = View(transposed=True)
"""The `Conv1D` of GPT-2, and lookup tables: (in, out)."""

EXPERTS = View(experts=True)
"""A stack (experts, out, in)."""

EXPERTS_TRANSPOSED = View(experts=True, transposed=True)
"""A stack (experts, in, out)."""


def conv(*, groups: int = 1, transposed: bool = False) -> View:
    """The view of a convolution weight.

    Args:
        groups: Its groups.
        transposed: Of `ConvTranspose`, which stores (in, out / groups, *kernel).

    Returns:
        The view; one matrix (out / groups) x (in / groups * prod kernel) per group.
    """
    return View(groups=groups, transposed=transposed)
