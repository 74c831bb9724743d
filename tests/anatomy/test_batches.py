import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest import Decoupled
from steepest.anatomy import CONV1D, EXPERTS, LINEAR, Bucket, View, conv
from steepest.geometry import AdaInf, Sign, Spectral

LAYOUTS = [
    ((6, 4), LINEAR),
    ((6, 4), CONV1D),
    ((12, 5), View(split=(6, 2, 4))),
    ((6, 2, 3, 3), conv(groups=3)),
    ((3, 4, 5), EXPERTS),
    ((8, 6), View(heads=4)),
    ((5,), None),
    ((), None),
    ((7, 2, 3), None),
]


@given(layout=st.sampled_from(LAYOUTS), count=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_gathering_and_scattering_are_inverse(layout, count):
    shape, view = layout
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    bucket = Bucket(tuple(tensors), view)
    batches = bucket.matrices(tensors)
    assert all(batch.ndim == 3 for batch in batches)
    assert sum(batch.numel() for batch in batches) == sum(tensor.numel() for tensor in tensors)
    for tensor, back in zip(tensors, bucket.parameter_shaped(batches), strict=True):
        assert torch.equal(tensor, back)


@pytest.mark.parametrize(("shape", "view"), LAYOUTS, ids=str)
@pytest.mark.parametrize("norm", [Spectral(polar="svd"), Sign(), AdaInf()], ids=str)
def test_a_bucket_is_its_parameters(shape, view, norm, rng):
    averages = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3)]
    squares = [average.square() + 0.1 for average in averages]
    bucket = Bucket(tuple(averages), view)
    together = bucket.parameter_shaped(norm.lmos(bucket.matrices(averages), bucket.matrices(squares)))
    for average, square, move in zip(averages, squares, together, strict=True):
        alone = Bucket((average,), view)
        (expected,) = alone.parameter_shaped(norm.lmos(alone.matrices([average]), alone.matrices([square])))
        torch.testing.assert_close(move, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("accept", [None, True, False])
def test_weights_decay_and_move(lr, accept, rng):
    weights = [torch.randn(3, 2, generator=rng, dtype=torch.float64) for _ in range(2)]
    moves = [torch.randn(3, 2, generator=rng, dtype=torch.float64) for _ in range(2)]
    if accept is False:  # as directions are then
        moves = [torch.zeros_like(move) for move in moves]
    expected = [w * (1 - 0.1 * 0.5) + 0.1 * d for w, d in zip(weights, moves, strict=True)]
    expected = [w.clone() for w in weights] if accept is False else expected
    Decoupled().apply_(
        weights, moves, length=lr, decay=lr * 0.5, accept=None if accept is None else torch.tensor(accept)
    )
    for w, e in zip(weights, expected, strict=True):
        torch.testing.assert_close(w, e, rtol=0, atol=0 if accept is False else 1e-15)
