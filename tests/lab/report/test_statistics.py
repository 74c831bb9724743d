"""Statistics against scipy, brute force and simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from scipy import stats

from steepest.lab.report.statistics import (
    Ended,
    Verdict,
    first_crossing,
    holm,
    paired_p,
    paired_verdicts,
    seeds_needed,
    steps_ratio,
    summarize,
    t_interval,
)

LOSSES = st.lists(st.none() | st.floats(0.1, 9), min_size=1, max_size=8)
FloatArray = NDArray[np.float64]
MANY = 2000  # simulated races; the standard error of a rate of 5% is then 0.5%


def verdicts_of(finals: Mapping[str, Mapping[int, float | None]]) -> tuple[Verdict, ...]:
    """Verdicts on losses that are exact for each seed."""
    return paired_verdicts({name: {seed: Ended(loss) for seed, loss in own.items()} for name, own in finals.items()})


def _t(draws: FloatArray) -> FloatArray:
    return draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(draws.shape[1]))


@pytest.fixture
def rng() -> Generator:
    return default_rng(20250131)


def test_summaries_of_none_one_and_several_values() -> None:
    assert summarize([]) is None
    one, three = summarize([2.0]), summarize([1.0, 2.0, 6.0])
    assert one is not None
    assert three is not None
    assert (one.mean, one.sd, one.n) == (2.0, None, 1)
    assert (three.mean, three.n) == (3.0, 3)
    assert three.sd == pytest.approx(math.sqrt(7))


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_and_p_value_are_scipys(n: int, rng: Generator) -> None:
    one, other = rng.normal(size=n), rng.normal(0.3, 1, size=n)
    result = stats.ttest_rel(one, other)
    interval = t_interval(list(one - other))
    assert interval is not None
    expected = result.confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert paired_p(list(one - other)) == pytest.approx(result.pvalue)


def test_differences_without_spread() -> None:
    assert paired_p([0.5]) is None
    assert paired_p([0.5, 0.5]) == 0
    assert paired_p([0.0, 0.0]) == 1


@given(losses=LOSSES, target=st.floats(0.1, 9))
def test_the_first_crossing_is_that_of_numpys_interpolation(losses: list[float | None], target: float) -> None:
    steps = list(range(0, 10 * len(losses), 10))
    values = [math.inf if loss is None else loss for loss in losses]
    found = first_crossing(steps, losses, target)
    reached = [i for i, value in enumerate(values) if value <= target]
    if not reached:
        assert found is None
        return
    first = reached[0]
    assert found is not None
    if first == 0 or math.isinf(values[first - 1]):
        assert found == steps[first]
        return
    expected = np.interp(target, values[first - 1 : first + 1][::-1], steps[first - 1 : first + 1][::-1])
    assert found == pytest.approx(float(expected))


def test_a_crossing_by_hand() -> None:
    assert first_crossing([0, 10, 20, 30], [5.0, 3.0, 2.0, 2.5], 2.25) == 17.5
    assert first_crossing([0, 10], [5.0, 3.0], 3.0) == 10
    assert first_crossing([0, 10], [5.0, 3.0], 2.9) is None


def test_ratio_by_hand() -> None:
    ratio = steps_ratio([(100, 50, 100), (100, 80, 100)])
    assert ratio is not None
    assert ratio.interval is not None
    assert ratio.value == pytest.approx(math.sqrt(0.4))
    assert math.sqrt(ratio.interval.low * ratio.interval.high) == pytest.approx(ratio.value)
    assert (ratio.n, ratio.censored) == (2, 0)


def test_a_seed_that_does_not_get_there_makes_the_ratio_a_bound() -> None:
    ratio = steps_ratio([(100, 50, 150), (100, None, 150)])
    assert ratio is not None
    assert ratio.value == pytest.approx(math.sqrt(0.5 * 1.5))
    assert (ratio.interval, ratio.n, ratio.censored) == (None, 2, 1)
    assert steps_ratio([]) is None


def test_one_seed_has_a_ratio_and_no_interval() -> None:
    ratio = steps_ratio([(100, 60, 100)])
    assert ratio is not None
    assert (round(ratio.value, 9), ratio.interval) == (0.6, None)


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_of_the_ratio_covers_the_truth(n: int, rng: Generator) -> None:
    truth, covered = 0.6, 0
    for noise in rng.normal(0, 0.1, size=(MANY, n)):
        ratio = steps_ratio([(150, 150 * truth * math.exp(e), 10_000) for e in noise])
        assert ratio is not None
        assert ratio.interval is not None
        covered += ratio.interval.low <= truth <= ratio.interval.high
    assert covered / MANY == pytest.approx(0.95, abs=0.015)  # three standard errors


@given(p_values=st.lists(st.floats(0, 1), max_size=6))
def test_holm_rejects_what_its_step_down_definition_rejects(p_values: list[float]) -> None:
    alpha = 0.05
    assume(all(abs(p * k - alpha) > 1e-9 for p in p_values for k in range(1, 7)))
    rejected: set[int] = set()
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] > alpha / (len(p_values) - rank):
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.02, 0.024, 0.9], [0.06, 0.06, 0.9]),  # 2 * 0.024 alone would decide a pair behind one that is not decided
        ([0.9, 0.024, 0.02], [0.9, 0.06, 0.06]),
        ([0.03, 0.04], [0.06, 0.06]),
    ],
)
def test_a_pair_is_never_decided_before_one_with_a_smaller_p(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


@pytest.mark.parametrize("effect", [0.4, -0.7, 1.3, 3.0])
def test_needed_seeds_give_the_power_and_one_less_does_not(effect: float, rng: Generator) -> None:
    n = seeds_needed(effect)
    assert n is not None
    # rejected share over simulated tests: at least 80% at n, less at n - 1; tolerance of three standard errors
    for seeds, expected in ((n, True), (n - 1, False)):
        if seeds >= 2:
            draws = rng.normal(effect, 1, size=(20_000, seeds))
            rejected = float(np.mean(np.abs(_t(draws)) > stats.t.ppf(0.975, seeds - 1)))
            assert rejected >= 0.8 - 0.0085 if expected else rejected < 0.8 + 0.0085


def test_no_number_of_seeds_finds_nothing() -> None:
    assert seeds_needed(0.0) is None
    assert seeds_needed(0.05) is None
    assert seeds_needed(50.0) == 2


def test_a_clear_difference_is_decided_in_both_directions() -> None:
    finals = {
        "adamw": {0: 1.70, 1: 1.72, 2: 1.71},
        "muon": {0: 1.60, 1: 1.61, 2: 1.61},
        "sgd": {0: 1.9, 1: 1.92, 2: 1.9},
    }
    verdicts = {(verdict.first, verdict.second): verdict for verdict in verdicts_of(finals)}
    assert {pair: verdict.outcome for pair, verdict in verdicts.items()} == {
        ("muon", "adamw"): "better",
        ("sgd", "adamw"): "worse",
        ("sgd", "muon"): "worse",
    }
    verdict = verdicts["muon", "adamw"]
    assert verdict.difference == pytest.approx(-0.31 / 3)
    assert verdict.n == 3
    assert verdict.more_seeds is None


def test_p_values_are_corrected_over_all_pairs_even_those_not_tested() -> None:
    two = {"adamw": {0: 1.70, 1: 1.72, 2: 1.71}, "muon": {0: 1.60, 1: 1.66, 2: 1.61}}
    [alone] = verdicts_of(two)
    with_untested = verdicts_of(two | {"late": {}})[0]
    assert alone.p is not None
    assert with_untested.p == pytest.approx(3 * alone.p)


def test_seeds_are_paired_by_name_and_not_by_place() -> None:
    [verdict] = verdicts_of({"adamw": {0: 1.0, 1: 2.0, 2: 3.0}, "muon": {2: 2.9, 0: 0.9, 1: 1.9, 7: 0.0}})
    assert verdict.n == 3
    assert verdict.difference == pytest.approx(-0.1)
    assert verdict.outcome == "better"


def test_one_seed_no_seed_and_diverged_seeds_are_undecided() -> None:
    one, none, diverged = (
        verdicts_of({"adamw": {0: 1.7, 1: 1.7}, "muon": finals})[0]
        for finals in ({0: 1.6}, {5: 1.6}, {0: 1.6, 1: None})
    )
    assert (one.outcome, one.n, one.p, one.interval, one.more_seeds) == ("undecided", 1, None, None, None)
    assert one.difference == pytest.approx(-0.1)
    assert (none.outcome, none.n, none.difference) == ("undecided", 0, None)
    assert (diverged.outcome, diverged.difference, diverged.diverged) == ("undecided", None, ("muon",))


def test_identical_runs_are_undecided_for_good() -> None:
    [verdict] = verdicts_of({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.0}})
    assert (verdict.outcome, verdict.p, verdict.difference, verdict.more_seeds) == ("undecided", 1.0, 0.0, None)


@given(
    finals=st.lists(
        st.lists(st.floats(1, 2), min_size=3, max_size=3).map(lambda values: dict(enumerate(values))),
        min_size=2,
        max_size=4,
    )
)
def test_an_undecided_pair_needs_at_least_one_more_seed(finals: list[dict[int, float]]) -> None:
    for verdict in verdicts_of({str(i): values for i, values in enumerate(finals)}):
        assert verdict.more_seeds is None or (verdict.more_seeds >= 1 and verdict.outcome == "undecided")


@pytest.mark.slow
@pytest.mark.parametrize(("methods", "seeds"), [(2, 2), (2, 5), (3, 3)])
def test_equal_methods_are_rarely_told_apart(methods: int, seeds: int, rng: Generator) -> None:
    """Family-wise error of at most 5%: over 1000 races, up to 7% is within three standard errors."""
    races = 1000
    draws = rng.normal(size=(races, methods, seeds)) + rng.normal(size=(races, 1, seeds))  # seeds shift all alike
    wrong = 0
    for race in draws:
        finals = {str(i): dict(enumerate(map(float, row))) for i, row in enumerate(race)}
        wrong += any(verdict.outcome != "undecided" for verdict in verdicts_of(finals))
    assert wrong / races <= 0.07


def test_a_true_difference_is_found_with_the_promised_power(rng: Generator) -> None:
    races, seeds = 1000, seeds_needed(1.5)
    assert seeds is not None
    found = 0
    for row in rng.normal(-1.5, 1, size=(races, seeds)):
        finals = {"base": dict.fromkeys(range(seeds), 0.0), "new": dict(enumerate(map(float, row)))}
        found += verdicts_of(finals)[0].outcome == "better"
    assert found / races >= 0.8 - 0.038  # three standard errors


SPREADS = (1.0, 4.0, 2.0)  # of a difference: from seed to seed, from block to block, and from both together


def _race(rng: Generator, seeds: int, *, spreads: tuple[float, ...] = SPREADS) -> dict[str, dict[int, Ended]]:
    """Two methods whose losses differ by a part of each seed, one of each of 32 blocks, and one of both."""
    of_seeds, of_blocks, of_both = spreads
    blocks = 32
    difference = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_blocks, (1, blocks))
    difference = difference + rng.normal(0, of_both, (seeds, blocks))
    shared = rng.normal(0, 10, (seeds, 1)) + rng.normal(0, 30, (1, blocks))

    def ended(losses: FloatArray) -> dict[int, Ended]:
        return {seed: Ended(float(row.mean()), tuple(map(float, row))) for seed, row in enumerate(losses)}

    return {"base": ended(shared), "new": ended(shared + difference)}


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_equal_methods_are_rarely_told_apart_by_the_examples_that_they_are_evaluated_on(
    seeds: int, rng: Generator
) -> None:
    """Counting seeds alone, the same races decide wrongly more than three times as often at eight seeds."""
    wrong = alone = 0
    for _ in range(MANY):
        race = _race(rng, seeds)
        wrong += paired_verdicts(race)[0].outcome != "undecided"
        losses = {name: {seed: run.loss for seed, run in own.items()} for name, own in race.items()}
        alone += verdicts_of(losses)[0].outcome != "undecided"
    assert wrong / MANY <= 0.05 + 0.015  # three standard errors
    if seeds == 8:
        assert alone / MANY > 0.15


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_few_seeds_whose_differences_spread_widely_decide_no_more_than_the_level_allows(
    seeds: int, rng: Generator
) -> None:
    """By Satterthwaite's degrees of freedom 12%, 8% and 6% of these races are decided, and more at lower levels."""
    wrong = 0
    for _ in range(MANY):
        race = _race(rng, seeds, spreads=(1.0, 1.7 / math.sqrt(seeds), 0.57))
        wrong += paired_verdicts(race)[0].outcome != "undecided"
    assert wrong / MANY <= 0.05 + 0.015  # three standard errors


def test_the_variance_of_seeds_and_of_blocks_add_up() -> None:
    [verdict] = paired_verdicts(
        {
            "a": {0: Ended(1.0, (0.5, 1.5, 1.0)), 1: Ended(1.0, (0.5, 1.5, 1.0))},
            "b": {0: Ended(0.8, (0.1, 1.3, 1.0)), 1: Ended(0.6, (0.1, 0.9, 0.8))},
        }
    )
    of_seeds = 0.2**2 / 2 / 2  # differences -0.2 and -0.4
    of_blocks = float(np.var([-0.4, -0.4, -0.1], ddof=1)) / 3
    freedom = 1  # of two seeds, which are fewer than the blocks
    half = stats.t.ppf(0.975, freedom) * math.sqrt(of_seeds + of_blocks)
    assert verdict.sampling == pytest.approx(math.sqrt(of_blocks))
    assert verdict.interval is not None
    assert (verdict.interval.low, verdict.interval.high) == pytest.approx((-0.3 - half, -0.3 + half))
    assert verdict.p == pytest.approx(2 * stats.t.sf(0.3 / math.sqrt(of_seeds + of_blocks), freedom))


def test_blocks_that_were_not_recorded_or_are_others_are_said_to_be_unknown() -> None:
    known, fewer, unknown = Ended(1.0, (0.9, 1.1)), Ended(1.0, (0.9, 1.0, 1.1)), Ended(1.0, None)
    for other in (fewer, unknown):
        assert paired_verdicts({"a": {0: known, 1: known}, "b": {0: other, 1: other}})[0].sampling is None
    assert paired_verdicts({"a": {0: known, 1: known}, "b": {0: known, 1: known}})[0].sampling == 0


def test_more_seeds_do_not_help_against_what_the_examples_leave_open(rng: Generator) -> None:
    assert seeds_needed(1.0, sampling=1.0, blocks=32) is None
    n = seeds_needed(1.5, sampling=0.3, blocks=32)
    assert n is not None
    assert n > (seeds_needed(1.5) or 0)
    found = 0
    for _ in range(MANY):
        of_seeds, of_blocks = rng.normal(1.5, 1, n), rng.normal(0, 0.3 * math.sqrt(32), 32)
        shift = float(of_blocks.mean())
        p = paired_p(list(of_seeds + shift), list(of_blocks + float(of_seeds.mean())))
        found += p is not None and p <= 0.05
    assert found / MANY >= 0.8 - 0.027  # three standard errors
