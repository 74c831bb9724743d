"""The synthetic study: independently measured values, known limits, and its seeds."""

import functools
import math

import pytest
import torch

from steepest.lab.cli.theory import CASES as NAMED
from steepest.linalg import polar
from steepest.theory import CASES, Case, simulate, surrogate_score
from steepest.theory.spectra import DIRECTIONS, SMALLEST, curvature_spectrum

# Means over 4 simulations of another implementation with another seed, in the order of DIRECTIONS.
ANCHORS = {
    "few-large": (104.8, 508.4, 557.9, 1964.7, 1889.7, 2063.0),
    "many-large": (12750, 85119, 86952, 88888, 83029, 103075),
    "few-tokens": (207.6, 733.7, 845.2, 2060.3, 1982.4, 2159.9),
    "no-spike": (668.5, 1702.1, 1630.3, 1779.9, 1709.8, 1866.9),
}
SIMULATIONS = 4


@functools.cache
def study(case):
    return simulate(case, simulations=SIMULATIONS, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_that_were_measured_elsewhere(case):
    """Within 5%, or three standard errors where large inputs that meet large eigenvalues make the scores scatter."""
    for name, anchor in zip(DIRECTIONS, ANCHORS[case], strict=True):
        scores = study(case)[name]
        error = scores.std().item() * math.sqrt(1 / SIMULATIONS + 1 / 4)
        assert abs(scores.mean().item() - anchor) < max(0.05 * anchor, 3 * error), name
    if case in ("many-large", "no-spike"):  # no scatter to hide behind
        ratios = torch.stack([study(case)[name] / study(case)["newton"] for name in DIRECTIONS]).mean(1)
        expected = torch.tensor(ANCHORS[case], dtype=torch.float64) / ANCHORS[case][-1]
        torch.testing.assert_close(ratios, expected, rtol=0.05, atol=0)


@pytest.mark.slow
def test_a_large_input_costs_muon_most_of_the_score_and_newton_muon_little():
    scores = study("few-large")
    assert (scores["newton-muon"] / scores["newton"]).mean() >= 0.93
    assert (scores["muon"] / scores["newton"]).mean() <= 0.30


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_direction_beats_newtons(case):
    scores = study(case)
    assert all((scores[name] <= scores["newton"] * (1 + 1e-12)).all() for name in DIRECTIONS)


def test_muons_score_without_any_anisotropy(rng):
    """Singular values of a normal matrix follow the quarter circle; their mean is 8 / (3 pi) of their RMS."""
    g = torch.randn(512, 512, generator=rng, dtype=torch.float64)
    eye = torch.eye(512)
    ratio = surrogate_score(polar(g, method="svd"), g, eye, eye) / surrogate_score(g, g, eye, eye)
    assert ratio.item() == pytest.approx(64 / (9 * math.pi**2), rel=2e-3)


def test_the_spectrum_falls_from_one_to_the_smallest():
    values = curvature_spectrum(50, decay=2.4)
    tau = math.log(1 / SMALLEST) / 49**2.4
    expected = torch.tensor([math.exp(-tau * k**2.4) for k in range(50)], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)


def test_seeds_decide_and_more_simulations_only_append():
    case = Case(tokens=64, decay=1.0, spike=4.0)
    few, many = (simulate(case, simulations=n, seed=3, size=16) for n in (2, 5))
    other = simulate(case, simulations=2, seed=4, size=16)
    for name in DIRECTIONS:
        assert torch.equal(many[name][:2], few[name])
        assert not torch.equal(other[name], few[name])


def test_the_command_line_knows_the_cases():
    assert tuple(CASES) == NAMED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"case": "few-lrge", "simulations": 1}, "Unknown case 'few-lrge': did you mean 'few-large'"),
        ({"case": "few-large", "simulations": 0}, "simulations of at least 1 and size of at least 2, got 0 and 512"),
        ({"case": "few-large", "simulations": 1, "size": 1}, "got 1 and 1"),
        ({"case": Case(8, 1.0, 1.0), "simulations": 1}, "8 tokens leave the moment of 512 inputs singular"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)
