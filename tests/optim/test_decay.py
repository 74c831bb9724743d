"""Weight decay as an object: its kinds are asked by the move, by Momo's model of the loss and by the ball."""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch

from steepest import Cautious, Decay, Decoupled, Momo, Muon, RowScaling, Spectral, SteepestDescent
from steepest.testing import backward, check_recipe, network


def trained(steps=4, **options):
    model = network()
    optimizer = Muon(model, **options)
    for step in range(steps):
        optimizer.zero_grad()
        loss = backward(model, step)
        optimizer.step(loss=loss.detach())
    return model, optimizer


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_number_is_decoupled_decay():
    number, decay = (trained(weight_decay=own)[0] for own in (0.1, Decoupled(0.1)))
    assert all(torch.equal(a, b) for a, b in zip(weights(number), weights(decay), strict=True))
    assert isinstance(Decoupled(0.1), Decay)


def test_groups_hold_the_rate_and_schedulers_may_write_it():
    model, optimizer = trained(weight_decay=Decoupled(0.1))
    rates = {group["role"]: group["weight_decay"] for group in optimizer.param_groups}
    assert rates["matrix"] == 0.1
    assert rates["vector"] == 0.0
    other, plain = trained(weight_decay=0.1)
    for own in (optimizer, plain):
        own.param_groups[0]["weight_decay"] = 0.3
    for m, own in ((model, optimizer), (other, plain)):
        backward(m, 9)
        own.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


def test_another_kind_is_what_it_says():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    optimizer = Muon([weight], lr=0.1, weight_decay=Cautious(0.5), nesterov=False, scale="none", polar="svd")
    before = weight.detach().clone()
    weight.grad = torch.randn(5, 3, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(weight.grad, full_matrices=False)
    optimizer.step()
    expected = before - 0.05 * before * (before * -(u @ vh) < 0) - 0.1 * u @ vh
    torch.testing.assert_close(weight.detach(), expected)


def test_another_kind_keeps_the_laws_of_recipes():
    def cautious(model, **options):
        return Muon(model, **{"weight_decay": Cautious(0.1), **options})

    check_recipe(cautious)


@pytest.mark.parametrize("bookkeeping", ["recurrent", "direct"])
@pytest.mark.parametrize("dual", ["cached", "stale"])
@pytest.mark.parametrize("product", ["max", "sum", "euclid"])
def test_momo_predicts_what_another_kind_takes_away(bookkeeping, dual, product):
    """On a linear loss the model is exact, and so is its value after steps with decay, also where a layer stays."""
    torch.manual_seed(1)
    slopes = [torch.randn(5, 3, dtype=torch.float64), 0.2 * torch.randn(3, 4, dtype=torch.float64)]
    weights = [torch.nn.Parameter(torch.randn_like(slope)) for slope in slopes]
    momo = Momo(-100.0, bookkeeping=bookkeeping)
    options = {"weight_decay": Cautious(0.5), "product": product, "step_size": momo, "dual": dual}
    optimizer = SteepestDescent(weights, lr=0.1, norms={"matrix": Spectral(polar="svd")}, **options)
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum((slope * weight).sum() for slope, weight in zip(slopes, weights, strict=True))
        loss.backward()
        optimizer.step(loss=loss.detach())
        value = optimizer.state_dict()["param_groups"][0]["momo_value"]
        now = sum(float((s * w.detach()).sum()) for s, w in zip(slopes, weights, strict=True))
        assert value == pytest.approx(now, rel=1e-9)


def test_where_no_ball_is_kept_none_is_promised():
    _, optimizer = trained(weight_decay=Cautious(0.1))
    assert not any(name.endswith("/ball_radius") for name in optimizer.diagnostics(weights=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "weights are no longer kept within norm 1 / weight_decay"),
        ({"stages": [RowScaling()]}, "decay takes more from weights than they have"),
        ({"weight_decay": Cautious(2.0)}, "decay takes more from weights than they have"),
    ],
)
def test_too_much_decay_is_told_and_of_a_ball_only_where_there_is_one(options, told):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = Muon([weight], **{"lr": 0.1, "weight_decay": 2.0, **options})
    optimizer.param_groups[0]["lr"] = 1.0
    with pytest.warns(UserWarning, match=rf"lr · weight_decay is 2 .*{told}, and from 2 on"):
        optimizer.step()


def test_the_kind_survives_saving_copying_and_pickling():
    model, optimizer = trained(weight_decay=Cautious(0.5))
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    again = copy.deepcopy(model)
    loaded = Muon(again, weight_decay=Cautious(0.5))
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    others = [(again, loaded), copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for m, own in [(model, optimizer), *others]:
        own.zero_grad()
        backward(m, 8)
        own.step()
    for other, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(model), strict=True))


def test_a_group_may_have_its_own_and_change_it():
    one, two = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = SteepestDescent([{"params": [one], "weight_decay": Cautious(0.2)}, {"params": [two]}], weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.1]
    assert [group["decay_kind"] for group in optimizer.param_groups] == ["Cautious(rate=0.0)", "Decoupled(rate=0.0)"]
    optimizer.param_groups[1]["weight_decay"] = Cautious(0.3)
    one.grad = two.grad = torch.ones(2, 2)
    optimizer.step()
    assert optimizer.param_groups[1]["weight_decay"] == 0.3
    assert optimizer.param_groups[1]["decay_kind"] == "Cautious(rate=0.0)"


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_rate_out_of_range_is_refused(rate):
    for kind in (Cautious, Decoupled):
        with pytest.raises(ValueError, match=f"{kind.__name__}: rate must be finite and at least 0"):
            kind(rate)

    @dataclass(frozen=True)
    class Unchecked(Cautious):
        def __post_init__(self):
            pass

    with pytest.raises(ValueError, match="weight_decay: rate"):
        Muon(network(), weight_decay=Unchecked(rate))


def test_a_group_of_another_optimizer_is_taken():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    first = Muon([weight], weight_decay=0.1)
    second = Muon([dict(first.param_groups[0])])
    weight.grad = torch.ones(2, 2)
    second.step()
    second.param_groups[0] = dict(first.param_groups[0])
    second.step()
    assert second.param_groups[0]["decay_kind"] == "Decoupled(rate=0.0)"


@pytest.mark.parametrize("text", ["x", 5])
def test_a_text_that_stands_for_no_kind_is_refused_before_anything_changes(text):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = Muon([weight])
    optimizer.param_groups[0]["decay_kind"] = text
    with pytest.raises(ValueError, match=f"decay_kind is {text!r}, which stands for no kind"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(weight.detach(), torch.ones(2, 2))


def test_kinds_that_print_alike_are_told_apart():
    @dataclass(frozen=True, repr=False)
    class Hidden(Cautious):
        part: float = 1.0

    one, two = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    kinds = [(one, Hidden(0.1, part=0.5)), (two, Hidden(0.1, part=0.25))]
    groups = [{"params": [p], "role": "matrix", "weight_decay": kind} for p, kind in kinds]
    optimizer = SteepestDescent(groups)
    first, second = (group["decay_kind"] for group in optimizer.param_groups)
    assert second == f"{first}#2"


def test_a_kind_that_is_no_dataclass_is_refused():
    class Bare:
        rate, needs_directions, keeps_norms, relative = 0.1, False, False, False
        radius, removed = Decoupled.radius, Decoupled.removed
        apply_, stay_finite = Decoupled.apply_, Decoupled.stay_finite

    with pytest.raises(TypeError, match="a kind of decay that is a dataclass"):
        Muon(network(), weight_decay=Bare())
