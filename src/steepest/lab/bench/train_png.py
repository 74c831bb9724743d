"""Bars of a training step, the part of the optimizer in its own colour, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from steepest.lab.bench.train_share import BASELINE, Share
from steepest.lab.report.palette import PAPER, styles

_PARTS = ("forward and backward", "optimizer")


def train_png(shares: Mapping[str, Sequence[Share]]) -> bytes:
    """One panel per preset, one bar per method.

    Args:
        shares: By preset, at least one, in order of the bars.

    Returns:
        The PNG.
    """
    rows = max(map(len, shares.values()))
    size = (1.2 + 5.4 * len(shares), 1.4 + 0.36 * rows)
    canvas = FigureCanvasAgg(Figure(size, dpi=150, layout="constrained", facecolor=PAPER["light"]))
    panels = canvas.figure.subplots(1, len(shares), squeeze=False)[0]
    for axes, (preset, own) in zip(panels, shares.items(), strict=True):
        _draw(axes, preset, own)
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    buffer = BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _draw(axes: Axes, preset: str, shares: Sequence[Share]) -> None:
    names = [share.method for share in shares]
    looks = styles(_PARTS, baseline=_PARTS[0])
    before = [share.forward_backward_ms.median for share in shares]
    own = [share.optimizer_ms.median for share in shares]
    axes.set_facecolor(PAPER["light"])
    axes.barh(names, before, color=looks[_PARTS[0]].light, label=_PARTS[0])
    axes.barh(names, own, left=before, color=looks[_PARTS[1]].light, label=_PARTS[1])
    for place, share in enumerate(shares):
        text = f" {share.share:.1%}"
        if share.method != BASELINE:
            text += f", step x {share.step_ratio.median:.3f}"
        axes.text(before[place] + own[place], place, text, va="center", fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(b + o for b, o in zip(before, own, strict=True)))
    axes.set_xlabel("milliseconds of a training step (medians)")
    axes.set_title(f"{preset}: the optimizer's share, and the step against {BASELINE}'s", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
