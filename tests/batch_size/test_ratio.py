"""Ratios of means: known cases, coverage of the intervals, and honest answers where there is no signal."""

import math

import pytest
import torch
from scipy import stats

from steepest.batch_size.ratio import Ratio, batch_for, block_length, ratio_of_means, student_quantile
from tests.cases import cases

F64 = torch.float64


def autoregression(count, phi, generator, width=1):
    noise = torch.randn(count, width, generator=generator, dtype=F64)
    series = [noise[0] / (1 - phi**2) ** 0.5]
    for shock in noise[1:]:
        series.append(phi * series[-1] + shock)
    return torch.stack(series).squeeze(-1)


@cases("freedom", [1, 2, 3, 4, 7, 30, 101, 5000])
@cases("probability", [0.6, 0.95, 0.995])
def test_quantiles_are_those_of_student(freedom, probability):
    tolerance = 1e-9 if freedom <= 1000 else 1e-3
    assert math.isclose(student_quantile(probability, freedom), stats.t.ppf(probability, freedom), rel_tol=tolerance)


def test_fieller_against_the_definition(rng):
    """The ends are where the mean of numerator - ρ denominator is exactly significant."""
    a, d = 3 + torch.randn(40, generator=rng, dtype=F64), 1 + 0.5 * torch.randn(40, generator=rng, dtype=F64)
    ratio = ratio_of_means(a, d, level=0.8, block=1)
    assert ratio.low < ratio.value < ratio.high
    assert ratio.value == pytest.approx(float(a.mean() / d.mean()))
    for end in (ratio.low, ratio.high):
        assert stats.ttest_1samp((a - end * d).numpy(), 0.0).pvalue == pytest.approx(0.2, rel=1e-9)


def test_an_unbounded_interval_keeps_its_lower_end(rng):
    a, d = 10 + 0.1 * torch.randn(30, generator=rng, dtype=F64), torch.randn(30, generator=rng, dtype=F64)
    d = d - d.mean() + 0.1
    ratio = ratio_of_means(a, d, block=1)
    assert ratio.status == "unbounded"
    assert math.isinf(ratio.high)
    assert "signal not told from noise" in ratio.remedy
    assert stats.ttest_1samp((a - ratio.low * d).numpy(), 0.0).pvalue == pytest.approx(0.1, rel=1e-9)


def test_a_denominator_with_a_negative_mean_has_an_infinite_ratio(rng):
    a, d = torch.ones(30, dtype=F64), torch.randn(30, generator=rng, dtype=F64)
    d = d - d.mean() - 0.1
    ratio = ratio_of_means(a, d)
    assert (ratio.value, ratio.high, ratio.status) == (math.inf, math.inf, "unbounded")
    surely = ratio_of_means(a, d - 100)
    assert (surely.value, surely.low, surely.high, surely.status) == (math.inf, 0.0, math.inf, "unbounded")


def test_neither_part_significant_leaves_everything_open(rng):
    a, d = torch.randn(2, 30, generator=rng, dtype=F64)
    ratio = ratio_of_means(a - a.mean() + 0.01, d - d.mean() + 0.01)
    assert (ratio.low, ratio.high, ratio.status) == (0.0, math.inf, "unbounded")


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_measurements_have_a_value_and_no_interval(count):
    ratio = ratio_of_means(torch.full((count,), 6.0), torch.full((count,), 2.0))
    assert ratio == Ratio(3.0, 0.0, math.inf, "unknown")
    assert "fewer than 3 measurements" in ratio.remedy


def test_nothing_at_all_is_no_signal():
    ratio = ratio_of_means(torch.zeros(5), torch.zeros(5))
    assert math.isnan(ratio.value)
    assert ratio.remedy == "no gradient was seen"


def test_squares_square_the_ends():
    assert Ratio(2.0, 1.0, 3.0, "bounded").squared() == Ratio(4.0, 1.0, 9.0, "bounded")


@pytest.mark.parametrize("phi", [0.0, 0.5])
@pytest.mark.parametrize("mean", [1.0, 0.4])
def test_coverage(phi, mean):
    """400 series of 64 measurements, signal noise of size 1, neighbours correlated or not; 0.9 is asked for.

    A difference of 0.05 from 0.9 is 3.3 standard errors. Blocks of 8 out of 64 keep some correlation: 0.83 is allowed.
    """
    rng, hits, bounded = torch.Generator().manual_seed(17), 0, 0
    repeats = 400
    both = autoregression(64, phi, rng, width=2 * repeats).view(64, 2, repeats) * (1 - phi**2) ** 0.5
    for noise, other in zip(both[:, 0].T, both[:, 1].T, strict=True):
        ratio = ratio_of_means(5 + 0.1 * other, mean + noise)
        hits += ratio.low <= 5 / mean <= ratio.high
        bounded += ratio.status == "bounded"
    assert (0.85 if phi == 0 else 0.83) <= hits / repeats <= 0.96
    assert 0.2 * repeats < bounded  # a statement, not "anything"


def test_coverage_is_lost_when_correlation_is_ignored():
    """What blocks are for."""
    rng, hits = torch.Generator().manual_seed(18), 0
    for _ in range(200):
        ratio = ratio_of_means(torch.full((64,), 5.0), 3 + autoregression(64, 0.7, rng), block=1)
        hits += ratio.low <= 5 / 3 <= ratio.high
    assert hits / 200 < 0.75


def test_blocks_grow_with_correlation_and_length():
    rng = torch.Generator().manual_seed(5)
    white = torch.randn(4000, generator=rng, dtype=F64)
    assert block_length(white) <= 3
    short, long = autoregression(400, 0.8, rng), autoregression(6400, 0.8, rng)
    assert 10 <= block_length(short) <= 25  # (1.6 / 0.36)^(2/3) 400^(1/3) = 20
    assert 40 <= block_length(long) <= 60  # 50
    assert block_length(white[:7]) == 1
    assert block_length(torch.ones(100)) == 1
    assert block_length(torch.arange(80.0)) == 10  # a trend: as few blocks as there may be


def test_the_batch_for_a_share_is_read_off_a_known_curve(rng):
    """A(b) = b / (b + 4) at 1, 2, 4, ..., 64: 0.7 of A(64) lies at 7.7; interpolation is over log b."""
    batches = [2.0**k for k in range(7)]
    curve = torch.tensor([b / (b + 4) for b in batches], dtype=F64)
    curves = curve + 0.02 * torch.randn(60, 7, generator=rng, dtype=F64)
    ratio = batch_for(curves, batches, kappa=0.7, level=0.99)
    assert ratio.status == "bounded"
    assert ratio.low < 7.7 < ratio.high
    assert ratio.high / ratio.low < 1.2
    exact = batch_for(curve.expand(1, 7), batches, kappa=0.7)
    assert exact.status == "unknown"
    assert exact.value == pytest.approx(7.72, rel=0.02)


@pytest.mark.parametrize("count", [3, 5, 8, 64])
def test_coverage_of_the_batch_for_a_share(count):
    """400 sets of curves b / (b + 2) with independent noise; 0.9 is asked for.

    0.85 is 3.3 standard errors below, and a coverage of 0.82 fails in 95 of 100 cases.
    """
    rng, batches = torch.Generator().manual_seed(19), [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 63.0]
    curve = torch.tensor([b / (b + 2) for b in batches], dtype=F64)
    truth, hits, repeats = batch_for(curve.expand(1, 7), batches, kappa=0.8).value, 0, 400
    for noise in torch.randn(repeats, count, 7, generator=rng, dtype=F64):
        ratio = batch_for(curve + 0.03 * noise, batches, kappa=0.8)
        assert ratio.status == "bounded"  # a statement, not "anything"
        hits += ratio.low <= truth <= ratio.high
    assert 0.85 <= hits / repeats <= 0.95


def test_the_ends_are_where_students_test_is_significant(rng):
    batches = [1.0, 2.0, 4.0, 8.0, 16.0]
    curve = torch.tensor([0.2, 0.5, 0.7, 0.9, 1.0], dtype=F64)
    curves = curve + 0.1 * torch.randn(12, 5, generator=rng, dtype=F64)
    ratio = batch_for(curves, batches, kappa=0.75, level=0.8)
    assert ratio.status == "bounded"
    for end in (ratio.low, ratio.high):
        place = next(i for i in range(4) if batches[i] <= end <= batches[i + 1])
        share = math.log2(end / batches[place])
        own = curves[:, place] * (1 - share) + curves[:, place + 1] * share
        assert stats.ttest_1samp((own - 0.75 * curves[:, -1]).numpy(), 0.0).pvalue == pytest.approx(0.2, rel=1e-6)


def test_curves_that_do_not_tell():
    flat = torch.ones(10, 3)
    at_most = batch_for(flat, [1.0, 2.0, 4.0])
    assert (at_most.value, at_most.low, at_most.high, at_most.status) == (1.0, 0.0, 1.0, "at most")
    noise = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    assert batch_for(noise - noise.mean(0), [1.0, 2.0, 4.0]).status == "not aligned"
    assert batch_for(torch.zeros(10, 3), [1.0, 2.0, 4.0]).status == "no signal"
    assert batch_for(torch.ones(10, 1), [1.0]).status == "one size"


def test_a_curve_that_still_rises_gives_a_lower_end(rng):
    """A straight line: 0.9 of A(8) lies at 7.2, beyond the last batch but one, and would move with the largest."""
    batches = [1.0, 2.0, 4.0, 8.0]
    curves = torch.tensor(batches) + 0.01 * torch.randn(20, 4, generator=rng)
    ratio = batch_for(curves, batches)
    assert ratio.status == "at least"
    assert 4 < ratio.low < ratio.value < 8
    assert math.isinf(ratio.high)


@cases(
    "call, message",
    [
        (lambda: ratio_of_means(torch.ones(2), torch.ones(3)), r"shapes \(2,\) and \(3,\)"),
        (lambda: ratio_of_means(torch.ones(0), torch.ones(0)), "n >= 1"),
        (lambda: ratio_of_means(torch.ones(3), torch.ones(3), level=1.0), "level=1.0"),
        (lambda: ratio_of_means(torch.ones(3), torch.ones(3), block=0), "block=0"),
        (lambda: batch_for(torch.ones(3, 2), [1.0]), r"curves \(n, 1\)"),
        (lambda: batch_for(torch.ones(3, 2), [1.0, 2.0], kappa=1.0), "kappa=1.0"),
        (lambda: student_quantile(0.5, 3), "0.5 < probability < 1"),
    ],
)
def test_errors_say_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
