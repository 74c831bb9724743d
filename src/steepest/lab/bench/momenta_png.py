"""How far each set of coefficients is from the polar factor, on momenta and on normal matrices, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from steepest.lab.bench.momenta import NORMAL, Finding
from steepest.lab.report.figure import Axis, Dots, Figure, Label, Rule, evenly, named
from steepest.lab.report.palette import GUIDE, styles
from steepest.lab.report.vega import panels_png


def momenta_png(findings: Sequence[Finding]) -> bytes:
    """A panel of distances and one of alignments: a line per set, a mark per source.

    Args:
        findings: At least one.

    Returns:
        The PNG.
    """
    left = _panel(findings, "distance", "distance ‖Q - U Vᵀ‖ / √k")
    right = _panel(findings, "alignment", "alignment <M, Q> / ‖M‖ nuclear")
    return panels_png([left, right], columns=2, width=330)


def _panel(findings: Sequence[Finding], quantity: Literal["distance", "alignment"], title: str) -> Figure:
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
