"""Every option of every constructor, given values of every kind: each is taken, or refused by name.

The table is generated from signatures: an option that is added later is in it, and needs a line in `RIGHT`.
"""

import decimal
import inspect
import math
import pydoc
import re
from typing import Unpack

import numpy as np
import pytest
import torch
from torch import nn

import steepest
from steepest import Frobenius, InputMoment, Momo, Muon, NonFiniteError, Sign, Spectral, View, route
from steepest.batch_size import Ball, Bound, NoiseScale, Problem, Setting
from steepest.batch_size.curve_fit import Point
from steepest.linalg import COEFFICIENTS, Coefficients
from steepest.optim import recipes
from steepest.optim.arguments import texts_of
from steepest.optim.guard import Guard
from steepest.optim.options import check_numbers
from tests.cases import cases
from tests.optim.training import assert_same, backward, network, snapshot, train


class Thing:
    """Nothing that an option could be."""


VALUES = {
    "None": None,
    "number as text": "1e-3",
    "empty text": "",
    "word": "nonsense",
    "bytes": b"1",
    "negative": -1,
    "negative fraction": -0.5,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "nan of NumPy": np.float64("nan"),
    "complex": 1j,
    "huge": 10**400,
    "huge negative": -(10**400),
    "huge in a list": [10**5000],
    "True": True,
    "zero": 0,
    "fraction": 0.5,
    "three": 3,
    "decimal": decimal.Decimal("0.1"),
    "number of NumPy": np.float32(0.25),
    "tensor of one": torch.tensor(0.5),
    "tensor of two": torch.ones(2),
    "array": np.ones(2),
    "empty list": [],
    "empty tuple": (),
    "empty mapping": {},
    "empty set": set(),
    "mapping of a role": {"matrix": Thing()},
    "mapping of no role": {"matrx": 0.5},
    "two words": ("a", "b"),
    "two nan": (math.nan, math.nan),
    "two flags": (True, True),
    "two huge": (10**400, 0.0),
    "three numbers": (0.1, 0.2, 0.3),
    "range": range(3),
    "class": dict,
    "object": Thing(),
}
NON_NEGATIVE = {"zero", "fraction", "three", "number of NumPy"}
POSITIVE = NON_NEGATIVE - {"zero"}
PART = NON_NEGATIVE - {"three"}
RATE = NON_NEGATIVE | {"tensor of one"}
FLAG = {"True"}
COUNT = {"three", "huge"}
# Which of the values an option takes, besides its default. None of them: any object of its own kind only.
RIGHT = {
    "stages": {"empty list"},
    "families": {"None", "empty mapping"},
    **dict.fromkeys(("lr", "adam_lr", "other_lr"), RATE),
    **dict.fromkeys(("momentum", "beta2", "decay"), PART),
    **dict.fromkeys(("weight_decay", "eps", "ridge", "ridge_floor", "init"), NON_NEGATIVE),
    **dict.fromkeys(("radius", "head_radius"), POSITIVE),
    **dict.fromkeys(("nesterov", "constrained", "regularized", "momo", "strict", "split_fused"), FLAG),
    **dict.fromkeys(("bias_correction", "normalize", "stagger", "hooks", "transposed", "experts"), FLAG),
    **dict.fromkeys(("every", "block_size", "tokens", "memory_cap"), COUNT),
    **{option: set() for option in ("scale", "coefficients", "polar", "dtype", "step_size", "precondition", "dual")},
    **{option: set() for option in ("on_nonfinite", "norms", "product", "ridge_unit", "on", "solver", "missing")},
    **{option: set() for option in ("bookkeeping", "heads_dim", "source", "name", "role", "view", "norm", "steps")},
    **{option: {"three"} for option in ("groups", "interleave", "heads")},
    **dict.fromkeys(("smoothness", "noise", "gap", "gradient", "X", "Y", "Z"), NON_NEGATIVE),
    "first": COUNT | {"zero"},
    "batch_size": COUNT,
    "seed": COUNT | {"zero"},
    "start": {"three", "zero"},
    "end": {"three"},
    "parts": POSITIVE,
    "threshold": POSITIVE,
    "strength": NON_NEGATIVE,
    "beta": PART,
    "mix": POSITIVE - {"three"},
    "censored": FLAG,
    "overshoot": {"three"},
    "rate": {"zero"},
    "level": PART - {"zero"},
    "samples": POSITIVE | {"None"},
    "unit": {"None", "number as text", "empty text", "word"},
    **{option: set() for option in ("shape", "measure", "losses", "kinds", "powers")},
    "prior": NON_NEGATIVE,
    "process_group": {"None"},
    "exchange_dtype": {"None"},
    "rounding": set(),
    "momentum_dtype": {"None"},
    "store": {"None"},
    "betas": {"None"},
    **{option: set() for option in ("weights", "between")},
    "later": {"None"},
    "structure": {"empty mapping"},
    "exponents": set(),
    "exponent": NON_NEGATIVE,
    **dict.fromkeys(("keep_size", "relative"), FLAG),
    "outward": PART,
    "part": NON_NEGATIVE,
    **{option: set() for option in ("sides", "bounds", "method", "roles")},
    "anneal": set(),
    "blend": {"zero"} | PART,
    "lower_bound": NON_NEGATIVE | {"negative", "negative fraction", "-inf", "class"},
    "p": {"three"},
    "by": POSITIVE,
    "split": {"empty list", "empty tuple"},
    "overrides": {"None", "empty mapping"},
}
# Where an owner takes more or fewer than others do.
OWN = {
    ("Coefficients", "name"): {"number as text", "empty text", "word"},
    ("Coefficients", "source"): {"number as text", "empty text", "word"},
    ("group", "name"): {"None", "number as text", "empty text", "word"},
    ("group", "role"): {"None"},
    ("group", "view"): {"None"},
    ("group", "dtype"): {"None"},
    ("InputMoment", "blend"): PART,
    ("ShampooPowers", "exponent"): PART,
    **{(owner, "split"): FLAG for owner in ("Eigenbasis", "ShampooPowers")},
    ("Averages", "betas"): set(),
    ("View", "interleave"): set(),
    **{(owner, option): POSITIVE for owner in ("Ball", "Setting") for option in ("lr", "scale")},
    ("Point", "steps"): POSITIVE,
    ("NoiseScale", "losses"): set(),
    ("NoiseScale", "scale"): POSITIVE | {"class"},
}


def model():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 12), nn.Linear(12, 4), nn.Linear(4, 5))


def group(**options):
    role = {"role": "vector"} if {"betas", "eps"} & options.keys() else {}
    return steepest.Muon([{"params": [nn.Parameter(torch.ones(3, 3))], **role, **options}])


def noise_scale(**options):
    watched = nn.Linear(2, 2)
    NoiseScale(watched, torch.optim.SGD(watched.parameters()), **options).close()


def tail_average(start=0, end=None, parts=1.0, beta=None, mix=1.0):
    return steepest.TailAverage(nn.Linear(2, 2), start=start, end=end, parts=parts, beta=beta, mix=mix)


def outer_nesterov(strength=0.6, decay=0.99, start=0, end=None):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    return steepest.OuterNesterov(optimizer, strength=strength, decay=decay, start=start, end=end)


def qk_clip(threshold=100.0):
    return steepest.QKClip(nn.MultiheadAttention(4, 2), threshold=threshold)


RECIPES = ["SteepestDescent", *recipes.RECIPES]
BASES = {
    "Momo": (steepest.Momo, {}),
    "InputMoment": (InputMoment, {"bias_correction": False}),
    "DiagonalMetric": (steepest.DiagonalMetric, {}),
    "RadialBrake": (steepest.RadialBrake, {}),
    "RowFloor": (steepest.RowFloor, {}),
    "Sphere": (steepest.Sphere, {}),
    "Eigenbasis": (steepest.Eigenbasis, {}),
    "ShampooPowers": (steepest.ShampooPowers, {}),
    "Spectral": (Spectral, {}),
    "AdaInf": (steepest.AdaInf, {}),
    "Ada2": (steepest.Ada2, {}),
    "Schatten": (steepest.Schatten, {}),
    "Scaled": (steepest.Scaled, {"norm": Sign(), "by": 1.0}),
    "View": (View, {}),
    "Rule": (steepest.Rule, {}),
    "Ball": (Ball, {"lr": 1.0, "weight_decay": 0.1}),
    "Setting": (Setting, {"lr": 1.0}),
    "Averages": (steepest.Averages, {"later": (0.5, 0.5)}),
    "Problem": (Problem, dict.fromkeys(("smoothness", "noise", "gap", "gradient"), 1.0)),
    "Bound": (Bound, {"X": 1.0, "Y": 1.0, "Z": 1.0}),
    "Point": (Point, {"batch_size": 8, "seed": 0, "steps": 9.0}),
    "TailAverage": (tail_average, {}),
    "OuterNesterov": (outer_nesterov, {}),
    "QKClip": (qk_clip, {}),
    "Coefficients": (Coefficients, {"name": "x", "source": "y", "steps": COEFFICIENTS["jordan"].steps}),
}
CALLS = {
    **{
        (name, option): (lambda value, name=name, option=option: getattr(steepest, name)(model(), **{option: value}))
        for name in RECIPES
        for option in inspect.signature(getattr(steepest, name)).parameters
        if option != "params"
    },
    **{
        (name, option): (lambda value, make=make, base=base, option=option: make(**{**base, option: value}))
        for name, (make, base) in BASES.items()
        for option in inspect.signature(make).parameters
    },
    **{
        ("group", option): (lambda value, option=option: group(**{option: value}))
        for option in (
            *("lr", "momentum", "nesterov", "weight_decay", "betas", "beta2", "role", "view", "norm", "name"),
            *("eps", "scale", "coefficients", "polar", "dtype"),
        )
    },
    **{
        ("NoiseScale", option): (lambda value, option=option: noise_scale(**{option: value}))
        for option in inspect.signature(NoiseScale).parameters
        if option not in ("model", "optimizer", "norm")
    },
    **{
        ("route", option): (lambda value, option=option: route(model(), **{option: value}))
        for option in ("overrides", "strict", "split_fused")
    },
}
SHOWN = {
    "huge": "of 1329 bits",
    "huge negative": "of 1329 bits",
    "huge in a list": "an integer of 16610 bits",
    "two huge": "(an integer of 1329 bits, 0.0)",
    "tensor of two": "shape (2,)",
}
DEFAULTS = {
    (name, option): parameter.default
    for name in (*RECIPES, *BASES, "route")
    for option, parameter in inspect.signature(
        BASES[name][0] if name in BASES else getattr(steepest, name)
    ).parameters.items()
}


def refused(owner, option, kind):
    """Whether the table says that a value is wrong here."""
    value = VALUES[kind]
    default = DEFAULTS.get((owner, option), Thing)
    if value is default or (type(value) is type(default) and value == default):
        return False
    return kind not in OWN.get((owner, option), RIGHT[option])


def told(text, kind):
    """Whether a message shows a value, or its type."""
    value = VALUES[kind]
    if kind in SHOWN:
        return SHOWN[kind] in text
    parts = [repr(value), repr(value.item()) if isinstance(value, np.generic) else repr(value)]
    if isinstance(value, dict):
        parts += map(repr, [*value, *value.values()])
    if isinstance(value, list):
        parts.append(repr(tuple(value)))
    return any(part in text for part in parts)


@pytest.mark.slow
@cases("owner, option", CALLS)
def test_a_wrong_value_is_refused_with_name_value_and_expectation(owner, option):
    for kind, value in VALUES.items():
        if not refused(owner, option, kind):
            continue
        try:
            CALLS[owner, option](value)
        except (TypeError, ValueError) as error:
            text = str(error)
            assert option.replace("overrides", "override") in text, f"{kind} does not name {option}: {text}"
            assert told(text, kind), f"{kind} is not shown: {text}"
            assert re.search(r"must|takes|Valid:|Roles are|is no |has no|are for|Give|Leave|The model has", text), (
                f"{kind}: {text}"
            )
            assert len(text) < 600, text
        else:
            pytest.fail(f"{owner}({option}={kind}) was accepted")


@pytest.mark.filterwarnings("ignore:lr · weight_decay is")
@cases("owner, option", CALLS)
def test_a_right_value_is_taken(owner, option):
    for kind, value in VALUES.items():
        if not refused(owner, option, kind):
            CALLS[owner, option](value)


TAKEN = {
    "lr": [torch.tensor(0.5), 0.5],
    "scale": ["none", "spectral"],
    "coefficients": ["jordan", COEFFICIENTS["cans"], [(2.0, -1.5, 0.5)], np.array([[2.0, -1.5, 0.5]] * 3)],
    "polar": ["svd", "gram"],
    "dtype": [torch.float32, torch.float64, None],
    "exchange_dtype": [torch.bfloat16, torch.float32, None],
    "rounding": ["nearest", "stochastic", "kept"],
    "momentum_dtype": [torch.bfloat16, None],
    "step_size": [Momo(), steepest.Fixed()],
    "precondition": [InputMoment(), "default", InputMoment(every=2)],
    "dual": ["stale"],
    "on_nonfinite": ["raise"],
    "momentum": [0.5, steepest.Averages(), steepest.Averages((0.5,), (1,))],
    "betas": [(0.5, 0.5), [0.5, 0], (np.float32(0.5), 0.5), (steepest.Averages(), 0.5)],
    "norms": [{"matrix": "frobenius"}, {"vector": Sign(), "head": Frobenius()}],
    "families": [{"*.weight": {"lr": 0.5}}, {"vector": {"betas": (0.5, 0.5)}}, None],
    "product": ["euclid", steepest.Hybrid(), steepest.Max("matrix", "embedding", "head", "vector")],
}
OBJECTS = [
    lambda: steepest.SteepestDescent(model(), lr={"matrix": 1, "embedding": 0.1, "head": 0.1, "vector": 0}),
    lambda: InputMoment(exponents=[0.5, 0.5], anneal=[1, 5], structure={"*": "full"}, block_size=4),
    lambda: steepest.Muon(model(), precondition=InputMoment(init=0.5, bias_correction=False, structure="full")),
    lambda: View(split=[2, 2], heads=[1, 2], interleave=2),
    lambda: steepest.Rule("head", View(heads=2)),
    lambda: steepest.Scaled("sign", "inverse_fan_in"),
    lambda: Momo(lower_bound="auto", bookkeeping="direct"),
]


@pytest.mark.parametrize("option", TAKEN)
def test_each_option_takes_objects_of_its_kind(option):
    for value in TAKEN[option]:
        takers = [o for o in CALLS if o[1] == option and o[0] in RECIPES]
        assert takers
        for taker in takers[:3]:
            CALLS[taker](value)


@pytest.mark.parametrize("make", OBJECTS)
def test_objects_take_their_options_together(make):
    make()


@cases("kind", [kind for kind, value in VALUES.items() if not isinstance(value, str) or not value])
def test_a_product_norm_refuses_what_is_no_child(kind):
    for node in (steepest.Max, steepest.Sum, steepest.Euclid, steepest.Hybrid):
        with pytest.raises((TypeError, ValueError), match=f"^{node.__name__} takes nodes and labels such as 'matrix'"):
            node(VALUES[kind])


@cases("kind", VALUES)
def test_an_override_is_a_role_a_view_or_a_rule(kind):
    with pytest.raises((TypeError, ValueError), match=r"The override '1\.weight' (must be a role|asks for the role)"):
        route(model(), overrides={"1.weight": VALUES[kind]})


@cases("kind", [kind for kind in VALUES if "tensor" not in kind])
def test_parameters_of_every_wrong_kind_are_refused(kind):
    for make in (lambda value: steepest.Muon(value), lambda value: steepest.Muon([{"params": value}])):
        with pytest.raises((TypeError, ValueError), match=r"must be a|must be in an order|empty parameter list"):
            make(VALUES[kind])


PEERS = {
    "ns_steps": 5,
    "adjust_lr_fn": "original",
    "fused": True,
    "foreach": True,
    "capturable": True,
    "maximize": True,
    "amsgrad": True,
    "differentiable": True,
    "momentum_beta": 0.9,
    "adamw_betas": (0.9, 0.95),
    "adamw_eps": 1e-8,
    "adamw_params": [],
    "muon_params": [],
    "wd": 0.1,
    "mu": 0.9,
    "ns_coefficients": (3.4445, -4.775, 2.0315),
    "rank": 0,
    "world_size": 1,
    "use_muon": True,
    "learning_rate": 0.1,
    "lower_bound": 0.0,
}


@pytest.mark.parametrize("name", RECIPES)
def test_peers_arguments_are_answered_with_what_to_write(name):
    make = getattr(steepest, name)
    for option, value in PEERS.items():
        with pytest.raises(TypeError, match=rf"^{name} has no option '{option}'\. (Write|Leave it out|Pass)"):
            make(model(), **{option: value})
    with pytest.raises(TypeError, match=rf"^{name} has no option 'stepsize'\. Did you mean 'step_size'\?"):
        make(model(), stepsize=Momo())
    with pytest.raises(TypeError, match=rf"^{name} takes params.* by position, got 4 values; write the others by name"):
        make(model(), 0.1, 0.9, True)


def test_rates_by_role_belong_to_steepest_descent():
    message = r"^Muon: lr must be one value, got \{'matrix': 0\.1\}\. A mapping.*SteepestDescent.*adam_lr="
    with pytest.raises(TypeError, match=message):
        steepest.Muon(model(), lr={"matrix": 0.1})


def test_subclasses_with_options_of_their_own_are_checked_where_ours_begin():
    class Mine(steepest.Muon):
        def __init__(self, params, scale, **options):
            super().__init__(params, **options)
            self.mine = scale

    assert Mine(model(), scale=3.0).mine == 3.0
    with pytest.raises(TypeError, match=r"^Mine: lr must be a number, got '1e-3'"):
        Mine(model(), scale=3.0, lr="1e-3")


def test_signatures_are_those_that_are_documented():
    for name in RECIPES:
        parameters = list(inspect.signature(getattr(steepest, name)).parameters.values())
        assert [parameter.name for parameter in parameters[:2]] == ["params", "lr"]
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[2:])


@pytest.mark.parametrize("name", RECIPES)
def test_help_shows_every_option_with_its_default_and_its_text(name):
    make = getattr(steepest, name)
    parameters = inspect.signature(make).parameters
    texts = texts_of(make.__doc__)
    assert list(texts) == list(parameters)
    assert all(len(text) > 10 and text.endswith((".", ")")) for text in texts.values())
    page = pydoc.plain(pydoc.render_doc(make))
    for option, parameter in parameters.items():
        assert option == "params" or f"{option}: " in page
        assert option in ("params", "dtype") or f" = {parameter.default!r}" in page
    assert all(len(line) <= 120 for line in make.__doc__.splitlines())


def test_every_recipe_is_known_and_exported_by_its_name():
    exported = [getattr(steepest, name) for name in steepest.__all__]
    found = {kind.__name__ for kind in exported if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
    assert found == set(RECIPES)
    assert list(recipes.RECIPES) == recipes.__all__ == sorted(recipes.__all__)
    assert "Mine" not in recipes.RECIPES


def test_a_recipe_of_a_user_shows_what_it_shares_too():
    @recipes.recipe
    class Mine(steepest.Muon):
        """A recipe of mine.

        Args:
            params: A module.
            lr: How fast.
            **options: See `Muon`.
        """

        def __init__(self, params, lr=0.5, **options: Unpack[recipes.AdamOptions]):
            super().__init__(params, lr, momentum=0.5, **options)

    assert Mine(model(), momo=True, eps=1e-6).param_groups[0]["momentum"] == 0.5
    assert texts_of(Mine.__doc__)["eps"] == texts_of(steepest.Muon.__doc__)["eps"]
    assert inspect.signature(Mine).parameters["dual"].default == "cached"
    with pytest.raises(TypeError, match=r"^Mine has no option 'momentum'"):
        Mine(model(), momentum=0.5)
    with pytest.raises(ValueError, match=r"momo=True and step_size=.* are two answers to one question"):
        Mine(model(), momo=True, step_size=Momo())


@pytest.mark.parametrize("name", ["NewtonMuon", "NewtonMuonMax", "Muon", "MuonMax", "SteepestDescent"])
@pytest.mark.parametrize("value", [False, True, 0])
def test_preconditioning_is_not_switched_by_a_flag(name, value):
    message = rf"precondition must be InputMoment\(\.\.\.\), the name of a preset or None, got {value}\."
    with pytest.raises(TypeError, match=message):
        getattr(steepest, name)(model(), precondition=value)


def test_no_betas_are_those_of_the_recipe():
    for name in ("Adam", "Muon", "MuonAdam", "MuonMax", "PolarGrad"):
        make = getattr(steepest, name)
        given, left = make(model(), betas=None), make(model())
        for one, other in zip(given.param_groups, left.param_groups, strict=True):
            assert (one["momentum"], one["beta2"]) == (other["momentum"], other["beta2"])
    assert steepest.Adam(model(), betas=None).param_groups[0]["beta2"] == 0.999


def test_a_loss_by_position_is_answered():
    optimizer = steepest.Muon(model())
    for loss in (torch.tensor(1.0), 1.0, "1"):
        with pytest.raises(TypeError, match=r"^closure must be a function that computes the loss, got .*step\(loss="):
            optimizer.step(loss)


# Numbers of the groups as schedulers and users may write them: looked at before every step.

BAD = {
    "nan": (math.nan, ValueError),
    "infinite": (math.inf, ValueError),
    "negative": (-0.1, ValueError),
    "text": ("0.1", TypeError),
    "none": (None, TypeError),
    "numpy": (np.float64("nan"), ValueError),
    "nan tensor": (torch.tensor(math.nan), ValueError),
    "infinite tensor": (torch.tensor(math.inf), ValueError),
    "negative tensor": (torch.tensor(-1.0), ValueError),
    "vector": (torch.ones(2), TypeError),
    "one of a vector": (torch.ones(1) / 2, TypeError),
    "whole": (torch.tensor(0), TypeError),
}


@pytest.mark.slow
@cases("option", ["lr", "momentum", "weight_decay", "beta2"])
@cases("case", BAD)
def test_a_number_that_is_none_is_refused_before_anything_changes(recipe, option, case):
    value, error = BAD[case]
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    group = optimizer.param_groups[1]
    kept, group[option] = group[option], value
    with pytest.raises(error, match=rf"parameter group 1 \(role '{group['role']}'\), as this step finds it: {option}"):
        optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    group[option] = kept
    optimizer.step()


@pytest.mark.parametrize("value", ["no", 1, None, torch.tensor(True)], ids=str)
def test_a_flag_that_is_none_is_refused_before_anything_changes(recipe, value):
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    group = optimizer.param_groups[1]
    kept, group["nesterov"] = group["nesterov"], value
    with pytest.raises(TypeError, match="as this step finds it: nesterov must be True or False, got "):
        optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    group["nesterov"] = np.bool_(kept)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:lr · weight_decay is")
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_whole_number_of_any_size_is_a_float(option):
    model = network()
    optimizer = Muon(model)
    backward(model, 0)
    optimizer.param_groups[0][option] = 2**70
    optimizer.step()


@pytest.mark.parametrize("value", [1.0, 2.5, torch.tensor(1.0)], ids=str)
@pytest.mark.parametrize("option", ["momentum", "beta2"])
def test_a_weight_of_the_old_average_is_below_one(option, value):
    model = network()
    optimizer = Muon(model)
    backward(model, 0)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("value", [1, 0, np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)])
def test_numbers_of_every_kind_are_taken(value):
    model = network()
    optimizer = Muon(model)
    for group in optimizer.param_groups:
        group["lr"] = value if group["role"] == "matrix" else 0.1 * value  # one rate for all would be told
        group["weight_decay"] = value
    train(model, optimizer, range(2))


def test_a_scheduler_that_writes_nan_is_named_and_weights_stay():
    model = network()
    optimizer = Muon(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.nan if step == 2 else 1.0)
    for step in range(2):
        train(model, optimizer, [step])
        scheduler.step()
    with pytest.raises(ValueError, match=r"parameter group 0 .*lr.*nan"):
        train(model, optimizer, [2])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:lr · weight_decay is inf")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_rate_on_an_accelerator_masks_the_step(recipe, bad, monkeypatch):
    """On the CPU a tensor is read at once; here it stays one, as it would on an accelerator."""
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    optimizer.param_groups[0]["lr"] = torch.tensor(bad)
    allowed = torch.tensor(bad).isfinite() & (torch.tensor(bad) >= 0)
    monkeypatch.setattr("steepest.optim.descent.check_numbers", lambda groups: [allowed])
    monkeypatch.setattr("steepest.optim.guard.Guard.admit", lambda *_: torch.tensor(True))
    optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    with pytest.warns(RuntimeWarning, match="is not finite"):
        assert optimizer.diagnostics()["skipped_steps"] == 1


def test_unread_numbers_are_judged_on_their_device():
    group = {"role": "matrix", "momentum": 0.9, "weight_decay": 0.0, "beta2": 0.0}
    (flag,) = check_numbers([(0, {**group, "lr": torch.ones((), device="meta")})])
    assert flag.device.type == "meta"
    assert flag.dtype == torch.bool


def test_raising_waits_for_a_rate():
    with pytest.raises(NonFiniteError, match="A learning rate, a momentum or a decay that is a tensor is not finite"):
        Guard("raise").restrict(True, [torch.tensor(False)])
