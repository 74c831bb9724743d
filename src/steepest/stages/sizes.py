"""Sizes of matrices: gradients whose squares can be averaged, and directions as long as others.

One infinite sum would stay in a moving average for ever.
"""

import math

import torch
from torch import Tensor


def bounded(gradients: Tensor) -> Tensor:
    """Entries cut off so that the squares of a whole matrix, in any basis, add up to something finite.

    What is cut off in float32 is above 2^63 / √(m n), 1e16 for a matrix of 1,000 x 1,000.

    Args:
        gradients: (B, m, n), finite or infinite.

    Returns:
        A new tensor.
    """
    exponent = math.frexp(torch.finfo(gradients.dtype).max)[1] // 2 - 1
    most = 2.0 ** (exponent - math.ceil(math.log2(max(1, gradients.shape[-2:].numel())) / 2))
    return gradients.clamp(-most, most)


def of_size(direction: Tensor, like: Tensor) -> Tensor:
    """A direction with the Frobenius norm of another.

    Args:
        direction: (B, m, n).
        like: Likewise.

    Returns:
        (B, m, n); 0 stays 0.
    """
    own, wanted = (torch.linalg.vector_norm(one, dim=(-2, -1), keepdim=True) for one in (direction, like))
    return direction * (wanted / torch.where(own == 0, 1.0, own))
