"""A figure as Vega-Lite: one specification, which the page draws live and of which pictures are made.

Colours follow the parameter `dark`, which the page sets and a picture leaves. The layers "names" and "key" are the
two ways to tell which curve is whose; a page with too little room takes them out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from io import BytesIO
from itertools import count
from typing import Any, cast

import vl_convert
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from steepest.lab.report import wording
from steepest.lab.report.figure import Axis, Bar, Curve, Figure, Label, Sort, cut, pieces, whisker
from steepest.lab.report.palette import INK, MUTED, PAPER, Dash, Marker, Style

Json = dict[str, Any]

SHOWN = "figure"  # text in a PNG: SHA-256 of the specification that it was drawn from
_WIDTH = 820  # pixels of a picture of one figure, drawn at twice that
_HAIRLINE, _ZONE = ("#e6e6df", "#2a2f36"), ("#eef0e2", "#22281f")
_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"  # the first comes with the renderer
_DASHES: dict[Dash, list[float]] = {
    "solid": [1, 0],
    "dash": [8, 4],
    "dot": [2, 2.5],
    "dashdot": [8, 3, 2, 3],
    "longdash": [14, 4],
}
_X = "M-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0L-1,-.6Z"
_TRIANGLE, _DIAMOND = "M0,-1.15L1.2,.95H-1.2Z", "M0,-1.3L1.2,0L0,1.3L-1.2,0Z"
_UP, _DOWN = "M0,-1L.7,-.1H.2V1H-.2V-.1H-.7Z", "M0,1L.7,.1H.2V-1H-.2V.1H-.7Z"
_SHAPES: dict[Marker, str] = {
    "circle": "circle",
    "square": "square",
    "triangle": _TRIANGLE,
    "diamond": _DIAMOND,
    "cross": "cross",
    "x": _X,
}
_END = "M0,-1V1"  # of an interval
_SORTS: dict[Sort, tuple[float, float, str | None]] = {  # pixels, opacity, own shape; in the order of drawing
    "seed": (5, 0.45, None),
    "above": (8, 0.8, _TRIANGLE),
    "up": (12, 1.0, _UP),
    "down": (12, 1.0, _DOWN),
    "diverged": (8, 1.0, _X),
    "mean": (9, 1.0, None),
}
_FIXED = ("type", "align", "baseline", "dx", "xOffset", "fontSize")
_TOLD = "(datum.datum || datum).text"  # while hovering, at or near the mark
_COLOUR = "(dark ? datum.dark : datum.light)"


def to_vega(figure: Figure) -> Json:
    """The specification, as wide as what it is put into. Text is literal: none is read as markup or expression."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": f"{figure.title}. {figure.caption}".strip(),
        "usermeta": {"keyed": figure.keyed, "room": 16 + 9 * max((len(one.text) for one in figure.labels), default=0)},
        "params": [{"name": "dark", "value": False}],
        "width": "container",
        "height": figure.height,
        "autosize": {"type": "fit", "contains": "padding"},
        "layer": list(_layers(figure)),
        "config": _config(),
    }


def to_png(figure: Figure) -> bytes:
    """The picture as PNG on light ground; the same figure gives the same bytes.

    It is also what a page prints, and shows without scripts: text of an SVG would need the fonts it was laid out for.
    """
    return _png(to_vega(figure) | {"width": _WIDTH})


def panels_png(figures: Sequence[Figure], *, columns: int, width: int) -> bytes:
    """Figures as the panels of one picture, each with its title over it.

    Args:
        figures: At least one, whose heights are those of the frames.
        columns: Of panels.
        width: Of the frame of a panel in pixels.

    Returns:
        The PNG.
    """
    spec = to_vega(figures[0])
    shared = {key: spec[key] for key in ("$schema", "params", "config")}
    frames = [{"title": one.title, "width": width, "height": one.height} for one in figures]
    # a name that is in two panels would give both the rows of one
    layers = [{"layer": [layer | {"name": None} for layer in _layers(one)]} for one in figures]
    panels = [frame | own for frame, own in zip(frames, layers, strict=True)]
    return _png(shared | {"concat": panels, "columns": columns, "spacing": 30})


def _png(spec: Json) -> bytes:
    """With few colours, and therefore small; it says what it shows, whatever fonts the machine has."""
    drawn = Image.open(BytesIO(vl_convert.vegalite_to_png(spec, scale=2))).convert("RGB")
    buffer, said = BytesIO(), PngInfo()
    said.add_text(SHOWN, hashlib.sha256(json.dumps(_rounded(spec)).encode()).hexdigest())
    drawn.quantize(colors=192, dither=Image.Dither.NONE).save(buffer, "png", optimize=True, pnginfo=said)
    return buffer.getvalue()


def _rounded(spec: Any) -> Any:
    """With six digits of each number: another machine may round the logarithm of a number otherwise."""
    if isinstance(spec, dict):
        return {key: _rounded(value) for key, value in cast(Json, spec).items()}
    if isinstance(spec, list | tuple):
        return [_rounded(value) for value in cast("Sequence[Any]", spec)]
    return f"{spec:.6g}" if isinstance(spec, float) else spec


def _config() -> Json:
    muted, line, paper, ink = ({"expr": _theme(*pair)} for pair in (MUTED, _HAIRLINE, PAPER.values(), INK))
    axis = {"domain": False, "ticks": False, "gridColor": line, "labelPadding": 6, "titlePadding": 10}
    text = {"labelColor": muted, "titleColor": muted, "labelFontSize": 12, "titleFontSize": 12.5}
    return {
        "font": _FONT,
        "background": paper,
        "padding": 6,
        "axis": axis | text | {"titleFontWeight": "normal", "labelFlush": False, "labelLimit": 0},
        "view": {"stroke": None},
        "title": {"anchor": "start", "frame": "group", "fontSize": 13, "color": ink},
    }


@cache
def script(snippet: str) -> str:
    """JavaScript that draws specifications without asking anybody for anything: Vega's, and a snippet that uses it.

    Args:
        snippet: May call `vegaEmbed`.
    """
    return vl_convert.javascript_bundle(snippet)


def _theme(light: str, dark: str) -> str:
    return f"(dark ? '{dark}' : '{light}')"


def _layers(figure: Figure) -> Iterator[Json]:
    """From the ground up."""
    across = bool(figure.rows or figure.bars)  # values run along x
    place = {
        "x": {"field": "x"} | _axis(figure.x, grid=across),
        "y": {"field": "y"} | _axis(figure.y, grid=not across),
    }
    ends = {"x2": {"field": "x2"}, "y2": {"field": "y2"}}
    if figure.zone is not None:
        rows = [{"y": figure.zone.low, "y2": figure.zone.high}]
        yield from _layer({"type": "rect", "fill": _theme(*_ZONE)}, rows, {"y": place["y"], "y2": ends["y2"]})
    if figure.rule is not None:
        dotted = {"type": "rule", "stroke": _theme(*MUTED), "strokeDash": str(_DASHES["dot"])}
        own = {figure.rule.axis: place[figure.rule.axis]}
        yield from _layer(dotted, [{figure.rule.axis: figure.rule.value}], own)
    filled = {"type": "rect", "fill": _COLOUR, "fillOpacity": "datum.opacity", "tooltip": _TOLD}
    yield from _layer(filled, list(map(_bar, figure.bars)), place | ends)
    intervals = [whisker(row.style, row.interval.low, row.interval.high, row.y) for row in figure.rows if row.interval]
    own = place | {"detail": {"field": "line"}}
    band = own | {"y": place["y"] | {"field": "low"}, "y2": {"field": "high"}}
    pale = {"type": "area", "fill": _COLOUR, "fillOpacity": "0.16"}
    yield from _layer(pale, list(_bands(figure.curves, figure)), band)
    dashed = {"type": "line", "stroke": _COLOUR, "strokeDash": "datum.dash", "strokeWidth": "2"}
    yield from _layer(dashed, list(_lines([*figure.curves, *intervals], figure)), own)
    points = [*_curve_points(figure), *_row_points(figure), *_dots(figure)]
    yield from _layer(_point_look(), points, place, name="points")
    yield from _names(figure.labels, place)
    if figure.keyed:
        yield {"name": "key", "layer": list(_key(figure))}
    yield from _small_print(figure, place)


def _layer(look: Json, rows: Sequence[Json], encoding: Json, *, name: str = "") -> Iterator[Json]:
    """One layer of rows, or none; of the look, all but what is fixed is an expression.

    What hovering tells is also what is read aloud; of other marks nothing is.
    """
    if rows:
        fixed = {key: look[key] for key in _FIXED if key in look}
        mark = fixed | {key: {"expr": value} for key, value in look.items() if key not in fixed}
        mark |= {"description": mark["tooltip"]} if "tooltip" in mark else {"aria": False}
        yield {"data": {"values": rows}, "mark": mark, "encoding": encoding} | ({"name": name} if name else {})


def _axis(axis: Axis, *, grid: bool) -> Json:
    look: Json = {"title": axis.title or None, "grid": grid}
    if axis.ticks is None:
        look["tickCount"] = 5
    else:
        places, texts = [place for place, _ in axis.ticks], [text for _, text in axis.ticks]
        look |= {"values": places, "labelExpr": f"{json.dumps(texts)}[indexof({json.dumps(places)}, datum.value)]"}
        look["labelOverlap"] = "greedy" if axis.title else False  # names of rows have no title
    scale: Json = {"domain": [axis.low, axis.high], "nice": False}
    scale |= {"type": "log"} if axis.logarithmic else {"zero": False}
    return {"type": "quantitative", "axis": look, "scale": scale}


def _colours(style: Style) -> Json:
    return {"light": style.light, "dark": style.dark}


def _bar(bar: Bar) -> Json:
    left, right, half = bar.start, bar.start + bar.length, bar.thickness / 2
    ends = {"x": left, "x2": right, "y": bar.y - half, "y2": bar.y + half}
    return ends | {"opacity": bar.opacity, "text": bar.text} | _colours(bar.style)


def _lines(curves: Sequence[Curve], figure: Figure) -> Iterator[Json]:
    """As far as they are in the frame. They are cut here, as pictures with clipped layers take long to draw."""
    number = count()
    for curve in curves:
        look = {"dash": _DASHES[curve.style.dash], **_colours(curve.style)}
        for piece in pieces(list(zip(curve.x, curve.y, strict=True)), figure.x, figure.y):
            own = look | {"line": next(number)}
            yield from ({"x": x, "y": y} | own for x, y in piece)


def _bands(curves: Sequence[Curve], figure: Figure) -> Iterator[Json]:
    for number, curve in enumerate(curves):
        if curve.low:
            for x, low, high in cut(list(zip(curve.x, curve.low, curve.high, strict=True)), figure.x, figure.y):
                ends = {"low": figure.y.clamp(low), "high": figure.y.clamp(high)}
                yield {"x": x, "line": number} | ends | _colours(curve.style)


def _point_look() -> Json:
    paper = _theme(**PAPER)
    fill, edge = f"datum.hollow ? {paper} : {_COLOUR}", f"datum.hollow ? {_COLOUR} : {paper}"
    numbers = {key: f"datum.{key}" for key in ("shape", "size", "opacity", "strokeWidth")} | {"tooltip": _TOLD}
    return {"type": "point", "fill": fill, "stroke": edge, **numbers}


def _point(
    x: float, y: float, text: str, style: Style, *, size: float, opacity: float = 1.0, shape: str | None = None
) -> Json:
    hollow = style.hollow if shape is None else shape == _END
    edge = 2 if shape == _END else 0 if shape else 1.5 if hollow else 1
    look = {"shape": shape or _SHAPES[style.marker], "size": size**2, "opacity": opacity, "strokeWidth": edge}
    return {"x": x, "y": y, "text": text, "hollow": hollow} | look | _colours(style)


def _curve_points(figure: Figure) -> Iterator[Json]:
    """Every point in the frame can be hovered; about eight of a curve are seen."""
    for curve in figure.curves:
        for i, (x, y) in enumerate(zip(curve.x, curve.y, strict=True)):
            if not curve.bare and figure.x.low <= x <= figure.x.high and figure.y.low <= y <= figure.y.high:
                text = wording.loss(y)
                if curve.low:
                    text += f" ({wording.loss(curve.low[i])}{wording.DASH}{wording.loss(curve.high[i])})"
                text = f"{wording.shortened(curve.name)} at {x:.4g}: {text}"
                seen = float(i % max(1, len(curve.x) // 8) == 0)
                yield _point(x, y, text, curve.style, size=7, opacity=seen)


def _row_points(figure: Figure) -> Iterator[Json]:
    for row in figure.rows:
        for value in row.values:
            yield _point(value, row.y_values, f"one seed: {wording.signed(value)}", row.style, size=8, opacity=0.4)
        for end in (row.interval.low, row.interval.high) if row.interval else ():
            yield _point(end, row.y, "", row.style, size=12, shape=_END)
        yield _point(row.mean, row.y, f"mean: {wording.signed(row.mean)}", row.style, size=14)


def _dots(figure: Figure) -> Iterator[Json]:
    for sort, (size, opacity, shape) in _SORTS.items():
        for dots in figure.dots:
            if dots.sort == sort:
                texts = dots.texts or ("",) * len(dots.x)
                for x, y, text in zip(dots.x, dots.y, texts, strict=True):
                    told = ": ".join(filter(None, (wording.shortened(dots.name), text)))
                    yield _point(x, y, told, dots.style, size=size, opacity=opacity, shape=shape)


def _names(labels: Sequence[Label], place: Json) -> Iterator[Json]:
    """Text over a ground that keeps lines out of it."""
    look = {"type": "text", "align": "left", "dx": 8, "fontSize": 12.5, "text": "datum.text"}
    look |= {"fontWeight": "datum.bold ? 600 : 400"}
    ground = look | {"fill": _theme(**PAPER), "stroke": _theme(**PAPER), "strokeWidth": "4", "opacity": "0.75"}
    rows = [{"x": one.x, "y": one.y, "text": one.text, "bold": one.bold} | _colours(one.style) for one in labels]
    if rows:
        layers = [*_layer(ground, rows, place), *_layer(look | {"fill": _COLOUR}, rows, place)]
        yield {"name": "names", "layer": layers}


def _key(figure: Figure) -> Iterator[Json]:
    """To the right of the frame: line and marker of each method, as far as it is drawn with them, and its name."""
    lined = {curve.name for curve in figure.curves}
    marked = {mark.name for mark in (*figure.dots, *figure.bars)} | {one.name for one in figure.curves if not one.bare}
    looks = {mark.name: mark.style for mark in (*figure.curves, *figure.dots, *figure.bars) if mark.name}
    rows = {
        name: _point(0, 10 + 21 * i, wording.shortened(name, length=40), style, size=8) | {"dash": _DASHES[style.dash]}
        for i, (name, style) in enumerate(looks.items())
    }
    at = {"x": {"value": "width"}}
    line = {"shape": "'M-1,0H1'", "size": "34 * 34", "stroke": _COLOUR, "strokeDash": "datum.dash", "strokeWidth": "2"}
    symbol = {"type": "point", "xOffset": 33, "y": "datum.y"}
    yield from _layer(symbol | line, [row for name, row in rows.items() if name in lined], at)
    yield from _layer(symbol | _point_look(), [row for name, row in rows.items() if name in marked], at)
    text = {"type": "text", "align": "left", "xOffset": 58, "fontSize": 12.5, "text": "datum.text"}
    yield from _layer(text | {"fontWeight": "600", "fill": _COLOUR, "y": "datum.y"}, list(rows.values()), at)


def _small_print(figure: Figure, place: Json) -> Iterator[Json]:
    """Over the frame what its marks and its shaded zone mean; beside a rule what it is."""
    look = {"type": "text", "text": "datum.text", "fontSize": 11.5, "fill": _theme(*MUTED)}
    over = look | {"baseline": "bottom", "y": "-4"}
    zone = [] if figure.zone is None else [{"text": f"shaded: {figure.zone.text}"}]
    yield from _layer(over | {"align": "left", "x": "0"}, [{"text": figure.above}] if figure.above else [], {})
    yield from _layer(over | {"align": "right"}, zone, {"x": {"value": "width"}}, name="zone")
    rule = figure.rule
    if rule is not None and rule.text:
        own = over | {"align": "center"} if rule.axis == "x" else look | {"align": "left", "baseline": "top", "x": "2"}
        yield from _layer(own, [{"text": rule.text, rule.axis: rule.value}], {rule.axis: place[rule.axis]})
