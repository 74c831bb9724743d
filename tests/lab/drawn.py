"""What is drawn of a figure, by layer."""

from __future__ import annotations

from typing import Any

from steepest.lab.report.figure import Figure
from steepest.lab.report.vega import to_vega


def layers(figure: Figure) -> dict[str, list[dict[str, Any]]]:
    """The layers of a specification by name, or else by kind of mark."""
    found: dict[str, list[dict[str, Any]]] = {}
    for layer in to_vega(figure)["layer"]:
        inner = layer.get("layer", [layer])
        found.setdefault(layer.get("name") or inner[0]["mark"]["type"], []).extend(inner)
    return found


def rows(drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the last of some layers shows."""
    return drawn[-1]["data"]["values"]
