"""Parts of a network that look at a batch as a whole: batch norm and dropout, however many ranks share the batch.

Alone, `BatchNorm` is torch's. Where a batch is shared out, its statistics are those of all ranks together, and masks of
`Dropout` are drawn for the whole batch, of which each rank takes its part: losses are then those of one process.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of images whose statistics are those of the whole batch."""

    rank, ranks = 0, 1

    def forward(self, input: Tensor) -> Tensor:
        """Shape in, shape out: (batch, channels, rows, columns)."""
        if self.ranks == 1 or not self.training:
            return super().forward(input)
        count = self.ranks * input.numel() // input.size(1)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = _over_ranks(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _over_ranks(centred.square().sum((0, 2, 3))) / count
        self._note(mean.detach(), variance.detach() * count / max(count - 1, 1))
        scaled = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        return (scaled * self.weight[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor) -> None:
        """Into the running statistics, as torch does it."""
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None:
                running.lerp_(now.to(running.dtype), self.momentum or 0.0)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


class _Sum(torch.autograd.Function):
    """Over all ranks; so is that of the gradients, as every rank's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor) -> Tensor:
        del ctx
        total = numbers.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        del ctx
        total = slopes[0].clone()
        dist.all_reduce(total)
        return total


def _over_ranks(numbers: Tensor) -> Tensor:
    return cast("Tensor", _Sum.apply(numbers))


class Dropout(nn.Module):
    """Each entry is zero with a probability, else divided by the probability of the opposite.

    Draws come from torch's generator on the CPU, wherever the entries are, so that a run that goes on has the same.

    Args:
        p: The probability, below 1.
    """

    rank, ranks = 0, 1

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Shape in, shape out: (batch, ...)."""
        if not self.training:
            return x
        drawn = _drawn((self.ranks * len(x), *x.shape[1:]))
        kept = drawn.chunk(self.ranks)[self.rank] >= self.p
        return x * kept.to(x.device) / (1 - self.p)


def _rand(shape: Sequence[int]) -> Tensor:
    return torch.rand(tuple(shape), device="cpu")


# a compiler would draw from a generator of its own
_drawn = cast("Callable[[Sequence[int]], Tensor]", torch.compiler.disable(_rand))


def whole_batch_modules(model: nn.Module) -> list[BatchNorm | Dropout]:
    """Those of a model."""
    return [module for module in model.modules() if isinstance(module, BatchNorm | Dropout)]
