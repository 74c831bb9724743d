import sys
from functools import partial

import pytest
import torch

from steepest.linalg import polar, products, symmetric
from steepest.linalg.products import OneByOne, Together, has_onednn, products_for
from tests.cases import cases
from tests.linalg.counting import Products

CPU = torch.device("cpu")


def commuting(count, size, rng):
    """Symmetric matrices with the same eigenvectors."""
    u, _ = torch.linalg.qr(torch.randn(count, size, size, generator=rng, dtype=torch.float64))
    return [(u * torch.randn(count, 1, size, generator=rng, dtype=torch.float64)) @ u.mT for _ in range(3)]


def blocks_of(a, parts):
    size = a.size(-1) // parts
    cut = [slice(at * size, (at + 1) * size) for at in range(parts)]
    return torch.stack([a[:, cut[row], cut[column]] for row in range(parts) for column in range(row, parts)])


@cases("parts", [1, 2, 3, 4, 6])
def test_blocks_are_the_whole_matrices(parts, rng):
    a, b, c = commuting(2, 12, rng)
    cut_a, cut_b, cut_c = (blocks_of(one, parts) for one in (a, b, c))
    whole = symmetric.whole
    torch.testing.assert_close(whole(cut_a), a)
    torch.testing.assert_close(whole(symmetric.product(cut_a, cut_b)), a @ b)
    found = symmetric.product(cut_a, cut_b, alpha=2.0, plus=cut_c, beta=-3.0)
    torch.testing.assert_close(whole(found), 2 * a @ b - 3 * c)
    torch.testing.assert_close(symmetric.frobenius_norm(cut_a), torch.linalg.matrix_norm(a))
    torch.testing.assert_close(
        whole(symmetric.add_to_diagonal(cut_a.clone(), 5.0)), a + 5 * torch.eye(12, dtype=torch.float64)
    )
    x = torch.randn(2, 12, 7, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(whole(symmetric.gram([x], parts)), x @ x.mT)
    tall = x.mT.contiguous().mT
    torch.testing.assert_close(whole(symmetric.gram([tall, x], parts))[:2], x @ x.mT)


@cases("parts", [1, 2, 3, 4, 6])
def test_the_work_is_that_share_of_a_whole_product(parts, rng):
    a = blocks_of(commuting(2, 12, rng)[0], parts)
    with Products() as counted:
        symmetric.product(a, a)
    assert counted.flops == round(2 * 2 * 12**3 * symmetric.work_share(parts))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_both_ways_do_the_same(layout, rng):
    if not has_onednn():
        pytest.skip("this CPU or this build of torch has no fast oneDNN products")
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-3)
    x = torch.randn(1, 60, 90, generator=rng)
    x = x if layout == "rows" else x.mT.contiguous().mT
    one, all_ = OneByOne(), Together(2)
    gram, grams = one.gram(x[0].contiguous()), all_.gram([x])
    close(symmetric.whole(grams)[0], gram)
    product = one.product(gram, gram, alpha=0.5, plus=gram, beta=2.0)
    products_ = all_.product(grams, grams, alpha=0.5, plus=grams, beta=2.0)
    close(symmetric.whole(products_)[0], product)
    close(all_.apply(grams, [x])[0][0], one.apply(gram, x[0].contiguous()))
    close(all_.frobenius_norm(grams)[0], one.frobenius_norm(gram))


def test_the_rule_for_the_way():
    assert products_for(64, torch.float32, CPU) == Together(1)
    assert products_for(512, torch.float64, CPU) == Together(4)
    assert products_for(5000, torch.float64, CPU) == Together(6)
    assert products_for(512, torch.bfloat16, CPU) == Together(2)
    assert products_for(512, torch.float32, torch.device("cuda")) == Together(1)
    assert isinstance(products_for(512, torch.float32, CPU), OneByOne if has_onednn() else Together)


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_a_product_that_is_missing_or_wrong_is_not_used(fault, monkeypatch, rng):
    module = sys.modules["steepest.linalg.products"]

    def missing(a, b):
        raise AttributeError(fault)

    monkeypatch.setattr(module, "_onednn", missing if fault == "missing" else lambda a, b: a @ b.mT + 0.01)
    has_onednn.cache_clear()
    try:
        assert not has_onednn()
        assert products_for(512, torch.float32, CPU) == Together(4)
        g = torch.randn(1, 200, 200, generator=rng)
        assert polar(g, method="newton-schulz").isfinite().all()
    finally:
        monkeypatch.undo()
        has_onednn.cache_clear()


def test_older_processors_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    has_onednn.cache_clear()
    try:
        assert not products.has_onednn()
    finally:
        monkeypatch.undo()
        has_onednn.cache_clear()
