import itertools
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.ranks import assign

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
