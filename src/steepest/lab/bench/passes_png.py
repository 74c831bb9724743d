"""Bars of the passes of a step relative to the plain calls, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping

from steepest.lab.bench.passes import PLAIN, Passes
from steepest.lab.report.figure import Axis, Bar, Figure, Label, named, whisker
from steepest.lab.report.palette import TEXT, styles
from steepest.lab.report.vega import panels_png


def passes_png(cases: Mapping[str, Passes]) -> bytes:
    """One panel per case: medians of the ratios as bars, quartiles as whiskers.

    Args:
        cases: By title, at least one.

    Returns:
        The PNG.
    """
    panels = [_panel(title, case) for title, case in cases.items()]
    return panels_png(panels, columns=len(panels), width=300)


def _panel(title: str, case: Passes) -> Figure:
    names = [row.way for row in case.rows]
    looks = styles(names, baseline=PLAIN)
    rows = [(-float(i), row) for i, row in enumerate(case.rows)]
    return Figure(
        key="passes",
        title=title,
        caption="",
        x=Axis("time / that of the plain calls", 0.0, 1.6 * max(row.ratio.high for row in case.rows)),
        y=named(names),
        height=36 * len(names),
        bars=tuple(Bar(looks[row.way], y, 0.7, row.ratio.median, 1.0, "") for y, row in rows),
        curves=tuple(whisker(TEXT, row.ratio.low, row.ratio.high, y) for y, row in rows),
        labels=tuple(
            Label(row.ratio.high, y, f"{row.ratio.median:.3f}, {row.ms.median:.3g} ms", TEXT, bold=False)
            for y, row in rows
        ),
    )
