"""The shapes of the matrices of a network: what a step has to work on, without the network."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal, get_args

from steepest.names import unknown_name

ShapeSet = Literal["gpt2", "llama", "conv", "many-small", "gpt2-124m", "gpt2-350m", "llama-1b"]
Shape = tuple[int, ...]

SHAPE_SETS: tuple[ShapeSet, ...] = get_args(ShapeSet)
WIDTHS: dict[ShapeSet, tuple[int, ...]] = {"gpt2": (256, 512, 768), "llama": (256, 512, 768), "conv": (64,)}
LAYERS: dict[ShapeSet, int] = {"gpt2": 4, "llama": 4, "conv": 2}
SIZED: tuple[ShapeSet, ...] = ("many-small", "gpt2-124m", "gpt2-350m", "llama-1b")  # that have a size of their own
SMALL_SIDES, SMALL_COUNT = (16, 24, 32, 48, 64, 96, 128), 500


def make_shapes(name: str, *, width: int | None = None, layers: int | None = None, seed: int = 0) -> list[Shape]:
    """Shapes of all matrices and convolutions.

    Args:
        name: "gpt2", "llama", "conv"; or "many-small", "gpt2-124m", "gpt2-350m" or "llama-1b".
        width: Of the model, or channels of the first stage of "conv"; None for sets that have a size of their own.
        layers: Blocks, for "conv" in each of four stages; None for the set's default.
        seed: Of the sides of "many-small".

    Returns:
        (out, in) of each matrix and (out, in, kernel, kernel) of each convolution.

    Raises:
        ValueError: If the set is not known, or takes no such width or number of layers.
    """
    if name not in SHAPE_SETS:
        raise ValueError(unknown_name("set of shapes", name, SHAPE_SETS))
    if name in SIZED:
        if width is not None or layers is not None:
            raise ValueError(f"{name} has neither width nor layers, got {width=} and {layers=}. Leave them out.")
        return many_small(seed) if name == "many-small" else sized(name)
    if width is None or width < 4 or width % 4:
        raise ValueError(f"{name} takes a width that is a positive multiple of 4, got {width}.")
    layers = LAYERS[name] if layers is None else layers
    if layers < 1:
        raise ValueError(f"{name} takes at least one layer, got layers={layers}.")
    return {"gpt2": gpt2, "llama": llama, "conv": conv}[name](width, layers)


def gpt2(width: int, layers: int) -> list[Shape]:
    """Query, key, value and output, and two matrices of a feed-forward part four times as wide."""
    square, up, down = (width, width), (4 * width, width), (width, 4 * width)
    return [square, square, square, square, up, down] * layers


def llama(width: int, layers: int) -> list[Shape]:
    """Keys and values of a quarter of the width, and a gated part of 8/3 of it, rounded up to a multiple of 64."""
    inner = 64 * math.ceil(8 * width / 3 / 64)
    square, quarter = (width, width), (width // 4, width)
    return [square, quarter, quarter, square, (inner, width), (inner, width), (width, inner)] * layers


def sized(name: str) -> list[Shape]:
    """Matrices of the blocks of a published model, tables and heads left out.

    Args:
        name: "gpt2-124m", "gpt2-350m" or "llama-1b".

    Source:
        https://huggingface.co/openai-community/gpt2, gpt2-medium there, and meta-llama/Llama-3.2-1B.
    """
    if name == "llama-1b":
        square, pairs, up, down = (2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)
        return [square, pairs, pairs, square, up, up, down] * 16
    return gpt2(768, 12) if name == "gpt2-124m" else gpt2(1024, 24)


def conv(width: int, layers: int) -> list[Shape]:
    """A residual network: a stem, then four stages of pairs of 3 x 3 kernels, each stage twice as wide as the last."""
    shapes: list[Shape] = [(width, 3, 3, 3)]
    inputs = width
    for outputs in (width, 2 * width, 4 * width, 8 * width):
        for _ in range(layers):
            shapes += [(outputs, inputs, 3, 3), (outputs, outputs, 3, 3)]
            if inputs != outputs:
                shapes.append((outputs, inputs, 1, 1))
            inputs = outputs
    return shapes


def many_small(seed: int) -> list[Shape]:
    """500 matrices whose sides are drawn from seven lengths between 16 and 128."""
    draw = random.Random(seed)
    return [(draw.choice(SMALL_SIDES), draw.choice(SMALL_SIDES)) for _ in range(SMALL_COUNT)]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(out, everything else), which is how Muon sees a convolution."""
    return shape[0], math.prod(shape[1:])


def short_and_long(shape: Sequence[int]) -> tuple[int, int]:
    """Sides of the matrix, the shorter one first."""
    rows, columns = matrix_shape(shape)
    return min(rows, columns), max(rows, columns)
