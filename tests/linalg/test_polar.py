import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.linalg import COEFFICIENTS, flops, get_coefficients, minimax, polar, polars
from steepest.linalg.plan import Iteration
from tests.cases import cases
from tests.linalg.counting import Products

TOO_WIDE = ["nonic", "cans"]  # for half precision
POLYNOMIAL = ["newton-schulz", "gram", "auto"]
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 7), (7, 3), (16, 16), (4, 6, 6), (2, 3, 8, 2), (3, 12, 40)]


def spectral_oracle(g: torch.Tensor, name: str) -> torch.Tensor:
    """U p(s / ‖G‖) Vᵀ from a float64 SVD: what an iteration in exact arithmetic returns."""
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return (u * COEFFICIENTS[name](s / norm_of(s, name)).unsqueeze(-2)) @ vh


def norm_of(singular_values: torch.Tensor, name: str) -> torch.Tensor:
    order = {"frobenius": 2, "schatten8": 8}[get_coefficients(name).norm]
    return torch.linalg.vector_norm(singular_values, ord=order, dim=-1, keepdim=True)


@cases("method", POLYNOMIAL)
@cases("name", ["nonic", "jordan", "polar_express", "cans", "cubic12"])
@cases("shape", SHAPES)
def test_it_is_the_scalar_map_on_the_singular_values(method, name, shape, rng):
    g = torch.randn(shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        polar(g, method=method, coefficients=name),
        spectral_oracle(g, name),
        rtol=0,
        atol=1e-9,
    )


@cases("shape", SHAPES)
def test_svd_is_orthogonal_and_attains_the_nuclear_norm(shape, rng):
    g = torch.randn(shape, generator=rng, dtype=torch.float64)
    factor = polar(g, method="svd")
    wide = factor.mT if g.size(-2) > g.size(-1) else factor
    eye = torch.eye(wide.size(-2), dtype=torch.float64).expand(*wide.shape[:-1], wide.size(-2))
    torch.testing.assert_close(wide @ wide.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close((g * factor).sum((-2, -1)), torch.linalg.matrix_norm(g, ord="nuc"))


# float32 carries 24 bits, bfloat16 8; five steps multiply a rounding error by up to the map's slope on small singular
# values, so the bound is on how far the image's singular values leave the certified interval.
@cases("method", ["newton-schulz", "gram"])
@cases(
    "name, dtype, margin",
    [
        ("nonic", torch.float32, 1e-4),
        ("polar_express", torch.float32, 1e-4),
        ("polar_express", torch.bfloat16, 0.06),
    ],
)
@cases("shape", [(64, 64), (64, 256), (256, 96)])
def test_low_precision_stays_in_the_certified_interval(name, method, dtype, margin, shape, rng):
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=rng, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=rng, dtype=torch.float64))
    spectrum = torch.logspace(-1.5, 0, min(shape), dtype=torch.float64)
    g = (u * spectrum) @ v.mT
    lower = float(spectrum.min() / norm_of(spectrum, name))
    low, high = COEFFICIENTS[name].certify(lower).image
    values = torch.linalg.svdvals(polar(g.float(), method=method, coefficients=name, dtype=dtype).double())
    assert values.min() >= low - margin
    assert values.max() <= high + margin


def spectra(rows):
    """Spectra that stress the Gram form: spread over decades, one spike, half of the rank, a spike over noise."""
    ones = torch.ones(rows, dtype=torch.float64)
    index = torch.arange(rows)
    yield from (torch.logspace(-decades, 0, rows, dtype=torch.float64) for decades in (2, 3, 4, 6))
    yield torch.where(index == 0, 1.0, 1e-3 * ones)
    yield torch.where(index < rows // 2, ones, 0.0)
    yield torch.where(index == 0, 1.0, 1e-5 * ones)


@cases(
    "name, dtype",
    [
        (name, dtype)
        for name in [*COEFFICIENTS, "eight of jordan", "minimax(1e-5, 8)"]
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        if dtype == torch.float32 or name not in TOO_WIDE
    ],
)
def test_the_gram_form_stays_in_the_certified_interval(name, dtype, rng):
    named = {"eight of jordan": COEFFICIENTS["jordan"].steps[:1] * 8, "minimax(1e-5, 8)": minimax(1e-5, 8)}
    chosen = named.get(name, name)
    for spectrum in spectra(48):
        u, _ = torch.linalg.qr(torch.randn(48, 48, generator=rng, dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(160, 48, generator=rng, dtype=torch.float64))
        g = ((u * spectrum) @ v.mT).float()
        largest = torch.linalg.matrix_norm(polar(g, method="gram", coefficients=chosen, dtype=dtype).double(), ord=2)
        # the margin is for half precision; where the Gram form diverges it does so by orders of magnitude
        assert largest <= get_coefficients(chosen).certify(1e-7).image[1] + 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_svd_keeps_every_direction_of_a_rounded_matrix(dtype, rng):
    g = torch.randn(256, 256, generator=rng).to(dtype)
    u, _, vh = torch.linalg.svd(g.double())
    torch.testing.assert_close(polar(g, method="svd").double(), u @ vh, rtol=0, atol=torch.finfo(dtype).eps)


def test_the_memory_cap_is_kept(monkeypatch, rng):
    sizes = []
    real = Iteration.run
    monkeypatch.setattr(
        Iteration, "run", lambda self, jobs: sizes.append([len(job.source) for job in jobs]) or real(self, jobs)
    )
    g = torch.randn(10, 8, 8, generator=rng)
    one = (2 * 64 + 5 * 64) * 4
    polar(g, method="newton-schulz", memory_cap=3 * one)
    assert sizes == [[3], [3], [3], [1]]
    sizes.clear()
    polar(g, method="newton-schulz", memory_cap=1)  # one matrix is never split
    assert sizes == [[1]] * 10
    sizes.clear()
    polars([g[:2], g[2:].mT], method="newton-schulz", memory_cap=5 * one)
    assert sizes == [[2, 3], [5]]


@cases("method", ["svd", *POLYNOMIAL])
@cases("scale", [1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e37])
def test_scale_does_not_matter(method, scale, rng):
    g = torch.randn(2, 5, 9, generator=rng)
    torch.testing.assert_close(polar(g * scale, method=method), polar(g, method=method), rtol=0, atol=2e-4)


@cases("method", ["svd", *POLYNOMIAL])
@cases("rows", [5, 200])
@cases("scale", [1e-38, 1e-40, 1e-44])
def test_subnormal_numbers_stay_numbers(method, rows, scale, rng):
    g = torch.randn(rows, 2 * rows, generator=rng) * scale
    assert polar(g, method=method).isfinite().all()


@pytest.mark.parametrize("rows", [40, 200])
def test_autocast_does_not_reach_the_products(rows, rng):
    g = torch.randn(rows, 2 * rows, generator=rng)
    expected = polar(g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(polar(g), expected)


@pytest.mark.parametrize("method", ["svd", *POLYNOMIAL])
def test_rank_one_keeps_its_direction(method, rng):
    u, v = torch.randn(12, generator=rng), torch.randn(30, generator=rng)
    expected = torch.outer(u / u.norm(), v / v.norm())
    factor = polar(torch.outer(u, v), method=method, coefficients="cubic12")
    torch.testing.assert_close(factor, expected, rtol=0, atol=1e-3)


@cases("name", [name for name in COEFFICIENTS if name not in TOO_WIDE])
@cases("method", ["newton-schulz", "gram"])
def test_rank_one_in_bfloat16_descends(name, method, rng):
    g = torch.outer(torch.randn(64, generator=rng), torch.randn(256, generator=rng))
    factor = polar(g, method=method, coefficients=name, dtype=torch.bfloat16)
    gain = (g * factor).sum() / torch.linalg.matrix_norm(g, ord="nuc")
    assert 0.6 < gain < 1.3


@cases("method", ["svd", *POLYNOMIAL])
@cases("bad", [torch.nan, torch.inf])
def test_a_non_finite_and_a_zero_matrix_leave_their_neighbour_alone(method, bad, rng):
    g = torch.randn(3, 4, 10, generator=rng)
    expected = polar(g, method=method)[0]
    g[1], g[2, 0, 0] = 0, bad
    result = polar(g, method=method)
    assert torch.equal(result[0], expected)
    assert (result[1] == 0).all()
    assert result[2].isnan().any()


@given(
    batch=st.integers(1, 5),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    cap=st.sampled_from([1, 500, 10**6]),
)
@settings(max_examples=40, deadline=None)
def test_a_batch_is_its_matrices_whatever_the_memory_cap(batch, rows, columns, cap):
    g = torch.randn(batch, rows, columns, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
    together = polar(g, memory_cap=cap)
    # what two orders of summation differ by grows like the square of the map's slope, 1e5, on the smallest values
    torch.testing.assert_close(together, torch.stack([polar(one) for one in g]), rtol=0, atol=1e-10)
    torch.testing.assert_close(polar(g.mT), together.mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (24, 40)])
def test_matrices_that_lie_interleaved_in_memory_are_those_that_lie_apart(shape, rng):
    """As heads do that cut a transposed weight, or those of a projection that reads them: bit for bit."""
    stored = torch.randn(shape, generator=rng)
    for heads in (stored.T.unflatten(0, (2, -1)), stored.unflatten(1, (2, -1)).transpose(0, 1)):
        alone = [polar(head.clone()) for head in heads]
        assert torch.equal(polar(heads), torch.stack(alone))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (3, 0)], ids=str)
def test_nothing_comes_from_nothing(shape):
    assert polar(torch.zeros(shape)).shape == shape


def test_types_and_memory_are_the_callers(rng):
    g = torch.randn(4, 4, generator=rng)
    assert polar(g.bfloat16()).dtype == torch.bfloat16
    before = g.clone()
    polar(g).fill_(7)
    polar(torch.zeros(2, 2)).fill_(7)
    assert torch.equal(g, before)


def test_the_operation_counts_are_those_of_the_field():
    # in units of k³ at aspect ratio r: standard 20 r + 10; Gram without a restart 4 r + 34, each of them 4 r - 6
    quintics, nonics = (partial(flops, coefficients=name) for name in ("polar_express", "nonic"))
    for ratio in (1, 2, 4, 8):
        shape = (64, 64 * ratio)
        assert quintics(*shape, method="newton-schulz", dtype=torch.bfloat16) == (20 * ratio + 10) * 64**3
        assert quintics(*shape, method="gram", dtype=torch.bfloat16) == (16 * ratio + 16) * 64**3
        assert quintics(*reversed(shape), method="gram") == (4 * ratio + 34) * 64**3
        assert nonics(*shape, method="newton-schulz") == (12 * ratio + 12) * 64**3
        assert nonics(*shape, method="gram") == (4 * ratio + 24) * 64**3
        assert nonics(*shape) == min(12 * ratio + 12, 4 * ratio + 24) * 64**3
        assert flops(*shape) == quintics(*shape) == min(20 * ratio + 10, 4 * ratio + 34) * 64**3


def test_operations_are_counted_as_they_are_done():
    for method, coefficients in (("newton-schulz", "nonic"), ("gram", "jordan"), ("auto", "auto")):
        with Products() as counted:
            polar(torch.randn(2, 300, 520, dtype=torch.float64), method=method, coefficients=coefficients)
        expected = flops(300, 520, method=method, coefficients=coefficients, dtype=torch.float64)
        assert counted.flops == 2 * expected
    with pytest.raises(ValueError, match="counts the polynomial methods, got method='svd'"):
        flops(4, 4, method="svd")


@cases(
    "call, error, message",
    [
        (lambda: polar(torch.ones(3)), ValueError, "polar takes (*batch, m, n), got shape (3,)"),
        (
            lambda: polar(torch.ones(2, 2).int()),
            TypeError,
            "takes a real floating-point tensor, got torch.int32",
        ),
        (
            lambda: polar(torch.ones(2, 2).cfloat()),
            TypeError,
            "takes a real floating-point tensor, got torch.complex64",
        ),
        (
            lambda: polar(torch.ones(2, 2), method="grm"),
            ValueError,
            "Unknown polar method 'grm': did you mean 'gram'?",
        ),
        (lambda: polar(torch.ones(2, 2), memory_cap=0), ValueError, "positive memory_cap in bytes, got 0"),
        (lambda: polar(torch.ones(2, 2), coefficients="x"), ValueError, "Unknown coefficients 'x'. Valid: auto, "),
        (
            lambda: polar(torch.ones(2, 2), coefficients="nonic", dtype=torch.bfloat16),
            ValueError,
            "'nonic' need products in a wider type than torch.bfloat16: their terms are up to 2.73e+03 times",
        ),
    ],
)
def test_the_error_says_what_came_and_what_was_expected(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


SIZES = [(3, 40, 90), (2, 130, 70), (2, 200, 300), (3, 257, 257), (1, 300, 161), (2, 390, 400)]


@pytest.mark.slow
@cases("coefficients", ["nonic", "polar_express"])
@cases("method", ["newton-schulz", "gram"])
@cases("dtype", [torch.float32, torch.float64])
@cases("shape", SIZES)
def test_blocks_and_single_matrices_are_the_scalar_map(coefficients, method, dtype, shape, rng):
    """Sizes on both sides of every threshold, divisible by the number of blocks or not."""
    g = torch.randn(shape, generator=rng, dtype=dtype)
    expected = spectral_oracle(g, coefficients).to(dtype)
    # what float32 may lose on any processor, as the set's certificate tells: where terms cancel, and in the slope at 0
    certificate = get_coefficients(coefficients).certify()
    lost = max(certificate.cancellation, certificate.slope) * torch.finfo(dtype).eps
    atol = lost if dtype == torch.float32 else 1e-10
    found = polar(g, method=method, coefficients=coefficients)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    [turned] = polars([g.mT], method=method, coefficients=coefficients, times=[-2.0])
    torch.testing.assert_close(turned, -2 * expected.mT, rtol=0, atol=2 * atol)


@given(
    shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)), max_size=6),
    method=st.sampled_from(["svd", *POLYNOMIAL]),
    cap=st.sampled_from([1, 3000, 10**6]),
)
@settings(max_examples=60, deadline=None)
def test_several_shapes_are_each_of_them(shapes, method, cap):
    generator = torch.Generator().manual_seed(len(shapes))
    batches = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    found = polars(batches, method=method, memory_cap=cap, times=[2.0] * len(batches))
    for batch, factor in zip(batches, found, strict=True):
        torch.testing.assert_close(factor, 2 * polar(batch, method=method), rtol=0, atol=1e-11)


@pytest.mark.parametrize("rows", [100, 200])
def test_what_the_process_allows_for_its_own_products_does_not_matter(rows, rng):
    g = torch.randn(2, rows, 2 * rows, generator=rng)
    expected = polar(g)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(polar(g), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_inherited_precision_is_inherited_again(rng):
    backends = torch.backends
    try:
        backends.fp32_precision = "bf16"
        inherited = backends.mkldnn.matmul.fp32_precision
        polar(torch.randn(3, 3, generator=rng))
        assert backends.mkldnn.matmul.fp32_precision == inherited
        backends.fp32_precision = "ieee"
        assert backends.mkldnn.matmul.fp32_precision in ("ieee", "none")
    finally:
        backends.fp32_precision = "none"


def test_no_gradient_flows_and_none_is_needed(rng):
    g = torch.randn(4, 4, generator=rng).requires_grad_()
    assert not polar(g).requires_grad
