"""Turns: who goes when, how often, and ratios within rounds."""

from collections import Counter

import pytest

from steepest.lab.bench.timing import Quartiles, order, paired_ratio, quartiles, take_turns


def test_everybody_takes_every_place_equally_often():
    names = ["a", "b", "c"]
    rounds = [order(names, index) for index in range(6)]
    assert all(sorted(one) == names for one in rounds)
    assert set(Counter((name, one.index(name)) for one in rounds for name in names).values()) == {2}


def test_everybody_follows_every_other_in_one_direction_and_in_the_other():
    names = ["a", "b", "c", "d"]
    follows = Counter(
        pair for index in range(8) for pair in zip(order(names, index), order(names, index)[1:], strict=False)
    )
    assert follows["a", "b"] == follows["b", "a"] > 0


def test_turns_are_counted_without_the_warm_up():
    calls = []

    def work(name):
        def run():
            calls.append(name)
            return float(len(calls))

        return run

    times = take_turns({"a": work("a"), "b": work("b")}, rounds=3, warm_up=2)
    assert calls == ["a", "b", "b", "a", "b", "a", "a", "b", "a", "b"]
    assert times == {"a": [6.0, 7.0, 9.0], "b": [5.0, 8.0, 10.0]}


def test_ratios_are_taken_within_rounds():
    slow, fast = [2.0, 20.0, 200.0], [1.0, 10.0, 100.0]
    assert paired_ratio(slow, fast) == Quartiles(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        paired_ratio(slow, fast[1:])


def test_quartiles_are_interpolated():
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == Quartiles(2.0, 3.0, 4.0)
