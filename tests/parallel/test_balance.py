import dataclasses
import itertools
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steepest import Muon
from steepest.linalg.polar import flops
from steepest.parallel import Machine, assign, cost, count_work

# Each charges for one thing alone.
FREE = 1e300
MULTIPLIES = Machine(((1, 1.0),), ((1, FREE),), 1 / FREE)
PASSES = Machine(((1, FREE),), ((1, 1.0),), 1 / FREE)
CALLING = Machine(((1, FREE),), ((1, FREE),), 1.0)
USUAL = Machine(((64, 50e9), (512, 100e9)), ((2**18, 100e9), (2**26, 10e9)), 2e-6)


CHANGED = {"products": ((64, 80e9), (512, 100e9)), "passes": ((2**18, 200e9), (2**26, 10e9))}


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
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def counted(shape):
    """Calls of a step on a bucket, and bytes of its elementwise passes."""
    count, rows, columns = shape
    weights = [torch.nn.Parameter(torch.ones(rows, columns)) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = Muon(weights, weight_decay=0.1, coefficients="nonic")
    optimizer.step()
    with Counting() as counts:
        optimizer.step()
    return counts.calls, counts.bytes


@pytest.mark.parametrize("shape", [(1, 64, 64), (4, 128, 512), (1, 256, 256), (4, 512, 256)], ids=str)
def test_the_counts_are_those_of_a_step(shape):
    calls, traffic = counted(shape)
    work = count_work(shape)
    assert calls == pytest.approx(work.calls, rel=0.15)
    assert traffic == pytest.approx(work.traffic + work.gram_traffic, rel=0.15)


def test_costs_are_operations_over_rate_traffic_over_bandwidth_and_calls():
    work = count_work((3, 64, 128))
    assert cost((3, 64, 128), MULTIPLIES) == pytest.approx(work.flops)
    assert cost((3, 64, 128), PASSES) == pytest.approx(work.traffic + work.gram_traffic)
    assert cost((3, 64, 128), CALLING) == pytest.approx(work.calls + work.python)


def test_operations_are_those_of_the_products_of_every_matrix():
    assert count_work((6, 64, 128)).flops == 6 * flops(64, 128)
    assert count_work((6, 64, 128), coefficients="jordan").flops == 6 * flops(64, 128, coefficients="jordan")


def test_rates_are_those_of_the_short_side_and_of_the_sizes():
    wide, tall = (dataclasses.replace(USUAL, **{name: table}) for name, table in CHANGED.items())
    assert cost((1, 512, 64), wide) < cost((1, 512, 64), USUAL)
    assert cost((1, 512, 512), wide) == cost((1, 512, 512), USUAL)
    assert cost((1, 64, 64), tall) < cost((1, 64, 64), USUAL)


def test_a_matrix_costs_as_much_as_its_transpose():
    assert cost((2, 96, 32), USUAL) == cost((2, 32, 96), USUAL)


@given(st.integers(1, 8), st.integers(8, 512), st.integers(8, 512))
def test_more_costs_more(count, rows, columns):
    least = cost((count, rows, columns), USUAL)
    assert 0 < least < cost((count + 1, rows, columns), USUAL)
    assert least < cost((count, 2 * rows, 2 * columns), USUAL)


def test_matrices_of_one_bucket_cost_less_together():
    assert cost((8, 64, 64), USUAL) < 8 * cost((1, 64, 64), USUAL)


def test_empty_buckets_are_refused():
    with pytest.raises(
        ValueError, match=re.escape("A bucket has shape=(B, m, n) with numbers of at least 1, got (0, 4, 4)")
    ):
        cost((0, 4, 4), USUAL)


COSTS = st.lists(st.floats(0, 1e6), max_size=7)


@given(COSTS, st.integers(1, 5))
def test_everything_has_one_owner(costs, ranks):
    shares = assign(costs, ranks)
    assert len(shares) == ranks
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)


@given(COSTS, st.integers(1, 3))
def test_the_longest_share_keeps_the_bound(costs, ranks):
    longest = max(sum(costs[index] for index in share) for share in assign(costs, ranks))
    best = min(
        max(sum(c for c, rank in zip(costs, owners, strict=True) if rank == r) for r in range(ranks))
        for owners in itertools.product(range(ranks), repeat=len(costs))
    )
    assert longest <= (4 / 3 - 1 / (3 * ranks)) * best * (1 + 1e-12)


def test_the_bound_is_reached():
    shares = assign([3, 3, 2, 2, 2], 2)
    assert max(sum((3, 3, 2, 2, 2)[index] for index in share) for share in shares) == 7  # 6 would do; 7/6 is the bound


def test_equal_costs_are_dealt_in_order():
    assert assign([1.0] * 6, 4) == [[0, 4], [1, 5], [2], [3]]
    assert Counter(map(len, assign([2.0] * 100, 8))) == {13: 4, 12: 4}


@pytest.mark.parametrize(
    ("costs", "ranks", "text"),
    [
        ([1.0], 0, "assign takes ranks of at least 1, got 0."),
        ([1.0, -2.0], 2, "got costs[1] = -2.0."),
        ([float("nan")], 2, "got costs[0] = nan."),
        ([1.0, float("inf")], 2, "got costs[1] = inf."),
    ],
)
def test_work_that_cannot_be_shared_out_is_refused(costs, ranks, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        assign(costs, ranks)
