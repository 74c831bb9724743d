"""Time of a step against each axis of the scaling study, measured and predicted, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from steepest.lab.bench.scaling import OF_ASPECT, SIDE, Row, Varied
from steepest.lab.report.palette import PAPER, styles

_TITLES: dict[Varied, str] = {
    "width": "width of one layer",
    "layers": f"layers of width {SIDE}",
    "aspect": f"long side / {SIDE}, of {OF_ASPECT} matrices",
}
_MARKS = ("measured", "predicted", "extra memory")


def scaling_png(rows: Sequence[Row]) -> bytes:
    """One panel per axis, both scales logarithmic: median and quartiles as dots, the prediction as a line.

    Args:
        rows: Of the study; an axis without rows has no panel.

    Returns:
        The PNG.
    """
    present: dict[Varied, list[Row]] = {}
    for row in rows:
        present.setdefault(row.point.axis, []).append(row)
    size = (1.0 + 4.2 * len(present), 4.2)
    canvas = FigureCanvasAgg(Figure(size, dpi=150, layout="constrained", facecolor=PAPER["light"]))
    panels = canvas.figure.subplots(1, len(present), squeeze=False)[0]
    handles = [_draw(axes, axis, own) for axes, (axis, own) in zip(panels, present.items(), strict=True)]
    canvas.figure.legend(handles[0], _MARKS, loc="outside lower center", ncols=3, frameon=False)
    buffer = BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _draw(axes: Axes, axis: Varied, rows: Sequence[Row]) -> list[Line2D]:
    """Draw a panel; returns what the key is to show."""
    colours = {name: style.light for name, style in styles(_MARKS, baseline="extra memory").items()}
    values = [row.point.value for row in rows]
    medians = [row.ms.median for row in rows]
    axes.set_facecolor(PAPER["light"])
    axes.vlines(values, [row.ms.low for row in rows], [row.ms.high for row in rows], color=colours["measured"])
    dots = axes.plot(values, medians, "o", color=colours["measured"])
    line = axes.plot(values, [row.predicted_ms for row in rows], color=colours["predicted"])
    memory = axes.twinx()
    megabytes = [row.peak_extra_bytes / 2**20 for row in rows]
    dotted = memory.plot(values, megabytes, ":", marker="s", markersize=4, color=colours["extra memory"])
    axes.set_xscale("log")
    for each, label in ((axes, "milliseconds of a step"), (memory, "peak extra memory, MiB")):
        each.set_yscale("log")
        each.yaxis.set_major_formatter("{x:g}")
        each.yaxis.set_minor_formatter(NullFormatter())
        each.set_ylabel(label)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=8)
    axes.set_xlabel(_TITLES[axis])
    axes.grid(color="#e6e6df", linewidth=0.8)
    worst = max(rows, key=lambda row: abs(row.error))
    axes.set_title(f"largest error of the prediction: {worst.error:+.0%} at {worst.point.value}", fontsize=9)
    return [*dots, *line, *dotted]
