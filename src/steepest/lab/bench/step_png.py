"""The picture of a benchmark of steps: a panel per width, a bar per contestant, the floors as lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steepest.lab.bench.contestants import CONTESTANTS
from steepest.lab.bench.step import Case
from steepest.lab.report.figure import Axis, Bar, Curve, Figure, Label, named, whisker
from steepest.lab.report.palette import GUIDE, TEXT, Dash, styles
from steepest.lab.report.vega import panels_png
from steepest.lab.report.wording import shortened

_LOOKS = styles(("ours", "others"), baseline="others")
_LINES: dict[str, Dash] = {"float32": "solid", "bfloat16": "dash"}


def cases_png(cases: Sequence[Case]) -> bytes:
    """The picture as PNG.

    Args:
        cases: At least one.
    """
    return panels_png(list(map(panel, cases)), columns=1, width=560)


def panel(case: Case) -> Figure:
    """Medians as bars, quartiles as whiskers, a reason instead of a bar where there is no number."""
    y = named([row.contestant for row in case.rows])
    bars: list[Bar] = []
    whiskers: list[Curve] = []
    labels: list[Label] = []
    longest = 0.0
    for place, row in enumerate(case.rows):
        time, ratio = row.milliseconds, row.ratio
        if time is None or ratio is None:
            labels.append(Label(0.0, -float(place), shortened(row.reason or "", length=80), GUIDE, bold=False))
            continue
        look = _LOOKS["ours" if CONTESTANTS[row.contestant].ours else "others"]
        bars.append(Bar(look, -float(place), 0.66, time.median, 0.85, ""))
        whiskers.append(whisker(TEXT, time.low, time.high, -float(place)))
        text = f"{time.median:.4g} ms, {ratio.median:.2f} ×, {row.products}"
        labels.append(Label(max(time.high, time.median), -float(place), text, TEXT, bold=False))
        longest = max(longest, time.high)
    floors = [
        Curve(
            f"floor of {dtype} products: {1e3 * floor.seconds:.4g} ms",
            replace(GUIDE, dash=_LINES.get(dtype, "dot")),
            (1e3 * floor.seconds,) * 2,
            (y.low, y.high),
            (),
            (),
            bare=True,
        )
        for dtype, floor in case.floors.items()
    ]
    size = "" if case.width is None else f" {case.width}"
    return Figure(
        key="step",
        title=f"{case.shapes}{size}: {case.matrices} matrices, {case.parameters / 1e6:.3g} M entries",
        caption="",
        x=Axis("milliseconds per step: median and quartiles", 0.0, 1.4 * longest),
        y=y,
        height=32 * len(case.rows),
        bars=tuple(bars),
        curves=(*floors, *whiskers),
        labels=tuple(labels),
        keyed=True,
    )
