import numpy as np
import pytest

from steepest.batch_size.curve_families import FAMILIES, family
from tests.batch_size.curves import OCTAVES, TRUTH, curve, shape, theta
from tests.cases import cases

X = np.log(np.array(OCTAVES, dtype=float))
POLES = [key for key, one in FAMILIES.items() if one.pole]


@cases("key", FAMILIES)
def test_shapes_are_the_formulas(key):
    np.testing.assert_allclose(1000 * np.exp(shape(key).log_shape(theta(key), X)), curve(key, OCTAVES), rtol=1e-12)


@cases("key", FAMILIES)
def test_slopes_are_derivatives(key):
    one, at = shape(key), theta(key)
    slopes = one.slopes(at, X)
    for index in range(one.size):
        shift = 1e-6 * np.eye(one.size)[index]
        numeric = (one.log_shape(at + shift, X) - one.log_shape(at - shift, X)) / 2e-6
        np.testing.assert_allclose(slopes[:, index], numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("key", "factor"), [("S", 2.25), ("I", 2.0), ("U", (1 + 0.5 * 2) ** 2)])
def test_best_batch_is_a_multiple_of_the_pole(key, factor):
    assert np.exp(shape(key).log_best(theta(key))) == pytest.approx(factor * TRUTH[key][0], rel=1e-12)


@pytest.mark.parametrize(
    "parameters", [("S", (14.0,)), ("U", (13.0, 0.7, 1.5)), ("W", (11.1, 0.1)), ("P", (50.0, 3.0))]
)
def test_best_batch_minimises_samples(parameters):
    key, values = parameters
    best = float(np.exp(shape(key).log_best(np.log(values))))
    grid = best * np.exp(np.linspace(-0.5, 0.5, 2001))
    grid = grid[grid > values[0] * 1.001] if shape(key).pole else grid
    samples = grid * curve(key, grid, parameters=values)
    assert grid[samples.argmin()] == pytest.approx(best, rel=1e-3)


def test_lambert_form_of_the_logarithm():
    """X=5, Y=1, c=.3: b_min = (Y / c)² and L = ln(X / c); a grid search finds 13.33."""
    at = np.log([(1 / 0.3) ** 2, np.log(5 / 0.3)])
    grid = np.geomspace(11.2, 30, 100_001)
    samples = grid * np.log(5 / (0.3 - 1 / np.sqrt(grid)))
    assert np.exp(family("W").log_best(at)) == pytest.approx(13.33, abs=0.005)
    assert np.exp(family("W").log_best(at)) == pytest.approx(grid[samples.argmin()], rel=1e-4)


@pytest.mark.parametrize(("key", "values"), [("H", (130.0,)), ("P", (90.0, 1.0)), ("P", (90.0, 0.3))])
def test_no_minimum_where_samples_only_grow(key, values):
    assert np.isneginf(shape(key).log_best(np.log(values)))


@pytest.mark.parametrize(("key", "p", "q"), [("S", 0.5, 1.0), ("I", 1.0, 1.0)])
def test_the_unified_pole_contains_the_others(key, p, q):
    at = np.log([14.0, p, q])
    np.testing.assert_allclose(shape("U").log_shape(at, X), shape(key).log_shape(at[:1], X), rtol=1e-12)
    assert shape("U").log_best(at) == pytest.approx(shape(key).log_best(at[:1]), rel=1e-12)


@pytest.mark.parametrize("key", POLES)
def test_out_of_reach_at_and_below_the_pole(key):
    at = theta(key)
    at[0] = X[1]
    assert np.isinf(shape(key).log_shape(at, X)).tolist() == [True, True] + [False] * 6
    assert (shape(key).slopes(at, X)[:2, 0] == 0).all()


@cases("share", [0.05, 0.2, 1.0])
@cases("key", [*FAMILIES, "P>1"])
def test_overhead_is_what_it_says(key, share):
    values = (90.0, 2.0) if key == "P>1" else TRUTH[key]
    key = key[0]
    at = np.log(values)
    found = float(np.exp(shape(key).log_overhead(at[None], share, X[0])[0]))
    best = float(np.exp(shape(key).log_best(at)))
    if key == "H":
        assert found == pytest.approx(share * 130, rel=1e-12)
        best = 1e-9  # the limit b -> 0
    best = best or OCTAVES[0]
    least, there = (b * curve(key, [b], parameters=values)[0] for b in (best, found))
    assert found > best
    assert there / least == pytest.approx(1 + share, rel=1e-6)


def test_unknown_family():
    with pytest.raises(ValueError, match=r"Unknown family 'Q'\. Valid: H, I, P, S, U, W\."):
        family("Q")
