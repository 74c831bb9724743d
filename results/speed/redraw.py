"""Draw the pictures of this directory anew from the rows in its JSON files: python results/speed/redraw.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from steepest.lab.bench.momenta import Finding
from steepest.lab.bench.passes import Passes
from steepest.lab.bench.pictures import momenta_png, passes_png, scaling_png, step_png, train_png
from steepest.lab.bench.scaling import Point, Row
from steepest.lab.bench.step import Case
from steepest.lab.bench.timing import Quartiles
from steepest.lab.bench.train_share import Share

HERE = Path(__file__).parent
PARTS = ("forward_backward_ms", "optimizer_ms", "step_ratio", "optimizer_ratio")


def pictures() -> Iterator[tuple[Path, bytes]]:
    """The file and the content of each."""
    draw = {"accuracy": _accuracy, "passes": _passes, "scaling": _scaling, "step": _step, "train": _train}
    for path in sorted(HERE.glob("*/*.json")):
        if path.stem in draw:  # that of ranks is four rows
            yield path.with_suffix(".png"), draw[path.stem](json.loads(path.read_text()))


def _accuracy(content: Any) -> bytes:
    return momenta_png([Finding(**{key: row[key] for key in row if key != "dtype"}) for row in content["rows"]])


def _passes(content: Any) -> bytes:
    return passes_png(msgspec.convert(content["cases"], dict[str, Passes]))


def _step(content: Any) -> bytes:
    return step_png(msgspec.convert(content["cases"], list[Case]))


def _scaling(content: Any) -> bytes:
    numbers = ("predicted_ms", "peak_extra_bytes", "state_bytes")
    return scaling_png(
        [
            Row(Point(row["axis"], row["value"], ()), _quartiles(row, "ms"), *(row[key] for key in numbers), ())
            for row in content["rows"]
        ]
    )


def _train(content: Any) -> bytes:
    shares: dict[str, list[Share]] = {}
    for row in content["rows"]:
        share = Share(row["method"], row["every"], *(_quartiles(row, part) for part in PARTS))
        shares.setdefault(row["preset"], []).append(share)
    return train_png(shares)


def _quartiles(row: Any, name: str) -> Quartiles:
    return Quartiles(low=row[f"{name}_low"], median=row[name], high=row[f"{name}_high"])


if __name__ == "__main__":
    for path, png in pictures():
        path.write_bytes(png)
