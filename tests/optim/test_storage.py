"""What is kept in 16 bits: bits that come back, draws that are right on average and the same everywhere."""

import copy
import io
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steepest import Adam, InputMoment, Momo, Muon, MuonMax, NewtonMuon, RowScaling
from steepest.optim.momentum import average_
from steepest.optim.storage import Storage, divided, drawn, joined, noise_of
from steepest.ranks.boxes import full, own_box
from tests.optim.training import assert_same, backward, network, snapshot, train

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) < 3.38e38)


@given(st.lists(FINITE, min_size=1, max_size=20))
def test_weight_and_bits_are_the_number_and_the_weight_is_the_nearest(numbers):
    wide = torch.tensor(numbers, dtype=torch.float32)
    weight, low = divided(wide)
    assert torch.equal(joined(weight, low).view(torch.int32), wide.view(torch.int32))
    nearest = wide.to(torch.bfloat16).double()
    assert torch.equal((weight.double() - wide.double()).abs(), (nearest - wide.double()).abs())


@given(st.lists(FINITE, min_size=1, max_size=20), st.integers(0, 65535))
def test_a_draw_is_one_of_the_two_neighbours_and_leaves_what_fits(numbers, noise):
    wide = torch.tensor(numbers, dtype=torch.float32)
    own = torch.full(wide.shape, noise, dtype=torch.int32)
    below, above = drawn(wide, torch.zeros_like(own)).float(), drawn(wide, torch.full_like(own, 65535)).float()
    found = drawn(wide, own).float()
    assert bool(((found == below) | (found == above)).all())
    assert bool((below.abs() <= wide.abs()).all())
    assert bool((above.abs() >= wide.abs()).all())
    fitting = wide.to(torch.bfloat16)
    assert torch.equal(drawn(fitting.float(), own), fitting)


def test_draws_are_right_on_average():
    """The mean of n draws has a standard deviation of at most half a gap over √n; five of them, so 1 in 1.7 million."""
    value, n = 1.0 + 0.3 * 2**-7, 100_000
    noise = noise_of("w", torch.tensor(3), full((n,)), (n,))
    mean = drawn(torch.full((n,), value), noise).double().mean()
    assert abs(float(mean) - value) < 5 * 0.5 * 2**-7 / n**0.5


@pytest.mark.parametrize("other", ["count", "name", "neighbour"])
def test_draws_of_other_steps_names_and_entries_have_nothing_to_do_with_each_other(other):
    """Correlations of n pairs have a standard deviation of 1/√n."""
    n = 40_000
    one = noise_of("blocks.0.weight", torch.tensor(7), full((200, 200)), (200, 200)).double()
    two = {
        "count": noise_of("blocks.0.weight", torch.tensor(8), full((200, 200)), (200, 200)),
        "name": noise_of("blocks.1.weight", torch.tensor(7), full((200, 200)), (200, 200)),
        "neighbour": one.roll(1),
    }[other].double()
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])) < 5 / n**0.5
    assert abs(float(one.mean()) / 65535 - 0.5) < 5 * 0.29 / n**0.5
    counts = torch.bincount((one.flatten() / 4096).long(), minlength=16)
    assert bool(((counts - n / 16).abs() < 5 * (n / 16) ** 0.5).all())


def test_a_part_of_a_tensor_draws_what_it_draws_in_the_whole():
    whole = noise_of("w", torch.tensor(5), full((6, 4, 5)), (6, 4, 5))
    part = noise_of("w", torch.tensor(5), ((2, 5), (0, 4), (1, 3)), (6, 4, 5))
    assert torch.equal(part, whole[2:5, :, 1:3])
    assert own_box(torch.empty(3, 2)) == ((0, 3), (0, 2))


METHODS = {
    "muon": partial(Muon, lr=0.02, weight_decay=0.1),
    "momo": partial(MuonMax, lr=0.5, step_size=Momo(0.5)),
    "adam": partial(Adam, lr=1e-3),
    "normuon": partial(Muon, stages=[RowScaling()]),
}


def trained(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step, torch.bfloat16)
        optimizer.step(loss=loss)


@pytest.mark.parametrize("name", METHODS)
def test_kept_bits_are_a_float32_copy_of_the_weights(name):
    """The reference holds that copy itself: each step is that of a float32 model with the gradients of the rounded."""
    model, copied = network(torch.bfloat16), network(torch.float32)
    copied.load_state_dict(model.state_dict())
    ours = METHODS[name](model, rounding="kept")
    theirs = METHODS[name](copied)
    for step in range(6):
        ours.zero_grad()
        loss = backward(model, step, torch.bfloat16)
        for parameter, twin in zip(model.parameters(), copied.parameters(), strict=True):
            twin.grad = parameter.grad.float()
        ours.step(loss=loss)
        theirs.step(loss=loss)
        for parameter, twin in zip(model.parameters(), copied.parameters(), strict=True):
            kept = joined(parameter, ours.state[parameter]["weight_low_bits"])
            torch.testing.assert_close(kept, twin.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(parameter, divided(kept)[0])


def gain_after(steps, **options):
    """A gain of 1 under Adam's steps of 1e-3, of which bfloat16 has no part of its own there."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(512, bias=False, dtype=torch.bfloat16)
    optimizer = Adam(norm, lr=1e-3, **options)
    for _ in range(steps):
        norm.weight.grad = torch.ones_like(norm.weight)
        optimizer.step()
    return float(norm.weight.detach().double().mean())


def test_gains_move_at_small_rates():
    assert gain_after(10) == 1.0
    assert gain_after(10, rounding="kept") == pytest.approx(0.99, abs=2**-9)
    assert gain_after(10, rounding="stochastic") == pytest.approx(0.99, abs=5 * 2**-8 * (10 / 512) ** 0.5)


@pytest.mark.parametrize(
    "options", [{"rounding": "kept"}, {"rounding": "stochastic"}, {"momentum_dtype": torch.bfloat16}]
)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_saved_and_loaded_goes_on_bit_for_bit(name, options):
    whole = network(torch.bfloat16)
    optimizer = METHODS[name](whole, **options)
    trained(whole, optimizer, range(3))
    file = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = network(torch.bfloat16)
    again.load_state_dict(weights)
    other = METHODS[name](again, **options)
    other.load_state_dict(state)
    twin = copy.deepcopy((whole, optimizer))
    for model, own in ((whole, optimizer), (again, other), twin):
        trained(model, own, range(3, 6))
    assert_same(snapshot(whole, optimizer)[0], snapshot(again, other)[0])
    assert_same(snapshot(whole, optimizer)[1], snapshot(again, other)[1])
    assert_same(snapshot(whole, optimizer)[0], snapshot(*twin)[0])


@pytest.mark.parametrize("name", METHODS)
def test_averages_of_16_bits_are_those_of_float32_rounded_after_each_gradient(name, monkeypatch):
    model, twin = network(), network()
    ours, theirs = METHODS[name](model, momentum_dtype=torch.bfloat16), METHODS[name](twin)

    def rounding(buffers, values, beta, *, accept=None):
        average_(buffers, values, beta, accept=accept)
        momenta = {id(state["momentum_buffer"]) for state in theirs.state.values()}
        for buffer in buffers:
            if id(buffer) in momenta:
                buffer.copy_(buffer.to(torch.bfloat16))

    for step in range(5):
        for one, own, average in ((model, ours, average_), (twin, theirs, rounding)):
            monkeypatch.setattr("steepest.optim.move.average_", average)
            own.zero_grad()
            own.step(loss=backward(one, step))
        assert all(state["momentum_buffer"].dtype == torch.bfloat16 for state in ours.state.values())
        assert_same(snapshot(model, ours)[0], snapshot(twin, theirs)[0])


def test_a_step_that_is_passed_over_rounds_nothing():
    model = network(torch.bfloat16)
    optimizer = Muon(model, rounding="stochastic")
    train(model, optimizer, [0], torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 1, torch.bfloat16)
    next(model.parameters()).grad.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert_same(before, list(model.parameters()))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_weights_that_somebody_sets_to_zero_go_on_from_there(zero):
    """Bits of the old number may be negative, and no number is below zero in that way."""
    model = network(torch.bfloat16)
    optimizer = Muon(model, rounding="kept")
    train(model, optimizer, range(3), torch.bfloat16)
    weight = next(model.parameters())
    assert bool((optimizer.state[weight]["weight_low_bits"] < 0).any())
    with torch.no_grad():
        weight.fill_(zero)
    train(model, optimizer, range(2), torch.bfloat16)
    assert bool((weight != 0).all())
    assert bool(joined(weight, optimizer.state[weight]["weight_low_bits"]).isfinite().all())


@pytest.mark.parametrize("rounding", ["kept", "stochastic"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_model_may_become_bfloat16_after_its_optimizer_was_built(rounding, steps):
    model = network()
    optimizer = Muon(model, rounding=rounding)
    assert optimizer.plan  # asks what is kept
    train(model, optimizer, range(steps))
    model.to(torch.bfloat16)
    train(model, optimizer, range(2), torch.bfloat16)
    assert all(("weight_low_bits" in state) == (rounding == "kept") for state in optimizer.state.values())


def test_a_model_may_not_become_float16_after_its_optimizer_was_built():
    model = network()
    optimizer = Muon(model, rounding="stochastic")
    model.to(torch.float16)
    with pytest.raises(ValueError, match=r"rounding='stochastic' is for bfloat16 weights, and '.*float16"):
        train(model, optimizer, [0], torch.float16)
    assert not optimizer.state


def test_state_dicts_hold_bits_in_a_type_that_ranks_can_exchange():
    model = network(torch.bfloat16)
    optimizer = Muon(model, rounding="kept")
    train(model, optimizer, range(2), torch.bfloat16)
    state = optimizer.state_dict()
    first, held = optimizer.state[next(model.parameters())]["weight_low_bits"], state["state"][0]
    assert held["weight_low_bits"].dtype == torch.int32
    again = Muon(model, rounding="kept")
    again.load_state_dict(state)
    loaded = again.state[next(model.parameters())]["weight_low_bits"]
    assert loaded.dtype == torch.int16
    assert torch.equal(loaded, first)
    held["weight_low_bits"] = held["weight_low_bits"] + 2**16
    with pytest.raises(ValueError, match=r"'weight_low_bits' of .* but numbers of 16 bits are needed"):
        again.load_state_dict(state)


def test_float32_weights_have_no_use_for_it():
    model, twin = network(), network()
    for rounding in ("kept", "stochastic"):
        optimizer = Muon(model, rounding=rounding)
    assert_same(train(model, optimizer, range(2)), train(twin, Muon(twin), range(2)))
    assert all("weight_low_bits" not in state for state in optimizer.state.values())


def test_bits_that_nobody_keeps_on_are_told_of():
    model = network(torch.bfloat16)
    optimizer = Muon(model, rounding="kept")
    train(model, optimizer, [0], torch.bfloat16)
    other = Muon(model)
    with pytest.warns(UserWarning, match=r"lower bits of bfloat16 weights.* rounding='kept'"):
        other.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(other.state_dict())  # they begin with zeros
    train(model, optimizer, [1], torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (ValueError, r"Muon: Unknown rounding 'up'", {"rounding": "up"}),
        (TypeError, "Muon: momentum_dtype must be torch.bfloat16", {"momentum_dtype": torch.float16}),
    ],
)
def test_what_is_refused(kind, message, options):
    with pytest.raises(kind, match=message):
        Muon(network(), **options)


def test_weights_of_float16_are_refused():
    with pytest.raises(ValueError, match=r"rounding='kept' is for bfloat16 weights, and '\w+.*' of shape .* float16"):
        Muon(network(torch.float16), rounding="kept")
    assert not Storage().rounds(torch.empty(1, dtype=torch.bfloat16))


def test_preconditioned_weights_of_16_bits_train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(torch.bfloat16)
    optimizer = NewtonMuon(
        model, rounding="kept", momentum_dtype=torch.bfloat16, precondition=InputMoment(structure="full", every=2)
    )
    x = torch.randn(16, 8, dtype=torch.bfloat16)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - x.flip(1)).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
