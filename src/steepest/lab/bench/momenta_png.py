"""How far each set of coefficients is from the polar factor, on momenta and on normal matrices, as a PNG."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from steepest.lab.bench.momenta import NORMAL, Finding
from steepest.lab.report.palette import PAPER, styles


def momenta_png(findings: Sequence[Finding]) -> bytes:
    """A panel of distances and one of alignments: a line per set, a mark per source.

    Args:
        findings: At least one.

    Returns:
        The PNG.
    """
    names = list(dict.fromkeys(found.coefficients for found in findings))
    size = (9.6, 1.8 + 0.36 * len(names))
    canvas = FigureCanvasAgg(Figure(size, dpi=150, layout="constrained", facecolor=PAPER["light"]))
    left, right = canvas.figure.subplots(1, 2, sharey=True)
    _draw(left, findings, "distance", "distance ‖Q - U Vᵀ‖ / √k")
    _draw(right, findings, "alignment", "alignment <M, Q> / ‖M‖ nuclear")
    right.axvline(1, color="#5f6873", linewidth=1, zorder=0)
    left.set_xlim(left=0)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    handles, labels = left.get_legend_handles_labels()
    canvas.figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    buffer = BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _draw(axes: Axes, findings: Sequence[Finding], quantity: str, label: str) -> None:
    axes.set_facecolor(PAPER["light"])
    names = list(dict.fromkeys(found.coefficients for found in findings))
    sources = list(dict.fromkeys(found.source for found in findings))
    looks = styles(sources, baseline=NORMAL)
    for source, mark in zip(sources, itertools.cycle("osD^vP"), strict=False):
        own = [found for found in findings if found.source == source and found.reason is None]
        values = [getattr(found, quantity) for found in own]
        places = [names.index(found.coefficients) for found in own]
        axes.scatter(values, places, marker=mark, color=looks[source].light, label=source)
    for place in {names.index(found.coefficients) for found in findings if found.reason is not None}:
        axes.annotate("refused", (0.02, place), xycoords=("axes fraction", "data"), va="center", color="#5f6873")
    axes.set_xlabel(label)
    axes.grid(color="#e6e6df", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
