"""The batched fits against slow, plain definitions."""

import numpy as np
import pytest
from scipy import optimize, stats

from steepest.batch_size.curve_families import FAMILIES
from steepest.batch_size.curve_fit import as_runs, fit
from steepest.batch_size.curve_likelihood import best_of_starts, hazard, hazard_slope, maximise
from tests.batch_size.curves import OCTAVES, TRUTH, curve, runs, shape, theta
from tests.cases import cases


def minus_loglik(parameters, key, data):
    """By the definition."""
    *inner, scale, log_sigma = parameters
    normal = stats.norm(scale + shape(key).log_shape(np.array(inner), data.x), np.exp(log_sigma))
    return -np.where(data.stopped, normal.logsf(data.y), normal.logpdf(data.y)).sum()


@cases("budget", [np.inf, 4000.0])
@cases("key", ["H", "P", "S", "W"])
def test_no_general_optimiser_does_better(key, budget):
    data = as_runs(runs(key, sigma=0.1, seed=1, budget=budget))
    found = best_of_starts(shape(key), data.x, data.y, data.stopped)
    assert data.stopped.any() == (budget < np.inf and curve(key, [16])[0] > budget)
    best = -float(found.loglik[0])
    ours = [*found.theta[0], float(found.scale[0]), float(np.log(found.sigma[0]))]
    assert minus_loglik(ours, key, data) == pytest.approx(best, abs=1e-8)
    low, high = shape(key).box(data.x, ~data.stopped)
    bounds = [*zip(low, high, strict=True), (None, None), (-6, 3)]
    for start in (ours, [*theta(key), np.log(1000.0), np.log(0.1)]):
        other = optimize.minimize(minus_loglik, start, (key, data), method="L-BFGS-B", bounds=bounds)
        assert other.fun >= best - 1e-5


def test_without_stopped_runs_it_is_least_squares():
    data = as_runs(runs("H", sigma=0.1, seed=2))
    found = best_of_starts(shape("H"), data.x, data.y, data.stopped)
    plain = optimize.least_squares(lambda p: data.y - p[1] - np.log1p(np.exp(p[0] - data.x)), [4.0, 6.0], xtol=1e-14)
    np.testing.assert_allclose([found.theta[0, 0], found.scale[0]], plain.x, atol=1e-5)
    assert found.sigma[0] == pytest.approx(np.sqrt((plain.fun**2).mean()), rel=1e-6)


@cases("key", FAMILIES)
def test_many_data_sets_are_fitted_as_one_by_one(key):
    sets = [as_runs(runs(key, sigma=0.08, seed=seed, budget=6000.0)) for seed in range(4)]
    x, y, stopped = sets[0].x, np.stack([one.y for one in sets]), np.stack([one.stopped for one in sets])
    starts = np.tile(theta(key), (4, 1))
    together = maximise(shape(key), x, y, stopped, starts)
    for row in range(4):
        alone = maximise(shape(key), x, y[row : row + 1], stopped[row : row + 1], starts[:1])
        np.testing.assert_allclose(together.loglik[row], alone.loglik[0], atol=1e-6)


def test_a_target_out_of_reach_costs_nothing_if_the_runs_were_stopped():
    """b_min is above the two smallest batch sizes; only that the others arrived bounds it."""
    data = runs("S", parameters=(40.0,), budget=1e5)
    assert [one.batch_size for one in data if one.censored] == [16] * 3 + [32] * 3
    assert fit(data, "S").parameters["b_min"] == pytest.approx(40, rel=1e-6)


def test_hazard_is_the_ratio_of_density_to_tail():
    z = np.linspace(-30, 30, 301)
    np.testing.assert_allclose(hazard(z), np.exp(stats.norm.logpdf(z) - stats.norm.logsf(z)), rtol=1e-12)
    assert hazard(np.array([-np.inf]))[0] == 0
    numeric = (hazard(z + 1e-5) - hazard(z - 1e-5)) / 2e-5
    np.testing.assert_allclose(hazard_slope(z, hazard(z)), numeric, atol=1e-5)


@pytest.mark.parametrize("key", ["H", "U"])
def test_two_stopped_batch_sizes_leave_the_estimate_unbiased(key):
    """Mean of log B_crit or log b* over 200 data sets is within 3 standard errors, 2% to 5%, of the truth."""
    parameters = TRUTH["H"] if key == "H" else (45.0, 0.5, 2.0)
    steps = curve(key, OCTAVES, parameters=parameters)
    budget = np.sqrt(steps[1] * steps[2]) if key == "H" else 10 * steps[2]
    sets = [as_runs(runs(key, sigma=0.1, seed=s, budget=budget, parameters=parameters)) for s in range(200)]
    x, y, stopped = sets[0].x, np.stack([one.y for one in sets]), np.stack([one.stopped for one in sets])
    assert stopped[:, :6].mean() > 0.98
    assert stopped[:, 6:].mean() < 0.01
    found = maximise(shape(key), x, y, stopped, np.tile(np.log(parameters), (200, 1)))
    truth = np.log(parameters[0]) if key == "H" else shape(key).log_best(np.log(parameters))
    errors = (found.theta[:, 0] if key == "H" else shape(key).log_best(found.theta)) - truth
    assert abs(errors.mean()) < 3 * errors.std() / np.sqrt(200)
    assert errors.std() / np.sqrt(200) < 0.02
