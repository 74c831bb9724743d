"""Noise scales of gradients whose mean and covariance are known."""

import math

import pytest
import torch

from steepest.batch_size.estimators import alignment, euclidean, l1, nested_sizes, nuclear
from steepest.linalg import polar

F64 = torch.float64


def equal(count, samples):
    return torch.full((count,), float(samples), dtype=F64)


def averages(estimate, repeats):
    """Mean and standard error of rows of numbers."""
    rows = torch.stack([torch.stack([part.reshape(()) for part in estimate()]) for _ in range(repeats)])
    return rows.mean(0), rows.std(0) / repeats**0.5, rows


class TestEuclidean:
    """60 dimensions, 8 micro-batches of 4 samples, covariance and gradient fixed: moments are known in closed form."""

    d, count, per = 60, 8, 4
    repeats = 8000

    @pytest.fixture(scope="class")
    @staticmethod
    def problem():
        rng = torch.Generator().manual_seed(3)
        root = torch.randn(60, 60, generator=rng, dtype=F64) / 60**0.5
        root = root * torch.linspace(0.2, 2.0, 60, dtype=F64)
        gradient = torch.randn(60, generator=rng, dtype=F64)
        return root, gradient * 2 / gradient.norm()

    def drawn(self, problem, count=8, per=4):
        root, gradient = problem
        noise = torch.randn(self.repeats, count, self.d, generator=torch.Generator().manual_seed(4), dtype=F64)
        return gradient + noise @ root.mT / per**0.5

    def moments(self, problem):
        root, gradient = problem
        sigma = root @ root.mT
        return sigma.trace(), gradient.square().sum(), (sigma @ sigma).trace(), gradient @ sigma @ gradient

    def test_both_parts_are_unbiased_with_the_variances_of_theory(self, problem):
        pairs = [euclidean(g, equal(8, 4)) for g in self.drawn(problem)]
        noise, signal = (torch.stack(part) for part in zip(*pairs, strict=True))
        trace, square, trace_of_square, along = self.moments(problem)
        batch = self.count * self.per
        for values, mean, variance in (
            (noise, trace, 2 * trace_of_square / (self.count - 1)),
            (signal, square, 4 * along / batch + 2 * trace_of_square / batch**2 * self.count / (self.count - 1)),
        ):
            assert abs(values.mean() - mean) < 4 * (variance / self.repeats) ** 0.5
            assert abs(values.var() / variance - 1) < 0.1  # 5 standard errors of a variance of 8000 values

    def test_the_signal_is_not_clamped(self, problem):
        signals = torch.stack([euclidean(g - problem[1], equal(8, 4)).signal for g in self.drawn(problem)[:500]])
        assert 0.3 < (signals < 0).double().mean() < 0.7  # no signal at all: zero in the mean

    def test_the_ratio_of_means_beats_the_mean_of_ratios(self, problem):
        gradients = self.drawn(problem) + 2 * problem[1]  # |G| = 6, so that no denominator is near zero
        pairs = torch.stack([torch.stack(euclidean(g, equal(8, 4))) for g in gradients])
        truth = self.moments(problem)[0] / 36
        of_means = pairs[:, 0].mean() / pairs[:, 1].mean()
        of_ratios = (pairs[:, 0] / pairs[:, 1]).mean()
        assert abs(of_means - truth) < 0.2 * abs(of_ratios - truth)

    @pytest.mark.slow
    @pytest.mark.parametrize("count", [2, 4, 16])
    def test_the_mean_does_not_depend_on_how_the_batch_is_cut(self, problem, count):
        pairs = [euclidean(g, equal(count, 32 / count)) for g in self.drawn(problem, count, 32 / count)]
        noise, signal = (torch.stack(part) for part in zip(*pairs, strict=True))
        trace, square, *_ = self.moments(problem)
        assert abs(noise.mean() - trace) < 4 * noise.std() / self.repeats**0.5
        assert abs(signal.mean() - square) < 4 * signal.std() / self.repeats**0.5

    def test_unequal_micro_batches_are_unbiased_too(self, problem):
        samples = torch.tensor([1.0, 2, 5, 8], dtype=F64)
        root, gradient = problem
        noise = torch.randn(self.repeats, 4, 60, generator=torch.Generator().manual_seed(5), dtype=F64) @ root.mT
        pairs = [euclidean(g, samples) for g in gradient + noise / samples.sqrt().view(-1, 1)]
        for part, truth in zip(zip(*pairs, strict=True), self.moments(problem)[:2], strict=True):
            values = torch.stack(part)
            assert abs(values.mean() - truth) < 4 * values.std() / self.repeats**0.5


@pytest.mark.parametrize("estimate", [euclidean, l1, nuclear])
def test_scales_do_not_change_with_the_gradients_unit_and_grow_with_the_samples(estimate, rng):
    g = 1 + torch.randn(6, 5, 7, generator=rng, dtype=F64)
    power = 2 if estimate is euclidean else 1
    one, scaled, more = estimate(g, equal(6, 2)), estimate(g * 3, equal(6, 2)), estimate(g, equal(6, 8))
    for part, other in zip(one, scaled, strict=True):
        torch.testing.assert_close(other, part * 3**power, rtol=1e-12, atol=0)
    torch.testing.assert_close((more[0] / one[0]) ** (2 / power), torch.tensor(4.0, dtype=F64))
    for part, other in zip(one[1:3], more[1:3], strict=True):
        torch.testing.assert_close(other, part, rtol=1e-12, atol=0)  # the signal is the mean's, whatever b counts


def test_the_euclidean_parts_of_layers_add_up(rng):
    g = torch.randn(5, 30, generator=rng, dtype=F64)
    whole = torch.stack(euclidean(g, equal(5, 3)))
    parts = sum(torch.stack(euclidean(part, equal(5, 3))) for part in g.split([7, 3, 20], dim=1))
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [2, 8])
def test_l1_noise_is_unbiased_for_gaussians_and_the_signals_err_on_their_sides(count, rng):
    sigma = torch.linspace(0.5, 2, 50, dtype=F64)
    gradient = torch.linspace(-1, 1, 50, dtype=F64)

    def estimate():
        return l1(gradient + sigma * torch.randn(count, 50, generator=rng, dtype=F64) / 2, equal(count, 4))

    mean, error, _ = averages(estimate, 1500)
    assert abs(mean[0] - sigma.sum()) < 4 * error[0]
    assert mean[1] > gradient.abs().sum() + 4 * error[1]
    assert mean[2] < gradient.abs().sum() - 4 * error[2]


def test_of_sparse_noise_few_micro_batches_show_little_and_say_so(rng):
    """One entry in a hundred is ±1: deviations of 0.1."""
    for count, per, share, rise in ((4, 1, 0.20, 1.2), (8, 8, 0.70, 1.2), (8, 400, 1.0, 1.0)):
        seen = torch.rand(count, per, 4000, generator=rng, dtype=F64)
        g = ((seen < 0.005).double() - (seen > 0.995).double()).mean(1)
        found = l1(g, equal(count, per))
        assert abs(found.noise / 400 - share) < 0.04
        assert abs(found.noise / found.half - rise) < 0.07


@pytest.mark.parametrize("estimate", [l1, nuclear])
def test_halves_are_both_halves_and_none_below_four(estimate, rng):
    g, samples = torch.randn(5, 4, 6, generator=rng, dtype=F64), torch.arange(1.0, 6.0, dtype=F64)
    halves = [estimate(g[part], samples[part]).noise for part in (slice(2), slice(3, 5))]
    torch.testing.assert_close(estimate(g, samples).half, (halves[0] + halves[1]) / 2)
    assert estimate(g[:3], samples[:3]).half == 0


def signal(m=16, n=32, rank=4, scale=24.1):
    """Rank 4 with the nuclear norm at which independent unit noise has the scale 24.1."""
    rng = torch.Generator().manual_seed(0)
    g = torch.randn(m, rank, generator=rng, dtype=F64) @ torch.randn(rank, n, generator=rng, dtype=F64)
    return g * m * n**0.5 / scale**0.5 / torch.linalg.matrix_norm(g, ord="nuc")


def noisy(gradient, count, per, rng):
    return gradient + torch.randn(count, *gradient.shape, generator=rng, dtype=F64) / per**0.5


class TestNuclear:
    def test_noise_is_that_of_the_short_side(self, rng):
        wide = torch.randn(64, 16, 64, generator=rng, dtype=F64)
        noise = nuclear(wide, equal(64, 1)).noise
        assert abs(noise / (16 * 64**0.5) - 1) < 0.01  # 128; the long side has 256
        torch.testing.assert_close(nuclear(wide.mT, equal(64, 1)).noise, noise)

    @pytest.mark.slow
    def test_noise_is_the_root_of_an_unbiased_covariance(self, rng):
        left = torch.randn(6, 6, generator=rng, dtype=F64)
        g = left @ torch.randn(2000, 6, 9, generator=rng, dtype=F64)
        expected = torch.linalg.eigvalsh(9 * left @ left.mT).sqrt().sum()
        assert abs(nuclear(g, equal(2000, 1)).noise / expected - 1) < 0.01
        rows = left[:1] @ torch.randn(4000, 6, 9, generator=rng, dtype=F64)  # m = 1: the root of a trace
        squares = torch.stack([nuclear(pair, equal(2, 1)).noise.square() for pair in rows.view(2000, 2, 1, 9)])
        assert abs(squares.mean() / (9 * left[0].square().sum()) - 1) < 4 * (2 / 9 / 2000) ** 0.5  # divided by R: half

    @pytest.mark.parametrize(
        ("shape", "per", "count", "share"), [((64, 64), 1, 2, 0.17), ((64, 64), 8, 2, 0.47), ((256, 256), 8, 4, 0.35)]
    )
    def test_of_noise_of_low_rank_few_micro_batches_show_little_and_say_so(self, shape, per, count, share, rng):
        """Products u vᵀ of one sample each, whose noise is m √n."""
        (m, n), samples = shape, equal(count, per)
        u, v = (torch.randn(count, per, size, generator=rng, dtype=F64) for size in shape)
        found = nuclear(torch.einsum("rbm,rbn->rmn", u, v) / per, samples)
        assert abs(found.noise / (m * n**0.5) - share) < 0.05
        assert found.noise > 1.3 * found.half

    def test_of_noise_of_full_rank_half_of_the_micro_batches_show_nearly_as_much(self, rng):
        found = nuclear(torch.randn(8, 16, 32, generator=rng, dtype=F64), equal(8, 1))
        assert 1 < found.noise / found.half < 1.05
        assert abs(found.noise / (16 * 32**0.5) - 1) < 0.05

    def test_noise_bounds_the_nuclear_norm_of_a_batchs_noise(self, rng):
        g = torch.randn(400, 10, 14, generator=rng, dtype=F64) * torch.linspace(0.1, 3, 10, dtype=F64).view(-1, 1)
        scale = nuclear(g, equal(400, 1)).noise
        for batch in (1, 4):
            sums = g.view(-1, batch, 10, 14).mean(1)
            assert torch.linalg.matrix_norm(sums, ord="nuc").mean() <= scale / batch**0.5

    def test_orthogonal_changes_of_coordinates_change_nothing(self, rng):
        g = torch.randn(5, 6, 9, generator=rng, dtype=F64) + 1
        q = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=F64)).Q
        p = torch.linalg.qr(torch.randn(9, 9, generator=rng, dtype=F64)).Q
        for part, other in zip(nuclear(g, equal(5, 2)), nuclear(q @ g @ p, equal(5, 2)), strict=True):
            torch.testing.assert_close(part, other, rtol=1e-9, atol=0)

    def test_batches_of_matrices_are_matrices_one_by_one(self, rng):
        g = torch.randn(4, 3, 6, 5, generator=rng, dtype=F64)
        together = nuclear(g, equal(4, 2))
        for place in range(3):
            for part, own in zip(together, nuclear(g[:, place], equal(4, 2)), strict=True):
                torch.testing.assert_close(part[place], own)

    def test_the_scale_is_bracketed_and_closes_in_with_the_batch(self, rng):
        """Plug-in 9 and 18, as measured elsewhere, where the truth is 24.1; the crossed one is above."""
        gradient = signal()
        scales = []
        for per in (4, 64):  # batches of 32 and 512
            mean, *_ = averages(lambda per=per: nuclear(noisy(gradient, 8, per, rng), equal(8, per)), 100)
            assert mean[0] < 1.03 * mean[3]  # of which the upper end may be trusted
            scales.append(((mean[0] / mean[1]) ** 2, (mean[0] / mean[2]) ** 2))
        (plug_small, crossed_small), (plug_large, crossed_large) = scales
        assert abs(plug_small - 9.2) < 0.5
        assert abs(plug_large - 18.0) < 0.5
        assert plug_small < plug_large < 24.1
        assert crossed_small > crossed_large > 24.1 * 0.98**2  # 1% of noise is lost to the root's concavity
        assert abs(crossed_large - 24.1) < 0.1 * 24.1


def exact(x):
    return polar(x, method="svd")


class TestAlignment:
    def share(self, gradient, per, rng, repeats=2000):
        g = noisy(gradient, repeats, per, rng)
        return (exact(g) * gradient).sum((-2, -1)) / torch.linalg.matrix_norm(gradient, ord="nuc")

    def test_the_rank_four_signal(self, rng):
        """0.837, 0.985 and 0.999 at batches of 4, 64 and 1024; and crossing finds them from the gradients alone."""
        gradient = signal()
        norm = torch.linalg.matrix_norm(gradient, ord="nuc")
        for per, expected in ((4, 0.837), (64, 0.985), (1024, 0.999)):
            truth = self.share(gradient, per, rng)
            assert abs(truth.mean() - expected) < 0.003
            crossed = torch.stack(
                [alignment(noisy(gradient, 8, per, rng), equal(8, per), exact, (1,))[0] / norm for _ in range(200)]
            )
            error = (crossed.var() / 200 + truth.var() / 2000) ** 0.5
            assert abs(crossed.mean() - truth.mean()) < 3 * error

    @pytest.mark.slow
    def test_every_size_is_unbiased_and_larger_batches_align_better(self, rng):
        gradient, sizes = signal(8, 12, 2, 60.0), nested_sizes(8)
        found = torch.stack([alignment(noisy(gradient, 8, 4, rng), equal(8, 4), exact, sizes) for _ in range(500)])
        norm, noise = torch.linalg.matrix_norm(gradient, ord="nuc"), 8 * 12**0.5
        means, errors = found.mean(0), found.std(0) / 500**0.5
        for size, mean, error in zip(sizes, means, errors, strict=True):
            truth = self.share(gradient, 4 * size, rng) * norm
            assert abs(mean - truth.mean()) < 3 * (error**2 + truth.var() / 2000) ** 0.5
            assert norm - noise / (4 * size) ** 0.5 <= mean + 3 * error
            assert mean - 3 * error <= norm
        assert (means.diff() > 0).all()

    def test_a_linear_direction_gives_the_unbiased_square_at_every_size(self, rng):
        g = torch.randn(6, 20, generator=rng, dtype=F64)
        samples = torch.tensor([1.0, 3, 2, 2, 5, 1], dtype=F64)
        products = g @ g.mT
        pairs = products.sum() - products.trace()
        one = alignment(g, torch.ones(6, dtype=F64), lambda x: x, (1, 5))
        torch.testing.assert_close(one, (pairs / 30).expand(2))
        left_out = [
            g[j] @ (samples @ g - samples[j] * g[j]) / (samples.sum() - samples[j]) for j in range(6)
        ]  # each against the weighted mean of the others
        torch.testing.assert_close(alignment(g, samples, lambda x: x, (1,))[0], torch.stack(left_out).mean())

    def test_directions_see_means_of_groups(self, rng):
        g = torch.randn(5, 3, generator=rng, dtype=F64)
        seen = []
        alignment(g, equal(5, 1), lambda x: seen.append(x) or x, (2,))
        torch.testing.assert_close(seen[0], torch.stack([g[:2].mean(0), g[2:4].mean(0)]))


def test_sizes():
    assert nested_sizes(2) == (1,)
    assert nested_sizes(3) == (1, 2)
    assert nested_sizes(8) == (1, 2, 4, 7)


@pytest.mark.parametrize("estimate", [euclidean, l1, nuclear])
def test_one_micro_batch_is_refused(estimate):
    with pytest.raises(ValueError, match=r"R >= 2 are needed, got shape \(1, 2, 2\). Split the batch"):
        estimate(torch.ones(1, 2, 2), torch.ones(1))


@pytest.mark.parametrize("samples", [torch.ones(3), torch.tensor([1.0, 0.0])])
def test_samples_that_do_not_fit_are_refused(samples):
    with pytest.raises(ValueError, match="one positive number for each of 2 gradients"):
        euclidean(torch.ones(2, 3), samples)


def test_vectors_have_no_nuclear_scale():
    with pytest.raises(ValueError, match=r"takes matrices \(R, \*batch, m, n\), got shape \(2, 3\). Try l1"):
        nuclear(torch.ones(2, 3), torch.ones(2))


@pytest.mark.parametrize("size", [0, 4])
def test_sizes_out_of_range_are_refused(size):
    with pytest.raises(ValueError, match=f"of 4 micro-batches takes sizes from 1 to 3, got {size}"):
        alignment(torch.ones(4, 2), torch.ones(4), torch.sign, (size,))


def test_the_correction_of_few_values_is_the_known_one():
    g = torch.tensor([[0.0], [2.0]], dtype=F64)  # one deviation of √2, times √(π/2)
    assert math.isclose(l1(g, equal(2, 1)).noise, math.sqrt(2) * math.sqrt(math.pi / 2), rel_tol=1e-12)


def test_newton_schulz_serves_for_the_crossed_signal(rng):
    g = noisy(signal(), 6, 8, rng)
    for part, other in zip(nuclear(g, equal(6, 8)), nuclear(g, equal(6, 8), method="auto"), strict=True):
        torch.testing.assert_close(other, part, rtol=2e-3, atol=0)
