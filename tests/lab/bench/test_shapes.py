"""Shapes of a benchmark: the networks they stand for, and what is refused."""

import math

import pytest

from steepest.lab.bench.shapes import (
    LAYERS,
    SHAPE_SETS,
    SIZED,
    SMALL_SIDES,
    WIDTHS,
    make_shapes,
    many_small,
    matrix_shape,
    short_and_long,
)
from tests.cases import cases


def entries(shapes):
    return sum(math.prod(shape) for shape in shapes)


def test_a_layer_of_gpt2_has_twelve_squares_of_its_width():
    shapes = make_shapes("gpt2", width=64, layers=3)
    assert len(shapes) == 18
    assert entries(shapes) == 3 * 12 * 64**2
    assert shapes[:6] == [(64, 64)] * 4 + [(256, 64), (64, 256)]


def test_llama_groups_queries_and_rounds_its_gate_up():
    shapes = make_shapes("llama", width=768, layers=2)
    assert shapes[:7] == [(768, 768), (192, 768), (192, 768), (768, 768), (2048, 768), (2048, 768), (768, 2048)]
    assert make_shapes("llama", width=100, layers=1)[4] == (320, 100)  # 266.7, rounded up


def test_conv_is_a_residual_network_of_eighteen_layers():
    shapes = make_shapes("conv", width=64)
    assert len(shapes) == 1 + 16 + 3
    # ResNet-18 without its last layer and its batch norms; its stem is 7 x 7, ours 3 x 3
    assert entries(shapes) == 11_689_512 - 513_000 - 9_600 - 64 * 3 * (7 * 7 - 3 * 3)
    assert [shape for shape in shapes if shape[2:] == (1, 1)] == [
        (128, 64, 1, 1),
        (256, 128, 1, 1),
        (512, 256, 1, 1),
    ]


def test_many_small_is_seeded():
    shapes = make_shapes("many-small", seed=3)
    assert shapes == many_small(3) != many_small(4)
    assert len(shapes) == 500
    assert {side for shape in shapes for side in shape} == set(SMALL_SIDES)


def test_every_set_has_defaults_that_work():
    for name in SHAPE_SETS:
        for width in WIDTHS.get(name, (None,)):
            assert make_shapes(name, width=width, layers=LAYERS.get(name))


def test_a_convolution_is_a_matrix_of_out_by_the_rest():
    assert matrix_shape((8, 4, 3, 3)) == (8, 36)
    assert short_and_long((40, 4, 3, 3)) == (36, 40)


@cases(
    "name, options, text",
    [
        ("gtp2", {"width": 8}, "Unknown set of shapes 'gtp2': did you mean 'gpt2'"),
        ("gpt2", {}, "gpt2 takes a width that is a positive multiple of 4, got None"),
        ("llama", {"width": 6}, "llama takes a width that is a positive multiple of 4, got 6"),
        ("conv", {"width": 8, "layers": 0}, "conv takes at least one layer, got layers=0"),
        ("many-small", {"width": 8}, "many-small has neither width nor layers, got width=8 and layers=None"),
    ],
)
def test_what_fits_no_set_is_refused(name, options, text):
    with pytest.raises(ValueError, match=text):
        make_shapes(name, **options)


@cases("name", SIZED)
def test_sets_with_a_size_take_no_other(name):
    for options in ({"width": 64}, {"layers": 2}):
        with pytest.raises(ValueError, match=f"{name} has neither width nor layers"):
            make_shapes(name, **options)


def test_published_models_have_the_matrices_of_their_blocks():
    # transformers' counts of parameters, less tables, biases and gains
    assert entries(make_shapes("gpt2-124m")) == 124_439_808 - (50_257 + 1_024) * 768 - 12 * 13 * 768 - 2 * 768
    assert entries(make_shapes("gpt2-350m")) == 354_823_168 - (50_257 + 1_024) * 1_024 - 24 * 13 * 1_024 - 2 * 1_024
    assert entries(make_shapes("llama-1b")) == 1_235_814_400 - 128_256 * 2_048 - 33 * 2_048
