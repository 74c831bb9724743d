"""Options of preconditioning: presets, the calendar of refreshes, and every text of refusal."""

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.stages.inputs import PRESETS, InputMoment


def test_defaults_are_the_default_preset_and_a_valid_choice():
    assert InputMoment.preset("default") == InputMoment()
    assert hash(InputMoment()) == hash(InputMoment())


# Paper's Algorithm 1 and its scripts: blocks as wide as the fan-out, K0 = 1e-3 I, no correction for the start.
@pytest.mark.parametrize(
    ("name", "every", "decay", "floor"),
    [("paper_record4", 32, 0.95, 1e-8), ("paper_record28", 16, 0.8, 0.0), ("track3", 64, 0.95, 1e-8)],
)
def test_presets_of_the_paper_state_its_numbers(name, every, decay, floor):
    options = InputMoment.preset(name)
    assert (options.every, options.decay, options.ridge, options.ridge_floor) == (every, decay, 0.2, floor)
    assert (options.structure, options.exponents, options.on) == ("block", (1.0, 0.0), "gradient")
    assert (options.init, options.bias_correction, options.normalize) == (1e-3, False, False)
    assert options.start(0, 1) == every - 1  # the scripts take Muon's steps until then


def test_an_override_takes_the_place_of_one_option_only():
    options = InputMoment.preset("track3", every=8)
    assert options == dataclasses.replace(InputMoment.preset("track3"), every=8)
    assert InputMoment.preset("track3").every == 64


def test_every_preset_is_valid():
    assert {name: InputMoment.preset(name).every for name in PRESETS}.keys() == PRESETS.keys()


@pytest.mark.parametrize(
    ("exponents", "powers"),
    [((1, 0), (1,)), ((0.5, 0.5), (0.5,)), ((1, 0.25), (1, 0.25)), ((0, 0), ()), ((0, 1), (1,))],
)
def test_one_matrix_per_distinct_exponent(exponents, powers):
    assert InputMoment(exponents=exponents).powers == powers


def test_lists_become_tuples_so_that_options_stay_hashable():
    options = InputMoment(exponents=[1.0, 0.0], anneal=[4, 8], on="gradient", roles=["head", "matrix", "head"])
    assert (options.exponents, options.anneal, options.roles) == ((1.0, 0.0), (4, 8), ("matrix", "head"))
    assert isinstance(hash(options), int)


def test_the_last_pattern_that_matches_gives_the_structure():
    options = InputMoment(structure={"*": "full", "*.down.*": "diagonal", "h.3.down.weight": "none"})
    assert options.structure_for("h.0.up.weight") == "full"
    assert options.structure_for("h.0.down.weight") == "diagonal"
    assert options.structure_for("h.3.down.weight") == "none"
    assert InputMoment(structure={"h.*": "full"}).structure_for("head") == "wide"
    assert InputMoment(structure="block").structure_for("any") == "block"


@given(
    every=st.integers(1, 12),
    first=st.none() | st.integers(0, 20),
    turns=st.integers(1, 6),
    stagger=st.booleans(),
)
def test_each_layer_refreshes_every_so_many_steps_from_its_start_on(every, first, turns, stagger):
    options = InputMoment(every=every, first=first, stagger=stagger)
    begin = every - 1 if first is None else first
    for turn in range(turns):
        start = options.start(turn, turns)
        assert [step for step in range(60) if options.due(step, start)] == list(range(start, 60, every))
        assert begin <= start < begin + every if stagger else start == begin
    starts = [options.start(turn, turns) for turn in range(turns)]
    if stagger:  # no step has two more layers than another
        loads = [starts.count(step) for step in range(begin, begin + every)]
        assert max(loads) - min(loads) <= 1


def test_the_blend_falls_linearly_and_then_nothing_is_looked_at():
    options = InputMoment(every=1, first=0, blend=0.8, anneal=(10, 14))
    blends = [options.blend_at(step) for step in (0, 10, 11, 12, 13, 14, 99)]
    assert blends == pytest.approx([0.8, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    assert [step for step in range(8, 30) if options.due(step, 0)] == list(range(8, 14))


def test_a_constant_blend_is_its_own_at_each_step():
    assert InputMoment(blend=0.25).blend_at(10**6) == 0.25


CHOICES = [
    (
        {"structure": "diag"},
        "Unknown structure 'diag': did you mean 'diagonal'? Valid: auto, block, diagonal, full, none, wide.",
    ),
    (
        {"structure": {"a": "full", "b": "ful"}},
        "Unknown structure 'ful': did you mean 'full'? Valid: auto, block, diagonal, full, none, wide.",
    ),
    ({"ridge_unit": "fro"}, "Unknown ridge_unit 'fro'"),
    ({"on": "gradients"}, "Unknown on 'gradients': did you mean 'gradient'? Valid: gradient, momentum."),
    ({"solver": "chol"}, "Unknown solver 'chol'. Valid: factor, inverse."),
    ({"missing": "skip"}, "Unknown missing 'skip'. Valid: muon, raise."),
    ({"every": 0}, "every must be at least 1, got 0."),
    ({"block_size": 0}, "block_size must be at least 1, got 0."),
    ({"first": -1}, "first must be at least 0, got -1."),
    ({"tokens": 0}, "tokens must be at least 1, got 0."),
    ({"decay": 1.0}, "decay must be in [0, 1), got 1.0."),
    ({"decay": -0.1}, "decay must be in [0, 1), got -0.1."),
    ({"ridge": -1}, "ridge must be finite and at least 0, got -1."),
    ({"ridge": math.nan}, "ridge must be finite and at least 0, got nan."),
    ({"ridge": math.inf}, "ridge must be finite and at least 0, got inf."),
    ({"ridge_floor": -1e-9}, "ridge_floor must be finite and at least 0, got -1e-09."),
    ({"init": -1.0, "bias_correction": False}, "init must be finite and at least 0, got -1.0."),
    ({"blend": 1.1}, "blend must be in [0, 1], got 1.1."),
    ({"blend": math.nan}, "blend must be in [0, 1], got nan."),
    ({"exponents": (1.0, 2.0)}, "exponents must be two numbers in [0, 1], got (1.0, 2.0)."),
    ({"exponents": (math.nan, 0.0)}, "exponents must be two numbers in [0, 1], got (nan, 0.0)."),
    ({"anneal": (5, 5)}, "anneal must be two steps (start, end), 0 <= start < end, got (5, 5)."),
    ({"anneal": (-1, 5)}, "anneal must be two steps (start, end), 0 <= start < end, got (-1, 5)."),
    ({"init": 1e-3}, "init=0.001 is a bias that bias_correction=True would take away; set it to False."),
    (
        {"solver": "factor", "exponents": (0.5, 0.5)},
        "solver='factor' solves with K, so its exponents are (1, 0), got (0.5, 0.5). Use solver='inverse'.",
    ),
    ({"normalize": False, "blend": 0.5}, "blend and anneal add P to the identity, for which P needs its scale"),
    ({"normalize": False, "anneal": (1, 2)}, "needs its scale; set normalize=True."),
    (
        {"roles": ("head", "embeding")},
        "roles must be a tuple of one or more of 'matrix', 'head', 'embedding', got ('head'",
    ),
    ({"roles": ("vector",), "on": "gradient"}, "'head', 'embedding', got ('vector',)."),
    (
        {"roles": ("head", "matrix")},
        "roles=('matrix', 'head') with on='momentum': in the norm of a role 'head', such as Adam's, a direction is "
        "divided by second moments of the gradients, which a preconditioned momentum does not fit. Set on='gradient'.",
    ),
]


@pytest.mark.parametrize(("options", "text"), CHOICES, ids=lambda value: None if isinstance(value, str) else str(value))
def test_a_value_out_of_range_or_two_that_exclude_one_another(options, text):
    with pytest.raises(ValueError, match=f"^InputMoment: .*{re.escape(text)}"):
        InputMoment(**options)


KINDS = [
    ({"every": 2.0}, "every must be a whole number, got 2.0. Write every=2."),
    ({"every": None}, "every must be a whole number, got None. Leave it out for the default."),
    ({"every": True}, "every must be a whole number, got True."),
    ({"tokens": "many"}, "tokens must be a whole number, got 'many'."),
    ({"decay": "slow"}, "decay must be a number, got 'slow'."),
    ({"ridge": None}, "ridge must be a number, got None. Leave it out for the default."),
    ({"init": True, "bias_correction": False}, "init must be a number, got True."),
    ({"blend": "half"}, "blend must be a number, got 'half'."),
    ({"blend": True}, "blend must be a number, got True."),
    ({"exponents": (True, False)}, "exponents must be two numbers in [0, 1], got (True, False)."),
    ({"exponents": 1.0}, "exponents must be two numbers in [0, 1], got 1.0."),
    ({"exponents": (1.0,)}, "exponents must be two numbers in [0, 1], got (1.0,)."),
    ({"exponents": ("1", "0")}, "exponents must be two numbers in [0, 1], got ('1', '0')."),
    ({"anneal": 100}, "anneal must be two steps (start, end), 0 <= start < end, got 100."),
    ({"stagger": 1}, "stagger must be True or False, got 1."),
    ({"hooks": None}, "hooks must be True or False, got None."),
    ({"normalize": "yes"}, "normalize must be True or False, got 'yes'."),
    ({"bias_correction": 0}, "bias_correction must be True or False, got 0."),
    (
        {"roles": "head"},
        "roles must be a tuple of one or more of 'matrix', 'head', 'embedding', got 'head'. Write roles=('head',).",
    ),
    ({"roles": ()}, "roles must be a tuple of one or more of 'matrix', 'head', 'embedding', got ()."),
]


@pytest.mark.parametrize(("options", "text"), KINDS, ids=lambda value: None if isinstance(value, str) else str(value))
def test_a_value_of_another_kind(options, text):
    with pytest.raises(TypeError, match=f"^InputMoment: {re.escape(text)}$"):
        InputMoment(**options)


def test_an_unknown_preset_and_an_unknown_option_of_one():
    names = ", ".join(sorted(PRESETS))
    with pytest.raises(ValueError, match=f"^Unknown preset 'track'.*did you mean 'track3'. Valid: {names}.$"):
        InputMoment.preset("track")
    with pytest.raises(TypeError, match=r"^InputMoment: Unknown option 'evry': did you mean 'every'\? Valid: anneal, "):
        InputMoment.preset("default", evry=3)


def test_structure_patterns_may_be_empty_but_not_of_another_kind():
    assert InputMoment(structure={}).structure_for("any") == "wide"
    with pytest.raises(TypeError, match=r"^InputMoment: structure must be a name or a mapping .*, got 3\.$"):
        InputMoment(structure=3)
