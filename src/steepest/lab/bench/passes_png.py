"""Bars of the passes of a step relative to the plain calls, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from steepest.lab.bench.passes import PLAIN, Passes
from steepest.lab.report.palette import PAPER, styles


def passes_png(cases: Mapping[str, Passes]) -> bytes:
    """One panel per case: medians of the ratios as bars, quartiles as whiskers.

    Args:
        cases: By title, at least one.

    Returns:
        The PNG.
    """
    size = (2.0 + 3.6 * len(cases), 2.4)
    canvas = FigureCanvasAgg(Figure(size, dpi=150, layout="constrained", facecolor=PAPER["light"]))
    panels = canvas.figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axes, (title, case) in zip(panels, cases.items(), strict=True):
        names = [row.way for row in case.rows]
        looks = styles(names, baseline=PLAIN)
        axes.set_facecolor(PAPER["light"])
        axes.barh(names, [row.ratio.median for row in case.rows], color=[looks[name].light for name in names])
        for place, row in enumerate(case.rows):
            axes.hlines(place, row.ratio.low, row.ratio.high, color="black", linewidth=1.2)
            text = f" {row.ratio.median:.3f}, {row.ms.median:.3g} ms"
            axes.text(row.ratio.high, place, text, va="center", fontsize=8)
        axes.set_xlim(0, 1.5 * max(row.ratio.high for row in case.rows))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("time / that of the plain calls")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    buffer = BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()
