"""The picture of a benchmark of steps: a panel per width, a bar per contestant, the floors as lines."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from steepest.lab.bench.contestants import CONTESTANTS
from steepest.lab.bench.step import Case, Row
from steepest.lab.report.palette import PAPER, styles

_LOOKS = styles(("ours", "others"), baseline="others")
_MUTED = "#5f6873"
_LINES = {"float32": "-", "bfloat16": (0, (4, 2))}
_PANEL, _ROW, _FRAME = 8.2, 0.32, 1.35  # inches: width of all, height of a bar, height of what is around them


def cases_png(cases: Sequence[Case]) -> bytes:
    """The picture as PNG.

    Args:
        cases: At least one.
    """
    buffer = BytesIO()
    draw(cases).savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def draw(cases: Sequence[Case]) -> Figure:
    """The picture: medians as bars, quartiles as whiskers, a reason instead of a bar where there is no number."""
    heights = [_FRAME + _ROW * len(case.rows) for case in cases]
    figure = Figure((_PANEL, sum(heights)), layout="constrained", facecolor=PAPER["light"])
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(cases), squeeze=False, height_ratios=heights)
    for axes, case in zip(panels.flat, cases, strict=True):
        _draw_panel(axes, case)
    return figure


def _draw_panel(axes: Axes, case: Case) -> None:
    axes.set_facecolor(PAPER["light"])
    for place, row in enumerate(case.rows):
        _draw_row(axes, place, row)
    for dtype, floor in case.floors.items():
        style = _LINES.get(dtype, ":")
        label = f"floor of {dtype} products: {1e3 * floor.seconds:.4g} ms"
        axes.axvline(1e3 * floor.seconds, color=_MUTED, linestyle=style, linewidth=1.3, label=label)
    longest = max(row.milliseconds.high for row in case.rows if row.milliseconds is not None)
    axes.set_xlim(0, 1.35 * longest)
    axes.set_ylim(len(case.rows) - 0.4, -0.6)
    axes.set_yticks(range(len(case.rows)), [row.contestant for row in case.rows])
    axes.set_xlabel("milliseconds per step: median and quartiles", color=_MUTED)
    size = "" if case.width is None else f" {case.width}"
    axes.set_title(
        f"{case.shapes}{size}: {case.matrices} matrices, {case.parameters / 1e6:.3g} M entries",
        loc="left",
        fontsize=11,
        fontweight="bold",
        pad=22,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, ncols=2, frameon=False, fontsize=8.5)


def _draw_row(axes: Axes, place: int, row: Row) -> None:
    time, ratio = row.milliseconds, row.ratio
    if time is None or ratio is None:
        reason = row.reason or ""
        text = reason if len(reason) <= 80 else f"{reason[:79]}…"
        axes.annotate(
            text,
            (0, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=_MUTED,
            parse_math=False,
        )
        return
    look = _LOOKS["ours" if CONTESTANTS[row.contestant].ours else "others"]
    axes.barh(place, time.median, 0.66, color=look.light, alpha=0.85, linewidth=0)
    axes.hlines(place, time.low, time.high, color="black", linewidth=1.2)
    text = f"{time.median:.4g} ms, {ratio.median:.2f} ×, {row.products}"
    axes.annotate(
        text,
        (max(time.high, time.median), place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        bbox={"facecolor": PAPER["light"], "edgecolor": "none", "pad": 1},
    )
