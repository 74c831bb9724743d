"""A figure as plotly draws it in the page: traces and layout, ready for `Plotly.newPlot`."""

from __future__ import annotations

import html
import math
from typing import Literal

from steepest.lab.report import wording
from steepest.lab.report.figure import Axis, Bar, Curve, Dots, Figure, Row, Sort
from steepest.lab.report.palette import PAPER, Style

Theme = Literal["light", "dark"]
Json = dict[str, object]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_INK = {"light": "#1b1f24", "dark": "#e8eaed"}
_MUTED = {"light": "#5f6873", "dark": "#9aa4af"}
_HAIRLINE = {"light": "#e6e6df", "dark": "#2a2f36"}
_ZONE = {"light": "#eef0e2", "dark": "#22281f"}
_SIZES: dict[Sort, tuple[float, float]] = {  # pixels and opacity, in the order in which they are drawn
    "seed": (5, 0.45),
    "above": (8, 0.8),
    "up": (11, 1.0),
    "down": (11, 1.0),
    "diverged": (8, 1.0),
    "mean": (9, 1.0),
}
_SHAPES: dict[Sort, str] = {"above": "triangle-up", "up": "arrow-up", "down": "arrow-down", "diverged": "x"}
_SYMBOL = {
    "circle": "circle",
    "square": "square",
    "triangle": "triangle-up",
    "diamond": "diamond",
    "cross": "cross",
    "x": "x",
}


def to_plotly(figure: Figure, *, theme: Theme) -> Json:
    """The figure as {"data": [...], "layout": {...}}; text from outside is escaped for plotly's own markup."""
    traces = [_band(curve, theme) for curve in figure.curves if curve.low]
    traces += [_line(curve, theme) for curve in figure.curves]
    for row in figure.rows:
        traces += [_values(row, theme), _mean(row, theme)]
    traces += [_bar(bar, theme) for bar in figure.bars]
    traces += [_marks(dots, theme) for sort in _SIZES for dots in figure.dots if dots.sort == sort]
    layout: Json = {
        "height": figure.height,
        "margin": {"l": 8, "r": _right_margin(figure), "t": 24, "b": 8, "pad": 4},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 13, "color": _MUTED[theme]},
        "showlegend": False,
        "hovermode": "x" if figure.curves and not figure.dots else "closest",
        "hoverlabel": {"bgcolor": PAPER[theme], "font": {"family": FONT, "color": _INK[theme]}},
        "xaxis": _axis(figure.x, theme, grid=bool(figure.rows or figure.bars)),
        "yaxis": _axis(figure.y, theme, grid=bool(figure.curves)),
        "barmode": "overlay",
        "meta": {"keyed": figure.keyed},
        "shapes": [*_zone(figure, theme), *_rule_line(figure, theme)],
        "annotations": [*_labels(figure, theme), *_rule_text(figure, theme), *_small_print(figure, theme)],
    }
    return {"data": traces, "layout": layout}


def _right_margin(figure: Figure) -> int:
    return 16 + 9 * max((len(label.text) for label in figure.labels), default=0)


def _axis(axis: Axis, theme: Theme, *, grid: bool) -> Json:
    ticks: Json = {}
    if axis.ticks is not None:
        places, texts = [place for place, _ in axis.ticks], [_escaped(text) for _, text in axis.ticks]
        ticks = {"tickmode": "array", "tickvals": places, "ticktext": texts}
    return {
        "title": {"text": axis.title, "standoff": 10, "font": {"size": 13}},
        "type": "log" if axis.logarithmic else "linear",
        "range": [_place(axis, axis.low), _place(axis, axis.high)],
        "showgrid": grid,
        "gridcolor": _HAIRLINE[theme],
        "zeroline": False,
        "automargin": True,
        "nticks": 5,
        "minor": {"showgrid": False},
        **ticks,
    }


def _place(axis: Axis, value: float) -> float:
    """A value as plotly wants it in ranges and annotations, though not in traces and shapes."""
    return math.log10(value) if axis.logarithmic else value


def _band(curve: Curve, theme: Theme) -> Json:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*curve.x, *reversed(curve.x)],
        "y": [*curve.high, *reversed(curve.low)],
        "fill": "toself",
        "fillcolor": _translucent(curve.style.colour(theme), 0.16),
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def _line(curve: Curve, theme: Theme) -> Json:
    texts = [wording.loss(y) for y in curve.y]
    if curve.low:
        ranges = zip(texts, curve.low, curve.high, strict=True)
        texts = [f"{text} ({wording.loss(a)}{wording.DASH}{wording.loss(b)})" for text, a, b in ranges]
    if curve.bare:
        line: Json = {"color": curve.style.colour(theme), "width": 2, "dash": curve.style.dash}
        return {"type": "scatter", "mode": "lines", "x": curve.x, "y": curve.y, "line": line, "hoverinfo": "skip"}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": _escaped(wording.shortened(curve.name)),
        "x": curve.x,
        "y": curve.y,
        "text": texts,
        "hovertemplate": "%{text}",
        "line": {"color": curve.style.colour(theme), "width": 2.25, "dash": curve.style.dash},
        "marker": _marker(curve.style, theme, size=7) | {"maxdisplayed": 8},
    }


def _values(row: Row, theme: Theme) -> Json:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": row.values,
        "y": [row.y_values] * len(row.values),
        "text": [wording.signed(value) for value in row.values],
        "hovertemplate": "one seed: %{text}<extra></extra>",
        "marker": _marker(row.style, theme, size=8) | {"opacity": 0.4},
    }


def _mean(row: Row, theme: Theme) -> Json:
    colour = row.style.colour(theme)
    trace: Json = {
        "type": "scatter",
        "mode": "markers",
        "x": [row.mean],
        "y": [row.y],
        "text": [wording.signed(row.mean)],
        "hovertemplate": "mean: %{text}<extra></extra>",
        "marker": _marker(row.style, theme, size=14),
    }
    if row.interval is not None:
        up, down = row.interval.high - row.mean, row.mean - row.interval.low
        bar: Json = {"type": "data", "symmetric": False, "array": [up], "arrayminus": [down]}
        trace["error_x"] = bar | {"color": colour, "thickness": 2.5, "width": 6}
    return trace


def _marks(dots: Dots, theme: Theme) -> Json:
    size, opacity = _SIZES[dots.sort]
    marker = _marker(dots.style, theme, size=size) | {"opacity": opacity}
    if dots.sort in _SHAPES:
        marker |= {"symbol": _SHAPES[dots.sort], "color": dots.style.colour(theme), "line": {"width": 0}}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": _escaped(wording.shortened(dots.name)),
        "x": dots.x,
        "y": dots.y,
        "text": dots.texts,
        "hovertemplate": "%{text}",
        "marker": marker,
    }


def _bar(bar: Bar, theme: Theme) -> Json:
    return {
        "type": "bar",
        "orientation": "h",
        "x": [bar.length],
        "y": [bar.y],
        "width": [bar.thickness],
        "text": [bar.text],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": bar.style.colour(theme), "opacity": bar.opacity, "line": {"width": 0}},
    }


def _marker(style: Style, theme: Theme, *, size: float) -> Json:
    colour, paper = style.colour(theme), PAPER[theme]
    outline: Json = {"width": 1.5, "color": colour} if style.hollow else {"width": 1, "color": paper}
    return {
        "color": paper if style.hollow else colour,
        "symbol": _SYMBOL[style.marker],
        "size": size,
        "line": outline,
    }


def _labels(figure: Figure, theme: Theme) -> list[Json]:
    return [
        {
            "x": _place(figure.x, label.x),
            "y": _place(figure.y, label.y),
            "text": _escaped(label.text),
            "xanchor": "left",
            "xshift": 8,
            "showarrow": False,
            "bgcolor": _translucent(PAPER[theme], 0.75),
            "font": {"color": label.style.colour(theme), "size": 13, "weight": 600},
        }
        for label in figure.labels
    ]


def _zone(figure: Figure, theme: Theme) -> list[Json]:
    if figure.zone is None:
        return []
    span: Json = {"xref": "paper", "x0": 0, "x1": 1, "y0": figure.zone.low, "y1": figure.zone.high}
    return [{"type": "rect", "layer": "below", "fillcolor": _ZONE[theme], "line": {"width": 0}, **span}]


def _small_print(figure: Figure, theme: Theme) -> list[Json]:
    """The text over the frame; the zone is named by the caption, as marks could cover a text beside it."""
    if not figure.above:
        return []
    place: Json = {"x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "paper", "yanchor": "bottom"}
    font: Json = {"color": _MUTED[theme], "size": 12}
    return [{"text": _escaped(figure.above), "showarrow": False, "font": font, **place}]


def _rule_line(figure: Figure, theme: Theme) -> list[Json]:
    if figure.rule is None:
        return []
    along, across = ("y", "x") if figure.rule.axis == "y" else ("x", "y")
    value = figure.rule.value
    line: Json = {"color": _MUTED[theme], "width": 1.25, "dash": "dot"}
    span: Json = {f"{across}0": 0, f"{across}1": 1, f"{across}ref": "paper", f"{along}0": value, f"{along}1": value}
    return [{"type": "line", "layer": "below", "line": line, **span}]


def _rule_text(figure: Figure, theme: Theme) -> list[Json]:
    if figure.rule is None or not figure.rule.text:
        return []
    text: Json = {"text": _escaped(figure.rule.text), "showarrow": False, "font": {"color": _MUTED[theme], "size": 12}}
    if figure.rule.axis == "y":
        place: Json = {
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": _place(figure.y, figure.rule.value),
            "yanchor": "top",
        }
    else:
        place = {
            "x": _place(figure.x, figure.rule.value),
            "xanchor": "center",
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
        }
    return [text | place]


def _translucent(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)
