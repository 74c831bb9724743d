"""Accuracy of directions that are known, and of optimizers that are exact."""

import math

import pytest
import torch

from steepest.lab.bench.accuracy import (
    MATRICES,
    SMALLEST,
    accuracy,
    consult,
    decaying,
    draw_oracles,
    first_directions,
    gaussian,
    judge,
    sampled,
)
from steepest.lab.bench.contestants import CONTESTANTS, Contestant, _steepest

SHAPES = [(6, 6), (4, 12), (12, 4), (6, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_multiple_of_the_polar_factor_is_exact(shape, rng):
    oracle = consult(gaussian(shape, rng))
    found = judge(3 * oracle.polar, oracle)
    assert found.orthogonality_error < 1e-7
    assert found.distance < 1e-7
    assert found.alignment == pytest.approx(1)
    assert (found.smallest, found.largest) == (pytest.approx(3), pytest.approx(3))


def test_stretched_singular_values_are_measured_against_their_best_multiple(rng):
    oracle = consult(gaussian((2, 5), rng))
    u, _, vh = torch.linalg.svd(oracle.gradient.double(), full_matrices=False)
    found = judge((u * torch.tensor([1.5, 0.5])) @ vh, oracle)  # c = 1
    assert found.distance == pytest.approx(0.5)
    assert found.orthogonality_error == pytest.approx(math.sqrt((1.25**2 + 0.75**2) / 2))
    assert (found.smallest, found.largest) == (pytest.approx(0.5), pytest.approx(1.5))


def test_the_gradient_itself_is_aligned_less_than_its_polar_factor(rng):
    oracle = consult(gaussian((5, 5), rng))
    s = torch.linalg.svdvals(oracle.gradient.double())
    assert judge(oracle.gradient, oracle).alignment == pytest.approx(float(s.square().sum() / (s.sum() * s[0])))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_decaying_spectrum_is_geometric(shape, rng):
    gradient = decaying(shape, rng)
    assert gradient.shape == shape
    s = torch.linalg.svdvals(gradient.double().flatten(1))
    assert float(s[0]) == pytest.approx(1, rel=1e-5)
    assert float(s[-1]) == pytest.approx(SMALLEST, rel=1e-3)
    assert float((s[1:] / s[:-1]).std()) < 1e-4


def test_a_few_matrices_of_each_shape_are_sampled():
    assert sampled([(2, 3)] * 9 + [(3, 2)]) == [(2, 3)] * MATRICES + [(3, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["gaussian", "decaying"])
def test_an_exact_optimizer_is_found_exact_on_every_shape(spectrum):
    exact = Contestant("exact", "steepest", _steepest(polar="svd"), "float32", ours=True)
    oracles = draw_oracles(spectrum, SHAPES, dtype=torch.float32, device="cpu", seed=0)
    found = accuracy(exact, oracles)
    assert found.distance < 1e-3
    assert found.orthogonality_error < 1e-5
    assert found.alignment == pytest.approx(1, abs=1e-4)
    assert (found.smallest, found.largest) == (pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4))


def test_torch_and_ours_with_its_coefficients_go_the_same_way():
    oracles = draw_oracles("gaussian", SHAPES, dtype=torch.float32, device="cpu", seed=0)
    gradients = [oracle.gradient for oracle in oracles]
    ours = first_directions(CONTESTANTS["steepest-jordan"], gradients)
    plain = first_directions(CONTESTANTS["torch-fp32"], gradients)
    theirs = first_directions(CONTESTANTS["torch"], gradients)
    for one, other, bf16 in zip(ours, plain, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # float32 through five quintics
        torch.testing.assert_close(one, bf16, rtol=0, atol=0.1)  # 8 bits
