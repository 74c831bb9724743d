"""The laws of `steepest.testing`: the library's pieces keep them, and pieces with a fault are found out.

Norms and recipes are those of the tables in docs/optimizers.md, which have a row for each, and some with other options.
"""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import steepest
from steepest import (
    Ada2,
    AdaInf,
    ColNorm,
    DiagonalMetric,
    Eigenbasis,
    Frobenius,
    InputMoment,
    Muon,
    NewtonMuon,
    RadialBrake,
    RowFloor,
    RowScaling,
    Scaled,
    Schatten,
    ShampooPowers,
    Sign,
    Spectral,
)
from steepest.geometry import NORMS, Norm
from steepest.optim.recipes import RECIPES
from steepest.stages import KNOWN, Entry, Stage
from steepest.testing import NORM_LAWS, RECIPE_LAWS, STAGE_LAWS, check_norm, check_recipe, check_stage, network
from tests.cases import cases
from tests.optim import training

PAGE = (Path(__file__).parent.parent / "docs" / "optimizers.md").read_text()
RECIPES_OF_PAGE = PAGE.partition("## Norms")[0]
ROWS = dict(re.findall(r"^\| `(\w+)\(model(?:, )?(.*?)\)`", RECIPES_OF_PAGE, flags=re.MULTILINE))  # recipe: options
HELD = {
    **{name: partial(getattr(steepest, name), **eval(f"dict({options})")) for name, options in ROWS.items()},
    **{f"{name}, as trained elsewhere": make for name, make in training.RECIPES.items()},
    "NewtonMuon, often": partial(NewtonMuon, precondition=InputMoment(every=2, first=1)),
    "NorMuon": partial(Muon, stages=[RowScaling()]),
    "IsoMuon": partial(Muon, stages=[DiagonalMetric()]),
    "SOAP-Muon": partial(Muon, stages=[Eigenbasis()]),
    "PMuon": partial(Muon, stages=[ShampooPowers(every=3)]),
    "NorMuon with inputs": partial(NewtonMuon, precondition=InputMoment(every=2, first=1), stages=[RowScaling()]),
    "Muon, decayed": partial(Muon, nesterov=False, weight_decay=0.1, scale="match_rms_adamw"),
}
EXACT = [
    *(Spectral(scale=scale, polar="svd") for scale in ("original", "match_rms_adamw", "spectral", "none")),
    *(kind() for kind in NORMS.values() if kind not in (Spectral, AdaInf, Ada2)),
    *(Schatten(p=1.5), Schatten(p=4.0), AdaInf(eps=1e-3), Ada2(eps=1e-3)),
    *(Scaled(ColNorm(), "sqrt_fan_out"), Scaled(Sign(), "inverse_fan_in"), Scaled(Frobenius(), "sqrt_size")),
    *(Scaled(Spectral(polar="svd"), 3), Scaled(AdaInf(), 0.5)),
]


def test_every_recipe_and_every_norm_has_its_row():
    assert ROWS.keys() == RECIPES.keys()
    norms = re.findall(
        r"^\| `(\w+)\([^)]*\)` \|", PAGE.partition("## Norms")[2].partition("\n## ")[0], flags=re.MULTILINE
    )
    assert sorted(norms) == sorted([*(kind.__name__ for kind in NORMS.values()), "Scaled"])
    about = PAGE.partition("## Stages")[2].partition("\n## ")[0]
    stages = re.findall(r"^\| `(\w+)\([^)]*\)` \|", about, flags=re.MULTILINE)
    ours = {kind for kind in vars(steepest.stages).values() if isinstance(kind, type) and issubclass(kind, Stage)}
    assert sorted(stages) == sorted(kind.__name__ for kind in ours - {Stage})
    assert ours >= {*KNOWN}


@pytest.mark.slow
@cases("law", NORM_LAWS)
@cases("norm", EXACT)
def test_norms_keep_the_law(norm, law):
    law(norm, 1e-12)


@pytest.mark.slow
@cases("law", RECIPE_LAWS)
@cases("name", HELD)
def test_recipes_keep_the_law(name, law):
    law(HELD[name])


@pytest.mark.parametrize("law", STAGE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "stage",
    [
        *(kind() for kind in KNOWN),
        RowScaling(beta2=0.0, eps=0.0),
        InputMoment(every=2, first=1, structure="full"),
        InputMoment(every=1, first=0, structure="full", exponents=(0.5, 0.5)),
        InputMoment(every=1, first=0, structure="full", on="gradient"),
        InputMoment(every=1, first=0, structure="full", on="gradient", roles=("matrix", "head")),
        InputMoment(every=1, first=0, structure="diagonal"),
        DiagonalMetric(source="gradients", sides="rows", beta2=0.0, keep_size=False),
        Eigenbasis(every=1, split=True),
        Eigenbasis(every=2, method="eigh", block_size=6, eps=0.0, beta2=0.0),
        ShampooPowers(every=1, exponent=0.5, ridge=0.0),
        ShampooPowers(every=1, exponent=1.0, ridge=0.1, split=True),
        RadialBrake(0.0),
        RowFloor(3.0),
    ],
    ids=repr,
)
def test_stages_keep_the_law(stage, law):
    law(stage)


class Faulty(Stage):
    """A stage with what each test puts in place of its methods."""

    prefix = "faulty_"

    def entries(self, row):
        return (Entry("faulty_count", torch.Size([1])),)


def counting(self, load, directions, states, accept):
    for state in states:
        state["faulty_count"] += 1
    return directions


def looking(self, load, gradients, averages, states, accept):
    for state in states:
        state["faulty_count"] += 1


def squaring(self, load, gradients, averages, states, accept):
    for state, gradient in zip(states, load.parameter_shaped(gradients), strict=True):
        new = state["faulty_count"] + gradient.square().mean()
        state["faulty_count"].copy_(new if accept is None else torch.where(accept, new, state["faulty_count"]))


def mixing(self, load, gradients, averages, states, accept):
    for state in states:
        new = state["faulty_count"] + gradients[-1].sign().mean()
        state["faulty_count"].copy_(new if accept is None else torch.where(accept, new, state["faulty_count"]))


def waking(self, states, present, accept):
    for state in states.values():
        if "faulty_count" in state:
            state["faulty_count"] += 1


def sharing(self, load, directions, states, accept):
    return tuple(d * sum(own.square().sum() for own in directions) for d in directions)


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("entries", lambda self, row: (Entry("count", torch.Size([1])),), "must begin with the stage's prefix"),
        ("after", lambda self, load, d, states, accept: tuple(one.mul_(2) for one in d), "arguments are only read"),
        (
            "before",
            lambda self, load, batches, states: tuple(one.mul_(2) for one in batches),
            "arguments are only read",
        ),
        ("linear", True, "after(c D) = c after(D)"),
        ("keeps_ball", True, "keeps_ball"),
        ("refresh", waking, "a step that is not taken changes no entry"),
        ("gradient", lambda self, load, gradients: [2 * one for one in gradients], "no_duals"),
        ("after", lambda self, load, d, states, accept: tuple(-one for one in d), "-<M, D> is at least 0"),
        ("entries", lambda self, row: (Entry("faulty_row", torch.Size([-1])),), "entries_are_what_is_declared"),
        ("after", counting, "a step that is not taken changes no entry"),
        ("after", lambda self, load, d, states, accept: tuple(one + (one == 0) for one in d), "after(0) = 0"),
        ("after", sharing, "a load is its parameters"),
        ("observe", looking, "a step that is not taken changes no entry"),
        ("observe", squaring, "gradients of any size leave finite entries"),
        ("observe", mixing, "a load is its parameters"),
        ("observe", lambda self, load, gradients, *rest: gradients[0].mul_(2), "arguments are only read"),
    ],
)
def test_a_stage_with_a_fault_is_found_out(name, fault, message, monkeypatch):
    monkeypatch.setattr(Faulty, name, fault)
    if name in ("linear", "keeps_ball"):
        squared = lambda self, load, d, states, accept: tuple(one * 9 * one.abs() for one in d)  # noqa: E731
        monkeypatch.setattr(Faulty, "after", squared)
    if fault is mixing:  # which shows where the number is used
        counted = lambda self, load, d, states, accept: tuple((1 + states[0]["faulty_count"]).abs() * one for one in d)  # noqa: E731
        monkeypatch.setattr(Faulty, "after", counted)
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_stage(Faulty())


def test_a_stage_that_does_nothing_keeps_every_law():
    check_stage(Faulty())


def test_an_approximate_polar_factor_keeps_the_laws_as_closely_as_it_is_one():
    check_norm(Spectral(polar="newton-schulz", coefficients="cubic12"), tolerance=0.01)
    with pytest.raises(AssertionError, match=r"^spectral polar=newton-schulz: dual\(M\) = -<M, lmo\(M\)>, but"):
        check_norm(Spectral(polar="newton-schulz"))


class Plain:
    """A norm that knows nothing of `Norm`, the largest entry."""

    adapts, matrix = False, False

    def primal(self, w, /, m=None, v=None):
        return w.abs().flatten(-2).amax(-1) if w.numel() else w.new_zeros(w.shape[:-2])

    def dual(self, m, /, v=None):
        return m.abs().sum((-2, -1))

    def lmo(self, m, /, v=None):
        return -m.sign()


class Uphill(Plain):
    def lmo(self, m, /, v=None):
        return m.sign()


class Long(Plain):
    def primal(self, w, /, m=None, v=None):
        return super().primal(w) / 2


class Small(Plain):
    def dual(self, m, /, v=None):
        return super().dual(m) / 2


class Greedy(Plain):
    """Its primal is the mean of entries, in which more can be gained than by signs."""

    def primal(self, w, /, m=None, v=None):
        return w.abs().mean((-2, -1))


class Writing(Plain):
    def lmo(self, m, /, v=None):
        return -m.sign_()


class Whole(Plain):
    def lmo(self, m, /, v=None):
        return -m.sign() * (1 + 0 * m.mean())


class Coarse(Frobenius):
    def lmo(self, m, /, v=None):
        return -m / m.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-30)


class Doubled(Frobenius):
    def lmos(self, batches, moments, *, memory_cap=None, radius=1.0):
        return [self.lmo(m) * radius**2 for m in batches]


class Claiming(Norm):
    adapts, matrix = False, True
    primal, dual, lmo = Frobenius.primal, Frobenius.dual, Frobenius.lmo

    def polar_scale(self, fan_out, fan_in):
        return 1.0


def test_a_norm_need_not_derive_from_ours():
    check_norm(Plain())


@cases(
    "norm, message",
    [
        (Uphill(), r"dual\(M\) = -<M, lmo\(M\)>, but .* D, to be added, not -D\."),
        (Long(), r"primal\(lmo\(M\)\) = 1, but at shape \(1, 1\) they differ by 0.5"),
        (Small(), r"dual\(M\) = -<M, lmo\(M\)>"),
        (Greedy(), r"<M, W> <= dual\(M\) · primal\(W\), but at shape \(.*\) a W is .* better than lmo\(M\)"),
        (Writing(), "arguments are only read, but M or V was written to. Work on a copy."),
        (Whole(), "a NaN spoils its own matrix only, but its neighbour changed"),
        (Coarse(), r"lmo\(c M\) = lmo\(M\), but at c 1e-\d+ they differ by .* Divide by the largest entry first"),
        (Doubled(), "lmos is radius times lmo of each, but at radius 0.25 they differ by"),
        (Claiming(), "singular values of directions are polar_scale, but .* Return None from polar_scale"),
    ],
)
def test_a_norm_with_a_fault_is_found_out(norm, message):
    with pytest.raises(AssertionError, match=message):
        check_norm(norm)


class Slow(Muon):
    def step(self, *args, **kwargs):
        for group in self.param_groups:
            group["lr"] = 0.0
        return super().step(*args, **kwargs)


class Clipping(Muon):
    def step(self, *args, **kwargs):
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e-3)
        return super().step(*args, **kwargs)


class Counting(Muon):
    """Keeps beside its state what the next step depends on."""

    def step(self, *args, **kwargs):
        self.count = getattr(self, "count", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1e-5 * self.count)
        return super().step(*args, **kwargs)


class Decaying(Muon):
    def step(self, *args, **kwargs):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.999)
        return super().step(*args, **kwargs)


@pytest.mark.slow
def test_a_recipe_with_a_fault_is_found_out():
    for make, message in [
        (Slow, r"^Slow: forty steps on one batch lower its loss, but it was .* and is .*learning rate"),
        (Clipping, "^Clipping: gradients are only read, but at tensor \\d they differ by"),
        (
            Counting,
            "^Counting: a run saved after 1 steps goes on exactly, but .* Keep in the state",
        ),
        (Decaying, "^Decaying: a gradient with nan changes nothing, but"),
        (lambda model, **_: Muon(model), "^<lambda>: Momo needs the loss, but a step without one was taken"),
    ]:
        with pytest.raises(AssertionError, match=message):
            check_recipe(make)


def test_the_network_of_the_laws_disturbs_nobodys_numbers():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network()
    assert torch.equal(torch.get_rng_state(), before)
