"""The pictures of the benchmarks, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from steepest.lab.bench.contestants import CONTESTANTS
from steepest.lab.bench.momenta import NORMAL, Finding
from steepest.lab.bench.passes import PLAIN, Passes
from steepest.lab.bench.scaling import OF_ASPECT, SIDE, Row, Varied
from steepest.lab.bench.step import Case
from steepest.lab.bench.train_share import BASELINE, Share
from steepest.lab.report.figure import Axis, Bar, Curve, Dots, Figure, Label, Rule, around, evenly, named, whisker
from steepest.lab.report.palette import GUIDE, TEXT, Dash, styles
from steepest.lab.report.vega import panels_png
from steepest.lab.report.wording import shortened

_STEP = styles(("ours", "others"), baseline="others")
_LINES: dict[str, Dash] = {"float32": "solid", "bfloat16": "dash"}
_PARTS = ("forward and backward", "optimizer")
_TRAIN = {
    name: replace(look, dash="solid", marker="square") for name, look in styles(_PARTS, baseline=_PARTS[0]).items()
}
_TITLES: dict[Varied, str] = {
    "width": "width of one layer",
    "layers": f"layers of width {SIDE}",
    "aspect": f"long side / {SIDE}, of {OF_ASPECT} matrices",
}
_SCALING = styles(("measured", "predicted", "extra memory"), baseline="extra memory")


def step_png(cases: Sequence[Case]) -> bytes:
    """A panel per width, a bar per contestant, the floors as lines.

    Args:
        cases: At least one.
    """
    return panels_png(list(map(step_panel, cases)), columns=1, width=560)


def step_panel(case: Case) -> Figure:
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
        look = _STEP["ours" if CONTESTANTS[row.contestant].ours else "others"]
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


def train_png(shares: Mapping[str, Sequence[Share]]) -> bytes:
    """One panel per preset, one bar per method.

    Args:
        shares: By preset, at least one, in order of the bars.

    Returns:
        The PNG.
    """
    last = list(shares)[-1]
    panels = [_train(preset, own, keyed=preset == last) for preset, own in shares.items()]
    return panels_png(panels, columns=len(panels), width=470)


def _train(preset: str, shares: Sequence[Share], *, keyed: bool) -> Figure:
    bars: list[Bar] = []
    labels: list[Label] = []
    for i, share in enumerate(shares):
        end = 0.0
        for name, own in zip(_PARTS, (share.forward_backward_ms, share.optimizer_ms), strict=True):
            bars.append(Bar(_TRAIN[name], -float(i), 0.72, own.median, 1.0, "", start=end, name=name))
            end += own.median
        against = "" if share.method == BASELINE else f", step x {share.step_ratio.median:.3f}"
        labels.append(Label(end, -float(i), f"{share.share:.1%}{against}", TEXT, bold=False))
    return Figure(
        key="train",
        title=f"{preset}: the optimizer's share, and the step against {BASELINE}'s",
        caption="",
        x=Axis("milliseconds of a training step (medians)", 0.0, 1.45 * max(label.x for label in labels)),
        y=named([share.method for share in shares]),
        height=30 * len(shares),
        bars=tuple(bars),
        labels=tuple(labels),
        keyed=keyed,
    )


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
    measured, predicted = _SCALING["measured"], _SCALING["predicted"]
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
        curves=(Curve("extra memory", _SCALING["extra memory"], places, megabytes, (), ()),),
    )


def _values(axis: Varied, rows: Sequence[Row]) -> Axis:
    values = [float(row.point.value) for row in rows]
    ticks = tuple((value, f"{value:g}") for value in values)
    return Axis(_TITLES[axis], min(values) / 1.15, max(values) * 1.15, logarithmic=True, ticks=ticks)


def momenta_png(findings: Sequence[Finding]) -> bytes:
    """A panel of distances and one of alignments: a line per set, a mark per source.

    Args:
        findings: At least one.

    Returns:
        The PNG.
    """
    left = _momenta(findings, "distance", "distance ‖Q - U Vᵀ‖ / √k")
    right = _momenta(findings, "alignment", "alignment <M, Q> / ‖M‖ nuclear")
    return panels_png([left, right], columns=2, width=330)


def _momenta(findings: Sequence[Finding], quantity: Literal["distance", "alignment"], title: str) -> Figure:
    names = list(dict.fromkeys(found.coefficients for found in findings))
    looks = styles(list(dict.fromkeys(found.source for found in findings)), baseline=NORMAL)
    dots: list[Dots] = []
    for source, look in looks.items():
        own = [found for found in findings if found.source == source]
        known = [(value, -float(names.index(one.coefficients))) for one in own if (value := getattr(one, quantity))]
        if known:
            x, y = zip(*known, strict=True)
            dots.append(Dots(source, look, "mean", x, y, ()))
    near = quantity == "alignment"
    values = [value for own in dots for value in own.x] + [1.0] * near
    margin = 0.06 * ((max(values) - min(values)) or 1.0) if values else 1.0
    low, high = (min(values) - margin if near else 0.0, max(values, default=0.0) + margin)
    refused = {names.index(found.coefficients) for found in findings if found.reason is not None}
    return Figure(
        key=quantity,
        title=quantity,
        caption="",
        x=Axis(title, low, high, ticks=evenly(low, high, most=5)),
        y=named([""] * len(names) if near else names),
        height=34 * len(names),
        dots=tuple(dots),
        rule=Rule("x", 1.0, "") if near else None,
        labels=tuple(Label(low, -float(row), "refused", GUIDE, bold=False) for row in sorted(refused)),
        keyed=near,
    )


def passes_png(cases: Mapping[str, Passes]) -> bytes:
    """One panel per case: medians of the ratios as bars, quartiles as whiskers.

    Args:
        cases: By title, at least one.

    Returns:
        The PNG.
    """
    panels = [_passes(title, case) for title, case in cases.items()]
    return panels_png(panels, columns=len(panels), width=300)


def _passes(title: str, case: Passes) -> Figure:
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
