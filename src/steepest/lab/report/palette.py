"""How each method looks, everywhere in the report: a colour for each background, a dash and a marker.

The first six colours stay apart for red-green colour-blind readers; dash and marker tell all of them apart without
colour. Contrast with the page is at least 4.5 to 1, so that a colour may also be the colour of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Dash = Literal["solid", "dash", "dot", "dashdot", "longdash"]
Marker = Literal["circle", "square", "triangle", "diamond", "cross", "x"]

PAPER = {"light": "#fcfcfa", "dark": "#14171b"}
MUTED, INK = ("#5f6873", "#9aa4af"), ("#1b1f24", "#e8eaed")  # (on light, on dark)

# (on light, on dark); the first is the baseline's
_COLOURS = (
    ("#4b5563", "#aab4c0"),
    ("#0067b8", "#4f9ff0"),
    ("#c2410c", "#ff8a4c"),
    ("#5a1e8c", "#f3a6e6"),
    ("#00805a", "#2fae7d"),
    ("#6c1800", "#d8d06a"),
    ("#8a6a00", "#8a7bff"),
    ("#b0289a", "#e0506a"),
)
_DASHES: tuple[Dash, ...] = ("dash", "solid", "longdash", "dashdot", "dot")
_MOMO = "-momo"  # how the name of a method's Momo version ends
_MARKERS: tuple[Marker, ...] = ("circle", "square", "triangle", "diamond", "cross", "x")


@dataclass(frozen=True)
class Style:
    """The look of one method. `index` is its place among the methods; the marker may be an outline."""

    index: int
    light: str
    dark: str
    dash: Dash
    marker: Marker
    hollow: bool = False

    def colour(self, theme: Literal["light", "dark"]) -> str:
        """Hexadecimal colour on the given background."""
        return self.light if theme == "light" else self.dark


TEXT = Style(-1, *INK, dash="solid", marker="circle")  # of what is no method's
GUIDE = Style(-1, *MUTED, dash="dot", marker="circle")


def styles(methods: Sequence[str], *, baseline: str) -> dict[str, Style]:
    """A style for each method: the baseline in grey, the others in the study's order.

    A method and its Momo version share colour and marker; the plain one is solid, the other dashed and hollow. Without
    Momo versions, colour, dash and marker cycle with different periods: the first 120 methods all look different.
    """
    ordered = [baseline, *(name for name in methods if name != baseline)]
    families = list(dict.fromkeys(name.removesuffix(_MOMO) for name in ordered))
    paired = any(name.endswith(_MOMO) for name in ordered)
    looks: dict[str, Style] = {}
    for index, name in enumerate(ordered):
        i, hollow = families.index(name.removesuffix(_MOMO)), name.endswith(_MOMO)
        colours, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        dash = _DASHES[i % len(_DASHES)] if not paired else "dash" if hollow else "solid"
        looks[name] = Style(index, *colours, dash=dash, marker=marker, hollow=hollow)
    return {name: looks[name] for name in methods}
