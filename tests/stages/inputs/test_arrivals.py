"""Inputs count exactly as long as the gradient that they made: thrown away, made elsewhere, or set by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from steepest import InputMoment
from tests.cases import cases
from tests.stages.inputs.watched import assert_kept, backward, data, moments, net, newton


def set_to_none(model):
    for p in model.parameters():
        p.grad = None


def zero_data(model):
    for p in model.parameters():
        p.grad.data.zero_()  # which no version counter notices


def zero_together(model):
    torch._foreach_zero_([p.grad for p in model.parameters()])


def replace_by_zeros(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


DISCARDS = {
    "model.zero_grad": lambda model: model.zero_grad(),
    "in place": lambda model: model.zero_grad(set_to_none=False),
    "none": set_to_none,
    "data": zero_data,
    "together": zero_together,
    "replaced": replace_by_zeros,
}


@pytest.mark.slow
@cases("discard", DISCARDS)
@cases("split", [[8], [3, 5]])
@cases("reentrant", [None, True, False])
def test_a_gradient_that_is_thrown_away_takes_its_inputs_along(discard, split, reentrant):
    model, x = net(reentrant=reentrant), data()
    optimizer, expected = newton(model), moments(model, [x])
    for _ in range(2):
        backward(model, data(seed=2))
        backward(model, data(seed=3))
        DISCARDS[discard](model)
    for part in x.split(split):
        (model(part).square().sum() / 100).backward()
    optimizer.step()
    assert_kept(model, optimizer, expected)


@pytest.mark.parametrize("discard", DISCARDS)
def test_a_gradient_of_one_layer_that_is_thrown_away(discard):
    model, x = net(), data()
    optimizer, y = newton(model), data(seed=2)
    expected = {**moments(model, [x, y]), "second.weight": moments(model, [x])["second.weight"]}
    backward(model, y)
    DISCARDS[discard](model.second)
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected)


@pytest.mark.parametrize("discard", DISCARDS)
def test_a_gradient_that_is_thrown_away_before_the_step_leaves_the_moment_as_it_was(discard):
    model = net()
    optimizer = newton(model)
    expected = moments(model, [x := data()])
    backward(model, x)
    optimizer.step()
    optimizer.zero_grad()
    y = data(seed=2)
    later = {**moments(model, [y]), "second.weight": expected["second.weight"]}
    backward(model, y)
    DISCARDS[discard](model.second)
    optimizer.step()
    assert_kept(model, optimizer, later)
    assert optimizer.diagnostics()["input_missing"] == 0


def attack(model):
    x = data(seed=2).requires_grad_()
    model(x).sum().backward(inputs=[x])


def saliency(model):
    x = data(seed=2).requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


def sharpness(model):
    weights = list(model.parameters())
    slopes = torch.autograd.grad(model(data(seed=2).requires_grad_()).square().sum(), weights, create_graph=True)
    torch.autograd.grad(sum(slope.square().sum() for slope in slopes), weights)


def another_head(model):
    probe = nn.Linear(7, 1).double()
    probe(model.middle(torch.relu(model.first(data(seed=2))))).sum().backward(inputs=list(probe.parameters()))


def averaged_weights(model):
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = data(seed=2).requires_grad_()
    torch.func.functional_call(model, average, (x,)).sum().backward()


def second_net(model):
    generator = nn.Linear(4, 5).double()
    for p in model.parameters():
        p.requires_grad_(False)
    model(generator(data(seed=2, width=4))).mean().backward()
    for p in model.parameters():
        p.requires_grad_(True)


ELSEWHERE = [attack, saliency, sharpness, another_head, averaged_weights, second_net]


@pytest.mark.parametrize("other", ELSEWHERE)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_passes_that_make_no_gradient_of_the_weights_do_not_count(other, when):
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    if when == "before":
        other(model)
    backward(model, x[:3])
    if when == "between":
        other(model)
    backward(model, x[3:])
    if when == "after":
        other(model)
    optimizer.step()
    assert_kept(model, optimizer, expected)
    assert optimizer.diagnostics()["input_partial"] == 0


def test_the_discriminator_of_a_gan_learns_from_its_own_step_alone():
    model, generator = net(), nn.Linear(4, 5).double()
    real, fake = data(), generator(data(seed=2, width=4))
    optimizer, expected = newton(model), moments(model, [real, fake.detach()])
    model(fake).mean().backward()
    model.zero_grad()
    model(real).mean().backward()
    (-model(fake.detach()).mean()).backward()
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_backward_pass_that_fails_and_is_repeated_in_parts_counts_once():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])

    def fail(gradient):
        raise torch.OutOfMemoryError

    y = torch.relu(model.first(x))
    y.register_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.head(model.middle(y)).sum().backward()
    model.zero_grad()
    for part in x.split(4):
        backward(model, part)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_two_models_in_turns():
    one, other = net(), net()
    first, second = newton(one), newton(other)
    x, y, z = data(), data(seed=2), data(seed=3)
    expected, its = moments(one, [x, z]), moments(other, [y])
    backward(one, x)
    backward(other, z)
    other.zero_grad()
    backward(one, z)
    backward(other, y)
    first.step()
    second.step()
    assert_kept(one, first, expected)
    assert_kept(other, second, its)


CHANGES = {
    "clipped": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "unscaled": lambda model: torch._foreach_mul_([p.grad for p in model.parameters()], 2.0**-12),
    "copied": lambda model: [setattr(p, "grad", p.grad.clone()) for p in model.parameters()],
    "noisy": lambda model: [p.grad.add_(torch.ones_like(p)) for p in model.parameters()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_that_is_changed_is_not_thrown_away(change):
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    for part in x.split(4):
        backward(model, part)
        CHANGES[change](model)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_micro_batches_whose_gradient_is_zero_count_as_in_one_batch():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    (model(x[:2]).square().sum() * 0).backward()
    (model(x[2:5]).square().sum() * 0).backward()
    backward(model, x[5:])
    optimizer.step()
    assert_kept(model, optimizer, expected)


class Shared(nn.Module):
    """One weight before, inside and after a checkpoint."""

    def __init__(self, reentrant):
        super().__init__()
        self.map, self.head, self.reentrant = nn.Linear(5, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        x = torch.tanh(self.map(x))
        x = checkpoint(lambda z: torch.tanh(self.map(z)), x, use_reentrant=self.reentrant)
        return self.head(torch.tanh(self.map(x)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_weight_inside_and_outside_of_a_checkpoint(reentrant):
    torch.manual_seed(7)
    model, x = Shared(reentrant).double(), data()
    optimizer = newton(model)
    rows = [x]
    for _ in range(2):
        rows.append(torch.tanh(model.map(rows[-1])).detach())
    z = torch.cat(rows).flatten(0, 1)
    backward(model, data(seed=2))
    model.zero_grad()
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, {"map.weight": z.T @ z / len(z)}, names=["map.weight"])
    assert optimizer.diagnostics()["input_partial"] == 0


def test_a_penalty_on_slopes_counts_its_inputs_once():
    """As in WGAN-GP; the weight of the last layer has its gradient by way of the second derivative only."""
    model, real = net(), data()
    between = data(seed=2).requires_grad_()
    optimizer, expected = newton(model), moments(model, [real, between])
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    (model(real).mean() + (slope.norm(dim=-1) - 1).square().mean()).backward()
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_loss_and_the_penalty_on_its_own_slope_count_the_inputs_once():
    model, x, y = net(), data().requires_grad_(), data(seed=2)
    optimizer, expected = newton(model), moments(model, [x, y])
    loss = model(x).square().mean()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()
    backward(model, y)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_slope_that_nobody_penalises_does_not_count():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    other = data(seed=2).requires_grad_()
    torch.autograd.grad(model(other).sum(), other, create_graph=True)
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_gradients_that_are_taken_and_set_by_hand_count():
    model, x = net(), data().requires_grad_()
    optimizer, expected = newton(model), moments(model, [x])
    saliency(model)
    wanted = [x, *model.parameters()]  # without x autograd does not go on to what the first layer reads
    gradients = torch.autograd.grad(model(x).square().mean(), wanted)
    for p, gradient in zip(model.parameters(), gradients[1:], strict=True):
        p.grad = gradient
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_gradients_that_are_only_looked_at_do_not_count():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    torch.autograd.grad(model(data(seed=2).requires_grad_()).square().mean(), list(model.parameters()))
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_weight_that_is_also_used_without_its_module_is_noticed():
    model, x, y = net(), data(), data(seed=2)
    optimizer, expected = newton(model), moments(model, [x])
    backward(model, x)
    F.linear(y, model.first.weight).square().sum().backward()
    with pytest.warns(UserWarning, match=r"^'first.weight' has a gradient from more backward passes than its inputs"):
        optimizer.step()
    assert_kept(model, optimizer, expected)
    assert optimizer.diagnostics()["input_partial"] == 1


@pytest.mark.parametrize("how", ["recorded", "zero", "thrown away"])
def test_a_weight_whose_use_elsewhere_hides_no_inputs(how):
    model, x, y = net(), data(), data(seed=2)
    optimizer = newton(model)
    expected = moments(model, [x])
    if how == "recorded":
        rows = torch.cat([x, y]).flatten(0, 1)
        expected["first.weight"] = rows.T @ rows / len(rows)
        optimizer.record_input(model.first.weight, y)
    F.linear(y, model.first.weight).square().sum().mul(0 if how == "zero" else 1).backward()
    if how == "thrown away":
        model.zero_grad()
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected)
    assert optimizer.diagnostics()["input_partial"] == 0


def test_a_layer_that_thaws_after_the_last_step():
    model, x, y = net(), data(), data(seed=2)
    optimizer = newton(model)
    model.second.weight.requires_grad_(False)
    backward(model, x)
    optimizer.step()
    optimizer.zero_grad()
    model.second.weight.requires_grad_(True)
    expected = moments(model, [y])
    backward(model, y)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_model_that_is_converted_after_the_optimizer_was_built():
    model = net(torch.float32)
    optimizer, x = newton(model), data()
    model.double()
    expected = moments(model, [x])
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected, rtol=1e-12)


@pytest.mark.parametrize("moment", ["before the forward pass", "while gradients are there"])
@pytest.mark.parametrize("missing", ["raise", "muon"])
def test_a_model_that_is_converted_there_and_back_between_steps(moment, missing):
    """As for an evaluation in another type: autograd adds to the gradient elsewhere from then on."""
    model, x, y = net(), data(), data(seed=2)
    optimizer = newton(model, InputMoment(every=1, first=0, decay=0.0, structure="full", missing=missing))
    for step in range(2):
        optimizer.zero_grad()
        backward(model, data(seed=3 + step))
        optimizer.step()
    optimizer.zero_grad()
    expected = moments(model.float().double(), [x, y])
    if moment == "while gradients are there":
        backward(model, x)
    model.float()
    model(x.float())
    model.double()
    if moment != "while gradients are there":
        backward(model, x)
    backward(model, y)
    optimizer.step()
    assert_kept(model, optimizer, expected)
    assert optimizer.diagnostics()["input_missing"] == 0


def test_gradients_of_a_converted_model_that_are_thrown_away_take_their_inputs_along():
    model, x = net(), data()
    optimizer = newton(model)
    model.float()
    model.double()
    expected = moments(model, [x])
    backward(model, data(seed=2))
    model.zero_grad()
    torch.autograd.grad(model(y := data(seed=4).requires_grad_()).sum(), y)
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_copy_forgets_what_is_thrown_away_there():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    backward(model, data(seed=2))
    twin, other = copy.deepcopy((model, optimizer))  # gradients stay behind
    backward(twin, x)
    other.step()
    assert_kept(twin, other, expected)


def test_layers_that_share_a_moment_throw_away_alike():
    torch.manual_seed(7)
    model = nn.ModuleDict({name: nn.Linear(5, 5) for name in ("q_proj", "k_proj", "v_proj")}).double()
    optimizer = newton(model, InputMoment(every=1, first=0, decay=0.0, structure="full"))

    def run(x):
        (model["q_proj"](x) * model["k_proj"](x) + model["v_proj"](x)).square().mean().backward()

    for seed in range(3):
        optimizer.zero_grad()
        run(data(seed=10 + seed))
        model.zero_grad()
        run(x := data(seed=seed))
        optimizer.step()
        rows = x.flatten(0, 1)
        assert_kept(model, optimizer, {"q_proj.weight": rows.T @ rows / 24}, names=["q_proj.weight"])
    assert optimizer.diagnostics()["input_parted"] == 0


def test_nothing_is_heard_in_steps_that_look_at_no_inputs():
    model = net()
    optimizer = newton(model, InputMoment(every=3, first=1, decay=0.0, structure="full"))
    heard = []
    for step in range(4):
        heard.append([arrivals._node is not None for arrivals in optimizer.stages[0].watch._arrivals])
        optimizer.zero_grad()
        backward(model, data(seed=step))
        optimizer.step()
    assert heard == [[step == 1] * 3 for step in range(4)]
