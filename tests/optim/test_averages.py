"""Several averages of gradients: against a reference from the whole history, and what they share with one average."""

import copy
import io
import pickle
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from steepest import (
    Ada2,
    AdaInf,
    Adam,
    Averages,
    Cautious,
    DiagonalMetric,
    Euclid,
    Fixed,
    Max,
    Momo,
    Muon,
    MuonAdam,
    MuonMax,
    RowScaling,
    Sign,
    SignDescent,
    Spectral,
    Sphere,
    SteepestDescent,
)
from steepest.geometry.text import built, text_of
from steepest.integrations.peers import import_state
from steepest.optim.momentum import FORGET_EVERY, average_, combined
from tests.cases import cases
from tests.optim.training import assert_same, backward, network, snapshot
from tests.optim.training import train as train_network
from tests.reference import grid
from tests.reference.regression import ROLES, blocks, oracle, parameter_groups, train

# Bounds above the loss are part of what is compared.
pytestmark = pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")

STEPS = 50
LR = {"matrix": 0.5, "embedding": 0.2, "head": 0.2, "vector": 0.2}
SWITCHED = Averages((0.6, 0.9), (1.0, 0.0), (0.4, 0.6), (20, 20))
FAMILY = Averages((0.5, 0.8, 0.95), (0.1, 0.2, 0.7), (0.5, 0.3, 0.2), (10, 40))
STEADY = Averages((0.9, 0.0), (0.25, 0.75))


def sometimes(step):
    """A lower bound that binds on every third step only, counted from 0."""
    return 1.3 if step % 3 == 2 else 0.0


@dataclass(frozen=True)
class Way:
    """One way to run."""

    averages: Averages
    nesterov: bool = False
    decay: float = 0.0
    cautious: bool = False
    sphere: str = ""  # of matrices: "kept" or "relative"
    lower_bound: object = None  # None: no Momo
    bookkeeping: str = "recurrent"
    dual: str = "cached"


WAYS = {
    "plain": Way(SWITCHED),
    "nesterov": Way(FAMILY, nesterov=True),
    "decay, nesterov, stale": Way(FAMILY, nesterov=True, decay=0.3, dual="stale"),
    "cautious": Way(STEADY, decay=0.3, cautious=True),
    "momo": Way(SWITCHED, lower_bound=1.2),
    "momo, nesterov": Way(SWITCHED, nesterov=True, lower_bound=sometimes),
    "momo, family, decay": Way(FAMILY, decay=0.3, lower_bound=1.3),
    "momo, direct": Way(FAMILY, lower_bound=1.3, bookkeeping="direct"),
    "momo, direct, nesterov, decay, stale": Way(
        SWITCHED, nesterov=True, decay=0.3, lower_bound=1.45, bookkeeping="direct", dual="stale"
    ),
    "momo, cautious, nesterov": Way(FAMILY, nesterov=True, decay=0.3, cautious=True, lower_bound=1.3),
    "momo, cautious, direct": Way(SWITCHED, decay=0.3, cautious=True, lower_bound=1.3, bookkeeping="direct"),
    "momo, sphere, nesterov": Way(FAMILY, nesterov=True, decay=0.3, sphere="kept", lower_bound=1.3),
    "momo, relative sphere, direct, stale": Way(
        SWITCHED, decay=0.3, sphere="relative", lower_bound=1.3, bookkeeping="direct", dual="stale"
    ),
    "auto": Way(FAMILY, nesterov=True, lower_bound="auto"),
    "auto, decay, direct, stale": Way(FAMILY, decay=0.3, lower_bound="auto", bookkeeping="direct", dual="stale"),
}
TREES = {Max(): ("max", *ROLES), Euclid(): ("euclid", *ROLES)}


def mixture(averages):
    later = averages.weights if averages.later is None else averages.later
    return grid.Mixture(averages.betas, averages.weights, later, averages.between)


def norms_of(other):
    return {"matrix": Spectral(scale="none", polar="svd"), **dict.fromkeys(ROLES[1:], other)}


def optimizer_of(groups, way, other, tree, *, regularized):
    momo = Fixed() if way.lower_bound is None else Momo(way.lower_bound, bookkeeping=way.bookkeeping)
    decays = dict.fromkeys(ROLES, Cautious(way.decay) if way.cautious else way.decay)
    if way.sphere:
        decays["matrix"] = Sphere(relative=way.sphere == "relative")
    return SteepestDescent(
        groups,
        lr=LR,
        momentum=way.averages,
        betas=(way.averages, 0.95),
        nesterov=way.nesterov,
        weight_decay=decays,
        norms=norms_of(other),
        product=tree,
        regularized=regularized,
        step_size=momo,
        dual=way.dual,
    )


CELLS = {
    "constrained": (Max(), False, AdaInf()),
    "regularized": (Euclid(), True, Ada2()),
    "constrained, product": (Euclid(), False, Sign()),
}


@pytest.mark.slow
@cases("cell, way", list(product(CELLS, WAYS)))
def test_fifty_steps_equal_the_reference_from_the_whole_history(cell, way):
    (tree, regularized, other), way = CELLS[cell], WAYS[way]
    groups, parameters = parameter_groups()
    optimizer = optimizer_of(groups, way, other, tree, regularized=regularized)
    waits = way.lower_bound is not None or tree != (Euclid() if regularized else Max())
    options = {
        role: {
            "lr": LR[role],
            "nesterov": way.nesterov,
            "cautious": way.cautious,
            "sphere": way.sphere if role == "matrix" else "",
            "weight_decay": 0.0 if way.sphere and role == "matrix" else way.decay,
        }
        for role in ROLES
    }
    method = grid.Method(
        tree=TREES[tree],
        regularized=regularized,
        beta=mixture(way.averages),
        lower_bound=way.lower_bound,
        stale=way.dual == "stale" and waits,
    )
    expected = grid.descend(blocks(norms_of(other), options), oracle, STEPS, method)
    for ours, theirs in zip(train(optimizer, parameters, STEPS), expected, strict=True):
        np.testing.assert_allclose(ours, np.concatenate([w.ravel() for w in theirs.weights]), rtol=0, atol=1e-10)
    if way.lower_bound is not None:
        numbers = optimizer.diagnostics()
        assert numbers["t"] == pytest.approx(expected[-1].length, rel=1e-6)
        assert numbers["dual_norm"] == pytest.approx(expected[-1].total, rel=1e-6)
        assert any(step.length < 1 for step in expected)  # or Momo would not have been tested


def network_steps(model, optimizer, steps):
    """Losses of a small training, with the loss for those who want it."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step)
        optimizer.step(loss=loss.detach())
        losses.append(loss.item())
    return losses


RECIPES = {
    "muon": lambda model, **options: Muon(model, momentum=FAMILY, betas=(FAMILY, 0.95), weight_decay=0.1, **options),
    "muon_momo": lambda model, **options: Muon(model, momentum=SWITCHED, momo=True, weight_decay=0.1, **options),
    "muon_max_direct": lambda model, **options: MuonMax(
        model, momentum=FAMILY, step_size=Momo(1.0, bookkeeping="direct"), dual="stale", **options
    ),
    "adam": lambda model, **options: Adam(model, betas=(FAMILY, 0.99), **options),
    "sign": lambda model, **options: SignDescent(model, momentum=SWITCHED, nesterov=True, **options),
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": 0.9}, r"Averages: betas must be 1 to 16 numbers in \[0, 1\), one for each average, got 0\.9"),
        ({"betas": (0.9, 1.0)}, r"Averages: betas must be 1 to 16 numbers in \[0, 1\).* got \(0\.9, 1\.0\)"),
        ({"betas": (0.9,) * 17}, "Averages: betas must be 1 to 16 numbers"),
        ({"betas": ()}, "Averages: betas must be 1 to 16 numbers"),
        ({"weights": (-0.1, 1.1)}, r"Averages: weights must be numbers of at least 0 that sum to 1.*\(-0\.1, 1\.1\)"),
        ({"weights": (0.5, 0.4)}, r"Averages: weights must be weights that sum to 1, got \(0\.5, 0\.4\).*sum to 0\.9"),
        ({"weights": (1.0,)}, r"Averages: weights must be 2 numbers, one for each of betas=\(0\.85, 0\.98\)"),
        ({"later": (1.0,)}, "Averages: later must be 2 numbers"),
        (
            {"later": (1, 0), "between": (5, 2)},
            "Averages: between must be two whole numbers of at least 0, the first",
        ),
        ({"later": (1, 0), "between": (-1, 2)}, r"Averages: between must be two whole.* got \(-1, 2\)"),
        ({"later": (1, 0), "between": 5}, "Averages: between must be two whole numbers"),
        ({"later": (1, 0)}, r"Averages: later=\(1\.0, 0\.0\) would count from the first gradient on.* Give between"),
        ({"between": (5, 9)}, r"Averages: between=\(5, 9\) says when weights change, but later is None"),
    ],
)
def test_what_are_no_averages_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Averages(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Averages.two(share=1.5), r"Averages\.two: share must be in \[0, 1\]"),
        (lambda: Averages.two(start=-1), r"Averages\.two: start must be at least 0"),
        (lambda: Averages.maxwell(age=2.0), r"Averages\.maxwell: age must be in \(2, 63\), got 2\.0"),
        (lambda: Averages.maxwell(age=63), r"Averages\.maxwell: age must be in \(2, 63\)"),
        (lambda: Averages.maxwell(age=9, later_age=70), r"Averages\.maxwell: later_age must be in \(2, 63\)"),
        (lambda: Averages.maxwell(count=1, age=9), r"Averages\.maxwell: count must be at least 2"),
        (lambda: Averages.maxwell(count=17, age=9), r"Averages\.maxwell: count must be at most 16"),
        (lambda: Averages.maxwell(shortest=5, longest=5, age=9), r"Averages\.maxwell: longest must be .* above 5"),
    ],
)
def test_constructors_refuse_what_cannot_be_had(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_weights_that_nearly_sum_to_one_are_divided_by_their_sum_and_a_text_builds_the_same():
    averages = Averages((0.5, 0.7, 0.9), (0.3333333, 0.3333333, 0.3333333), (0.2, 0.3, 0.5), (1, 9))
    assert sum(averages.weights) == pytest.approx(1, abs=1e-15)
    assert built(text_of(averages), {"Averages": Averages}) == averages


@pytest.mark.parametrize("age", [2.001, 10.0, 26.0, 58.0, 62.999])
def test_a_family_has_the_age_that_was_asked_for_and_weights_that_fall_as_an_exponential(age):
    family = Averages.maxwell(count=7, age=age)
    times = np.array([1 / (1 - beta) for beta in family.betas])
    assert times[[0, -1]] == pytest.approx([3, 64])
    np.testing.assert_allclose(np.diff(np.log(times)), np.log(64 / 3) / 6, rtol=1e-12)
    history = np.arange(20_000)  # ages, of which the weights below are those of the followed average
    followed = sum(w * (1 - b) * b**history for b, w in zip(family.betas, family.weights, strict=True))
    assert followed.sum() == pytest.approx(1)
    assert (followed * history).sum() == pytest.approx(age, rel=1e-9)
    slopes = np.diff(np.log(family.weights)) / np.diff(times)
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)


def test_weights_go_over_as_the_reference_says():
    for averages in (SWITCHED, FAMILY, STEADY, Averages((0.5, 0.6), (1, 0), (0, 1), (3, 4))):
        counts = torch.arange(60, dtype=torch.float64)
        found = torch.stack(averages.weights_at(counts), dim=1)
        expected = np.stack([mixture(averages).shares(int(t)) for t in counts])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_followed_is_a_mean_of_the_gradients_for_each_count_of_its_own(ahead, rng):
    """Two parameters, one of which missed the first gradients; the third saw none."""
    gradients = torch.randn(30, 3, 4, generator=rng, dtype=torch.float64)
    buffers = [[torch.zeros(4, dtype=torch.float64) for _ in range(3)] for _ in FAMILY.betas]
    for step, now in enumerate(gradients):
        for own, beta in zip(buffers, FAMILY.betas, strict=True):
            average_(own[: 1 + (step >= 12)], list(now[: 1 + (step >= 12)]), beta)
    counts = torch.tensor([30.0, 18.0, 0.0], dtype=torch.float64)
    given = [gradients[-1, 0], gradients[-1, 1], torch.zeros(4, dtype=torch.float64)]
    found = combined(buffers, FAMILY, FAMILY.betas[0], counts, ahead=given if ahead else None)
    for place, count in enumerate((30, 18)):
        weights = torch.from_numpy(grid.average_weights(count, mixture(FAMILY), ahead))
        expected = (weights[:, None] * gradients[30 - count :, place]).sum(0)
        torch.testing.assert_close(found[place], expected, rtol=1e-12, atol=1e-14)
    assert not found[2].any()


@pytest.mark.parametrize("momo", [False, True])
def test_one_average_is_the_number_to_every_bit_and_key(momo):
    runs = []
    for momentum in (0.9, Averages((0.9,), (1.0,))):
        model = network()
        optimizer = MuonAdam(model, momentum=momentum, momo=momo)
        network_steps(model, optimizer, range(4))
        runs.append((optimizer.state_dict(), [p.detach() for p in model.parameters()]))
    (first, ours), (second, theirs) = runs
    assert repr(first) == repr(second)
    assert "averages" not in first["param_groups"][0]
    assert_same(ours, theirs)


def test_all_weight_on_one_average_is_that_average():
    """Whatever the others are: gradients are averaged into them, and nobody follows them."""
    for place, nesterov in ((0, False), (1, True)):
        weights = tuple(float(own == place) for own in range(2))
        runs = []
        for momentum in (Averages((0.9, 0.9), weights), 0.9):
            model = network(torch.float64)
            optimizer = Muon(model, momentum=momentum, betas=(momentum, 0.95), nesterov=nesterov, polar="svd")
            runs.append(train_network(model, optimizer, range(6), torch.float64))
        for one, other in zip(*runs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_stages_that_look_at_gradients_are_shown_what_is_followed(nesterov):
    runs = []
    for momentum in (Averages((0.9, 0.9), (0.3, 0.7)), 0.9):
        model = network(torch.float64)
        stages = [DiagonalMetric(), RowScaling()]
        optimizer = Muon(model, momentum=momentum, betas=(0.9, 0.95), nesterov=nesterov, stages=stages, polar="svd")
        runs.append(train_network(model, optimizer, range(6), torch.float64))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_equal_averages_are_one_average_under_momo():
    runs = []
    for momentum in (Averages((0.9, 0.9, 0.9), (0.2, 0.3, 0.5), (0.1, 0.1, 0.8), (2, 5)), 0.9):
        model = network(torch.float64)
        optimizer = MuonAdam(model, momentum=momentum, step_size=Momo(1.2), weight_decay=0.1, lr=0.3, polar="svd")
        steps = []
        for step in range(10):
            optimizer.zero_grad()
            loss = backward(model, step, torch.float64)
            optimizer.step(loss=loss)
            steps.append(optimizer.diagnostics()["t"])
        runs.append((steps, [p.detach() for p in model.parameters()]))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-9)
    assert any(t < 1 for t in runs[0][0])
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_groups_and_roles_may_have_averages_of_their_own_and_print_them():
    model = network()
    three = Averages.maxwell(3, age=9.0)
    roles = {"matrix": three, "embedding": 0.9, "head": 0.8, "vector": 0.7}
    optimizer = SteepestDescent(
        model, momentum=roles, betas={**dict.fromkeys(roles, (0.8, 0.9)), "head": (SWITCHED, 0.9)}
    )
    by_role = {group["role"]: group for group in optimizer.param_groups}
    assert by_role["matrix"]["momentum"] == three.betas[0]
    assert by_role["matrix"]["averages"] == text_of(three)
    assert by_role["head"]["averages"] == text_of(SWITCHED)
    assert by_role["vector"]["momentum"] == 0.8
    assert "averages" not in by_role["vector"]
    page, plan = repr(optimizer), optimizer.plan
    assert "0.6, 0.9" in page
    assert text_of(three) in page
    assert f"gradients of matrix: {text_of(three)}" in str(plan)
    assert "gradients of vector: one average" in str(plan)
    sizes = {row.role: (row.state_bytes - 8) / row.numel for row in plan}  # a count takes 8
    assert [sizes[role] for role in ("matrix", "head", "vector")] == [12, 12, 8]
    grouped = Muon([{"params": [torch.nn.Parameter(torch.ones(3, 3))], "momentum": SWITCHED}], momentum=0.5)
    assert grouped.param_groups[0]["momentum"] == 0.6
    network_steps(model, optimizer, range(2))
    state = optimizer.state[by_role["matrix"]["params"][0]]
    assert [key for key in state if key.startswith("momentum")] == [
        "momentum_buffer",
        "momentum_buffer_2",
        "momentum_buffer_3",
    ]


def test_momo_wants_the_same_averages_in_all_groups():
    with pytest.raises(ValueError, match=r"Momo needs the same averages of gradients in all groups.*matrix Averages"):
        MuonAdam(network(), momentum=SWITCHED, betas=(0.6, 0.95), momo=True)
    other = Averages((0.6, 0.95), (0.5, 0.5))
    with pytest.raises(ValueError, match="Momo needs the same averages"):
        MuonAdam(network(), momentum=SWITCHED, betas=(other, 0.95), momo=True)


def test_schedulers_write_the_first_beta():
    model = network()
    optimizer = Muon(model, momentum=SWITCHED, betas=(SWITCHED, 0.95))
    assert optimizer.defaults["momentum"] == 0.6
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [0.1, 0.01, 0.01], total_steps=8, base_momentum=0.5, max_momentum=0.7
    )
    assert all(group["momentum"] == 0.7 for group in optimizer.param_groups)
    for step in range(4):
        network_steps(model, optimizer, [step])
        scheduler.step()
    assert all(group["averages"] == text_of(SWITCHED) for group in optimizer.param_groups)
    assert f"{optimizer.param_groups[0]['momentum']:g}, 0.9" in repr(optimizer)


def test_the_number_of_averages_is_that_of_the_state():
    optimizer = Muon(network(), momentum=SWITCHED)
    group = optimizer.param_groups[0]
    group["momentum"] = Averages((0.3, 0.9), (0.5, 0.5))
    network_steps(network(), optimizer, ())
    assert "0.3, 0.9" in repr(optimizer.plan and optimizer)
    group["momentum"] = FAMILY
    with pytest.raises(ValueError, match=r"momentum must be a number or 2 averages, as when the group was made, got"):
        optimizer.state_dict()
    group["momentum"] = 0.9
    optimizer.param_groups[1]["momentum"] = FAMILY
    with pytest.raises(ValueError, match=r"group 1: momentum must be a number, as when the group was made, got Aver"):
        optimizer.state_dict()
    optimizer.param_groups[1]["momentum"] = 0.9
    group["averages"] = "nonsense"
    with pytest.raises(ValueError, match=r"group 0: averages is 'nonsense'\. Write momentum=Averages"):
        optimizer.state_dict()


@pytest.mark.parametrize("how", ["state", "file", "copy", "pickle", "flat"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_is_resumed_goes_on_bit_for_bit(name, how):
    model = network()
    optimizer = RECIPES[name](model)
    network_steps(model, optimizer, range(5))
    if how in ("copy", "pickle"):
        pair = copy.deepcopy((model, optimizer)) if how == "copy" else pickle.loads(pickle.dumps((model, optimizer)))
        again, other = pair
    else:
        again = copy.deepcopy(model)
        other = RECIPES[name](again)
        if how == "flat":
            flat = StateDictOptions(flatten_optimizer_state_dict=True)
            saved = get_optimizer_state_dict(model, optimizer, options=flat)
            assert [value for key, value in saved.items() if key.endswith(".averages")]
            set_optimizer_state_dict(again, other, saved, options=flat)
        else:
            saved = optimizer.state_dict()
            if how == "file":
                buffer = io.BytesIO()
                torch.save(saved, buffer)
                buffer.seek(0)
                saved = torch.load(buffer, weights_only=True)
            other.load_state_dict(saved)
    assert network_steps(model, optimizer, range(5, 30)) == network_steps(again, other, range(5, 30))
    for ours, theirs in zip(snapshot(model, optimizer), snapshot(again, other), strict=True):
        assert_same(ours, theirs)


def test_a_state_of_other_averages_is_refused_and_weights_are_those_of_the_optimizer():
    model = network()
    optimizer = Muon(model, momentum=SWITCHED)
    network_steps(model, optimizer, range(3))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    told = r"Parameter group 0 of the state was saved with momentum=Averages\(.* but has .* here, whose averages are"
    for momentum in (0.6, Averages((0.6, 0.95), (0.5, 0.5)), FAMILY):
        with pytest.raises(ValueError, match=told):
            Muon(network(), momentum=momentum).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"was saved with momentum=a number but has momentum=Averages"):
        optimizer.load_state_dict(Muon(network(), momentum=0.6).state_dict())
    other = Muon(network(), momentum=Averages((0.3, 0.9), (0.5, 0.5)))
    other.load_state_dict(saved)
    assert other.param_groups[0]["momentum"] == 0.6
    assert "weights=(0.5, 0.5)" in other.param_groups[0]["averages"]
    assert repr(saved) == repr(before)
    damaged = copy.deepcopy(saved)
    damaged["param_groups"][0]["averages"] = "Averages(betas=(2.0, 1.0))"
    with pytest.raises(ValueError, match=r"averages is 'Averages.*damaged"):
        optimizer.load_state_dict(damaged)
    missing = copy.deepcopy(saved)
    del missing["state"][0]["momentum_buffer_2"]
    with pytest.raises(ValueError, match="'momentum_buffer_2' is missing"):
        optimizer.load_state_dict(missing)
    plain = Muon(network(), momentum=0.6)
    with pytest.raises(ValueError, match=r"momentum_buffer_2.* is an average that this optimizer"):
        plain.load_state_dict({**saved, "param_groups": plain.state_dict()["param_groups"]})


def test_momos_numbers_of_each_average_are_there_from_the_start_and_none_may_be_missing():
    model = network()
    optimizer = MuonAdam(model, momentum=FAMILY, momo=True)
    keys = {f"momo_{kind}{place}" for kind in ("value", "intercept") for place in ("", "_2", "_3")}
    assert all(keys <= group.keys() for group in optimizer.param_groups)
    assert "momo_value_4" not in optimizer.param_groups[0]
    network_steps(model, optimizer, range(3))
    saved = optimizer.state_dict()
    assert len({saved["param_groups"][0][key] for key in sorted(keys) if "value" in key}) == 3
    del saved["param_groups"][0]["momo_value_3"]
    with pytest.raises(ValueError, match="momo_value_3=None, but a finite number is needed"):
        MuonAdam(network(), momentum=FAMILY, momo=True).load_state_dict(saved)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_that_is_not_finite_leaves_everything(name):
    for bad in ("gradient", "loss"):
        model = network()
        optimizer = RECIPES[name](model)
        network_steps(model, optimizer, range(3))
        before, numbers = snapshot(model, optimizer), optimizer.state_dict()["param_groups"][0]
        loss = backward(model, 3)
        if bad == "gradient":
            next(model.parameters()).grad.view(-1)[0] = torch.nan
        with pytest.warns(RuntimeWarning, match="skipped"):
            optimizer.step(loss=loss if bad == "gradient" else torch.nan)
        for old, now in zip(before, snapshot(model, optimizer), strict=True):
            assert_same(old, now)
        after = optimizer.state_dict()["param_groups"][0]
        assert {k: v for k, v in after.items() if "skipped" not in k} == {
            k: v for k, v in numbers.items() if "skipped" not in k
        }


@pytest.mark.parametrize("name", RECIPES)
def test_masked_steps_are_plain_ones_where_accepted_and_none_elsewhere(name):
    """As on an accelerator, where whether a step is taken stays on the device."""
    models = [network(), network()]
    plain, masked = (RECIPES[name](model) for model in models)
    admit = masked._guard.admit
    for step in range(12):
        taken = step % 3 != 2
        masked._guard.admit = lambda *args, taken=taken: torch.tensor(taken) & bool(admit(*args))
        for model, optimizer in zip(models, (plain, masked), strict=True):
            if taken or optimizer is masked:
                network_steps(model, optimizer, [step])
    first, second = (snapshot(model, optimizer) for model, optimizer in zip(models, (plain, masked), strict=True))
    for one, other in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(first[1], second[1], strict=True):
        assert one["step"] == other["step"] == 8
        torch.testing.assert_close(one["momentum_buffer_2"], other["momentum_buffer_2"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [None, torch.bfloat16])
def test_half_precision_weights_have_averages_of_the_type_that_was_chosen(dtype, kept):
    model = network(dtype)
    optimizer = MuonAdam(model, momentum=FAMILY, momentum_dtype=kept, momo=True)
    for step in range(4):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step, dtype).detach())
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert all(state[key].dtype == (kept or torch.float32) for key in state if key.startswith("momentum_buffer"))
        assert parameter.isfinite().all()
    saved = optimizer.state_dict()
    other = MuonAdam(network(dtype), momentum=FAMILY, momentum_dtype=kept, momo=True)
    other.load_state_dict(saved)
    assert_same(list(saved["state"].values()), list(other.state_dict()["state"].values()))


def test_bfloat16_averages_are_those_of_float32_but_for_rounding():
    runs = []
    for kept in (None, torch.bfloat16):
        model = network()
        optimizer = Muon(model, momentum=FAMILY, betas=(FAMILY, 0.95), momentum_dtype=kept, lr=0.0)
        network_steps(model, optimizer, range(20))
        runs.append([optimizer.state[p]["momentum_buffer_3"].float() for p in model.parameters()])
    for one, other in zip(*runs, strict=True):
        assert 0 < (one - other).norm() <= 0.02 * one.norm()


def test_further_averages_of_gradients_that_ended_are_forgotten_too():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = SignDescent([weight], momentum=Averages((0.1, 0.2), (0.5, 0.5)), lr=1e-3)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    weight.grad = torch.zeros(2, 2)
    for _ in range(FORGET_EVERY * 2):
        optimizer.step()
    assert not optimizer.state[weight]["momentum_buffer_2"].any()
    settled = weight.detach().clone()
    optimizer.step()
    assert torch.equal(settled, weight)


def test_the_frank_wolfe_gap_is_of_what_steps_follow():
    model = network(torch.float64)
    optimizer = Muon(model, momentum=FAMILY, weight_decay=0.1, nesterov=False, polar="svd")
    gradients = []
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step, torch.float64)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
    numbers = optimizer.diagnostics(weights=True)
    name = next(row.name for row in optimizer.plan if row.role == "matrix" and len(row.shape) == 2)
    weights = torch.from_numpy(grid.average_weights(6, mixture(FAMILY), False))
    mean = sum(w * g[name] for w, g in zip(weights, gradients, strict=True))
    weight = dict(model.named_parameters())[name].detach()
    pull = (mean * weight).sum() / numbers[f"weights/{name}/ball_radius"]
    expected = torch.linalg.svdvals(mean).sum() + pull
    assert numbers[f"weights/{name}/frank_wolfe_gap"] == pytest.approx(expected.item(), rel=1e-3)


def test_a_peers_average_is_where_all_begin():
    model = torch.nn.Linear(3, 2, bias=False)
    old = torch.optim.SGD(model.parameters(), lr=0.0)
    muon = torch.optim.Muon(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(4):
        model.weight.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        muon.step()
    del old
    new = SteepestDescent(model.named_parameters(), momentum=Averages((0.5, 0.8), (0.3, 0.7)))
    report = import_state(new, muon.state_dict(), "torch.optim.Muon", ["weight"], steps=4)
    assert "all averages begin with the same mean" in str(report)
    state, theirs = new.state[model.weight], muon.state[model.weight]["momentum_buffer"] / (1 - 0.9**4)
    for key, beta in (("momentum_buffer", 0.5), ("momentum_buffer_2", 0.8)):
        torch.testing.assert_close(state[key] / (1 - beta**4), theirs)
    model.weight.grad = torch.ones(2, 3)
    new.step()


def test_a_tied_scheduler_of_betas_under_direct_momo_stays_exact():
    """Where the first β changes between steps, the intercepts of direct bookkeeping are made anew."""
    model = network(torch.float64)
    optimizer = MuonAdam(model, momentum=STEADY, step_size=Momo(0.5, bookkeeping="direct"), polar="svd")
    for step in range(6):
        for group in optimizer.param_groups:
            group["momentum"] = 0.9 - 0.05 * step
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step, torch.float64))
        assert 0 <= optimizer.diagnostics()["t"] <= 1


def test_what_moves_weights_beside_the_optimizer_moves_the_model_of_each_average():
    model = network(torch.float64)
    optimizer = MuonAdam(model, momentum=FAMILY, momo=True, polar="svd")
    for step in range(4):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step, torch.float64))
    before = dict(optimizer.state_dict()["param_groups"][0])
    moves = [(p, torch.full_like(p, 0.01 * (place + 1)), 0.5) for place, p in enumerate(model.parameters())]
    optimizer.displace(moves)
    after = optimizer.state_dict()["param_groups"][0]
    for key, buffer, beta in zip(("", "_2", "_3"), ("", "_2", "_3"), FAMILY.betas, strict=True):
        slopes = [optimizer.state[p][f"momentum_buffer{buffer}"] / (1 - beta**4) for p in model.parameters()]
        change = sum((m * 0.5 * direction).sum() for m, (_, direction, _) in zip(slopes, moves, strict=True))
        assert after[f"momo_value{key}"] - before[f"momo_value{key}"] == pytest.approx(change.item(), rel=1e-9)
