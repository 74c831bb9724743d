"""The passes of a step: the same loads and the same numbers as the optimizer's, and ratios that follow from times."""

import statistics

import pytest
import torch

import steepest
from steepest.lab.bench import passes as passes_module
from steepest.lab.bench.contestants import Settings
from steepest.lab.bench.passes import PLAIN, loads_of, make_passes, measure_passes, merged, ways
from steepest.lab.bench.pictures import passes_png
from steepest.optim.decay import Decoupled

SHAPES = [(6, 6), (4, 12), (12, 4), (6, 2, 2, 2), (6, 6)]
WAYS = [PLAIN, "plain, load by load", "steepest, no decay", "steepest, with decay"]


def tensors(shapes, generator):
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_loads_and_their_order_are_those_of_a_step(rng, monkeypatch):
    """Enough matrices for several loads."""
    shapes = [(256, 256)] * 7 + [(128, 640)] * 3
    params = [tensor.requires_grad_() for tensor in tensors(shapes, rng)]
    written, apply_ = [], Decoupled.apply_
    seen = lambda self, own, *rest, **named: (written.append(own), apply_(self, own, *rest, **named))  # noqa: E731
    monkeypatch.setattr(Decoupled, "apply_", seen)
    optimizer = steepest.Muon(params)
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng)
    optimizer.step()
    found = [load.parameters for load in loads_of(params)]
    assert len(found) > 1
    assert [list(map(id, own)) for own in found] == [list(map(id, own)) for own in written]


def test_every_way_does_what_it_says():
    settings = Settings(lr=0.5, momentum=0.75, weight_decay=0.25)
    for index, way in enumerate(WAYS):
        passes = make_passes(SHAPES, seed=0)
        before = merged(make_passes(SHAPES, seed=0))
        assert list(ways(passes, settings)) == WAYS
        assert ways(passes, settings)[way]() > 0
        # with decay, a step is a pull toward the move, which a norm then returns as long as the ball's radius
        after, shrink, length = merged(passes), *((1, -0.5), (1, -0.5), (1, 0.5), (0.875, 0.125))[index]
        assert len(after.parameters) == len(SHAPES)
        for new, old, move_ in zip(after.parameters, before.parameters, before.moves, strict=True):
            torch.testing.assert_close(new, shrink * old + length * move_)
        for new, old, gradient in zip(after.momenta, before.momenta, before.gradients, strict=True):
            torch.testing.assert_close(new, 0.75 * old + 0.25 * gradient)


def test_rows_follow_from_the_seconds():
    found = measure_passes(SHAPES, pairs=4)
    assert (found.matrices, found.entries, found.loads) == (5, 36 * 2 + 48 * 3, 1)
    assert [row.way for row in found.rows] == WAYS
    for row in found.rows:
        own, base = found.seconds[row.way], found.seconds[PLAIN]
        assert len(own) == 4
        assert row.ms.median == pytest.approx(1e3 * statistics.median(own))
        assert row.ratio.median == pytest.approx(statistics.median(a / b for a, b in zip(own, base, strict=True)))
    assert passes_png({"a": found, "b": found}).startswith(b"\x89PNG")


def test_ours_are_timed_through_the_functions_of_the_library(monkeypatch):
    called = []
    for owner, name in ((passes_module, "average_"), (Decoupled, "apply_")):
        monkeypatch.setattr(owner, name, lambda *_, name=name, **named: called.append((name, named)))
    settings = Settings(lr=0.5, weight_decay=0.25)
    works = ways(make_passes(SHAPES, seed=0), settings)
    works["steepest, no decay"]()
    works["steepest, with decay"]()
    assert [name for name, _ in called] == ["average_", "apply_"] * 2
    assert [named for _, named in called[1::2]] == [
        {"length": 0.5, "decay": 0.0},
        {"length": 0.5, "decay": 0.125, "pull": True},
    ]


def test_one_round_has_no_quartiles():
    with pytest.raises(ValueError, match="at least 2 pairs, for their quartiles, got pairs=1"):
        measure_passes(SHAPES, pairs=1)
