"""Product norms: duality, attainment, and closed-form optima against a search that knows no dual norm."""

import re
from dataclasses import FrozenInstanceError
from functools import lru_cache
from itertools import product as pairs

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.geometry import (
    PRODUCTS,
    Ada2,
    AdaInf,
    ColNorm,
    Euclid,
    Frobenius,
    Hybrid,
    Max,
    Nuclear,
    RowNorm,
    Scaled,
    Schatten,
    Sign,
    Spectral,
    Sum,
    get_product,
)
from tests.cases import cases
from tests.reference.maximise import layer_slope, least, product_slope

LAYERS = [
    *(Spectral(scale=rule, polar="svd") for rule in ("original", "match_rms_adamw", "spectral", "none")),
    Frobenius(),
    Sign(),
    RowNorm(),
    ColNorm(),
    AdaInf(eps=1e-3),
    Ada2(eps=1e-3),
    Nuclear(),
    Schatten(p=3.0),
]
OTHERS = [Sign(), AdaInf(eps=1e-3), Ada2(eps=1e-3)]
LABELS = ("matrix", "matrix", "head", "vector")
SHAPES = ((2, 3), (3, 2), (2, 2), (1, 3))
TREES = [Max(), Sum(), Euclid(), Hybrid(), Max(Euclid(Sum("matrix"), "head"), "vector")]
INF = float("inf")
F, ETA = 3.0, 0.7  # the model's value at no step, and the learning rate
SCALED = [Scaled(ColNorm(), "sqrt_fan_out"), Scaled(Sign(), "inverse_fan_in"), Scaled(Frobenius(), "sqrt_size")]
CASES = [*pairs(LAYERS, OTHERS, TREES), *pairs(SCALED, [Sign()], TREES)]
each_case = cases("layer, other, tree", CASES)


def moments(index):
    generator = torch.Generator().manual_seed(index)
    m = torch.randn(SHAPES[index], generator=generator, dtype=torch.float64)
    return m, torch.rand(SHAPES[index], generator=generator, dtype=torch.float64)


def per_label(values):
    """One vector per label from one 0-d tensor per block."""
    return {
        name: torch.stack([value for label, value in zip(LABELS, values, strict=True) if label == name])
        for name in dict.fromkeys(LABELS)
    }


def per_block(coefficients):
    """One 0-d tensor per block from the coefficients of each label."""
    seen = [LABELS[:index].count(label) for index, label in enumerate(LABELS)]
    return [
        coefficients[label][index] if coefficients[label].ndim else coefficients[label]
        for label, index in zip(LABELS, seen, strict=True)
    ]


class Space:
    """The weights of four blocks under one product norm, at one momentum."""

    def __init__(self, layer, other, tree):
        self.norms = [layer if label == "matrix" else other for label in LABELS]
        self.tree = tree.covering(list(dict.fromkeys(LABELS)))
        self.m, self.v = zip(*(moments(index) for index in range(len(LABELS))), strict=True)
        self.each = list(zip(self.norms, self.m, self.v, strict=True))
        combined = self.tree.combine(per_label([norm.dual(m, v) for norm, m, v in self.each]))
        self.dual = combined.total.item()
        coefficients = per_block(combined.coefficients)
        self.own = [norm.lmo(m, v) for norm, m, v in self.each]
        self.lmo = [c * d for c, d in zip(coefficients, self.own, strict=True)]

    def slope(self, d):
        """<m, d>, for a batch of d's: one (S, m, n) per block."""
        return sum((m * x).sum((-2, -1)) for m, x in zip(self.m, d, strict=True))

    def norm(self, d):
        norms = [norm.primal(x, m, v) for (norm, m, v), x in zip(self.each, d, strict=True)]
        return torch.stack([self.tree.norm(per_label(one)) for one in zip(*norms, strict=True)])

    def around(self, d, rng, spread, count=8):
        return [x + spread * torch.randn(count, *x.shape, generator=rng, dtype=torch.float64) for x in d]


@lru_cache
def searched_slope(norm, index):
    return layer_slope(norm, *moments(index), torch.Generator().manual_seed(7))


@pytest.mark.slow
@each_case
def test_no_weight_does_better_than_the_steepest_direction(layer, other, tree, rng):
    space = Space(layer, other, tree)
    best = [x.unsqueeze(0) for x in space.lmo]
    assert space.norm(best).item() == pytest.approx(1, rel=1e-12)
    assert space.slope(best).item() == pytest.approx(-space.dual, rel=1e-12)
    radii = 10 ** torch.empty(len(LABELS), 30, 1, 1, dtype=torch.float64).uniform_(-2, 2, generator=rng)
    samples = [
        *(space.around(space.lmo, rng, spread) for spread in (1e-3, 1e-1, 1.0, 10.0)),
        [radius * d for radius, d in zip(radii, space.own, strict=True)],  # each block's best, at the wrong lengths
        *([d.unsqueeze(0) * (i == only) for i, d in enumerate(space.own)] for only in range(len(LABELS))),
    ]
    for d in samples:
        assert (-space.slope(d) <= space.dual * space.norm(d) * (1 + 1e-12)).all()


def closed_form(dual, floor, *, regularized):
    """Optimal value of the model max(F + <m, d>, floor), and the part t of the full step that reaches it."""
    gap = max(F - floor, 0.0)
    reach = ETA * dual**2 if regularized else ETA * dual
    t = min(gap / reach, 1.0)
    if not regularized:
        return max(F - ETA * dual, floor), t
    return (F - ETA * dual**2 / 2 if reach <= gap else floor + gap**2 / (2 * ETA * dual**2)), t


@pytest.mark.slow
@each_case
@cases("regularized", [False, True])
def test_the_closed_form_optimum_is_what_a_search_finds(layer, other, tree, regularized, rng):
    space = Space(layer, other, tree)
    slopes = [searched_slope(norm, index) for index, norm in enumerate(space.norms)]
    steepest = product_slope(space.tree, LABELS, slopes, rng)  # so that <m, d> >= -steepest ‖d‖ for all d

    def objective(slope, length, floor):
        penalty = length**2 / (2 * ETA) if regularized else 0.0
        return max(F + slope, floor) + penalty

    def value_at(d, floor):
        values = zip(space.slope(d).tolist(), space.norm(d).tolist(), strict=True)
        return [objective(slope, length, floor) for slope, length in values]

    reach = ETA * space.dual * (space.dual if regularized else 1.0)
    for floor in (-INF, F - 2 * reach, F - 0.4 * reach, F + 0.1):
        expected, t = closed_form(space.dual, floor, regularized=regularized)
        high = 4 * ETA * steepest if regularized else ETA
        found = least(lambda length, floor=floor: objective(-length * steepest, length, floor), high)
        assert found == pytest.approx(expected, rel=0, abs=1e-10)
        step = [t * ETA * (space.dual if regularized else 1.0) * d for d in space.lmo]
        assert value_at([d.unsqueeze(0) for d in step], floor) == [pytest.approx(expected, rel=0, abs=1e-10)]
        for spread in (1e-4, 1e-2, 1.0):
            near = space.around(step, rng, spread)
            if not regularized:
                outside = (space.norm(near) / ETA).clamp(min=1).reshape(-1, 1, 1)
                near = [d / outside for d in near]
            assert min(value_at(near, floor)) >= expected - 1e-11


@st.composite
def trees(draw, kinds=(Max, Sum, Euclid), labels=("a", "b", "c", "d")):
    kind = draw(st.sampled_from(kinds))
    if len(labels) == 1:
        return kind(*labels)
    cut = draw(st.integers(1, len(labels) - 1))
    parts = [labels[:cut], labels[cut:]]
    return kind(*(child for part in parts for child in draw(st.sampled_from([part, [draw(trees(kinds, part))]]))))


@given(tree=trees(), counts=st.lists(st.integers(0, 3), min_size=4, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_any_tree_and_its_dual_satisfy_hoelder_and_attain_it(tree, counts, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = dict(zip("abcd", counts, strict=True))
    draws = [
        {label: torch.rand(count, generator=generator, dtype=torch.float64) for label, count in counts.items()}
        for _ in range(6)
    ]
    duals, *radii = draws
    if seed % 3 == 0:
        duals["b"] = torch.zeros_like(duals["b"])
    combined = tree.combine(duals)
    for r in radii:
        assert sum((duals[x] * r[x]).sum() for x in "abcd") <= combined.total * tree.norm(r) * (1 + 1e-12)
    steps = {label: combined.coefficients[label] * torch.ones_like(duals[label]) for label in "abcd"}
    gain = sum((duals[x] * steps[x]).sum() for x in "abcd")
    torch.testing.assert_close(gain, combined.total, rtol=1e-12, atol=0)
    if combined.total > 0:
        assert tree.norm(steps).item() == pytest.approx(1, rel=1e-12)


@given(data=st.data(), seed=st.integers(0, 1000), regularized=st.booleans())
@settings(max_examples=60, deadline=None)
def test_in_a_separable_norm_no_block_feels_another(data, seed, regularized):
    tree = data.draw(trees(kinds=(Euclid,) if regularized else (Max,)))
    assert tree.separable(regularized=regularized)
    generator = torch.Generator().manual_seed(seed)
    duals = {label: torch.rand(2, generator=generator, dtype=torch.float64) for label in "abcd"}
    grown = {label: dual * torch.tensor([1.0 if label == "a" else 3.0, 5.0]) for label, dual in duals.items()}

    def first(duals):
        combined = tree.combine(duals)
        return (combined.coefficients["a"] * (combined.total if regularized else 1.0) * torch.ones(2))[0]

    torch.testing.assert_close(first(grown), first(duals), rtol=1e-12, atol=0)


def test_which_norms_are_separable():
    nested = {Max(Max("a"), "b"): (True, False), Euclid(Euclid("a"), "b"): (False, True)}
    for tree, expected in {Max(): (True, False), Euclid(): (False, True), Sum(): (False, False), **nested}.items():
        assert (tree.separable(regularized=False), tree.separable(regularized=True)) == expected
    assert not any(Hybrid().separable(regularized=regularized) for regularized in (False, True))


@cases("tree", TREES)
def test_zero_duals_give_a_zero_total_and_finite_coefficients(tree):
    space = tree.covering(list(dict.fromkeys(LABELS)))
    combined = space.combine(per_label([torch.zeros(())] * len(LABELS)))
    assert combined.total == 0
    assert all(coefficient.isfinite().all() for coefficient in combined.coefficients.values())
    some = space.combine(per_label([torch.tensor(x) for x in (0.0, 2.0, 0.0, 0.0)]))
    assert some.total == 2
    assert per_block(some.coefficients)[1] == 1


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_stay_in_range(size):
    combined = Euclid("a", "b").combine({"a": torch.tensor([3 * size]), "b": torch.tensor([4 * size])})
    assert combined.total.item() == pytest.approx(5 * size)
    assert [combined.coefficients[x].item() for x in "ab"] == pytest.approx([0.6, 0.8])


def test_the_first_of_equal_blocks_moves_under_a_sum():
    combined = Sum().covering(["a", "b"]).combine({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([2.0])})
    assert combined.coefficients["a"].tolist() == [0, 1]
    assert combined.coefficients["b"] == 0


def test_a_node_without_children_takes_every_label_and_unused_labels_are_dropped():
    assert Max().covering(["matrix", "vector"]) == Max("matrix", "vector")
    assert Hybrid().covering(["matrix", "vector"]) == Hybrid(Max("matrix"), "vector")
    assert Hybrid().covering(["vector"]) == Hybrid("vector")
    assert Sum(Max("a"), "b").covering(["b"]).labels() == ["b"]


@cases("tree", [*TREES, Hybrid("a", Sum("b", "c"))])
def test_a_tree_prints_as_what_builds_it(tree):
    again = eval(repr(tree), {kind.__name__: kind for kind in PRODUCTS.values()})
    assert again == tree
    assert hash(again) == hash(tree)
    with pytest.raises(FrozenInstanceError):
        tree.children = ()


def test_trees_are_equal_if_their_kind_and_children_are():
    assert Max("a", Sum("b")) == Max("a", Sum("b"))
    different = [Max("a", "b"), Max("b", "a"), Sum("a", "b"), Max("a", Max("b")), Max()]
    assert len(set(different)) == len(different)


def test_names_and_trees_are_taken():
    assert {get_product(name) for name in PRODUCTS} == {Max(), Sum(), Euclid(), Hybrid()}
    assert get_product(Max("a")) == Max("a")


@cases(
    "call, error, message",
    [
        (lambda: Max(3), TypeError, "Max takes nodes and labels such as 'matrix', got 3."),
        (lambda: Euclid("a", Max), TypeError, "Euclid takes nodes and labels such as 'matrix', got <class"),
        (
            lambda: Max("a", Sum("b", "a")),
            ValueError,
            "The label 'a' appears twice in Max('a', Sum('b', 'a')); a block has one place in the tree.",
        ),
        (
            lambda: Max("matrix", "vecotr").covering(["matrix", "vector"]),
            ValueError,
            "Unknown place in the product norm 'vector': did you mean 'vecotr'? Valid: matrix, vecotr. "
            "Add it to Max('matrix', 'vecotr').",
        ),
        (
            lambda: Max("a", Sum()).covering(["a"]),
            ValueError,
            "Sum() inside of a product norm must say which labels it is for.",
        ),
        (
            lambda: get_product("hybird"),
            ValueError,
            "Unknown product 'hybird': did you mean 'hybrid'? Valid: euclid, hybrid, max, sum.",
        ),
        (lambda: get_product(Max), TypeError, "product must be a name or a tree such as Hybrid(), got <class"),
        (lambda: get_product(None), TypeError, "product must be a name or a tree such as Hybrid(), got None."),
    ],
)
def test_the_error_says_what_came_and_what_was_expected(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
