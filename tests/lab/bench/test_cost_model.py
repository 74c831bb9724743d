import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steepest import Muon
from steepest.lab.bench.cost_model import ALL_TRAFFIC, LOAD_TRAFFIC, LONG_TRAFFIC, cost, count_work
from steepest.lab.bench.machine import Machine
from steepest.linalg import symmetric
from steepest.linalg.polar import flops, polars
from steepest.linalg.products import SMALLEST_ONE_BY_ONE, has_onednn

FREE = ((1, 1e300),)
TABLES = ("products", "passes", "fresh", "transposed")
CALLING = Machine(FREE, FREE, FREE, FREE, 1.0)
USUAL = Machine(
    products=((64, 50e9), (512, 100e9)),
    passes=((2**18, 100e9), (2**26, 10e9)),
    fresh=((2**18, 80e9), (2**26, 8e9)),
    transposed=((2**18, 10e9), (2**26, 5e9)),
    seconds_per_call=2e-6,
)
LAYER = [(4, 256, 256), (1, 1024, 256), (1, 256, 1024)]


def charging(name):
    """A machine that charges for one thing alone, one second per unit."""
    return dataclasses.replace(CALLING, **{name: ((1, 1.0),)}, seconds_per_call=1e-300)


class Counting(TorchDispatchMode):
    """Counts calls, and bytes that elementwise passes read and write."""

    def __init__(self):
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        name = function.name()
        if (
            not function.is_view
            and "mm" not in name
            and "linear" not in name
            and "unsafe_view" not in name
            and "empty" not in name
        ):
            written = args[0] if result is None else result  # in place, for lists
            tensors = [leaf for leaf in tree_leaves((args, kwargs, written)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def counted(shapes):
    """Calls of a step on buckets, and bytes of its elementwise passes outside of polar factors."""
    weights = [torch.nn.Parameter(torch.ones(rows, columns)) for count, rows, columns in shapes for _ in range(count)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = Muon(weights, weight_decay=0.1)
    optimizer.step()
    with Counting() as counts:
        optimizer.step()
    with Counting() as polar:
        for shape in shapes:
            polars([torch.ones(shape)], times=[-1.0])
    one_by_one = min(shapes[0][1:]) >= SMALLEST_ONE_BY_ONE and has_onednn()
    return counts.calls - one_by_one * polar.calls, counts.bytes - polar.bytes


BUCKETS = [[(1, 64, 64)], [(4, 128, 512)], [(1, 256, 256)], [(4, 512, 256)], [(6, 512, 512)], LAYER]


@pytest.mark.slow
@pytest.mark.parametrize("shapes", BUCKETS, ids=str)
def test_the_counts_are_those_of_a_step(shapes, monkeypatch):
    """Of whole products: those in blocks, of large matrices without oneDNN, take calls that are not counted."""
    monkeypatch.setattr(symmetric, "SMALLEST_BLOCK", dict.fromkeys(symmetric.SMALLEST_BLOCK, 10**9))
    calls, traffic = counted(shapes)
    work = count_work(shapes)
    assert calls == pytest.approx(work.calls, rel=0.15)
    entries = 4 * sum(map(math.prod, shapes))
    assert traffic == pytest.approx((ALL_TRAFFIC + LOAD_TRAFFIC) * entries, rel=0.1)


@pytest.mark.parametrize("name", TABLES)
def test_each_rate_is_charged_for_its_own_work(name):
    assert cost(LAYER, charging(name)) == pytest.approx(sum(getattr(count_work(LAYER), name).values()))


def test_calls_are_charged_with_python_around_them():
    work = count_work(LAYER)
    assert cost(LAYER, CALLING) == pytest.approx(work.calls + work.python)


def test_operations_are_those_of_the_products_of_every_matrix():
    assert count_work([(6, 64, 128)]).products == {64: 6 * flops(64, 128)}
    assert count_work([(6, 64, 128)], coefficients="jordan").products == {64: 6 * flops(64, 128, coefficients="jordan")}
    assert set(count_work([(2, 64, 128), (1, 32, 32)]).products) == {32, 64}


def test_passes_over_all_layers_miss_the_cache_that_one_layer_fits_in():
    assert set(count_work(LAYER).passes) == {4 * 12 * 256**2}


def test_only_tall_matrices_that_are_worked_on_one_by_one_are_transposed():
    tall, wide = ({4 * 256 * 1024}, set())
    expected = tall if has_onednn() else wide
    assert set(count_work([(2, 1024, 256)]).transposed) == expected
    assert not count_work([(2, 256, 1024)]).transposed
    assert not count_work([(2, 512, 64)]).transposed


def test_what_a_matrix_has_beyond_a_square_is_passed_over_in_new_memory():
    square, long = (sum(count_work([shape]).fresh.values()) for shape in ((1, 256, 256), (1, 256, 512)))
    assert square == 4 * LOAD_TRAFFIC * 256**2
    assert long == 2 * square + 4 * LONG_TRAFFIC * 256**2


@given(st.integers(1, 8), st.integers(8, 512), st.integers(8, 512))
def test_more_costs_more(count, rows, columns):
    least = cost([(count, rows, columns)], USUAL)
    assert 0 < least < cost([(count + 1, rows, columns)], USUAL)
    assert least < cost([(count, 2 * rows, 2 * columns)], USUAL)


def test_buckets_cost_less_together():
    assert cost([(8, 64, 64)], USUAL) < 8 * cost([(1, 64, 64)], USUAL)
    assert cost([(2, 64, 64), (2, 64, 128)], USUAL) < cost([(2, 64, 64)], USUAL) + cost([(2, 64, 128)], USUAL)


@pytest.mark.parametrize("shapes", [[], [(0, 4, 4)], [(1, 4, 4), (1, 0, 4)]], ids=str)
def test_empty_buckets_are_refused(shapes):
    text = f"A step takes buckets of shapes (B, m, n) with numbers of at least 1, got {shapes}. Leave empty ones out."
    with pytest.raises(ValueError, match=re.escape(text)):
        cost(shapes, USUAL)
