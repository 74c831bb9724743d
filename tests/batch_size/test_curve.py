import numpy as np
import pytest

from steepest.batch_size.curve import (
    Answer,
    Point,
    estimate,
    fit,
    lack_of_fit,
    levels,
    linear_step_time,
    recommendation,
    time_optimal,
)
from steepest.batch_size.curve_fit import as_runs
from tests.batch_size.curves import HALVES, OCTAVES, runs
from tests.cases import cases

# b K(b) of Muon (lr .02, momentum .9) on a noisy 8 x 16 quadratic; 8 and 16 do not get there.
QUADRATIC = {32: 18389, 64: 15744, 128: 22101, 256: 36267, 512: 64000}
U_SHAPED = [
    *(Point(b, 0, samples / b) for b, samples in QUADRATIC.items()),
    *(Point(b, 0, 3000.0, censored=True) for b in (8, 16)),
]


def few(points, **options):
    return estimate(points, resamples=200, **options)


@pytest.mark.slow
@cases("seed", range(20))
@cases("sigma, knee", [(0.02, 2000.0), (0.1, 2000.0), (0.1, 130.0), (0.1, 20.0)])
def test_the_hyperbola_has_no_interior_minimum(seed, sigma, knee):
    """Not even where noise alone makes one: with B_crit = 2000, b K(b) rises by 1% from 16 to 32."""
    found = few(runs("H", sigma=sigma, seed=seed, parameters=(knee,)), families=["H"])
    assert found.chosen.best_batch is None
    assert found.b_star.kind == "at most"
    assert found.b_star.high >= 16  # a range, which small batch sizes are in
    assert "no interior minimum" in found.b_star.reason


def test_noise_did_make_minima_of_the_hyperbola():
    """Or else the test above would show nothing."""
    least = [
        min(levels(as_runs(runs("H", sigma=0.1, seed=s, parameters=(2000.0,)))), key=lambda one: one.samples).batch_size
        for s in range(20)
    ]
    assert sum(16 < b < 2048 for b in least) > 5


@cases("sigma", [0.0, 0.05])
@cases("key, truth, sizes", [("S", 31.5, HALVES), ("I", 28.0, HALVES), ("U", 52.0, OCTAVES)])
def test_a_minimum_inside_is_a_number(key, truth, sizes, sigma):
    found = few(runs(key, sizes, sigma=sigma, seed=4))
    assert found.b_star.kind == "point"
    assert found.b_star.value == pytest.approx(truth, rel=0.01 if sigma == 0 else 0.1)
    assert found.b_star.low <= found.b_star.value <= found.b_star.high


def test_the_knee_is_found_without_noise():
    found = few(runs("H"))
    assert found.knee.value == pytest.approx(130, rel=1e-4)
    assert found.overhead.value == pytest.approx(26, rel=1e-4)
    assert found.warnings == ()
    assert found.hyperbola is found.chosen


@pytest.mark.parametrize(
    ("sizes", "answer"),
    [
        ((64, 91, 128, 181, 256, 362), Answer("at most", None, None, 64)),
        ((12, 14, 16, 18, 20, 22), Answer("at least", None, 22, None)),
        ((24, 32, 64, 128, 256, 512), Answer("between", None, 24, 64)),
    ],
)
def test_a_minimum_outside_or_close_to_the_edge_is_a_range(sizes, answer):
    """b* = 31.5."""
    found = few(runs("S", sizes, sigma=0.02, parameters=(14.0,) if sizes[0] > 14 else (11.0,))).b_star
    truth = 31.5 if sizes[0] > 14 else 24.75
    assert (found.kind, found.value, found.low, found.high) == (answer.kind, None, answer.low, answer.high)
    assert found.contains(truth)
    assert found.reason


def test_one_batch_size_below_is_not_enough_even_if_smaller_ones_never_arrive():
    found = few(U_SHAPED)
    assert (found.b_star.kind, found.b_star.low, found.b_star.high) == ("between", 32, 128)
    assert "with 1 measured below and 4 above" in found.b_star.reason
    assert found.choice.skipped["U"].endswith("here at 5")
    assert any(warning.startswith("2 of 7 runs stopped") for warning in found.warnings)


def test_runs_that_never_arrive_are_a_left_side():
    """Without them b K(b) falls to the edge; with them the edge is not where it is least."""
    both = [
        Point(p.batch_size, s, p.steps * (1 + 0.02 * s * (not p.censored)), p.censored)
        for p in U_SHAPED
        for s in (0, 1)
    ]
    kept = [one for one in both if one.batch_size != 32]
    with_stopped, without = few(kept), few([one for one in kept if not one.censored])
    assert (with_stopped.b_star.kind, with_stopped.b_star.low) == ("between", 16)
    assert (without.b_star.kind, without.b_star.high) == ("at most", 64)


def test_too_few_batch_sizes_with_all_seeds():
    points = [
        *runs("S", (32, 64), sigma=0.02),
        *(Point(b, s, 1500.0 - b, censored=s == 0) for b in (128, 256) for s in range(3)),
    ]
    found = few(points)
    assert found.b_star.kind == "refused"
    assert "all seeds reached the target at 2 batch sizes only" in found.b_star.reason
    assert any("give every run more steps" in warning for warning in found.warnings)
    assert not found.b_star.contains(64)


@pytest.mark.parametrize(("knee", "kind"), [(3.0, "at most"), (130.0, "point"), (20_000.0, "at least")])
def test_a_knee_outside_the_grid_is_a_range(knee, kind):
    found = few(runs("H", sigma=0.05, parameters=(knee,))).knee
    assert found.kind == kind
    assert found.contains(knee)
    assert (found.value is None) == (kind != "point")


def test_an_interval_that_leaves_the_grid_is_open():
    found = few(runs("H", sigma=0.2, parameters=(20.0,), seed=3)).knee
    assert found.kind == "point"
    assert found.low is None
    assert "open" in str(found)
    assert "beyond the smallest measured" in found.reason


def test_a_rejected_hyperbola_warns():
    found = few(runs("U", sigma=0.05))
    assert found.chosen.family.key == "U"
    assert any(warning.startswith("The hyperbola is rejected: its AICc is") for warning in found.warnings)
    assert "the hyperbola is rejected" in found.knee.reason
    assert any(warning.startswith("The hyperbola is rejected") for warning in few(runs("U"), families=["U"]).warnings)


def test_rivals_with_another_answer_warn():
    rival = [few(runs("U", OCTAVES[:6], sigma=0.3, seed=seed)).warnings for seed in range(10)]
    assert any("may be right as well" in warning for one in rival for warning in one)


def test_one_seed_warns():
    assert any(one.startswith("One seed") for one in few(runs("H", sigma=0.05, seeds=1)).warnings)


def test_a_parameter_at_its_bound_warns():
    flat = [Point(b, s, 100.0 * (1 + 0.01 * s)) for b in OCTAVES for s in range(3)]
    assert any("ran to the end of its range" in one for one in few(flat, families=["S"]).warnings)


def test_lack_of_fit():
    """Uniform p-values for the true family; tiny ones for a wrong one; none without seeds."""
    values = [lack_of_fit(fit(runs("H", sigma=0.1, seed=seed), "H")) for seed in range(200)]
    assert np.mean(np.array(values) < 0.1) == pytest.approx(0.1, abs=0.065)  # 3 standard errors
    assert lack_of_fit(fit(runs("U", sigma=0.02), "H")) < 1e-6
    assert lack_of_fit(fit(runs("H", sigma=0.1, seeds=1), "H")) is None
    assert lack_of_fit(fit(runs("H", sigma=0.1, budget=6000.0), "H")) is None
    assert any(
        one.startswith("H does not describe the runs") for one in few(runs("U", sigma=0.02), families=["H"]).warnings
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overhead": 0.0}, "estimate: overhead must be finite and above 0, got 0.0"),
        ({"level": 1.0}, r"estimate: level must be in \(0, 1\), got 1.0"),
        ({"resamples": 10}, "estimate: resamples must be at least 100, got 10"),
        ({"families": ["H", "h"]}, "Unknown family 'h'"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        estimate(runs("H"), **options)


def test_the_sentence_names_what_it_says():
    text = recommendation(few(runs("H", sigma=0.05)), setting="Muon, target loss 0.2, lr tuned", unit="images")
    assert text.startswith("SFO-minimising b* <= 16 images (smallest measured")
    assert "20%-overhead batch = " in text
    assert "knee B_crit = 13" in text
    assert text.endswith("90% intervals, 3 seeds, 8 batch sizes 16 to 2048, Muon, target loss 0.2, lr tuned).")


def test_the_sentence_without_numbers():
    text = recommendation(few(U_SHAPED))
    assert text.startswith("SFO-minimising b* between 32 and 128 (b K(b) is least at 64; ")
    assert "1 seed, 7 batch sizes 8 to 512)" in text


@cases(
    "answer, text",
    [
        (Answer("point", 130.0, 95.0, 180.0), "= 130 [95, 180]"),
        (Answer("point", 130.0, None, 180.0), "= 130 [open, 180]"),
        (Answer("at most", None, None, 64), "<= 64"),
        (Answer("at least", None, 512, None), ">= 512"),
        (Answer("between", None, 32, 128), "between 32 and 128"),
        (Answer("refused", None, None, None), "not known"),
    ],
)
def test_answers_as_text(answer, text):
    assert str(answer) == text


@pytest.mark.slow
def test_a_range_takes_in_what_other_families_say():
    """Power law with b* = 6.8: where another family without a minimum is chosen, the range still has b* in it."""
    held, asked = 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        points = [
            Point(b, s, 1000 * (1 + (26 / b) ** 1.2) * float(np.exp(0.2 * rng.standard_normal())))
            for b in (4, 8, 16, 32, 64)
            for s in range(3)
        ]
        found = estimate(points, resamples=200, seed=seed)
        if found.chosen.best_batch is None:
            asked += 1
            held += found.b_star.kind == "refused" or found.b_star.contains(6.8)
    assert asked > 15
    assert held > 0.85 * asked


def test_a_scale_whose_interval_spans_the_grid_is_refused():
    answers = set()
    for seed in range(12):
        points = runs("H", sigma=0.6, seed=seed, parameters=(3.0,), sizes=(16, 32, 64))
        answer = few(points, families=["H"]).knee
        answers.add(answer.kind)
        assert answer.kind != "at most" or answer.high <= 64
        assert answer.kind != "refused" or "its interval spans all that was measured" in answer.reason
    assert "refused" in answers


def test_a_family_named_twice_is_fitted_once():
    assert len(estimate(runs("H", parameters=(130.0,)), families=["H", "H"], resamples=100).choice.fits) == 1


@pytest.mark.parametrize(("fixed", "each"), [(0.5, 0.001), (0.1, 0.001), (1.0, 0.0005)])
def test_hyperbola_and_linear_steps_have_a_closed_form(fixed, each):
    """(1 + B / b)(τ0 + τ1 b) is least at √(B τ0 / τ1)."""
    found = time_optimal(fit(runs("H"), "H"), linear_step_time(seconds_fixed=fixed, seconds_per_example=each))
    best = np.sqrt(130 * fixed / each)
    assert found.kind == "point"
    assert found.batch_size == pytest.approx(best, rel=2e-3)
    assert found.seconds == pytest.approx(1000 * (1 + 130 / best) * (fixed + each * best), rel=1e-4)


def test_steps_that_cost_by_the_example_are_samples():
    """Then time is b K(b): b* of the curve, and the edge for the hyperbola."""
    timed = linear_step_time(seconds_fixed=0.0, seconds_per_example=0.01)
    assert time_optimal(fit(runs("U"), "U"), timed).batch_size == pytest.approx(52, rel=2e-3)
    edge = time_optimal(fit(runs("H"), "H"), timed)
    assert (edge.kind, edge.batch_size) == ("at most", pytest.approx(16))


def test_steps_that_cost_the_same_take_the_largest_batch():
    found = time_optimal(fit(runs("H"), "H"), linear_step_time(seconds_fixed=1.0, seconds_per_example=0.0))
    assert (found.kind, found.batch_size) == ("at least", pytest.approx(2048))


def test_measured_times_are_joined_by_lines_and_not_extended():
    curve = fit(runs("H"), "H")
    measured = {b: 0.5 + 0.001 * b for b in OCTAVES}
    linear = time_optimal(curve, linear_step_time(seconds_fixed=0.5, seconds_per_example=0.001))
    assert time_optimal(curve, measured).batch_size == pytest.approx(linear.batch_size, rel=1e-9)
    short = time_optimal(curve, {b: seconds for b, seconds in measured.items() if b <= 128})
    assert (short.kind, short.batch_size) == ("at least", pytest.approx(128))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({64: 1.0}, "take two or more batch sizes"),
        ({64: 1.0, 128: 0.0}, "with finite seconds above 0"),
        ({1: 1.0, 2: 2.0}, r"do not overlap: the latter are 16 to 2048\. Time steps in that range"),
    ],
)
def test_times_that_are_none(times, message):
    with pytest.raises(ValueError, match=message):
        time_optimal(fit(runs("H"), "H"), times)


@pytest.mark.parametrize(("fixed", "each"), [(0.0, 0.0), (-1.0, 1.0), (np.inf, 1.0)])
def test_linear_times_that_are_none(fixed, each):
    with pytest.raises(ValueError, match=r"must be finite, not negative and not both 0"):
        linear_step_time(seconds_fixed=fixed, seconds_per_example=each)
