"""What is seen of layers' inputs in all the ways a model is called, against inputs captured from a plain copy."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from steepest import InputMoment, MissingInputsError, NewtonMuon
from tests.anatomy.routed import LanguageModel
from tests.stages.inputs.watched import NAMES, SEEN, assert_kept, backward, data, kept, moments, net, newton

TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-13}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
EVERY_THIRD = InputMoment(every=3, first=1, decay=0.0, structure="full")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("split", [[8], [4, 4], [2] * 4, [1] * 8, [1, 4, 3], [5, 0, 3]], ids=str)
def test_micro_batches_make_the_moment_of_their_batch(split, dtype):
    model = net(dtype)
    optimizer, x = newton(model), data(dtype=dtype)
    expected = moments(net(), [x.double()])
    for part in x.split(split):
        (model(part).square().sum() / 100).backward()
    optimizer.step()
    assert_kept(model, optimizer, expected, **TOLERANCE[dtype])
    assert all(moment.dtype == dtype for moment in kept(model, optimizer).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_keep_moments_in_float32(dtype):
    model = net(dtype)
    optimizer, x = newton(model), data(dtype=dtype)
    expected = moments(model, [x])
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected, rtol=1e-5, atol=1e-6)
    assert all(moment.dtype == torch.float32 for moment in kept(model, optimizer).values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("split", [[8], [3, 5]], ids=str)
def test_activation_checkpointing_counts_once(reentrant, split):
    model = net(reentrant=reentrant)
    optimizer, x = newton(model), data()
    expected = moments(model, x.split(split))
    for part in x.split(split):
        backward(model, part)
    masses = [watched.mass for watched in optimizer.stages[0].watch.seen.values()]
    assert [float(mass) for mass in masses] == [24.0, 24.0, 24.0]
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_passes_without_a_gradient_are_not_seen():
    model, x = net(), data()
    optimizer, other = newton(model), data(seed=2)
    expected = moments(model, [x])
    backward(model, x)
    with torch.no_grad():
        model(other)
    with torch.inference_mode():
        model(other)
    model.eval()
    model(other)
    model.train()
    model(other)  # a training pass that nobody differentiates
    model(other).sum().backward(inputs=[model.head.weight])  # stops before the layers that are watched
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_backward_pass_that_leaves_out_the_layers_inputs_is_refused():
    model, x = net(), data()
    optimizer = newton(model)
    model(x).square().mean().backward(inputs=list(model.parameters()))
    with pytest.raises(MissingInputsError, match=r"^'first.weight' has a gradient, but its inputs .* are missing"):
        optimizer.step()


def test_a_gradient_taken_in_eval_mode_counts():
    model, x = net().eval(), data()
    optimizer, expected = newton(model), moments(model, [x])
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected)


@pytest.mark.parametrize("before", ["forward", "backward", "neither"])
def test_clearing_gradients_forgets_what_they_were_computed_from(before):
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    backward(model, data(seed=2))
    if before == "forward":
        optimizer.zero_grad()
    loss = model(x).square().mean()
    if before == "backward":
        optimizer.zero_grad()
    if before == "neither":
        expected = moments(model, [data(seed=2), x])
    loss.backward()
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_nothing_is_put_before_a_module_while_nobody_watches():
    model, x = net(), data().requires_grad_()
    optimizer = newton(model, EVERY_THIRD)
    same = []
    model.first.register_forward_pre_hook(lambda module, arguments: same.append(arguments[0] is x))
    for _ in range(6):
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
    assert same == [True, False, True, True, False, True]


def test_watching_changes_no_gradient():
    model, plain, x = net(), net(), data().requires_grad_()
    newton(model)
    y = x.detach().clone().requires_grad_()
    backward(model, x)
    backward(plain, y)
    for ours, theirs in zip((x, *model.parameters()), (y, *plain.parameters()), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_frozen_layers_have_no_moment_and_may_freeze_later():
    model, x = net(), data()
    model.second.weight.requires_grad_(False)
    optimizer, expected = newton(model), moments(model, [x])
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected, names=["first.weight", "third.weight"])
    model.third.weight.requires_grad_(False)
    optimizer.zero_grad()
    y = data(seed=2)
    later = {**moments(model, [y]), "third.weight": expected["third.weight"]}
    backward(model, y)
    optimizer.step()
    assert_kept(model, optimizer, later, names=["first.weight", "third.weight"])


def test_a_backward_pass_done_twice_counts_twice_like_its_gradient():
    model, x, y = net(), data(), data(seed=2)
    optimizer = newton(model)
    expected = moments(model, [x, x, y])
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    backward(model, y)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_second_derivative_does_not_disturb():
    model, x = net(), data().requires_grad_()
    optimizer, expected = newton(model), moments(model, [x])
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_transforms_of_torch_func_are_not_watched():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    backward(model, x)
    assert torch.allclose(per_sample["first.weight"].mean(0), model.first.weight.grad)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_outputs_changed_in_place():
    torch.manual_seed(7)
    parts = (nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    model, x = nn.Sequential(*parts).double(), data()
    optimizer, expected = newton(model), moments(model, [x])
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected, names=["0.weight", "2.weight"])


def test_under_autocast_moments_are_of_the_rounded_inputs_that_layers_multiply():
    model, x = net(torch.float32), data(dtype=torch.float32)
    optimizer = newton(model)
    calls = []
    for module in (model.first, model.second, model.third):
        module.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0].detach().clone()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    optimizer.step()
    assert [z.dtype for z in calls] == [torch.float32, torch.bfloat16, torch.bfloat16]
    rows = (z.bfloat16().double().flatten(0, -2) for z in calls)
    expected = {name: z.T @ z / len(z) for name, z in zip(NAMES, rows, strict=True)}
    assert_kept(model, optimizer, expected, rtol=1e-5, atol=1e-6)
    assert {moment.dtype for moment in kept(model, optimizer).values()} == {torch.float32}


def test_a_copy_of_the_model_leaves_the_moments_alone():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    average = copy.deepcopy(model)
    thawed = pickle.loads(pickle.dumps(model))
    backward(model, x)
    for other in (average, thawed):
        backward(other, data(seed=2))
    optimizer.step()
    assert_kept(model, optimizer, expected)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_goes_on_alike_and_alone(again):
    model = net()
    optimizer = newton(model, EVERY_THIRD)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, data(seed=step))
        optimizer.step()
    backward(model, data(seed=20))  # half an accumulation
    twin, other = again((model, optimizer))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        theirs.grad = ours.grad.clone()  # which torch does not copy
    for one, its in ((model, optimizer), (twin, other)):
        for step in range(3, 8):
            backward(one, data(seed=step))
            its.step()
            its.zero_grad()
    assert kept(model, optimizer).keys() == set(NAMES)
    for name, moment in kept(model, optimizer).items():
        assert torch.equal(moment, kept(twin, other)[name])
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_two_optimizers_of_one_model_see_each_what_they_asked_for():
    model, x, y = net(), data(), data(seed=2)
    one, other = newton(model), newton(model, EVERY_THIRD)
    first = moments(model, [x])
    backward(model, x)
    one.step()
    assert_kept(model, one, first)
    assert kept(model, other) == {}
    other.step()
    one.zero_grad()
    other.zero_grad()
    second = moments(model, [y])
    backward(model, y)
    other.step()
    assert_kept(model, other, second)
    assert_kept(model, one, first)


def test_an_optimizer_that_is_gone_leaves_no_hooks():
    model = net()
    optimizer = newton(model)
    assert [len(module._forward_pre_hooks) for module in (model.first, model.head)] == [1, 0]
    del optimizer
    gc.collect()
    assert [len(module._forward_pre_hooks) for module in (model.first, model.head)] == [0, 0]


def test_a_watch_that_is_detached_sees_nothing():
    model = net()
    optimizer = newton(model)
    optimizer.stages[0].watch.detach()
    backward(model, data())
    with pytest.raises(MissingInputsError, match=r"^'first.weight' has a gradient, but its inputs since the last step"):
        optimizer.step()


def test_inputs_whose_squares_overflow_leave_that_matrix_alone_and_are_counted():
    model = net(torch.float32)
    optimizer, x = newton(model), data(dtype=torch.float32)
    backward(model, x)
    optimizer.step()
    before = {name: moment.clone() for name, moment in kept(model, optimizer).items()}
    powers = optimizer.state[model.first.weight]["input_powers"].clone()
    optimizer.zero_grad()
    (model(x * 1e25).tanh().mean() * 1e-30).backward()  # gradients are finite
    optimizer.step()
    after = kept(model, optimizer)
    assert torch.equal(after["first.weight"], before["first.weight"])
    assert torch.equal(optimizer.state[model.first.weight]["input_powers"], powers)
    assert not torch.equal(after["third.weight"], before["third.weight"])  # tanh brought these back into range
    assert optimizer.diagnostics()["input_kept_powers"] == 2
    assert optimizer.diagnostics()["skipped_steps"] == 0


def test_a_language_model_is_seen_through_its_embedding():
    torch.manual_seed(7)
    model = LanguageModel(tied=True).double()
    optimizer = NewtonMuon(model, lr=0.01, precondition=SEEN)

    def run(ids):
        x = model.tokens(ids) + model.positions(torch.arange(ids.size(-1)))
        for block in model.blocks:
            x = x + block.down(torch.relu(block.up(block.norm(x))))
        return model.head(x)

    run(torch.randint(16, (4, 8))).logsumexp(-1).mean().backward()
    optimizer.step()
    assert len(kept(model, optimizer)) == 4  # up and down of two blocks; the tied head is a table
    traces = [float(moment.trace()) for name, moment in kept(model, optimizer).items() if "up" in name]
    assert traces == pytest.approx([8, 8], rel=1e-3)  # the norm makes rows of unit mean square
