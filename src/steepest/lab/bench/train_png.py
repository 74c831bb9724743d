"""Bars of a training step, the part of the optimizer in its own colour, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from steepest.lab.bench.train_share import BASELINE, Share
from steepest.lab.report.figure import Axis, Bar, Figure, Label, named
from steepest.lab.report.palette import TEXT, styles
from steepest.lab.report.vega import panels_png

_PARTS = ("forward and backward", "optimizer")
_LOOKS = {
    name: replace(look, dash="solid", marker="square") for name, look in styles(_PARTS, baseline=_PARTS[0]).items()
}


def train_png(shares: Mapping[str, Sequence[Share]]) -> bytes:
    """One panel per preset, one bar per method.

    Args:
        shares: By preset, at least one, in order of the bars.

    Returns:
        The PNG.
    """
    last = list(shares)[-1]
    panels = [_panel(preset, own, keyed=preset == last) for preset, own in shares.items()]
    return panels_png(panels, columns=len(panels), width=470)


def _panel(preset: str, shares: Sequence[Share], *, keyed: bool) -> Figure:
    bars: list[Bar] = []
    labels: list[Label] = []
    for i, share in enumerate(shares):
        end = 0.0
        for name, own in zip(_PARTS, (share.forward_backward_ms, share.optimizer_ms), strict=True):
            bars.append(Bar(_LOOKS[name], -float(i), 0.72, own.median, 1.0, "", start=end, name=name))
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
