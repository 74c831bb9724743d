"""NoiseScale in loops of one process: what it records is what torch.autograd.grad says, whatever the loop does."""

import math

import pytest
import torch
from torch import nn

import steepest
from steepest.batch_size.estimators import alignment, euclidean, l1, nested_sizes, nuclear
from steepest.batch_size.noise import NoiseScale
from tests.batch_size.noisy_loops import (
    ALL,
    MICRO,
    PER,
    STEPS,
    loss_of,
    mean_gradients,
    measured,
    network,
    sgd,
    train,
    train_step,
    values,
)
from tests.cases import cases

F64 = torch.float64


def test_every_number_is_the_estimators_of_the_micro_batches():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    samples = torch.full((MICRO,), float(PER), dtype=F64)
    expected = []
    for step in range(3):
        gradients = mean_gradients(model, step)
        train_step(model, optimizer, step)
        rows = []
        for name, p in model.named_parameters():
            g = gradients.get(name, torch.zeros(MICRO, *p.shape, dtype=F64))
            matrix = name.endswith("weight") and "table" not in name
            parts = nuclear(g, samples) if matrix else [torch.zeros((), dtype=F64)] * 4
            aligned = alignment(g, samples, lambda x: x / norm(x), nested_sizes(MICRO))
            rows.append(torch.stack([*euclidean(g, samples), *l1(g, samples), *parts, *aligned]))
        expected.append(torch.stack(rows))
    order = [layer.name for layer in noise._layers]
    places = [order.index(name) for name, _ in model.named_parameters()]
    torch.testing.assert_close(values(noise)[:, places], torch.stack(expected), rtol=1e-9, atol=1e-15)


def norm(x):
    length = x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    return torch.where(length == 0, 1.0, length)


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


@cases(
    "options",
    [
        {"divide": 1, "losses": "whole", "factor": 1.0},
        {"losses": "weighted"},
        {"factor": 1024.0, "scale": 1024.0},
        {"factor": 1024.0, "scale": lambda: 1024.0},
        {"to_none": False},
        {"store": "cpu"},
        {"samples": None, "told": True},
    ],
)
def test_how_losses_are_scaled_and_gradients_kept_changes_nothing(options):
    if options.pop("losses", "") == "whole":
        model = network()  # the step is the same if the learning rate is a quarter
        optimizer = sgd(model, 0.05 / MICRO)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL, losses="whole")
        train(model, optimizer, divide=1)
    elif "told" in options:
        model = network()
        optimizer = sgd(model)
        noise = NoiseScale(model, optimizer, every=1, kinds=ALL)
        for step in range(STEPS):
            for index in range(MICRO):
                noise.micro_batch(PER)
                (loss_of(model, step, index) / MICRO).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert noise.read().unit == "samples"
    elif "factor" in options:
        model = network()
        optimizer = sgd(model, 0.05 / 1024)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL, scale=options["scale"])
        train(model, optimizer, factor=1024.0)
    else:
        noise = measured(**options)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_clipping_is_not_seen():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER)
    train(model, optimizer, steps=1, after=lambda: clip(model))
    torch.testing.assert_close(values(noise), values(measured(kinds=("euclidean", "alignment")))[:1])


def test_a_common_factor_changes_no_scale():
    plain, unscaled = measured(), measured(scale=1 / 8.0)  # exact in every type
    for one, other in zip(plain.read().scales, unscaled.read().scales, strict=True):
        assert other.ratio.value == pytest.approx(one.ratio.value, rel=1e-9, nan_ok=True)
    for one, other in zip(plain.read().curves, unscaled.read().curves, strict=True):
        assert other.ratio.value == pytest.approx(one.ratio.value, rel=1e-9, nan_ok=True)
        assert other.values == pytest.approx([8 * value for value in one.values])


def test_measuring_changes_no_weight_and_leaves_no_hook():
    plain, watched = network(), network()
    optimizer = sgd(watched)
    with NoiseScale(watched, optimizer, every=2, kinds=ALL) as noise:
        train(watched, optimizer)
    train(plain, sgd(plain))
    assert noise.read().measurements == 2
    loss_of(watched, 0, 0).backward()
    assert len(noise._record) == 0
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_steps_in_between_have_no_hooks():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=3)
    seen = []
    for step in range(6):
        seen.append((noise.measuring, len(noise._record._handles)))
        train_step(model, optimizer, step)
    assert seen == [(False, 0), (False, 0), (True, 6)] * 2
    assert [record.step for record in noise._records] == [2, 5]


def test_batches_may_be_split_on_measured_steps_only():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=2, samples=PER)
    for step in range(4):
        pieces = MICRO if noise.measuring else 1
        for index in range(pieces):
            (loss_of(model, step, index) / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = noise.read()
    assert (report.measurements, report.batch) == (2, MICRO * PER)


@pytest.mark.parametrize("before", [0, 2])
def test_closures_are_measured_like_loops(before):
    """The last micro-batches, or all, run inside of step()."""
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(before):
            (loss_of(model, step, index) / MICRO).backward()

        def closure(step=step):
            losses = [loss_of(model, step, index) / MICRO for index in range(before, MICRO)]
            for loss in losses:
                loss.backward()
            return sum(losses)

        optimizer.step(closure)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_adaptive_norms_use_the_second_moments_of_before_the_step():
    found = []
    for closure in (False, True):
        model = network()
        optimizer = steepest.Adam(model, lr=0.01)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=("alignment",))
        for step in range(3):

            def backward(step=step, model=model):
                for index in range(MICRO):
                    (loss_of(model, step, index) / MICRO).backward()
                return 0.0

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            optimizer.zero_grad()
        found.append(values(noise))
    torch.testing.assert_close(found[0], found[1])
    first = found[0][0, [layer.name for layer in noise._layers].index("down.weight")]
    gradients = mean_gradients(network(), 0)["down.weight"]
    samples = torch.full((MICRO,), float(PER), dtype=F64)
    torch.testing.assert_close(
        first, alignment(gradients, samples, torch.sign, nested_sizes(MICRO)), rtol=1e-4, atol=1e-9
    )  # without a past, Adam's step is the sign but for eps
    # given the past, the direction g / (√V + eps) is linear in the gradient: all sizes estimate the same
    state = steepest.Adam(model := network(), lr=0.01)
    for step in range(2):
        train_step(model, state, step)
    moment = state.state[model.down.weight]["second_moment"]
    weight = 1 - state.param_groups[0]["beta2"] ** 2
    gradients = mean_gradients(model, 2)["down.weight"]
    linear = alignment(gradients, samples, lambda g: g / ((moment / weight).sqrt() + 1e-8), nested_sizes(MICRO))
    place = [layer.name for layer in noise._layers].index("down.weight")
    torch.testing.assert_close(found[0][2, place], linear, rtol=1e-4, atol=1e-12)


def test_muon_is_measured_in_its_groups_norms():
    model = network()
    optimizer = steepest.Muon(model, lr=0.02, polar="svd", scale="none")
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=("nuclear", "alignment"))
    gradients = mean_gradients(model, 0)["up.weight"]
    train_step(model, optimizer, 0)
    names = [layer.name for layer in noise._layers]
    row = values(noise)[0, names.index("up.weight")]
    samples = torch.full((MICRO,), float(PER), dtype=F64)
    torch.testing.assert_close(row[:4], torch.stack(list(nuclear(gradients, samples))), rtol=1e-9, atol=0)
    expected = alignment(gradients, samples, lambda g: steepest.polar(g, method="svd"), nested_sizes(MICRO))
    torch.testing.assert_close(row[4:], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(row[2], row[-1])  # leave one out is the crossed signal
    weights = dict(zip(names, noise._records[0].weights.tolist(), strict=True))
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert weights == pytest.approx({name: rate / max(rates.values()) for name, rate in rates.items()})


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_torchs_adam_is_sign_descent(name):
    model = network()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=("l1", "alignment"))
    train_step(model, optimizer, 0)
    torch.testing.assert_close(values(noise)[0, :, 2], values(noise)[0, :, -1])


def test_an_unknown_optimizer_takes_a_norm():
    model = network()
    optimizer = torch.optim.Rprop(model.parameters())
    with pytest.raises(ValueError, match="in which norm Rprop descends is not known"):
        NoiseScale(model, optimizer)
    noise = NoiseScale(model, optimizer, norm="sign", every=1)
    train_step(model, optimizer, 0)
    assert noise.read().curve().batches == (1.0, 2.0, 3.0)


def test_convolutions_and_fused_weights_are_seen_as_matrices():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Flatten(), nn.Linear(8 * 4, 5)).double()
    optimizer = steepest.Muon(model, lr=0.01)
    noise = NoiseScale(model, optimizer, every=1, kinds=("nuclear",))
    xs = torch.randn(3, 2, 3, 4, 4, dtype=F64)
    stacked = torch.stack([torch.autograd.grad(model(x).square().mean(), model[0].weight)[0] for x in xs])
    for x in xs:
        (model(x).square().mean() / 3).backward()
    optimizer.step()
    expected = nuclear(stacked.flatten(2), torch.ones(3, dtype=F64))
    names = [layer.name for layer in noise._layers]
    torch.testing.assert_close(values(noise)[0, names.index("0.weight")], torch.stack(list(expected)))


def test_gradients_that_are_not_finite_are_counted_and_the_next_step_is_measured():
    model = network()
    optimizer = sgd(model, lr=0.0)
    noise = NoiseScale(model, optimizer, every=2, kinds=ALL)
    for step in range(5):
        for index in range(MICRO):
            (loss_of(model, step, index) * (math.nan if (step, index) == (1, 2) else 1.0)).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.nan_to_num_()  # so that weights survive; what is recorded came before
        optimizer.step()
        optimizer.zero_grad()
    assert [record.step for record in noise._records] == [2, 3]
    assert noise.read().discarded == 1
    assert "1 not finite" in str(noise.read())


def test_thrown_away_gradients_are_not_counted():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for index in range(3):
        loss_of(model, 9, index).backward()  # and then no step, as a GradScaler decides
    optimizer.zero_grad()
    train(model, optimizer)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_gradients_set_to_zero_are_forgotten_by_hand():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for index in range(3):
        loss_of(model, 9, index).backward()
    optimizer.zero_grad(set_to_none=False)
    noise.forget()
    train(model, optimizer)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_what_was_frozen_when_hooks_were_set_is_measured_one_step_later():
    model = network()
    optimizer = sgd(model)
    model.up.weight.requires_grad_(False)
    noise = NoiseScale(model, optimizer, every=1)
    model.up.weight.requires_grad_(True)
    train(model, optimizer, steps=2)
    assert [record.step for record in noise._records] == [1]
    assert noise.read().scale("euclidean", "up.weight").noise > 0


def test_unequal_micro_batches_are_weighed():
    model, sizes = nn.Linear(3, 1, bias=False).double(), (1, 2, 5)
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, losses="weighted", unit="sequences")
    data = [torch.randn(size, 3, dtype=F64) for size in sizes]
    stacked = torch.stack([torch.autograd.grad(model(x).square().mean(), model.weight)[0] for x in data])
    for x in data:
        (model(x).square().sum() / sum(sizes)).backward()
        noise.micro_batch(len(x))
    optimizer.step()
    expected = euclidean(stacked, torch.tensor(sizes, dtype=F64))
    torch.testing.assert_close(values(noise)[0, 0, :2], torch.stack(list(expected)))
    assert noise.read().batch == 8
    assert noise.read().unit == "sequences"
