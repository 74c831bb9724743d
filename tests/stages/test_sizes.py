"""Gradients whose squares add up to something finite."""

import pytest
import torch

from steepest.stages.sizes import bounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 500), (1, 70, 70)], ids=str)
def test_squares_of_a_whole_matrix_add_up_to_something_finite(shape, dtype):
    for value in (torch.finfo(dtype).max, torch.inf):
        found = bounded(torch.full(shape, value, dtype=dtype))
        assert found.square().sum((-2, -1)).isfinite().all()
        assert (found @ found.mT).isfinite().all()
        assert float(found.min()) > torch.finfo(dtype).max ** 0.5 / (4 * max(shape))  # and not far below that


def test_what_is_not_large_stays_to_the_bit():
    given = torch.tensor([[[1e15, -1e15, 1e-38, 0.0]]])
    found = bounded(given)
    assert torch.equal(found, given)
    assert found is not given
    assert bounded(torch.empty(2, 0, 3)).shape == (2, 0, 3)
