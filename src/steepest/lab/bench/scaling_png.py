"""Time and memory of a step against each axis of the scaling study, measured and predicted, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence

from steepest.lab.bench.scaling import OF_ASPECT, SIDE, Row, Varied
from steepest.lab.report.figure import Axis, Curve, Dots, Figure, around
from steepest.lab.report.palette import styles
from steepest.lab.report.vega import panels_png

_TITLES: dict[Varied, str] = {
    "width": "width of one layer",
    "layers": f"layers of width {SIDE}",
    "aspect": f"long side / {SIDE}, of {OF_ASPECT} matrices",
}
_LOOKS = styles(("measured", "predicted", "extra memory"), baseline="extra memory")


def scaling_png(rows: Sequence[Row]) -> bytes:
    """A column per axis, all scales logarithmic: above the time, median and quartiles as dots and whiskers and the
    prediction as a line; below the memory.

    Args:
        rows: Of the study; an axis without rows has no panel.

    Returns:
        The PNG.
    """
    present: dict[Varied, list[Row]] = {}
    for row in rows:
        present.setdefault(row.point.axis, []).append(row)
    last = list(present)[-1]
    times = [_time(axis, own, keyed=axis == last) for axis, own in present.items()]
    memory = [_memory(axis, own) for axis, own in present.items()]
    return panels_png([*times, *memory], columns=len(present), width=300)


def _time(axis: Varied, rows: Sequence[Row], *, keyed: bool) -> Figure:
    x = _values(axis, rows)
    places = tuple(place for place, _ in x.ticks or ())
    worst = max(rows, key=lambda row: abs(row.error))
    ends = [end for row in rows for end in (row.ms.low, row.ms.high, row.predicted_ms)]
    measured, predicted = _LOOKS["measured"], _LOOKS["predicted"]
    medians = Dots("measured", measured, "mean", places, tuple(row.ms.median for row in rows), ())
    quartiles = (
        Curve("measured", measured, (place, place), (row.ms.low, row.ms.high), (), (), bare=True)
        for place, row in zip(places, rows, strict=True)
    )
    line = Curve("predicted", predicted, places, tuple(row.predicted_ms for row in rows), (), (), bare=True)
    return Figure(
        key="time",
        title=f"largest error of the prediction: {worst.error:+.0%} at {worst.point.value}",
        caption="",
        x=x,
        y=around("milliseconds of a step", ends),
        height=240,
        curves=(*quartiles, line),
        dots=(medians,),
        keyed=keyed,
    )


def _memory(axis: Varied, rows: Sequence[Row]) -> Figure:
    x = _values(axis, rows)
    megabytes = tuple(row.peak_extra_bytes / 2**20 for row in rows)
    places = tuple(place for place, _ in x.ticks or ())
    return Figure(
        key="memory",
        title="peak extra memory",
        caption="",
        x=x,
        y=around("peak extra memory, MiB", megabytes),
        height=140,
        curves=(Curve("extra memory", _LOOKS["extra memory"], places, megabytes, (), ()),),
    )


def _values(axis: Varied, rows: Sequence[Row]) -> Axis:
    values = [float(row.point.value) for row in rows]
    ticks = tuple((value, f"{value:g}") for value in values)
    return Axis(_TITLES[axis], min(values) / 1.15, max(values) * 1.15, logarithmic=True, ticks=ticks)
