"""What is held out from training, in parts that never meet: one to choose options by, one to report on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Part = Literal["tuning", "report"]
TUNING_SHARE = 4  # one in so many of what is held out is for tuning
BLOCKS = 32


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over a part (natural log), and the share of right answers where that means something.

    Args:
        loss: Mean over the examples.
        accuracy: None for tasks without one.
        blocks: Mean loss of each of at most `BLOCKS` runs of neighbouring examples, of which the part is a sample; from
            their spread follows how far `loss` may be off. Empty where it is exact.
    """

    loss: float
    accuracy: float | None = None
    blocks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """How many examples are evaluated at most: all along a run, and of each part at its end."""

    curve: int
    tuning: int
    report: int


class HeldOut:
    """Which held-out examples are evaluated: evenly spread over each part, the same for every run.

    Args:
        tuning: Number of examples for tuning, which come first.
        report: Number of examples to report on, which follow.
        sizes: How many are wanted.
    """

    def __init__(self, tuning: int, report: int, sizes: Sizes) -> None:
        self._available: dict[Part, int] = {"tuning": tuning, "report": report}
        self._sizes = sizes

    def examples(self, part: Part, *, whole: bool) -> Tensor:
        """Indices (n,) int64 of a part.

        Args:
            part: Which.
            whole: False: those of a curve only.
        """
        wanted = getattr(self._sizes, part if whole else "curve")
        return (0 if part == "tuning" else self._available["tuning"]) + spread(self._available[part], wanted)


Share = Callable[[Callable[[Tensor], Tensor], Sequence[Tensor]], list[Tensor]]


def one_by_one(act: Callable[[Tensor], Tensor], pieces: Sequence[Tensor]) -> list[Tensor]:
    """What comes of each piece."""
    return [act(piece) for piece in pieces]


def spread(available: int, wanted: int) -> Tensor:
    """At most `wanted` indices below `available`, evenly spread and distinct."""
    count = min(available, wanted)
    return torch.arange(count, device="cpu") * available // max(count, 1)


def evaluation(losses: Tensor, right: Tensor | None = None) -> Evaluation:
    """What the losses of single examples come to.

    Args:
        losses: (n,), in the order in which the examples lie in the data: neighbours resemble each other, so it is
            blocks of them that vary independently.
        right: (n,) bool, whether each answer was right; None where that means nothing.
    """
    wide = losses.double()
    blocks = tuple(block.mean().item() for block in wide.tensor_split(min(BLOCKS, len(wide))))
    return Evaluation(wide.mean().item(), None if right is None else right.double().mean().item(), blocks)
