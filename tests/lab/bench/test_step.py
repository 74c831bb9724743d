"""The assembled benchmark: rows, ratios and floors that follow from the seconds it records."""

import statistics

import pytest
import torch

from steepest.lab.bench import Bench, measure
from steepest.lab.bench import step as step_module
from steepest.lab.bench.contestants import CONTESTANTS
from steepest.lab.bench.pictures import step_panel
from steepest.lab.bench.step import largest_bucket

BENCH = Bench(widths=(16, 8), layers=1, peers=("torch-fp32", "torch", "heavyball"), pairs=4, warm_up=1)


@pytest.fixture(scope="module")
def cases():
    """With heavyball missing."""
    with pytest.MonkeyPatch.context() as patch:
        examine = step_module.examine
        patch.setattr(
            step_module, "examine", lambda who, work: "gone" if who.name == "heavyball" else examine(who, work)
        )
        told = []
        found = measure(BENCH, tell=told.append)
    assert told[0] == "gpt2 8: steepest"
    assert told[4] == "gpt2 8: 4 rounds of steepest, torch, torch-fp32"
    return found


def test_there_is_a_case_per_width_and_a_row_per_contestant(cases):
    assert [case.width for case in cases] == [8, 16]
    for case in cases:
        assert [row.contestant for row in case.rows] == ["steepest", "torch", "torch-fp32", "heavyball"]
        assert (case.matrices, case.parameters) == (6, 12 * case.width**2)
        assert case.largest_bucket_bytes == 4 * 4 * case.width**2
        assert case.cpu_share > 0
        assert set(case.floors) == {"float32", "bfloat16"}


def test_a_peer_without_numbers_has_a_reason(cases):
    row = cases[0].rows[3]
    assert (row.reason, row.milliseconds, row.ratio, row.gaussian) == ("gone", None, None, None)
    assert "heavyball" not in cases[0].seconds
    assert all(row.reason is None for row in cases[0].rows[:3])


def test_rows_follow_from_the_seconds(cases):
    for case in cases:
        for row in case.rows[:3]:
            own, base = case.seconds[row.contestant], case.seconds["steepest"]
            median = statistics.median(own)
            assert len(own) == BENCH.pairs
            assert row.milliseconds.median == pytest.approx(1e3 * median)
            assert row.ratio.median == pytest.approx(statistics.median(a / b for a, b in zip(own, base, strict=True)))
            assert row.gflops_per_second == pytest.approx(row.gflops / median)
            assert row.of_floor == pytest.approx(median / case.floors[row.products].seconds)
            assert row.of_limit == pytest.approx(median / case.limits[row.products].seconds)
            assert row.of_limit >= row.of_floor
            assert row.of_bucket == pytest.approx(row.peak_bytes / case.largest_bucket_bytes)
            assert 0.5 < row.gaussian.alignment <= 1.001


def test_the_floor_is_flops_over_measured_rates(cases):
    for case in cases:
        width, floor, rate = case.width, case.floors["float32"], case.gemm_gflops_per_second["float32"]
        square, long = 15 * width**3, 24 * width**3
        assert floor.flops == 4 * square + 2 * long
        expected = 4 * square / rate[f"{width}x{width}"] + 2 * long / rate[f"{width}x{4 * width}"]
        assert floor.seconds == pytest.approx(expected / 1e9)


def test_the_limit_is_the_floor_at_the_fastest_product(cases):
    for case in cases:
        for name, limit in case.limits.items():
            assert limit.flops == case.floors[name].flops
            assert limit.seconds <= case.floors[name].seconds
            for sides, rate in case.fastest_gflops_per_second[name].items():
                assert rate >= case.gemm_gflops_per_second[name][sides]
                seconds = [median for key, median in medians(case) if key.endswith(f" {sides} {name}")]
                m, n = map(int, sides.split("x"))
                assert rate == pytest.approx(2e-9 * m * m * n / min(seconds))


def medians(case):
    return [(key, statistics.median(own)) for key, own in case.seconds.items()]


def test_the_picture_has_a_panel_per_width_with_bars_floors_and_the_reason(cases):
    panels = [step_panel(case) for case in cases]
    assert [figure.title.split(":")[0] for figure in panels] == ["gpt2 8", "gpt2 16"]
    for figure, case in zip(panels, cases, strict=True):
        assert [bar.length for bar in figure.bars] == [row.milliseconds.median for row in case.rows[:3]]
        lines = [(curve.name.split(":")[0], curve.x[0]) for curve in figure.curves if curve.name]
        assert lines == [(f"floor of {dtype} products", 1e3 * floor.seconds) for dtype, floor in case.floors.items()]
        quartiles = [curve.x for curve in figure.curves if not curve.name]
        assert quartiles == [(row.milliseconds.low, row.milliseconds.high) for row in case.rows[:3]]
        assert "gone" in [label.text for label in figure.labels]
        assert [name for _, name in figure.y.ticks] == [row.contestant for row in case.rows]


def test_threads_are_set_for_the_benchmark_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(step_module, "_measure_case", lambda *_: seen.append(torch.get_num_threads()))
    measure(Bench(widths=(8,), threads=2), tell=print)
    assert (seen, torch.get_num_threads()) == ([2], 1)


def test_the_largest_bucket_holds_matrices_of_one_shape():
    assert largest_bucket([(2, 3), (3, 2), (2, 3), (2, 1, 3, 1), (4, 4)]) == 18


def test_sets_have_default_widths():
    assert Bench(shapes="gpt2").cases() == (256, 512, 768)
    assert Bench(shapes="many-small").cases() == (None,)
    assert set(CONTESTANTS) >= {"steepest", "torch", "heavyball"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pairs": 1}, "at least 2 pairs, for their quartiles, got pairs=1"),
        ({"dtype": "float23"}, "Unknown dtype 'float23': did you mean 'float32'"),
        ({"shapes": "lama"}, "Unknown set of shapes 'lama': did you mean 'llama'"),
        ({"widths": (8, 6)}, "gpt2 takes a width that is a positive multiple of 4, got 6"),
        ({"shapes": "many-small", "widths": (8,)}, "many-small has neither width nor layers"),
        ({"peers": ("tach",)}, "Unknown contestant 'tach'"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Bench(**options)
