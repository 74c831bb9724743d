"""Views: every element goes where a plain loop says, and comes back."""

import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.anatomy.views import CONV1D, EXPERTS, EXPERTS_TRANSPOSED, LINEAR, View, conv
from tests.cases import cases

LAYOUTS = [  # view, shape
    (LINEAR, (5, 7)),
    (LINEAR, (1, 7)),
    (LINEAR, (5, 1)),
    (LINEAR, (4, 2, 3)),  # conv 1d, Bilinear
    (LINEAR, (4, 2, 3, 5)),
    (LINEAR, (4, 2, 3, 1, 2)),
    (conv(groups=2), (6, 3, 2, 2)),
    (conv(groups=4), (4, 1, 3)),  # depthwise
    (conv(groups=3), (6, 1, 3, 3)),  # depthwise with a multiplier
    (conv(transposed=True), (4, 3, 2, 2)),
    (conv(transposed=True, groups=2), (4, 3, 5)),
    (CONV1D, (5, 7)),
    (View(split=(4, 2, 2)), (8, 3)),
    (View(split=(4, 2, 2), transposed=True), (3, 8)),
    (EXPERTS, (3, 4, 5)),
    (EXPERTS_TRANSPOSED, (3, 4, 5)),
    (View(experts=True, split=(2, 2)), (3, 4, 5)),
    (View(experts=True, split=(2, 2), transposed=True), (3, 5, 4)),
    (View(experts=True, split=(2, 2), transposed=True, interleave=2), (3, 5, 4)),  # gate and up alternate
    (View(split=(6, 6, 6), interleave=3), (18, 2)),  # (heads, 3, head_dim)
    (View(split=(8, 4, 4), interleave=2, heads=(4, 2, 2)), (16, 3)),  # grouped by key-value head
    (View(split=(8, 4, 4), heads=(4, 2, 2)), (16, 3)),
    (View(split=(4, 4), interleave=4, heads=2), (8, 3)),
    (View(heads=3), (6, 5)),
    (View(heads=3, heads_dim="in"), (5, 6)),
    (View(heads=3, heads_dim="in", transposed=True), (6, 5)),
    (View(heads=2, experts=True), (3, 4, 5)),
    (View(heads=2, heads_dim="in"), (3, 4, 5)),
    (LINEAR, (0, 5)),
    (LINEAR, (5, 0)),
    (View(split=(4, 2, 2)), (8, 0)),
    (EXPERTS, (0, 4, 5)),
    (conv(groups=2), (4, 3, 0)),
]
BY_LAYOUT = cases("view, shape", LAYOUTS)


def loop_oracle(view: View, t: torch.Tensor) -> list[list[list[list[object]]]]:
    """parts x matrices x rows x columns, by indexing one element at a time from the definition of each field."""
    parts = []
    stack = t if view.experts else t[None]
    kernel = list(product(*map(range, stack.shape[3:])))

    def element(e, out, cin, k):
        return stack[(e, cin, out, *k) if view.transposed else (e, out, cin, *k)].item()

    d1, d2 = stack.shape[1:3]
    splits = view.split or ((d2 if view.transposed else d1),)
    heads = view.heads if isinstance(view.heads, tuple) else (view.heads or 1,) * len(splits)
    for number, (size, count) in enumerate(zip(splits, heads, strict=True)):
        matrices = []
        for e in range(stack.shape[0]):
            for g in range(view.groups):
                if view.transposed:  # the inputs of group g, all stored outputs
                    outs, ins = list(range(d2)), list(range(g * d1 // view.groups, (g + 1) * d1 // view.groups))
                else:  # the outputs of group g, all stored inputs
                    outs, ins = list(range(g * d1 // view.groups, (g + 1) * d1 // view.groups)), list(range(d2))
                if view.split:
                    chunk = sum(splits) // view.interleave
                    share, before = size // view.interleave, sum(splits[:number]) // view.interleave
                    outs = [c * chunk + before + r for c in range(view.interleave) for r in range(share)]
                cut = ins if view.heads_dim == "in" else outs
                for h in range(count):
                    head = cut[h * len(cut) // count : (h + 1) * len(cut) // count]
                    rows, columns = (outs, head) if view.heads_dim == "in" else (head, ins)
                    matrices.append([[element(e, o, i, k) for i in columns for k in kernel] for o in rows])
        parts.append(matrices)
    return parts


def numbered(shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


@BY_LAYOUT
def test_each_element_goes_where_the_loop_says(view, shape):
    t = numbered(shape)
    batches = view.split_tensor(t)
    assert tuple(tuple(b.shape) for b in batches) == view.blocks(shape)
    if t.numel():
        assert [b.tolist() for b in batches] == loop_oracle(view, t)
    else:
        assert all(b.numel() == 0 for b in batches)


@BY_LAYOUT
@cases("dtype", [torch.bfloat16, torch.float64])
def test_merge_undoes_split(view, shape, dtype, rng):
    t = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    merged = view.merge(view.split_tensor(t), shape)
    assert merged.dtype == dtype
    assert merged.is_contiguous()
    assert torch.equal(merged, t)
    if t.numel():
        assert merged.data_ptr() != t.data_ptr()


@BY_LAYOUT
def test_other_strides_give_the_same_matrices(view, shape):
    t = numbered(shape)
    reversed_dims = tuple(range(len(shape)))[::-1]
    strange = t.permute(reversed_dims).contiguous().permute(reversed_dims)
    assert [b.tolist() for b in view.split_tensor(strange)] == [b.tolist() for b in view.split_tensor(t)]
    assert torch.equal(view.merge(view.split_tensor(strange), shape), t)


@BY_LAYOUT
def test_the_text_of_a_view_is_the_view(view, shape):
    del shape
    assert View.parse(str(view)) == view


def test_layouts_read_as_words():
    assert str(LINEAR) == "linear"
    gpt_oss = View(transposed=True, experts=True, split=(8, 8), interleave=8)
    assert str(gpt_oss) == "transposed experts split=8+8 interleave=8"
    assert str(View(heads=4, heads_dim="in")) == "heads=4@in"
    assert str(conv(groups=2)) == "groups=2"


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (LINEAR, (5, 7)),
        (LINEAR, (4, 2, 3, 3)),
        (conv(groups=2), (4, 2, 3)),
        (CONV1D, (5, 7)),
        (View(split=(4, 2, 2)), (8, 3)),
        (View(split=(4, 2, 2), transposed=True), (3, 8)),
        (View(experts=True, split=(2, 2)), (3, 4, 5)),
        (View(heads=3), (6, 5)),
        (View(heads=3, heads_dim="in"), (5, 6)),
        (View(experts=True, split=(2, 2), transposed=True, interleave=2), (3, 5, 4)),
    ],
    ids=str,
)
def test_no_copy_where_strides_suffice(view, shape):
    t = torch.zeros(shape)
    for batch in view.split_tensor(t):
        batch.fill_(1)
    assert (t == 1).all()


def test_one_tied_tensor_is_one_set_of_matrices():
    table = torch.nn.Embedding(6, 4)
    head = torch.nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    (as_head,), (as_table,) = LINEAR.split_tensor(head.weight), CONV1D.split_tensor(table.weight)
    assert torch.equal(as_head.mT, as_table)
    assert as_head.data_ptr() == as_table.data_ptr()


def test_conv_blocks_compute_the_convolution(rng):
    """A grouped convolution is its blocks times unfolded input: the blocks are the matrices of the layer."""
    layer = torch.nn.Conv2d(6, 4, 3, groups=2, bias=False).double()
    x = torch.randn(1, 6, 3, 3, generator=rng, dtype=torch.float64)
    (blocks,) = conv(groups=2).split_tensor(layer.weight)
    columns = x.reshape(2, 27, 1)
    torch.testing.assert_close(layer(x).reshape(2, 2, 1), blocks @ columns)


def test_transposed_conv_blocks_compute_the_adjoint(rng):
    """With one input position and the kernel's positions as outputs, every output is a row-block times the input."""
    layer = torch.nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False).double()
    x = torch.randn(1, 4, 1, generator=rng, dtype=torch.float64)
    (blocks,) = conv(groups=2, transposed=True).split_tensor(layer.weight)
    assert blocks.shape == (2, 3, 6)
    by_position = blocks.unflatten(2, (2, 3))  # (groups, out, in, kernel)
    expected = torch.einsum("goik,gi->gok", by_position, x.reshape(2, 2)).reshape(1, 6, 3)
    torch.testing.assert_close(layer(x), expected)


@st.composite
def views_with_shapes(draw):
    """A random view and a shape that it fits."""
    size = st.integers(1, 3)
    transposed, experts = draw(st.booleans()), draw(st.booleans())
    kernel = tuple(draw(st.lists(size, max_size=2)))
    stack = (draw(size),) if experts else ()
    if draw(st.booleans()):
        groups = draw(size)
        view = View(transposed=transposed, experts=experts, groups=groups)
        return view, (*stack, groups * draw(size), draw(size), *kernel)
    interleave, heads = draw(size), draw(size)
    split = tuple(interleave * heads * draw(size) for _ in range(draw(st.integers(1, 3))))
    where = draw(st.sampled_from(["out", "in"]))
    blocks = heads if interleave == 1 or where == "in" else interleave * heads
    view = View(transposed, experts, 1, split, interleave, blocks, where)
    fans = (sum(split), heads * draw(size))
    return view, (*stack, *(fans[::-1] if transposed else fans), *kernel)


@settings(deadline=None, max_examples=150)
@given(views_with_shapes())
def test_any_view_is_a_permutation_that_the_loop_confirms(case):
    view, shape = case
    t = numbered(shape)
    batches = view.split_tensor(t)
    assert sum(b * m * n for b, m, n in view.blocks(shape)) == t.numel()
    assert [b.tolist() for b in batches] == loop_oracle(view, t)
    assert torch.equal(view.merge(batches, shape), t)
    assert View.parse(str(view)) == view


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "View groups must be positive, got 0. Leave it out for none."),
        ({"split": (4, 0)}, "View split must be positive, got (4, 0)"),
        ({"heads": 0}, "View heads must be positive, got 0"),
        ({"heads": 2, "heads_dim": "inn"}, "View: Unknown heads_dim 'inn': did you mean 'in'? Valid: in, out."),
        ({"heads_dim": "in"}, "heads_dim='in' says where heads lie, but heads is None. Give heads as well."),
        ({"interleave": 2}, "interleave=2 mixes the parts of split, which is empty. Give split."),
        ({"groups": 2, "split": (2, 2)}, "groups=2 cannot be combined with split or heads. Keep one of them."),
        ({"split": (2, 2), "heads": (1, 1, 1)}, "heads=(1, 1, 1) has 3 entries for 2 parts. Give one number per part"),
    ],
    ids=str,
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        View(**options)


@pytest.mark.parametrize(
    ("view", "shape", "message"),
    [
        (LINEAR, (5,), "View 'linear' does not fit shape (5,): it needs at least 2 dimensions (out, in)."),
        (LINEAR, (), "does not fit shape (): it needs at least 2 dimensions"),
        (
            EXPERTS,
            (3, 4),
            "View 'experts' does not fit shape (3, 4): it needs at least 3 dimensions (experts, out, in)",
        ),
        (
            conv(groups=3),
            (4, 2, 3),
            "groups=3 does not divide the first dimension 4. Use the groups of the convolution.",
        ),
        (View(split=(3, 3)), (8, 6), "split adds up to 6, the fan-out is 8. Give the fan-out of every part;"),
        (View(split=(6, 2), interleave=4), (8, 6), "interleave=4 does not divide the part of 6 rows."),
        (View(heads=3), (8, 6), "heads=3 does not divide the fan-out 8. Use the head count of the layer."),
        (View(heads=4, heads_dim="in"), (8, 6), "heads=4 does not divide the fan-in 6."),
        (View(split=(12,), interleave=4, heads=6), (12, 1), "does not divide the fan-out 12 in chunks of interleave=4"),
    ],
    ids=str,
)
def test_a_view_that_does_not_fit_says_why(view, shape, message):
    for call in (lambda: view.blocks(shape), lambda: view.split_tensor(torch.zeros(shape))):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_merge_refuses_other_batches():
    batches = View(split=(4, 2)).split_tensor(torch.zeros(6, 3))
    message = "merges batches ((1, 4, 3), (1, 2, 3)) into shape (6, 3), got ((1, 2, 3), (1, 4, 3))."
    with pytest.raises(ValueError, match=re.escape(message)):
        View(split=(4, 2)).merge(batches[::-1], (6, 3))


@pytest.mark.parametrize(
    "text", ["expert", "groups=", "groups=2+2", "split=a", "heads=2@up", "transposed=1", "split=+2"]
)
def test_an_unknown_word_is_named(text):
    with pytest.raises(ValueError, match=rf"has the word '{re.escape(text)}'\. Words are linear, transposed, experts"):
        View.parse(text)
