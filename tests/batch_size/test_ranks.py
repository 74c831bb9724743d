"""Effective rank and noise in the nuclear norm."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.batch_size.bounds import lag
from steepest.batch_size.ranks import effective_rank, noise_of_covariance, noise_of_entries, noise_of_variance
from steepest.linalg import polar


def nuclear(x):
    return torch.linalg.matrix_norm(x, ord="nuc")


@given(m=st.integers(1, 7), n=st.integers(1, 7), rank=st.integers(1, 7), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_it_is_between_one_and_the_rank_and_joins_the_two_norms(m, n, rank, seed):
    rng = torch.Generator().manual_seed(seed)
    rank = min(m, n, rank)
    left, right = torch.randn(m, rank, generator=rng).double(), torch.randn(rank, n, generator=rng).double()
    a = left @ right
    r = effective_rank(a)
    assert 1 - 1e-9 <= float(r) <= rank * (1 + 1e-9)
    torch.testing.assert_close(nuclear(a), r.sqrt() * torch.linalg.matrix_norm(a))
    assert float(effective_rank(polar(a, method="svd"))) == pytest.approx(rank)
    b = torch.randn(m, n, generator=rng).double()
    assert abs(float((a * b).sum())) <= float(nuclear(a) * torch.linalg.matrix_norm(b, ord=2)) * (1 + 1e-9)


def test_scale_does_not_matter_and_zero_has_rank_zero(rng):
    a = torch.randn(3, 4, 5, generator=rng)
    torch.testing.assert_close(effective_rank(a * 1e-30), effective_rank(a))
    assert effective_rank(torch.zeros(2, 3)).item() == 0
    assert effective_rank(a).shape == (3,)
    assert effective_rank(torch.ones(4, 4)).item() == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0]))).item() == pytest.approx(9 / 5)  # stable rank is 5/4


@pytest.mark.parametrize("batch", [1, 8])
def test_the_noise_of_a_mean_is_below_its_bound(batch, rng):
    """Rows of different sizes, 4000 draws; from the covariance of rows, and of columns."""
    root = torch.randn(6, 6, generator=rng, dtype=torch.float64) * torch.logspace(0, -1.5, 6)
    draws = root @ torch.randn(4000, 6, 20, generator=rng, dtype=torch.float64)
    noise = draws.view(-1, batch, 6, 20).mean(1)
    rows, columns = 20 * root @ root.mT, (root @ root.mT).trace() * torch.eye(20, dtype=torch.float64)
    seen = nuclear(noise).mean() * math.sqrt(batch)
    assert seen <= noise_of_covariance(rows) <= 1.1 * seen
    assert noise_of_covariance(columns) > 1.5 * noise_of_covariance(rows)
    sigma = math.sqrt(float(rows.trace()))
    values, vectors = torch.linalg.eigh(rows)
    symmetric_root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    r = float(effective_rank(symmetric_root))
    assert noise_of_variance(sigma, r) == pytest.approx(float(noise_of_covariance(rows)))
    assert noise_of_variance(sigma, 6) >= float(noise_of_covariance(rows))


def test_numbers_of_independent_entries():
    assert noise_of_entries(16, 64, 1.0) == noise_of_entries(64, 16, 1.0) == 128
    assert noise_of_entries(8, 16, 0.5) == 16
    assert float(noise_of_covariance(64 * torch.eye(16))) == pytest.approx(128)
    assert float(noise_of_covariance(16 * torch.eye(64))) == pytest.approx(256)
    assert noise_of_variance(0.5 * math.sqrt(8 * 16), 8) == pytest.approx(16)  # isotropic: the worst case is attained


@pytest.mark.parametrize(("sigma", "rank"), [(-1.0, 2), (math.nan, 2), (1.0, 0.5), (1.0, math.inf)])
def test_wrong_input_is_refused(sigma, rank):
    wrong = f"rank must be finite and at least 1, got {rank}"
    expected = wrong if 0 <= sigma < math.inf else f"sigma must be finite and at least 0, got {sigma}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        noise_of_variance(sigma, rank)


def test_noise_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"positive semidefinite matrix, got the eigenvalue -5"):
        noise_of_covariance(torch.diag(torch.tensor([1.0, -5.0])))
    with pytest.raises(ValueError, match=r"sigma must be finite and at least 0, got -1"):
        noise_of_entries(16, 64, -1)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1\.5"):
        lag(1.5, nesterov=False)
