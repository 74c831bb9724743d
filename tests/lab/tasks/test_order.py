import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.tasks.order import ExampleOrder, derive_seed
from tests.cases import cases

sizes = st.integers(1, 40)
batches = st.lists(st.integers(1, 25), min_size=1, max_size=8)


@given(size=sizes, first=batches, second=batches)
def test_the_order_does_not_depend_on_the_batch_size(size, first, second):
    total = min(sum(first), sum(second))
    walks = []
    for counts in (first, second):
        order = ExampleOrder(size, seed=3)
        walks.append(torch.cat([order.take(count) for count in counts])[:total])
    assert torch.equal(*walks)


@given(size=sizes, epochs=st.integers(1, 4))
def test_each_epoch_visits_every_example_once(size, epochs):
    walk = ExampleOrder(size, seed=5).take(size * epochs).view(epochs, size)
    assert torch.equal(walk.sort(dim=1).values, torch.arange(size).expand(epochs, size))


@given(size=sizes, before=batches, after=batches)
def test_a_restored_order_goes_on_exactly(size, before, after):
    order, restored = ExampleOrder(size, seed=1), ExampleOrder(size, seed=1)
    for count in before:
        order.take(count)
    restored.load_state_dict(order.state_dict())
    assert all(torch.equal(order.take(count), restored.take(count)) for count in after)


def test_seeds_and_epochs_give_different_orders():
    walks = [ExampleOrder(50, seed=seed).take(100).view(2, 50) for seed in (0, 1)]
    rows = {tuple(row.tolist()) for walk in walks for row in walk}
    assert len(rows) == 4


def test_derived_seeds_do_not_run_into_each_other():
    parts = [("order", 1, 2), ("order", 12), ("order", 2, 1), ("model", 1, 2), ("order1", 2)]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="at least one example, got size=0"):
        ExampleOrder(0, seed=0)


@cases(
    "change, message",
    [
        ({"seed": 8}, "does not belong to the walk"),
        ({"size": 9}, "does not belong to the walk"),
        ({"more": 1}, "does not belong to the walk"),
        ({"position": 10}, "outside of its 10 examples"),
        ({"epoch": -1}, "outside of its 10 examples"),
    ],
)
def test_a_state_of_another_walk_is_refused(change, message):
    order = ExampleOrder(10, seed=7)
    with pytest.raises(ValueError, match=message):
        order.load_state_dict({**order.state_dict(), **change})
