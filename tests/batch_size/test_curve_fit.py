import numpy as np
import pytest

from steepest.batch_size.curve_families import FAMILIES
from steepest.batch_size.curve_fit import Point, choose, fit
from tests.batch_size.curves import HALVES, OCTAVES, TRUTH, curve, runs, shape, theta
from tests.cases import cases


@cases("seeds", [1, 3])
@cases("key", FAMILIES)
def test_without_noise_the_truth_comes_back(key, seeds):
    found = fit(runs(key, seeds=seeds), key)
    for name, value in zip(found.family.parameters, TRUTH[key], strict=True):
        assert found.parameters[name] == pytest.approx(value, rel=1e-3)
    assert found.parameters["K_inf"] == pytest.approx(1000, rel=1e-3)
    truth = np.exp(shape(key).log_best(theta(key)))
    assert (found.best_batch or 0) == pytest.approx(truth, rel=1e-3)
    assert found.steps(300) == pytest.approx(curve(key, [300])[0], rel=1e-4)


@cases("key", ["H", "S", "I", "P", "U"])
def test_without_noise_the_family_itself_is_chosen(key):
    """Without noise a family that contains the true one fits as well, and only its size speaks against it."""
    choice = choose(runs(key))
    assert choice.chosen.family.key == key
    assert choice.weights[key] > 0.75  # P contains H exactly and pays for one more parameter
    assert sum(choice.weights.values()) == pytest.approx(1)
    assert choice.excess(key) == 0
    assert [choice.excess(one.family.key) for one in choice.fits] == sorted(
        one.aicc - choice.fits[0].aicc for one in choice.fits
    )


def test_aicc_counts_shape_scale_and_spread():
    found = fit(runs("U", sigma=0.1), "U")
    assert found.aicc == pytest.approx(2 * 5 - 2 * found.loglik + 2 * 5 * 6 / (24 - 5 - 1))


def test_overhead_of_the_hyperbola_is_its_share_of_the_knee():
    assert fit(runs("H"), "H").overhead(0.2) == pytest.approx(26, rel=1e-6)


def test_spread_is_corrected_for_the_parameters():
    """Mean of σ² over 200 data sets; uncorrected it would be 19/24 of it, ten standard errors away."""
    squares = [fit(runs("U", sigma=0.1, seed=seed), "U").sigma ** 2 for seed in range(200)]
    error = np.std(squares) / np.sqrt(200)
    assert abs(np.mean(squares) - 0.01) < 3 * error
    assert 8 * error < 0.01 * 5 / 24


def test_beyond_the_pole_the_target_is_out_of_reach():
    assert fit(runs("S", HALVES), "S").steps(10) == np.inf


def test_a_parameter_that_nothing_determines_is_named():
    flat = [Point(b, s, 100.0 * (1 + 0.01 * s)) for b in OCTAVES for s in range(3)]
    assert fit(flat, "S").at_bound == ("b_min",)
    assert fit(runs("S", sigma=0.05), "S").at_bound == ()


def test_families_that_take_more_batch_sizes_are_listed_with_the_reason():
    choice = choose(runs("S", OCTAVES[:4], sigma=0.05))
    assert set(choice.skipped) == {"U", "W"}
    assert choice.skipped["U"] == "takes the target reached at 6 batch sizes or more, here at 4"
    table = str(choice)
    assert "U  not fitted: takes the target reached at 6 batch sizes" in table
    assert table.splitlines()[1].startswith(choice.chosen.family.key)
    assert choice.excess("U") is None


@pytest.mark.parametrize(
    ("points", "key", "message"),
    [
        (runs("H", OCTAVES[:2]), "H", r"hyperbola \(H\) takes the target reached at 3 batch sizes or more, here at 2"),
        (runs("H", OCTAVES[:4], seeds=1), "P", r"takes 6 runs or more of which 4 reached the target, here 4"),
        (runs("H"), "X", r"Unknown family 'X'"),
        ([*runs("H"), Point(16, 0, 5.0)], "H", r"Two points have batch size 16 and seed 0: they would count one run"),
    ],
)
def test_runs_that_do_not_suffice_are_refused(points, key, message):
    with pytest.raises(ValueError, match=message):
        fit(points, key)


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match=r"No family can be fitted: H takes .*; S takes .* Add batch sizes or seeds"):
        choose(runs("H", OCTAVES[:2]), ["H", "S"])
    with pytest.raises(ValueError, match=r"No family can be fitted: none was asked for"):
        choose(runs("H"), [])


@pytest.mark.parametrize(("size", "steps"), [(0, 10.0), (4, 0.0), (4, np.inf), (4, np.nan)])
def test_points_that_are_none(size, steps):
    with pytest.raises(ValueError, match=r"Point: (batch_size must be at least 1|steps must be .* above 0), got"):
        Point(size, 0, steps)
