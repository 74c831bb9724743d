"""Steps on a sphere, matrix by matrix: what brings weights back to their radius, and what Momo must know of it.

A step goes along W(s) = r (W + s D) / ‖W + s D‖_F. With n = ‖W‖_F, x = <W, D> and a linear model of slope m,

    what it gains      <m, W - W(s)> = (1 - κ) <m, W> - κ s <m, D>,     κ = r / √(n² + 2 s x + s² ‖D‖_F²),
    at first, per s    (r / n) (-<m, D> + x <m, W> / n²):               what D without its radial part gains,
    and for s = 0      (1 - r / n) <m, W>:                              weights that somebody moved off are pulled back.

Everything here is one number per matrix. A radius of infinity stands for a matrix that nothing keeps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def radii(kept: Tensor, squares: Tensor) -> Tensor:
    """Radii from the first step on: norms that weights had in it; infinity for a matrix that was zero then.

    Args:
        kept: Of the step before; 0: there was none.
        squares: ‖W‖_F² of now.

    Returns:
        In the type in which they are kept.
    """
    sizes = squares.sqrt()
    first = torch.where(sizes > 0, sizes, torch.inf).to(kept.dtype)
    return torch.where(kept == 0, first, kept)


def returning(radius: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """κ: what weights are multiplied by after a move.

    Args:
        radius: r.
        before: ‖W‖_F² before the move.
        after: After it.

    Returns:
        1 for what did not move, has no radius, or has no direction to go out to it.
    """
    factor = radius.to(after.dtype) / after.sqrt()
    stays = (after == before) | ~factor.isfinite() | (factor == 0)
    return torch.where(stays, 1.0, factor)


def lengthening(radius: Tensor, squares: Tensor) -> Tensor:
    """What makes directions as long as the radius.

    Args:
        radius: r.
        squares: ‖D‖_F².

    Returns:
        1 where there is no radius, or no direction.
    """
    factor = radius.to(squares.dtype) / squares.sqrt()
    return torch.where(factor.isfinite() & (factor > 0), factor, 1.0)


@dataclass(frozen=True)
class Arc:
    """The way that a step goes, before it is known how far.

    Args:
        radius: r.
        squares: ‖W‖_F².
        across: <W, D>.
        lengths: ‖D‖_F².
        average: <m, W> for the momentum m; (averages, matrices) where there are several.
        ahead: <m, W> for the averages that steps follow: m, or Nesterov's.
    """

    radius: Tensor
    squares: Tensor
    across: Tensor
    lengths: Tensor
    average: Tensor
    ahead: Tensor

    @property
    def _start(self) -> Tensor:
        """r / n."""
        return returning(self.radius, torch.full_like(self.squares, -1.0), self.squares)

    def pull(self) -> Tensor:
        """What weights gain that go back to the radius before the step, all together, 0-d."""
        return ((1 - self._start) * self.ahead).sum()

    def slopes(self, gains: Tensor) -> Tensor:
        """What directions gain at first per unit of length, their radial part left out.

        Args:
            gains: -<m, D> with the averages that steps follow.
        """
        around = self.across * self.ahead / torch.where(self.squares == 0, 1.0, self.squares)
        bound = self.radius.isfinite() & (self.squares > 0)
        return torch.where(bound, self._start * (gains + around), gains)

    def gained(self, lengths: Tensor, gains: Tensor) -> Tensor:
        """What a step gains.

        Args:
            lengths: s, what each direction is multiplied by.
            gains: -<m, D> with the momentum itself; (averages, matrices) where there are several.
        """
        after = self.squares + 2 * lengths * self.across + lengths.square() * self.lengths
        factor = returning(self.radius, self.squares, after)
        return (1 - factor) * self.average + factor * lengths * gains
