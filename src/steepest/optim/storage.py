"""How weights and averages of 16 bits are kept: what rounding would take away is drawn for, or kept beside.

A bfloat16 number has eight bits of precision: a gain of 1 that is to move by 0.001 stays where it is, step after step.

* "stochastic": the float32 result is rounded up or down with the probabilities that make it right on average. The draw
  is a function of the parameter's name, the place of the entry in the whole tensor and the count of gradients, so that
  it is the same in all layouts and after loading.
* "kept": the 16 bits of the float32 result that do not fit into the weight are kept in the state. Both together are the
  float32 weight, bit for bit, which no rounding reaches; the weight is that number, rounded.

Source: rounding by the lower half of the bits, as in Zamirai et al., arXiv:2010.06192, who round by chance, or
sum up what rounding took away (Kahan); kept bits need no such sum, as nothing is lost.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from steepest.checks import choice, refusal
from steepest.ranks.boxes import Box

Rounding = Literal["nearest", "stochastic", "kept"]
ROUNDING: tuple[Rounding, ...] = get_args(Rounding)
HALF, MASK = 16, 0xFFFF
# Of the finaliser of MurmurHash3 (A. Appleby, public domain), whose every input bit reaches every output bit.
MULTIPLIERS = (-2048144789, -1028477387)  # 0x85ebca6b, 0xc2b2ae35 as int32


def check_momentum_dtype(name: str, value: object) -> torch.dtype | None:
    """torch.bfloat16 or None.

    Raises:
        TypeError: If it is something else.
    """
    if value is None or value is torch.bfloat16:
        return cast(torch.dtype | None, value)
    raise TypeError(refusal(name, "torch.bfloat16, which has the range of float32, or None", value))


@dataclass(frozen=True)
class Storage:
    """What is kept in 16 bits, and how.

    Args:
        rounding: Of bfloat16 weights.
        momentum_dtype: Of averages of gradients; None: float32, or wider for wider parameters.
    """

    rounding: Rounding = "nearest"
    momentum_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        choice(ROUNDING)("rounding", self.rounding)
        check_momentum_dtype("momentum_dtype", self.momentum_dtype)

    def check(self, name: str, parameter: Tensor) -> None:
        """Refuse a weight that cannot be rounded so.

        Args:
            name: Of the parameter.
            parameter: Any type.

        Raises:
            ValueError: If it is float16.
        """
        if self.rounding != "nearest" and parameter.dtype == torch.float16:
            raise ValueError(
                f"rounding={self.rounding!r} is for bfloat16 weights, and {name!r} of shape {tuple(parameter.shape)} "
                "is float16. Train float32 weights under autocast with a GradScaler, or make the model bfloat16."
            )

    def rounds(self, parameter: Tensor) -> bool:
        """Whether steps of a weight are more than rounded to the nearest."""
        return self.rounding != "nearest" and parameter.dtype == torch.bfloat16

    def keeps(self, parameter: Tensor) -> bool:
        """Whether lower bits of a weight are kept."""
        return self.rounding == "kept" and parameter.dtype == torch.bfloat16

    def exact(self, own: Tensor, low: Tensor | None) -> Tensor:
        """A weight with the bits that are kept beside it: a copy.

        Args:
            own: What this rank keeps of it.
            low: Its kept bits, if there are any.
        """
        return joined(own, low) if low is not None and self.keeps(own) else own.clone()

    def add_(
        self, own: Tensor, add: Tensor, factor: float | Tensor, low: Tensor | None, noise: Callable[[], Tensor]
    ) -> None:
        """Add to a weight outside of a step, rounded as steps are.

        Args:
            own: What this rank keeps of it; written to.
            add: Like it, in the type of averages.
            factor: What that is multiplied by.
            low: Its kept bits, if there are any; written to.
            noise: Draws, where rounding does.
        """
        wide = self.exact(own, low).to(add.dtype)
        wide.add_(add * (factor.to(add.device, add.dtype) if isinstance(factor, Tensor) else factor))
        if low is not None and self.keeps(own):
            weight, bits = divided(wide)
            low.copy_(bits)
            own.copy_(weight)
        elif self.rounding == "stochastic" and self.rounds(own):
            own.copy_(drawn(wide, noise()))
        else:
            own.copy_(wide)


def joined(weight: Tensor, low: Tensor | None) -> Tensor:
    """The float32 number that a bfloat16 weight and its kept bits are.

    Bits of a weight that somebody else has set to zero since may be below those of zero, which are of no number: they
    count as zeros.

    Args:
        weight: bfloat16.
        low: int16, the lower half of the bits as a signed number; None: zeros.

    Returns:
        A new float32 tensor.

    Examples:
        >>> weight, low = divided(torch.tensor([1.001, -2.0]))
        >>> weight, joined(weight, low)
        (tensor([ 1., -2.], dtype=torch.bfloat16), tensor([ 1.0010, -2.0000]))
    """
    wide = weight.detach().float()
    if low is None:
        return wide
    bits = low.to(torch.int32)
    bits.masked_fill_((wide == 0) & (bits < 0), 0)
    return bits.add_(wide.view(torch.int32)).view(torch.float32)


def divided(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `joined`.

    Args:
        wide: float32, finite.

    Returns:
        The nearest bfloat16 weight, the larger one in the middle between two, and int16 bits.
    """
    bits = wide.view(torch.int32)
    low = bits.to(torch.int16)  # which takes the lower half
    return (bits - low.to(torch.int32)).view(torch.float32).to(torch.bfloat16), low


def drawn(wide: Tensor, noise: Tensor) -> Tensor:
    """Rounded up or down to bfloat16, with the probability that makes it right on average.

    Args:
        wide: float32, finite.
        noise: int32, likewise in shape: of 16 bits, all alike often.

    Returns:
        bfloat16; what is a bfloat16 number already stays it.
    """
    return ((wide.view(torch.int32) + noise) & ~MASK).view(torch.float32).to(torch.bfloat16)


def noise_of(name: str, count: Tensor, box: Box, shape: Sequence[int]) -> Tensor:
    """16 bits for each entry of a box of a tensor, a function of what is given and of nothing else.

    Args:
        name: Of the parameter.
        count: 0-d whole number; another one, other bits.
        box: First and one past the last index of each dimension.
        shape: Of the whole tensor.

    Returns:
        int32 numbers below 65536, of the shape of the box, on the device of the count.
    """
    seed = count.to(torch.int32) * MULTIPLIERS[0] + int.from_bytes(zlib.crc32(name.encode()).to_bytes(4), signed=True)
    index = torch.zeros((), dtype=torch.int32, device=count.device)
    for dimension, (start, stop) in enumerate(box):
        stride = math.prod(shape[dimension + 1 :]) % 2**31
        own = torch.arange(start, stop, dtype=torch.int32, device=count.device) * stride
        index = index.unsqueeze(-1) + own
    # twice, as neighbours and consecutive counts differ in few bits
    mixed = _mixed(_mixed(index) + _mixed(seed))
    return mixed & MASK


def _mixed(bits: Tensor) -> Tensor:
    """All bits depend on all bits; int32, which wraps around."""
    for shift, factor in zip((16, 13), MULTIPLIERS, strict=True):
        bits = (bits ^ _shifted(bits, shift)) * factor
    return bits ^ _shifted(bits, 16)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in from the left."""
    return (bits >> by) & ((1 << (32 - by)) - 1)
