import itertools
import re

import pytest

from steepest.lab.bench import scaling
from steepest.lab.bench.cost_model import cost
from steepest.lab.bench.machine import Machine
from steepest.lab.bench.pictures import scaling_png
from steepest.lab.bench.scaling import ASPECTS, LAYERS, SIDE, WIDTHS, Point, measure_scaling, points, predict, stride
from tests.cases import cases

MACHINE = Machine(((64, 100e9),), *[((2**20, 10e9),)] * 3, 1e-6)
SMALL = [Point("width", 8, ((8, 8), (16, 8))), Point("layers", 2, ((8, 8),) * 2), Point("aspect", 3, ((4, 12),))]


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    monkeypatch.setattr(scaling, "calibrate", lambda *, clock: MACHINE)


def test_the_study_has_three_axes():
    found = points()
    assert [point.value for point in found] == [*WIDTHS, *LAYERS, *ASPECTS]
    assert len({point.name for point in found}) == len(found)


def test_a_layer_has_six_matrices_and_aspect_keeps_the_short_side():
    wide, deep, long = points(widths=[32], layers=[3], aspects=[4])
    assert wide.shapes == ((32, 32),) * 4 + ((128, 32), (32, 128))
    assert len(deep.shapes) == 18
    assert set(long.shapes) == {(SIDE, 4 * SIDE)}


def test_every_point_is_timed_in_each_round():
    ticks = itertools.count()
    rows, machine = measure_scaling(SMALL, rounds=3, clock=lambda: next(ticks) / 1000)
    assert machine == MACHINE
    assert [row.point for row in rows] == SMALL
    for row in rows:
        assert row.ms.median == pytest.approx(1.0)
        assert len(row.seconds) == 3
        assert row.error == pytest.approx(row.predicted_ms / row.ms.median - 1)
    assert next(ticks) == 2 * 3 * (2 + 3)


def test_memory_of_a_step_is_more_than_a_matrix_and_the_momentum_is_kept():
    (row,), _ = measure_scaling([Point("width", 64, ((64, 64),) * 2)], rounds=3)
    assert row.peak_extra_bytes >= 2 * 4 * 64 * 64
    assert 2 * 4 * 64 * 64 <= row.state_bytes < 3 * 4 * 64 * 64


def test_long_steps_are_taken_in_fewer_rounds():
    ticks = itertools.count()
    (row,), _ = measure_scaling(SMALL[:1], rounds=9, clock=lambda: 100.0 * next(ticks))
    assert len(row.seconds) == 3


@pytest.mark.slow
@cases("seconds, rounds, expected", [(0.0, 15, 1), (0.1, 15, 1), (1.0, 15, 1), (2.0, 15, 3), (100.0, 15, 5)])
def test_strides_fill_the_time_and_leave_three_steps(seconds, rounds, expected):
    assert stride(seconds, rounds=rounds) == expected


def test_the_prediction_has_a_bucket_for_each_shape():
    point = Point("width", 8, ((8, 8), (16, 8), (8, 8)))
    assert predict(point, MACHINE) == cost([(2, 8, 8), (1, 16, 8)], MACHINE)


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match=re.escape("measure_scaling takes rounds of at least 3, got 2.")):
        measure_scaling(SMALL, rounds=2)


def test_a_point_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="measure_scaling takes each point once, got 'width 8' twice"):
        measure_scaling([*SMALL, SMALL[0]], rounds=3)


def test_the_figure_is_a_png_and_has_a_panel_for_each_axis_that_was_measured():
    rows, _ = measure_scaling(SMALL, rounds=3)
    wide, narrow = scaling_png(rows), scaling_png(rows[:1])
    assert wide.startswith(b"\x89PNG")
    width = [int.from_bytes(image[16:20]) for image in (wide, narrow)]
    assert width[0] > 2 * width[1]
