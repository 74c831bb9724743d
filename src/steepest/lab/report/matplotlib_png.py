"""A figure as matplotlib draws it: a PNG on light ground, for papers, for print and for readers without scripts."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image

from steepest.lab.report.figure import Curve, Dots, Figure, Row, Sort
from steepest.lab.report.palette import PAPER, Style
from steepest.lab.report.wording import shortened

_WIDTH = 820  # pixels at 100 dots an inch; drawn at twice that
_MUTED, _HAIRLINE = "#5f6873", "#e6e6df"
_DASH = {
    "solid": "-",
    "dash": (0, (5, 2.5)),
    "dot": (0, (1, 1.6)),
    "dashdot": (0, (5, 2, 1, 2)),
    "longdash": (0, (9, 2.5)),
}
_ZONE = "#eef0e2"
_SIZES: dict[Sort, tuple[float, float]] = {
    "seed": (3.5, 0.45),
    "above": (6, 0.8),
    "up": (9, 1.0),
    "down": (9, 1.0),
    "diverged": (6, 1.0),
    "mean": (7, 1.0),
}
_SHAPES: dict[Sort, str] = {"above": "^", "up": "$\N{UPWARDS ARROW}$", "down": "$\N{DOWNWARDS ARROW}$", "diverged": "X"}
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
    for bar in figure.bars:
        axes.barh(bar.y, bar.length, bar.thickness, color=bar.style.light, alpha=bar.opacity, linewidth=0)
    for dots in figure.dots:
        _draw_dots(axes, dots)
    if figure.zone is not None:
        axes.axhspan(figure.zone.low, figure.zone.high, color=_ZONE, linewidth=0, zorder=0.5)
    _draw_frame(axes, figure)
    _draw_text(axes, figure)
    if figure.keyed:
        _draw_key(axes, figure)
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
        linewidth=1.8,
        markevery=max(1, len(curve.x) // 8),
        **_dash(curve.style),
        **({} if curve.bare else _marker(curve.style, size=5)),
    )


def _marker(style: Style, *, size: float) -> dict[str, Any]:
    colour, paper = style.light, PAPER["light"]
    fill, edge = (paper, colour) if style.hollow else (colour, paper)
    return {
        "marker": _MARKER[style.marker],
        "markersize": size,
        "markerfacecolor": fill,
        "markeredgecolor": edge,
    }


def _dash(style: Style) -> dict[str, Any]:
    return {"linestyle": _DASH[style.dash]}


def _draw_dots(axes: Axes, dots: Dots) -> None:
    size, alpha = _SIZES[dots.sort]
    look = _marker(dots.style, size=size)
    if dots.sort in _SHAPES:
        look |= {"marker": _SHAPES[dots.sort], "markerfacecolor": dots.style.light, "markeredgecolor": "none"}
    above = 2.5 if dots.sort == "mean" else 2.2
    axes.plot(dots.x, dots.y, linestyle="none", alpha=alpha, clip_on=False, zorder=above, **look)


def _draw_key(axes: Axes, figure: Figure) -> None:
    looks = {mark.name: mark.style for mark in (*figure.curves, *figure.dots)}
    handles = [
        Line2D([], [], color=style.light, linewidth=1.8, **_marker(style, size=7), **_dash(style))
        for style in looks.values()
    ]
    # the length of the handles is that of three dashes and two gaps
    names, corner = [shortened(name) for name in looks], (1.0, 1.0)
    key = axes.legend(
        handles, names, fontsize=10.5, handlelength=3.43, frameon=False, loc="upper left", bbox_to_anchor=corner
    )
    for text, style in zip(key.get_texts(), looks.values(), strict=True):
        text.set(color=style.light, fontweight="bold", parse_math=False)


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
    if figure.x.logarithmic:
        axes.set_xscale("log")
    if figure.y.logarithmic:
        axes.set_yscale("log")
    axes.tick_params(which="minor", length=0)
    axes.set_xlim(figure.x.low, figure.x.high)
    axes.set_ylim(figure.y.low, figure.y.high)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x" if figure.rows or figure.bars else "y", color=_HAIRLINE, linewidth=1)
    axes.tick_params(length=0, colors=_MUTED, labelsize=10)
    for side, axis in ((axes.xaxis, figure.x), (axes.yaxis, figure.y)):
        side.set_label_text(axis.title, color=_MUTED, fontsize=10.5, parse_math=False)
        if axis.logarithmic:
            side.set_minor_formatter(NullFormatter())
        else:
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
    _draw_small_print(axes, figure)
    rule = figure.rule
    if rule is None or not rule.text:
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


def _draw_small_print(axes: Axes, figure: Figure) -> None:
    """Over the frame: what its marks mean on the left, what the shaded zone is on the right."""
    zone = "" if figure.zone is None else f"shaded: {figure.zone.text}"
    for text, x, side in ((figure.above, 0.0, "left"), (zone, 1.0, "right")):
        axes.annotate(
            text,
            (x, 1),
            xycoords="axes fraction",
            xytext=(0, 3),
            textcoords="offset points",
            horizontalalignment=side,
            verticalalignment="bottom",
            color=_MUTED,
            fontsize=9.5,
            annotation_clip=False,
            parse_math=False,
        )
