"""Sums of z zᵀ against loops over tokens, what each structure keeps of them, and which structure is chosen."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.stages import InputMoment
from steepest.stages.inputs import MomentLayout, Rows
from steepest.stages.inputs.moments import layout_for
from steepest.stages.inputs.options import WIDEST


def by_hand(rows, weights, stack):
    """Full moments (S, n, n) and masses (S,), token by token."""
    values = rows.values
    n = values.size(-1)
    tokens = values.shape[:-2]
    total, mass = torch.zeros(stack, n, n, dtype=torch.float64), torch.zeros(stack, dtype=torch.float64)
    for place in torch.cartesian_prod(*map(torch.arange, tokens)).reshape(-1, len(tokens)).tolist():
        weight = 1.0 if weights is None else float(weights[tuple(place[: weights.ndim])])
        for matrix in range(stack):
            z = values[tuple(place)][min(matrix, values.size(-2) - 1)].double()
            own = weight if rows.chosen is None else weight * float(rows.chosen[tuple(place)][matrix])
            total[matrix] += own * torch.outer(z, z)
            mass[matrix] += own
    return total, mass


def kept(full, layout):
    """What a layout keeps of full moments."""
    if layout.structure == "diagonal":
        return full.diagonal(dim1=-2, dim2=-1)
    blocks = range(0, layout.fan_in, layout.block)
    return torch.cat([torch.stack([m[b : b + layout.block, b : b + layout.block] for b in blocks]) for m in full])


@st.composite
def problems(draw):
    stack, block, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tokens = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(*tokens, draw(st.sampled_from([1, stack])), block * blocks, generator=gen, dtype=torch.float64)
    chosen = torch.rand(*tokens, stack, generator=gen) < 0.6 if draw(st.booleans()) else None
    weights = None
    if draw(st.booleans()):
        weights = torch.rand(tokens[: draw(st.integers(1, len(tokens)))], generator=gen, dtype=torch.float64)
    structure = draw(st.sampled_from(["full", "block", "diagonal"]))
    size = {"full": block * blocks, "block": block, "diagonal": 1}[structure]
    return Rows(values, chosen), weights, MomentLayout(structure, stack, block * blocks, size)


@settings(max_examples=80, deadline=None)
@given(problems())
def test_sums_are_those_of_a_loop_over_tokens(problem):
    rows, weights, layout = problem
    full, masses = by_hand(rows, weights, layout.stack)
    total, mass = layout.sums(rows, weights, torch.float64)
    assert (total.shape, mass.shape) == (layout.shape, layout.mass_shape)
    torch.testing.assert_close(total, kept(full, layout), rtol=1e-12, atol=1e-12)
    repeats = len(mass) // layout.stack
    torch.testing.assert_close(mass, masses.repeat_interleave(repeats), rtol=1e-12, atol=1e-12)


def test_a_block_is_the_full_problem_of_its_features(rng):
    x = torch.randn(11, 2, 6, generator=rng, dtype=torch.float64)
    weights = torch.rand(11, generator=rng, dtype=torch.float64)
    together, mass = MomentLayout("block", 2, 6, 3).sums(Rows(x), weights, torch.float64)
    for place, features in enumerate((slice(0, 3), slice(3, 6))):
        alone, own = MomentLayout("full", 2, 3, 3).sums(Rows(x[..., features]), weights, torch.float64)
        torch.testing.assert_close(together[place::2], alone, rtol=1e-13, atol=0)
        torch.testing.assert_close(mass[place::2], own, rtol=1e-13, atol=0)


def test_no_tokens_have_no_mass():
    for structure, block in (("full", 4), ("block", 2), ("diagonal", 1)):
        total, mass = MomentLayout(structure, 2, 4, block).sums(Rows(torch.zeros(0, 1, 4)), None, torch.float32)
        assert not total.any()
        assert not mass.any()


@pytest.mark.parametrize(("structure", "block"), [("full", 4), ("block", 2), ("diagonal", 1)])
def test_what_is_left_out_may_be_no_number(structure, block, rng):
    layout, x = MomentLayout(structure, 2, 4, block), torch.randn(6, 1, 4, generator=rng, dtype=torch.float64)
    weights, chosen = torch.tensor([0.0, 1, 1, 2, 1, 0]), torch.tensor([[0, 0], [1, 1], [0, 1], [1, 1], [0, 0], [1, 1]])
    expected = layout.sums(Rows(x, chosen), weights, torch.float64)
    x[0], x[4], x[5] = torch.nan, torch.inf, torch.nan
    for found, same in zip(layout.sums(Rows(x, chosen), weights, torch.float64), expected, strict=True):
        assert torch.equal(found, same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_summed_in_float32(dtype, rng):
    x = torch.randn(512, 1, 3, generator=rng).to(dtype)
    total, _ = MomentLayout("full", 1, 3, 3).sums(Rows(x), None, torch.float32)
    assert total.dtype == torch.float32
    exact = torch.einsum("tsi,tsj->sij", x.double(), x.double())
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-3)  # bfloat16 sums would be off by units


def test_a_mask_of_booleans_or_half_precision_counts_like_numbers(rng):
    x, layout = Rows(torch.randn(5, 1, 3, generator=rng)), MomentLayout("diagonal", 1, 3, 1)
    mask = torch.tensor([True, False, True, True, False])
    expected, mass = layout.sums(Rows(x.values[mask]), None, torch.float32)
    for same in (mask, mask.bfloat16(), mask.long()):
        total, own = layout.sums(x, same, torch.float32)
        torch.testing.assert_close(total, expected)
        assert torch.equal(own, mass)


@pytest.mark.parametrize(
    ("layout", "text", "shape", "mass", "numel"),
    [
        (MomentLayout("full", 1, 6, 6), "full 6", (1, 6, 6), (1,), 36),
        (MomentLayout("full", 3, 6, 6), "3 x full 6", (3, 6, 6), (3,), 108),
        (MomentLayout("block", 2, 6, 2), "2 x 3 blocks of 2", (6, 2, 2), (6,), 24),
        (MomentLayout("diagonal", 4, 6, 1), "4 x diagonal 6", (4, 6), (4,), 24),
    ],
    ids=str,
)
def test_a_layout_says_its_size(layout, text, shape, mass, numel):
    assert (str(layout), layout.shape, layout.mass_shape, layout.numel) == (text, shape, mass, numel)


def chosen(options, *, fan_in, fan_out, readers=None, stack=1):
    layout = layout_for(options, "w", stack=stack, fan_in=fan_in, fan_out=fan_out, readers=readers or fan_out)
    return None if layout is None else (layout.structure, layout.block)


@pytest.mark.parametrize(
    ("fan_in", "fan_out", "readers", "auto", "wide"),
    [
        (32, 32, 32, "full", None),
        (8, 32, 32, "full", None),
        (31, 16, 16, "full", None),
        (32, 16, 16, "diagonal", "diagonal"),  # the second map of an MLP reads much and writes little
        (128, 32, 32, "diagonal", "diagonal"),
        (32, 8, 48, "full", None),  # keys of grouped attention share what queries read
        (WIDEST, WIDEST, WIDEST, "full", None),
        (WIDEST + 1, 2 * WIDEST, 2 * WIDEST, "diagonal", None),
    ],
)
def test_wide_maps_read_much_and_write_little(fan_in, fan_out, readers, auto, wide):
    for structure, expected in (("auto", auto), ("wide", wide)):
        block = fan_in if expected == "full" else 1
        found = chosen(InputMoment(structure=structure), fan_in=fan_in, fan_out=fan_out, readers=readers)
        assert found == (expected and (expected, block))
    assert InputMoment().structure == "wide"


def test_blocks_are_as_wide_as_the_fan_out_and_never_wider_than_the_fan_in():
    block = InputMoment(structure="block")
    assert chosen(block, fan_in=12, fan_out=3) == ("block", 3)
    assert chosen(block, fan_in=12, fan_out=12) == ("full", 12)
    assert chosen(block, fan_in=12, fan_out=48) == ("full", 12)
    assert chosen(InputMoment(structure="block", block_size=6), fan_in=12, fan_out=3) == ("block", 6)
    assert chosen(InputMoment(structure="block", block_size=99), fan_in=12, fan_out=3) == ("full", 12)


def test_structures_that_were_asked_for():
    assert chosen(InputMoment(structure="none"), fan_in=4, fan_out=4) is None
    assert chosen(InputMoment(structure="full"), fan_in=400, fan_out=4) == ("full", 400)
    assert chosen(InputMoment(structure="diagonal"), fan_in=4, fan_out=400) == ("diagonal", 1)
    assert chosen(InputMoment(structure={"w": "none"}), fan_in=4, fan_out=4) is None


def test_blocks_that_do_not_divide():
    text = (
        "InputMoment: blocks of 5 do not divide the fan-in 12 of 'w'; set block_size to a divisor, or give 'w' the "
        "structure 'diagonal' or 'full'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        chosen(InputMoment(structure="block"), fan_in=12, fan_out=5)
    with pytest.raises(ValueError, match="blocks of 5 do not divide"):
        chosen(InputMoment(structure="block", block_size=5), fan_in=12, fan_out=4)
