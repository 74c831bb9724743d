"""A figure as matplotlib draws it: a PNG on light ground, for papers, for print and for readers without scripts."""

from __future__ import annotations

from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image

from steepest.lab.report.figures import Curve, Figure, Row
from steepest.lab.report.palette import PAPER

_WIDTH = 820  # pixels at 100 dots an inch; drawn at twice that
_MUTED, _HAIRLINE = "#5f6873", "#e6e6df"
_DASH = {
    "solid": "-",
    "dash": (0, (5, 2.5)),
    "dot": (0, (1, 1.6)),
    "dashdot": (0, (5, 2, 1, 2)),
    "longdash": (0, (9, 2.5)),
}
_MARKER = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "P", "x": "X"}


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG; the same figure gives the same bytes. No text is read as mathematics."""
    size = (_WIDTH / 100, figure.height / 100)
    canvas = FigureCanvasAgg(Canvas(size, dpi=200, layout="constrained", facecolor=PAPER["light"]))
    axes = canvas.figure.add_subplot(facecolor=PAPER["light"])
    for curve in figure.curves:
        _draw_curve(axes, curve)
    for row in figure.rows:
        _draw_row(axes, row)
    _draw_frame(axes, figure)
    _draw_text(axes, figure)
    canvas.draw()
    # few colours are in use: a palette makes the file a third of the size
    drawn = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    buffer = BytesIO()
    drawn.quantize(colors=192, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _draw_curve(axes: Axes, curve: Curve) -> None:
    colour = curve.style.light
    if curve.low:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        curve.x,
        curve.y,
        color=colour,
        linestyle=_DASH[curve.style.dash],
        linewidth=1.8,
        marker=_MARKER[curve.style.marker],
        markersize=5,
        markeredgecolor=PAPER["light"],
        markevery=max(1, len(curve.x) // 8),
    )


def _draw_row(axes: Axes, row: Row) -> None:
    colour, marker = row.style.light, _MARKER[row.style.marker]
    if row.interval is not None:
        axes.hlines(row.y, row.interval.low, row.interval.high, color=colour, linewidth=2)
        ends = (row.interval.low, row.interval.high)
        axes.plot(ends, (row.y, row.y), marker="|", markersize=10, markeredgewidth=2, linestyle="none", color=colour)
    for values, y, markersize, alpha in ((row.values, row.y_values, 6, 0.4), ((row.mean,), row.y, 11, 1.0)):
        heights = [y] * len(values)
        axes.plot(
            values,
            heights,
            linestyle="none",
            color=colour,
            alpha=alpha,
            marker=marker,
            markersize=markersize,
            markeredgecolor=PAPER["light"],
        )


def _draw_frame(axes: Axes, figure: Figure) -> None:
    if figure.y.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
    axes.set_xlim(figure.x.low, figure.x.high)
    axes.set_ylim(figure.y.low, figure.y.high)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x" if figure.rows else "y", color=_HAIRLINE, linewidth=1)
    axes.tick_params(length=0, colors=_MUTED, labelsize=10)
    for side, axis in ((axes.xaxis, figure.x), (axes.yaxis, figure.y)):
        side.set_label_text(axis.title, color=_MUTED, fontsize=10.5, parse_math=False)
        if not axis.logarithmic:
            side.set_major_locator(MaxNLocator(6))
        if axis.ticks is not None:
            side.set_ticks([place for place, _ in axis.ticks], [text for _, text in axis.ticks], parse_math=False)
    if figure.rule is not None:
        draw = axes.axhline if figure.rule.axis == "y" else axes.axvline
        draw(figure.rule.value, color=_MUTED, linewidth=1, linestyle=(0, (1, 1.6)), zorder=0.9)


def _draw_text(axes: Axes, figure: Figure) -> None:
    for label in figure.labels:
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(8, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=label.style.light,
            fontsize=10.5,
            fontweight="bold",
            bbox={"facecolor": PAPER["light"], "alpha": 0.75, "edgecolor": "none", "pad": 1},
            annotation_clip=False,
            parse_math=False,
        )
    rule = figure.rule
    if rule is None:
        return
    horizontal = rule.axis == "y"
    axes.annotate(
        rule.text,
        (0, rule.value) if horizontal else (rule.value, 1),
        xycoords=axes.get_yaxis_transform() if horizontal else axes.get_xaxis_transform(),
        xytext=(2, -3) if horizontal else (0, 3),
        textcoords="offset points",
        horizontalalignment="left" if horizontal else "center",
        verticalalignment="top" if horizontal else "bottom",
        color=_MUTED,
        fontsize=9.5,
        annotation_clip=False,
        parse_math=False,
    )
