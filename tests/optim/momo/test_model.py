"""Momo's own arithmetic, its options, and its way through checkpoints and outside changes."""

import copy
import io
import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steepest import Adam, Averages, Euclid, Fixed, Max, Momo, Muon, MuonAdam, MuonMax, PolarGrad, SteepestDescent
from steepest.optim.guard import Guard
from steepest.optim.momo.model import MODEL_KEYS, truncated
from tests.optim.training import assert_same, backward, network, snapshot

METHODS = {
    "muon": lambda model, **o: Muon(model, 3.0, weight_decay=0.01, step_size=Momo(0.5), **o),
    "muon_max_stale": lambda model, **o: MuonMax(model, 3.0, dual="stale", step_size=Momo("auto"), **o),
    "polar_grad_direct": lambda model, **o: PolarGrad(model, 3.0, step_size=Momo(0.3, bookkeeping="direct"), **o),
    "adam": lambda model, **o: Adam(model, 1.0, betas=(0.9, 0.9), step_size=Momo(lambda step: 0.1 / (step + 1)), **o),
}


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))


@given(st.floats(-1e30, 1e30), st.floats(0, 1e30) | st.just(-0.0))
def test_a_part_of_a_step_is_between_none_and_all(gap, decrease):
    t = truncated(torch.tensor(gap, dtype=torch.float64), torch.tensor(decrease, dtype=torch.float64)).item()
    assert 0 <= t <= 1
    if gap <= 0:
        assert t == 0
    elif decrease > 0:
        assert t == pytest.approx(min(1, gap / decrease))


def test_an_endless_gap_is_all_of_the_step_and_nothing_over_nothing_is_none():
    one, zero = torch.ones(()), torch.zeros(())
    assert truncated(one * math.inf, one) == 1
    assert truncated(zero, zero) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_bit_for_bit_through_a_file(method):
    model = network()
    optimizer = METHODS[method](model)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(4, 8))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network()
    resumed = METHODS[method](other)
    resumed.load_state_dict(saved["optimizer"])  # before the weights: the order must not matter
    other.load_state_dict(saved["model"])
    train(other, resumed, range(4, 8))
    for ours, theirs in zip(snapshot(model, optimizer), snapshot(other, resumed), strict=True):
        assert_same(ours, theirs)
    assert optimizer.diagnostics() == resumed.diagnostics()


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_its_own_way(method):
    model = network()
    optimizer = METHODS[method](model)
    train(model, optimizer, range(3))
    pair = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(*pair, range(3, 6))
    for ours, theirs in zip(snapshot(model, optimizer), snapshot(*pair), strict=True):
        assert_same(ours, theirs)


def test_group_keys_exist_from_the_start_and_are_plain_numbers():
    optimizer = MuonAdam(network(), momo=True)
    for group in optimizer.param_groups:
        assert all(group[key] == 0.0 for key in MODEL_KEYS)
    assert all(key not in group for group in MuonAdam(network()).param_groups for key in MODEL_KEYS)


def test_states_with_and_without_momo_load_into_each_other():
    model = network()
    with_momo = MuonAdam(model, momo=True)
    train(model, with_momo, range(3))
    plain = MuonAdam(network())
    plain.load_state_dict(with_momo.state_dict())
    assert all(key not in group for group in plain.param_groups for key in MODEL_KEYS)
    other = network()
    plain = MuonAdam(other)
    train(other, plain, range(3))
    with_momo.load_state_dict(plain.state_dict())
    model.load_state_dict(other.state_dict())
    loss = backward(model, 5)
    with_momo.step(loss=loss)  # a model of the loss that starts here
    assert with_momo.diagnostics()["gap"] == pytest.approx(loss.item())


def test_weights_changed_outside_restart_the_model_with_a_warning():
    model = network()
    optimizer = MuonAdam(model, 3.0, step_size=Momo(0.5))
    train(model, optimizer, range(4))
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    optimizer.zero_grad()
    loss = backward(model, 4)
    with pytest.warns(UserWarning, match="Weights were changed since the last step") as seen:
        optimizer.step(loss=loss)
    assert seen[0].filename == __file__
    assert optimizer.diagnostics()["gap"] == pytest.approx(loss.item() - 0.5, abs=1e-6)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    optimizer.step(loss=backward(model, 4))  # no second warning


def test_a_checkpoint_of_other_weights_restarts_the_model():
    model = network()
    optimizer = MuonAdam(model, 3.0, step_size=Momo(0.5))
    train(model, optimizer, range(4))
    state = optimizer.state_dict()
    fresh = network()
    resumed = MuonAdam(fresh, 3.0, step_size=Momo(0.5))
    resumed.load_state_dict(state)
    loss = backward(fresh, 4)
    with pytest.warns(UserWarning, match="Weights were changed since the last step"):
        resumed.step(loss=loss)
    assert resumed.diagnostics()["gap"] == pytest.approx(loss.item() - 0.5, abs=1e-6)


def averaged_model(history, weights, beta):
    """Value of the averaged linear model at the present weights, by its definition."""
    count = len(history)
    total = 0.0
    for age, (loss, past, gradients) in enumerate(reversed(history)):
        slope = sum(((w - p) * g).sum().item() for w, p, g in zip(weights, past, gradients, strict=True))
        total += (1 - beta) * beta**age / (1 - beta**count) * (loss + slope)
    return total


def observed(model, optimizer, steps, history, outside=None):
    """Train, and check at every step that the gap is the averaged model's value over the lower bound of 0.5."""
    parameters = list(model.parameters())
    for step in steps:
        if outside is not None:
            outside(step)
        optimizer.zero_grad()
        loss = backward(model, step, torch.float64)
        history.append((loss.item(), [p.detach().clone() for p in parameters], [p.grad.clone() for p in parameters]))
        expected = averaged_model(history, [p.detach() for p in parameters], 0.95) - 0.5
        optimizer.step(loss=loss)
        assert optimizer.diagnostics()["gap"] == pytest.approx(expected, abs=1e-9)


def test_direct_bookkeeping_is_right_whoever_writes_to_the_weights():
    model = network(torch.float64)
    optimizer = MuonAdam(model, 3.0, step_size=Momo(0.5, bookkeeping="direct"))

    def shrink(step):
        for parameter in model.parameters():
            parameter.data.mul_(0.99)  # which nothing counts

    observed(model, optimizer, range(5), [], shrink)


@pytest.mark.parametrize("modes", [("recurrent", "direct"), ("direct", "recurrent")])
def test_bookkeeping_may_change_from_one_checkpoint_to_the_next(modes):
    model, history = network(torch.float64), []
    first, second = (MuonAdam(model, 3.0, step_size=Momo(0.5, bookkeeping=mode)) for mode in modes)
    observed(model, first, range(4), history)
    second.load_state_dict(first.state_dict())
    observed(model, second, range(4, 8), history)


@pytest.mark.parametrize("momentum", [0.9, Averages((0.6, 0.9), (1.0, 0.0), (0.4, 0.6), (3, 3))])
def test_momo_may_begin_with_averages_of_a_run_without_it(momentum):
    """The first value is that of the loss, and it goes on alike however it is known, with weights of the gradients."""
    steady = Averages((0.6, 0.9), (0.4, 0.6)) if isinstance(momentum, Averages) else momentum
    gaps = []
    for averages, bookkeeping in ((momentum, "recurrent"), (momentum, "direct"), (steady, "recurrent")):
        model = network(torch.float64)
        plain = MuonAdam(model, 0.1, momentum=momentum, betas=(momentum, 0.95))
        for step in range(6):
            plain.zero_grad()
            backward(model, step, torch.float64)
            plain.step()
        momo = Momo(0.1, bookkeeping=bookkeeping)
        optimizer = MuonAdam(model, 0.1, momentum=averages, betas=(averages, 0.95), step_size=momo)
        optimizer.load_state_dict(plain.state_dict())
        for step in range(6, 12):
            optimizer.zero_grad()
            loss = backward(model, step, torch.float64)
            optimizer.step(loss=loss)
            gaps.append(optimizer.diagnostics()["gap"])
            if step == 6:
                assert gaps[-1] == pytest.approx(loss.item() - 0.1, rel=1e-12)
    assert gaps[:6] == pytest.approx(gaps[6:12], rel=1e-9)
    assert gaps[:6] == pytest.approx(gaps[12:], rel=1e-12)


def test_a_step_that_is_passed_over_is_not_where_the_model_begins(monkeypatch):
    """Also where whether a step is taken stays unread, as on an accelerator."""
    found = []
    for bad in ((), (0,)):
        model = network()
        plain = MuonAdam(model, 0.1)
        train(model, plain, range(4))
        optimizer = MuonAdam(model, 0.1, step_size=Momo(0.1, bookkeeping="direct"))
        optimizer.load_state_dict(plain.state_dict())
        with monkeypatch.context() as patched:
            patched.setattr(Guard, "admit", lambda self, names, gradients, loss: loss.isfinite())
            for _ in bad:
                optimizer.step(loss=torch.tensor(math.nan))
            train(model, optimizer, range(4, 8))
        found.append((optimizer.diagnostics()["gap"], [p.detach().clone() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


def test_a_parameter_that_joins_late_does_not_upset_direct_bookkeeping():
    lengths = []
    for mode in ("recurrent", "direct"):
        model = network(torch.float64)
        model[0].weight.requires_grad_(False)
        optimizer = MuonAdam(model, 3.0, step_size=Momo(0.5, bookkeeping=mode))
        for step in range(8):
            model[0].weight.requires_grad_(step >= 4)
            optimizer.zero_grad()
            optimizer.step(loss=backward(model, step, torch.float64))
            lengths.append(optimizer.diagnostics()["t"])
    assert lengths[:5] == pytest.approx(lengths[8:13], rel=1e-9)
    assert all(0 <= t <= 1 for t in lengths)


def test_a_checkpoint_that_was_only_loaded_and_saved_again_is_the_same():
    model = network()
    optimizer = MuonAdam(model, 3.0, step_size=Momo(0.5))
    train(model, optimizer, range(4))
    state = optimizer.state_dict()
    other = MuonAdam(model, 3.0, step_size=Momo(0.5))
    other.load_state_dict(state)
    assert other.state_dict()["param_groups"] == state["param_groups"]
    again = MuonAdam(model, 3.0, step_size=Momo(0.5))
    again.load_state_dict(copy.deepcopy(other).state_dict())
    train(model, again, range(4, 5))  # without a warning


def test_other_parameters_may_move_after_a_checkpoint_than_before():
    model = network()
    optimizer = MuonAdam(model, 3.0, step_size=Momo(0.5))
    for step in range(4):
        optimizer.zero_grad()
        loss = backward(model, step)
        if step % 2:
            model[0].weight.grad = None  # as of an expert without a token
        if step == 3:
            state, saved = copy.deepcopy(optimizer.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
        optimizer.step(loss=loss)
    fresh = network()
    fresh.load_state_dict(saved)
    resumed = MuonAdam(fresh, 3.0, step_size=Momo(0.5))
    resumed.load_state_dict(state)
    loss = backward(fresh, 3)
    fresh[0].weight.grad = None
    resumed.step(loss=loss)
    for ours, theirs in zip(snapshot(model, optimizer), snapshot(fresh, resumed), strict=True):
        assert_same(ours, theirs)


def test_stale_duals_do_not_outlive_a_run_that_did_not_need_them():
    model = network()
    stale = MuonMax(model, 0.01, dual="stale")
    train(model, stale, range(2))
    cached = MuonMax(model, 0.01)
    cached.load_state_dict(stale.state_dict())
    assert all("dual_norm" not in state for state in cached.state_dict()["state"].values())
    again = MuonMax(model, 0.01, dual="stale")
    again.load_state_dict(stale.state_dict())
    assert any("dual_norm" in state for state in again.state_dict()["state"].values())


def test_losses_that_stay_below_the_bound_warn_once():
    model = network()
    optimizer = MuonAdam(model, step_size=Momo(100.0))
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(19))
    with pytest.warns(
        UserWarning, match=r"below Momo's lower_bound for 20 steps, now .* below 100: steps shrink"
    ) as seen:
        train(model, optimizer, range(19, 42))
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("product", ["max", "euclid", "sum", "hybrid"])
@pytest.mark.parametrize("regularized", [False, True])
def test_zero_gradients_move_nothing(product, regularized):
    model = network()
    optimizer = SteepestDescent(model, product=product, regularized=regularized, step_size=Momo())
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(loss=1.0)
    assert 0 <= optimizer.diagnostics()["t"] <= 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("damage", [{"momo_value": math.nan}, {"momo_weights": "much"}, {"momo_steps": None}])
def test_a_damaged_model_of_the_loss_is_refused(damage):
    model = network()
    optimizer = MuonAdam(model, momo=True)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    state["param_groups"][0].update(damage)
    with pytest.raises(ValueError, match=rf"group 0 was saved with {next(iter(damage))}=.*checkpoint is damaged"):
        optimizer.load_state_dict(state)


def test_labels_of_the_product_are_roles_or_groups():
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="Unknown role or group 'lsat': did you mean 'last'"):
        SteepestDescent([{"params": [weight], "name": "last"}], product=Euclid(Max("lsat"), "matrix"))
    with pytest.raises(ValueError, match="name 'head' is a role, but the group's role is 'matrix'"):
        SteepestDescent([{"params": [weight], "name": "head"}])


def test_momo_needs_one_momentum():
    model = network()
    with pytest.raises(ValueError, match=r"one momentum for all groups.* got matrix 0\.95, .*0\.8"):
        Muon(model, betas=(0.8, 0.95), momo=True)
    loss = backward(model, 0)
    for own in (Muon(model, momo=True), SteepestDescent(model, step_size=Momo())):  # the default of betas follows
        own.step(loss=loss)
        own.param_groups[-1]["momentum"] = 0.5  # as a scheduler might
        before = copy.deepcopy(own.state_dict()["state"])
        with pytest.raises(ValueError, match=r"one momentum for all groups.* got matrix 0\.95, .*0\.5"):
            own.step(loss=loss)
        assert str(before) == str(own.state_dict()["state"])
    pair = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    groups = [{"params": [pair[0]]}, {"params": [pair[1]], "momentum": 0.5}]
    with pytest.raises(ValueError, match=r"got matrix 0\.95, matrix 0\.5\. Give momentum="):
        MuonAdam(groups, momo=True)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"lower_bound": "automatic"},
            TypeError,
            "lower_bound must be a number, a function or 'auto', got 'automatic'",
        ),
        ({"lower_bound": True}, TypeError, "lower_bound must be a number, a function or 'auto', got True"),
        ({"lower_bound": math.nan}, ValueError, "lower_bound must be below the loss, and not infinity, got nan"),
        ({"lower_bound": math.inf}, ValueError, "lower_bound must be below the loss, and not infinity, got inf"),
        ({"bookkeeping": "recurent"}, ValueError, "Unknown bookkeeping 'recurent': did you mean 'recurrent'"),
    ],
)
def test_options_are_checked(options, kind, message):
    with pytest.raises(kind, match=message):
        Momo(**options)


def test_a_schedule_that_returns_nonsense_is_refused():
    model = network()
    optimizer = MuonAdam(model, step_size=Momo(lambda step: None))
    loss = backward(model, 0)
    with pytest.raises(TypeError, match="lower_bound must be a number, a function or 'auto', got None"):
        optimizer.step(loss=loss)


def test_a_schedule_sees_the_number_of_steps_so_far():
    model = network()
    seen = []
    optimizer = MuonAdam(model, step_size=Momo(lambda step: seen.append(step) or 0.0))
    train(model, optimizer, range(3))
    resumed = MuonAdam(model, step_size=Momo(lambda step: seen.append(step) or 0.0))
    resumed.load_state_dict(optimizer.state_dict())
    train(model, resumed, range(1))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dual": "cache"}, ValueError, "Unknown dual 'cache': did you mean 'cached'"),
        ({"regularized": 1}, TypeError, "regularized must be True or False, got 1"),
        ({"product": "hybird"}, ValueError, "Unknown product 'hybird': did you mean 'hybrid'"),
        ({"product": Euclid("matrix", "vector")}, ValueError, "Unknown place in the product norm 'head'"),
    ],
)
def test_the_pieces_are_checked_when_the_optimizer_is_built(options, kind, message):
    with pytest.raises(kind, match=message):
        SteepestDescent(network(), **options)


def test_a_group_can_have_a_place_of_its_own(rng):
    a, b, c = (nn.Parameter(torch.randn(3, 4, generator=rng, dtype=torch.float64)) for _ in range(3))
    groups = [{"params": [a, b]}, {"params": [c], "name": "last"}]
    optimizer = SteepestDescent(
        groups, lr=0.1, product=Euclid("matrix", "last"), norms={"matrix": "frobenius"}, regularized=True
    )
    for p in (a, b, c):
        p.grad = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    start, gradients = [p.detach().clone() for p in (a, b, c)], [p.grad.clone() for p in (a, b, c)]
    optimizer.step()
    for p, w, g in zip((a, b, c), start, gradients, strict=True):  # the Euclidean norm of all: gradient descent
        torch.testing.assert_close(p.detach(), w - 0.1 * g, rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match=r"name must be a text, .* got 3"):
        SteepestDescent([{"params": [a], "name": 3}])


def test_fixed_is_the_default():
    assert Fixed() == Fixed()
    model, other = network(), network()
    for net, optimizer in ((model, SteepestDescent(model)), (other, SteepestDescent(other, step_size=Fixed()))):
        backward(net, 0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# What Momo is for, on a problem whose optimum is known: the learning rate may be wrong by decades.

# Bounds above the loss are part of what is compared.
pytestmark = pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")

BEST, STEPS = 2.0, 300
HUGE = [1e2, 1e3, 1e4, 1e5, 1e6]
# batch and momentum: exact gradients without an average, noisy gradients with one
SETTINGS = {"full": (None, 0.0), "noisy": (16, 0.9)}
# recipe, setting, excess loss that Momo stays below at every rate
REACHED = [
    (MuonAdam, "full", 1e-6),
    (MuonMax, "full", 5e-5),
    (MuonAdam, "noisy", 2e-5),
    (MuonMax, "noisy", 2e-4),
]


@lru_cache
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 6, dtype=torch.float64)
    weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 6), (8,)))
    return x, x @ weight.T + bias


def loss_of(weight, bias, rows):
    x, y = data()
    return BEST + 0.5 * (x[rows] @ weight.T + bias - y[rows]).square().sum(1).mean()


def excess(recipe, setting, lr, step_size, *, dual="cached", seed=1):
    """Loss on all data above the smallest possible one, at the end or where it has left all bounds."""
    size, momentum = SETTINGS[setting]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((8, 6), (8,))]
    options = {"momentum": momentum, "betas": (momentum, 0.9), "polar": "svd", "dual": dual}
    optimizer = recipe(parameters, lr, adam_lr=lr / 10, step_size=step_size, **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = slice(None) if size is None else torch.randint(0, 256, (size,), generator=generator)
        optimizer.zero_grad()
        loss = loss_of(*parameters, rows)
        if loss > 1e15:
            return loss.item()
        loss.backward()
        optimizer.step(loss=loss)
    with torch.no_grad():
        return loss_of(*parameters, slice(None)).item() - BEST


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "setting", "reached"), REACHED)
def test_momo_is_flat_over_four_decades_where_the_base_method_diverges(recipe, setting, reached):
    start = loss_of(torch.zeros(8, 6).double(), torch.zeros(8).double(), slice(None)).item() - BEST
    assert all(excess(recipe, setting, lr, Fixed()) > start for lr in HUGE[::2])
    finals = [excess(recipe, setting, lr, Momo(BEST)) for lr in HUGE]
    assert max(finals) < reached
    if setting == "noisy":  # full batches end in rounding errors, which differ
        assert max(finals) < 1.2 * min(finals)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "reached"), [(MuonAdam, 2e-5), (MuonMax, 4e-4)])
def test_stale_dual_norms_are_as_flat(recipe, reached):
    finals = [excess(recipe, "noisy", lr, Momo(BEST), dual="stale") for lr in HUGE[::2]]
    assert max(finals) < reached
    assert max(finals) < 1.2 * min(finals)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [MuonAdam, MuonMax])
def test_at_a_small_rate_momo_is_the_base_method_whatever_the_bound(recipe):
    base = excess(recipe, "noisy", 1e-2, Fixed())
    for bound in (0.0, BEST):
        assert excess(recipe, "noisy", 1e-2, Momo(bound)) == base


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [MuonAdam, MuonMax])
@pytest.mark.parametrize("bound", [2.1, 2.5, 4.0])
def test_training_stops_at_a_lower_bound_that_is_too_high(recipe, bound):
    assert excess(recipe, "full", 1e3, Momo(bound)) == pytest.approx(bound - BEST, rel=1e-2)
