"""The floor: operations of each form, which is least, and what rates make of them."""

import pytest
import torch

from steepest.lab.bench import floor as module
from steepest.lab.bench.floor import (
    FASTEST,
    FORMS,
    MOST_BYTES,
    find_floor,
    gemm_works,
    key,
    least,
    product_flops,
    rates,
)
from tests.cases import cases

BY_NAME = {form.name: form for form in FORMS}


def count(*, products=0, grams=0, squares=0, cubes=0, m=3, n=7):
    """Operations by hand: full products m x m by m x n, Gram matrices of X, symmetric and full products m x m."""
    return 2 * m * m * n * products + m * m * n * grams + m**3 * squares + 2 * m**3 * cubes


@cases(
    "name, parts",
    [
        ("standard, 5 quintics", {"products": 5, "grams": 5, "squares": 5}),
        ("standard, 4 quintics", {"products": 4, "grams": 4, "squares": 4}),
        # a Gram form of T steps and S starts, all of whose matrices commute: T squares, T - S products with the factor
        # and 2 (T - S) of R with Z on either side
        ("Gram, 5 quintics", {"products": 1, "grams": 1, "squares": 5 + 4 + 2 * 4}),
        ("Gram, 5 quintics, one restart", {"products": 2, "grams": 2, "squares": 5 + 3 + 2 * 3}),
        ("Gram, 4 quintics", {"products": 1, "grams": 1, "squares": 4 + 3 + 2 * 3}),
        ("Gram, 4 quintics, one restart", {"products": 2, "grams": 2, "squares": 4 + 2 + 2 * 2}),
        ("standard, 3 of degree nine", {"products": 3, "grams": 3, "squares": 6}),
        ("Gram, 3 of degree nine", {"products": 1, "grams": 1, "squares": 6 + 2 + 2 * 2}),
    ],
)
def test_forms_count_what_their_products_need(name, parts):
    assert BY_NAME[name].flops(3, 7) == count(**parts)


def test_every_form_is_counted_by_hand():
    assert len(BY_NAME) == len(FORMS) == 8


def test_the_least_form_depends_on_the_ratio_of_the_sides():
    assert least(64, 64).name == "standard, 3 of degree nine"
    assert least(64, 256).name == "Gram, 3 of degree nine"
    assert least(64, 256).flops(64, 256) == min(form.flops(64, 256) for form in FORMS)


def test_the_floor_adds_each_matrix_at_the_rate_of_its_sides():
    floor = find_floor([(2, 8), (8, 2), (4, 1, 2, 2)], {(2, 8): 100.0, (4, 4): 50.0})
    wide, square = 2 * (3 * 4 * 8 + 12 * 8), 15 * 64
    assert floor.flops == wide + square
    assert floor.seconds == pytest.approx(wide / 100 + square / 50)
    assert dict(floor.forms) == {"2x8": "Gram, 3 of degree nine", "4x4": "standard, 3 of degree nine"}


def test_the_rate_is_that_of_the_faster_form_in_its_median_round():
    times = {key("bmm", 2, 8, torch.float32): [4.0, 4.0, 1.0], key("mm", 2, 8, torch.float32): [2.0, 3.0, 9.0]}
    assert rates(times, [(2, 8), (8, 2)], torch.float32) == {(2, 8): product_flops(2, 8) / 3.0}
    assert product_flops(2, 8) == 64


def test_the_fastest_form_need_not_be_public():
    names = [key(form, 2, 8, torch.float32) for form in FASTEST]
    times = dict(zip(names, [[4.0], [3.0], [2.0]], strict=True))
    assert rates(times, [(2, 8)], torch.float32) == {(2, 8): 64 / 3.0}
    assert rates(times, [(2, 8)], torch.float32, forms=FASTEST) == {(2, 8): 64 / 2.0}
    del times[names[2]]
    assert rates(times, [(2, 8)], torch.float32, forms=FASTEST) == {(2, 8): 64 / 3.0}


def test_onednn_multiplies_float32_where_it_is_to_be_had(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "has_onednn", lambda: True)
    monkeypatch.setattr(module, "_onednn", lambda a, b: seen.append(a @ b))
    works = gemm_works([(4, 8), (8, 4)], [torch.float32, torch.bfloat16], device="cpu", seed=0)
    assert [name for name in works if name.startswith("onednn")] == ["onednn 4x8 float32"]
    assert works["onednn 4x8 float32"]() > 0
    assert [one.shape for one in seen] == [(4, 8)] * 2


@pytest.mark.skipif(not module.has_onednn(), reason="oneDNN's product is not to be had here")
def test_onednn_is_given_the_operands_of_the_other_forms(rng):
    left, right = (torch.randn(5, side, generator=rng) for side in (5, 7))
    torch.testing.assert_close(module._onednn(left, right), left @ right)


def test_products_are_run_once_for_all_that_share_their_sides(monkeypatch):
    seen = []
    batched = torch.bmm
    monkeypatch.setattr(module, "has_onednn", lambda: False)
    monkeypatch.setattr(torch, "bmm", lambda a, b: (seen.append((a.shape, b.shape, b.dtype)), batched(a, b))[1])
    works = gemm_works([(4, 8), (8, 4), (4, 4)], [torch.float32, torch.bfloat16], device="cpu", seed=0)
    assert len(works) == 8
    assert all(work() > 0 for work in works.values())
    assert ((2, 4, 4), (2, 4, 8), torch.bfloat16) in seen
    assert MOST_BYTES // (4 * 8 * 4) > 2
