"""Kernels for symmetric products: a right one is used, a wrong one is refused with one warning, products go on."""

import sys
import types
import warnings

import pytest
import torch

from steepest.linalg import flops, mirrored, polar, products
from steepest.linalg.mirrored import MODULES, kernel_for, takes
from steepest.linalg.products import Mirrored, Together, products_for
from tests.cases import cases

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ROWS = 256


def halves(a, b, C=None, alpha=1.0, beta=1.0):
    """What such a kernel does: the upper triangle, rounded once, and its mirror."""
    assert type(alpha) is type(beta) is float
    whole = alpha * (a.float() @ b.float()) + (0 if C is None else beta * C.float())
    upper = whole.triu()
    return (upper + upper.triu(1).mT).to(a.dtype)


def lower_is_missing(a, b, **options):
    return halves(a, b, **options).triu()


def another_tile(a, b, **options):
    found = halves(a, b, **options)
    found[:, 64:96, 128:160] = 0
    return found


def sum_is_forgotten(a, b, C=None, **options):
    return halves(a, b, **options)


def another_type(a, b, **options):
    return halves(a, b, **options).float()


def raises(a, b, **options):
    raise NotImplementedError("only on another card")


def half(a, b, **options):
    return halves(a, b, **options)[:, : a.size(1) // 2]


WRONG = {
    "lower is missing": (lower_is_missing, "X Xᵀ is up to "),
    "another tile": (another_tile, "X Xᵀ is up to "),
    "sum is forgotten": (sum_is_forgotten, "α R R . β R is up to "),
    "another type": (another_type, "has shape .* and type torch.float32"),
    "raises": (raises, "it failed, NotImplementedError: only on another card"),
    "half": (half, r"has shape \(2, 128, 256\)"),
}


@pytest.fixture
def installed(monkeypatch):
    """A package with a kernel, on a machine whose processor is taken for a CUDA device."""

    def install(kernel, module=MODULES[-1]):
        names = module.split(".")
        for end in range(1, len(names) + 1):
            name = ".".join(names[:end])
            if not name.startswith("torch") or end == len(names):
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[module].gemm_symmetric = kernel
        forget()

    def forget():
        mirrored._tried.cache_clear()
        mirrored._imported.cache_clear()
        mirrored._refused.clear()

    kernel_of = kernel_for
    trial = mirrored._deviation

    def here(kernel, rows, dtype, device):
        assert device == CUDA
        return trial(kernel, rows, dtype, CPU)

    monkeypatch.setattr(mirrored, "_deviation", here)
    monkeypatch.setattr(mirrored, "kernel_for", lambda rows, dtype, device: kernel_of(rows, dtype, CUDA))
    forget()
    yield install
    forget()


@cases("dtype", [torch.bfloat16, torch.float16])
def test_a_right_one_is_used(installed, dtype, rng):
    calls = []

    def counted(a, b, **options):
        calls.append(options)
        return halves(a, b, **options)

    installed(counted)
    chosen = products_for(ROWS, dtype, CUDA)
    assert isinstance(chosen, Mirrored)
    tried = len(calls)
    assert tried == 2
    assert products_for(ROWS, dtype, CUDA) == chosen
    assert len(calls) == tried  # once for each number of rows
    g = torch.randn(2, ROWS, 512, generator=rng, dtype=torch.float32)
    values = torch.linalg.svdvals(polar(g, dtype=dtype).double())
    assert len(calls) > tried
    installed(raises)
    with pytest.warns(UserWarning, match="is not used"):
        plain = torch.linalg.svdvals(polar(g, dtype=dtype).double())
    # both round at 2^-8 or finer, in other places
    torch.testing.assert_close(values, plain, rtol=0, atol=0.05)


@cases("kernel, text", WRONG.values(), ids=WRONG)
def test_a_wrong_one_is_refused_with_one_warning(installed, kernel, text, rng):
    installed(kernel)
    with pytest.warns(UserWarning, match=f"quack.gemm_interface.gemm_symmetric is not used: .*{text}") as warned:
        assert products_for(ROWS, torch.bfloat16, CUDA) == Together(1)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert products_for(2 * ROWS, torch.bfloat16, CUDA) == Together(1)
        g = torch.randn(1, ROWS, 300, generator=rng)
        values = torch.linalg.svdvals(polar(g, dtype=torch.bfloat16).double())
    assert (values > 0.5).all()


def test_one_that_is_wrong_for_some_rows_is_not_trusted_with_others(installed):
    installed(lambda a, b, **options: halves(a, b, **options) * (1.5 if a.size(1) > ROWS else 1.0))
    assert isinstance(products_for(ROWS, torch.bfloat16, CUDA), Mirrored)
    with pytest.warns(UserWarning, match="with 512 rows"):
        assert products_for(2 * ROWS, torch.bfloat16, CUDA) == Together(1)
    assert products_for(ROWS, torch.bfloat16, CUDA) == Together(1)


def test_torchs_own_comes_first_and_the_next_one_if_it_is_wrong(installed):
    other = lambda a, b, **options: halves(a, b, **options)  # noqa: E731
    installed(halves)
    installed(other, MODULES[0])
    assert products_for(ROWS, torch.bfloat16, CUDA).kernel is other
    installed(raises, MODULES[0])
    with pytest.warns(UserWarning, match="torch._vendor"):
        assert products_for(ROWS, torch.bfloat16, CUDA).kernel is halves


@cases(
    "rows, dtype, device",
    [
        (ROWS, torch.bfloat16, CPU),
        (ROWS, torch.float32, CUDA),
        (ROWS - 8, torch.bfloat16, CUDA),
        (ROWS + 4, torch.bfloat16, CUDA),
    ],
)
def test_nothing_is_imported_where_none_could_be_used(monkeypatch, rows, dtype, device):
    def imported(name):
        raise AssertionError(name)

    monkeypatch.setattr(mirrored.importlib, "import_module", imported)
    assert kernel_for(rows, dtype, device) is None


def test_without_a_package_products_are_torchs(monkeypatch):
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)  # which Python takes for missing
    mirrored._imported.cache_clear()
    mirrored._tried.cache_clear()
    try:
        assert kernel_for(ROWS, torch.bfloat16, CUDA) is None
    finally:
        mirrored._imported.cache_clear()
        mirrored._tried.cache_clear()


def test_batches_that_it_cannot_read_are_multiplied_by_torch(rng):
    def refuses(a, b, **options):
        raise AssertionError(a.shape)

    odd = torch.randn(2, 256, 260, generator=rng).bfloat16()
    assert not takes(odd)
    assert torch.equal(mirrored.gram([odd], refuses), odd @ odd.mT)
    even = torch.randn(2, 256, 264, generator=rng).bfloat16()
    assert takes(even)
    assert takes(even.mT.contiguous().mT)
    assert not takes(even[:, :, 4:260])
    assert not takes(even[..., ::2])


def test_operations_of_symmetric_products_count_half(installed):
    k, long = ROWS, 1024
    installed(halves)
    found = {
        method: flops(k, long, method=method, coefficients="jordan", dtype=torch.bfloat16, device=CUDA)
        for method in ("newton-schulz", "gram")
    }
    assert found["newton-schulz"] == 5 * (3 * k * k * long + k**3)
    mirrored._imported.cache_clear()
    mirrored._tried.cache_clear()
    sys.modules[MODULES[-1]].gemm_symmetric = None
    whole = flops(k, long, method="newton-schulz", coefficients="jordan", dtype=torch.bfloat16, device=CUDA)
    assert whole == 5 * (4 * k * k * long + 2 * k**3)
    assert products.Mirrored(1, halves).work_share == 0.5
