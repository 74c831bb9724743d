import math

import pytest

from steepest.lab.engine.walk import LADDERS as KNOWN
from steepest.lab.engine.walk import Tried, at_edge, best_of, ladder, search
from steepest.lab.methods import RATES

LADDERS = {"lr": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), "beta": (0.5, 0.7, 0.8, 0.9, 0.95)}
START = {"lr": 4.0, "beta": 0.8}


def walked(loss, *, ladders=LADDERS, start=START, budget=16):
    walk = search(ladders, start, budget=budget)
    options = next(walk)
    while True:
        try:
            options = walk.send(loss(options))
        except StopIteration as end:
            return end.value


def bowl(options):
    return (math.log2(options["lr"]) - 4) ** 2 + 10 * abs(options["beta"] - 0.9)


def test_a_walk_finds_the_bottom_of_a_bowl():
    tried = walked(bowl)
    assert best_of(tried).options == {"lr": 16.0, "beta": 0.9}
    assert tried[0] == Tried(START, bowl(START))


@pytest.mark.parametrize("budget", [1, 2, 7, 30])
def test_a_walk_tries_as_many_settings_as_it_may_each_once(budget):
    tried = walked(bowl, budget=budget)
    settings = [tuple(one.options.values()) for one in tried]
    assert len(settings) == len(set(settings)) == budget


def test_what_does_not_end_in_a_number_is_never_the_best():
    tried = walked(lambda options: math.nan if options["lr"] > 4 else bowl(options))
    assert best_of(tried).options["lr"] == 4.0
    assert {one.loss for one in tried if one.options["lr"] > 4} == {math.inf}


def test_a_best_setting_at_the_edge_of_what_was_tried_is_known():
    tried = walked(lambda options: -options["lr"] + abs(options["beta"] - 0.8), budget=12)
    assert at_edge(tried) == ("lr",)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ladders": {**LADDERS, "lr": (2.0, 1.0, 4.0)}}, "ladder of 'lr' must rise"),
        ({"start": {"lr": 3.0, "beta": 0.8}}, "start of 'lr' must be one of"),
        ({"budget": 31}, "between 1 and the 30 settings"),
        ({"budget": 0}, "between 1 and the 30 settings"),
    ],
)
def test_walks_that_cannot_be_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        walked(bowl, **change)


@pytest.mark.parametrize("name", [*RATES, *KNOWN])
def test_ladders_rise_and_hold_where_a_rate_starts(name):
    values = ladder(name, 0.03)
    assert list(values) == sorted(set(values))
    assert name not in RATES or (0.03 in values and values[12] / values[10] == pytest.approx(2, rel=1e-5))


def test_an_option_without_a_ladder_is_refused():
    with pytest.raises(ValueError, match="Unknown option of a walk 'betta2': did you mean 'beta2'"):
        ladder("betta2", 0.9)
