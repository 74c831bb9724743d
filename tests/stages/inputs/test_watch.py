"""What is seen of layers' inputs in all the ways a model is called, against inputs captured from a plain copy."""

import copy
import gc
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from steepest import InputMoment, MissingInputsError, NewtonMuon
from steepest.anatomy import EXPERTS, route
from tests.anatomy.routed import LanguageModel
from tests.optim.training import powers_of
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
    powers = powers_of(optimizer, model.first.weight).clone()
    optimizer.zero_grad()
    (model(x * 1e25).tanh().mean() * 1e-30).backward()  # gradients are finite
    optimizer.step()
    after = kept(model, optimizer)
    assert torch.equal(after["first.weight"], before["first.weight"])
    assert torch.equal(powers_of(optimizer, model.first.weight), powers)
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


# Tokens that count less or not at all: masks, and samples of tokens.

MASKS = {
    "tokens": (torch.rand(8, 3, generator=torch.Generator().manual_seed(3)) < 0.5).double(),
    "booleans": torch.rand(8, 3, generator=torch.Generator().manual_seed(3)) < 0.5,
    "sequences": torch.tensor([1.0, 0, 1, 1, 0, 0, 0.5, 2]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_masked_tokens_do_not_count(mask, reentrant):
    model, x, y = net(reentrant=reentrant), data(), data(seed=2)
    optimizer, mask = newton(model), MASKS[mask]
    expected = moments(model, [x, y], [mask, torch.ones(8, 3)])
    with optimizer.input_mask(mask):
        loss = model(x).square().mean()
        if reentrant:
            loss.backward()
    with optimizer.input_mask(torch.ones(8, 3)) if reentrant else nullcontext():
        if not reentrant:
            loss.backward()
        backward(model, y)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_padding_that_overflows_does_no_harm_if_masked_out():
    model, x = net(), data()
    mask = MASKS["tokens"]
    optimizer, expected = newton(model), moments(model, [x], [mask])
    x = torch.where(mask.bool().unsqueeze(-1), x, 1e200)  # its square is no number of float64
    with optimizer.input_mask(mask):
        model.first(x)[mask.bool()].square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(kept(model, optimizer)["first.weight"], expected["first.weight"])


TEXT = (
    r"^input_mask was used in a forward pass since the last step, but is not in force while the inputs of '{}' are "
    r"seen: .*Call backward\(\) within input_mask, with a mask for each micro-batch.$"
)


def test_a_mask_that_a_checkpointed_layer_would_not_see_is_refused():
    model = net(reentrant=True)
    optimizer = newton(model)
    with optimizer.input_mask(MASKS["tokens"]):
        loss = model(data()).square().mean()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=TEXT.format("third.weight")):
        loss.backward()
    optimizer.zero_grad()
    with optimizer.input_mask(MASKS["tokens"]):
        backward(model, data())
    optimizer.step()
    optimizer.zero_grad()
    backward(model, data())  # a step without any mask


@pytest.mark.parametrize("shape", [(3, 8), (8, 3, 1), (3,), (23,)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape):
    model = net()
    optimizer = newton(model)
    with optimizer.input_mask(torch.ones(shape)):
        loss = model(data()).square().mean()
    text = (
        r"^The mask of inputs has shape .*, which is not how the tokens \(8, 3\) that 'third.weight' reads begin\. Give"
    )
    with pytest.raises(ValueError, match=text):
        loss.backward()


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_of_tokens_is_evenly_spread_and_weighs_as_much_as_all(masked):
    model, x, y = net(), data(), data(size=1)
    options = InputMoment(every=1, first=0, decay=0.0, structure="full", tokens=7)
    optimizer, mask = newton(model, options), MASKS["tokens"]
    taken = torch.zeros(24).index_fill(0, torch.tensor([0, 5, 7, 13, 15, 17, 22]), 1.0).view(8, 3)
    weights = taken * (24 / 7) * (mask if masked else 1.0)
    expected = moments(model, [x, y], [weights, torch.ones(1, 3)])
    with optimizer.input_mask(mask) if masked else nullcontext():
        loss = model(x).square().mean()
    (loss + model(y).square().mean()).backward()
    optimizer.step()
    assert_kept(model, optimizer, expected, rtol=1e-6, atol=1e-7)  # the weights above are of float32


# Layers that share inputs, have several, have none, or hide them: what is kept of each.


class Tied(nn.Module):
    def __init__(self, repeats=1):
        super().__init__()
        self.one = nn.Linear(5, 5)
        self.two = nn.Linear(5, 5)
        self.two.weight = self.one.weight
        self.head = nn.Linear(5, 3)
        self.repeats = repeats

    def forward(self, x):
        for _ in range(self.repeats):
            x = torch.tanh(self.two(torch.tanh(self.one(x))))
        return self.head(x)


@pytest.mark.parametrize("repeats", [1, 3])
def test_all_calls_of_all_modules_of_one_weight_count(repeats):
    torch.manual_seed(7)
    model, x = Tied(repeats).double(), data()
    optimizer, expected = newton(model), moments(model, [x])
    backward(model, x)
    assert float(optimizer.stages[0].watch.seen[0].mass) == 24 * 2 * repeats
    optimizer.step()
    assert_kept(model, optimizer, expected, names=["one.weight"])


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.skip = False

    def forward(self, x):
        x = torch.tanh(self.always(x))
        return self.head(x if self.skip else torch.tanh(self.sometimes(x)))


def test_a_layer_that_is_skipped_in_a_refresh_keeps_its_moment_and_powers():
    torch.manual_seed(7)
    model, x, y = Skipping().double(), data(), data(seed=2)
    optimizer, expected = newton(model), moments(model, [x])
    backward(model, x)
    optimizer.step()
    powers = powers_of(optimizer, model.sometimes.weight).clone()
    model.skip = True
    optimizer.zero_grad()
    later = {**expected, "always.weight": moments(model, [y])["always.weight"]}
    backward(model, y)
    optimizer.step()
    assert_kept(model, optimizer, later, names=["always.weight", "sometimes.weight"])
    assert torch.equal(powers_of(optimizer, model.sometimes.weight), powers)
    assert optimizer.diagnostics()["input_missing"] == 0


class Mixture(nn.Module):
    """Three experts and a router's choice that is given."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(5, 6)
        self.experts = Experts()
        self.head = nn.Linear(4, 3)

    def forward(self, x, index):
        return self.head(self.experts(torch.tanh(self.lift(x)), index))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x, index):
        chosen = nn.functional.one_hot(index, 3).sum(1).to(x.dtype)
        return torch.einsum("...n,smn,...s->...m", x.flatten(0, -2), self.up_proj, chosen).unflatten(0, x.shape[:-1])


def test_an_expert_without_tokens_keeps_its_moment():
    torch.manual_seed(7)
    model = Mixture().double()
    optimizer = newton(route(model, overrides={"experts.up_proj": EXPERTS}))
    for step, experts in enumerate(([0, 1, 2], [0, 2])):
        x = data(seed=step)
        index = torch.tensor(experts).repeat(12)[:24].unsqueeze(-1)
        z = torch.tanh(model.lift(x)).detach().flatten(0, -2)
        before = optimizer.state[model.experts.up_proj].get("input_moment", torch.zeros(3, 6, 6)).clone()
        optimizer.zero_grad()
        model(x, index).square().mean().backward()
        optimizer.step()
        state = optimizer.state[model.experts.up_proj]
        for expert in range(3):
            own = z[(index == expert).any(-1)]
            expected = own.T @ own / len(own) if expert in experts else before[expert]
            torch.testing.assert_close(state["input_moment"][expert], expected, rtol=1e-12, atol=1e-13)
    assert state["input_mass"].tolist() == [1.0, 1.0, 1.0]


class Attention(nn.Module):
    def __init__(self, names, *, cross=False):
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(5, 5) for name in names})
        self.head = nn.Linear(5, 3)
        self.cross = cross

    def forward(self, x):
        y = x.flip(0) if self.cross else x
        a, *others = (layer(x if place == 0 else y) for place, layer in enumerate(self.maps.values()))
        return self.head(a * others[0].tanh() * others[1].sigmoid())


def memory(optimizer):
    return [(row.name, row.inputs) for row in optimizer.plan if row.inputs]


@pytest.mark.parametrize("split", [[8], [3, 5]], ids=str)
def test_layers_of_odd_names_that_read_the_same_come_to_share_a_moment(split):
    torch.manual_seed(7)
    model, x = Attention(["ask", "tell", "say"]).double(), data()
    optimizer, expected = newton(model), moments(model, [x])
    assert [kind for _, kind in memory(optimizer)] == ["full 5"] * 3
    for part in x.split(split):
        backward(model, part)
    optimizer.step()
    assert [kind for _, kind in memory(optimizer)] == ["full 5"] + ["as maps.ask.weight"] * 2
    assert_kept(model, optimizer, expected, names=["maps.ask.weight"])


def test_layers_whose_names_promise_more_than_they_hold_part_at_the_first_refresh():
    torch.manual_seed(7)
    model, x = Attention(["q_proj", "k_proj", "v_proj"], cross=True).double(), data()
    optimizer = newton(model)
    shared = ["full 5", "as maps.q_proj.weight", "as maps.q_proj.weight"]
    assert [kind for _, kind in memory(optimizer)] == shared
    expected = moments(model, [x])
    backward(model, x)
    optimizer.step()
    assert [kind for _, kind in memory(optimizer)] == ["full 5", "full 5", "as maps.k_proj.weight"]
    assert_kept(model, optimizer, expected, names=["maps.q_proj.weight", "maps.k_proj.weight"])
    assert optimizer.diagnostics()["input_parted"] == 0  # they never were together


def test_inputs_that_differ_where_they_are_not_sampled_are_told_apart_by_their_place():
    torch.manual_seed(7)
    model, x = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)]).double(), data()
    optimizer = newton(model)
    y = x.clone()
    y[0, 0, 2] += 1  # of 120 entries every other one is looked at, more or less: 0, 1, 3, 5, 7, ...
    model[2](model[0](x) * model[1](y)).square().mean().backward()
    optimizer.step()
    assert [kind for _, kind in memory(optimizer)] == ["full 5", "full 5"]


def test_layers_that_cease_to_read_the_same_part_then():
    torch.manual_seed(7)
    model = Attention(["q_proj", "k_proj", "v_proj"]).double()
    optimizer = newton(model, InputMoment(every=1, first=0, decay=0.5, structure="full"))
    backward(model, data())
    optimizer.step()
    model.cross = True
    before = kept(model, optimizer)["maps.q_proj.weight"].clone()
    optimizer.zero_grad()
    backward(model, data(seed=2))
    optimizer.step()
    assert optimizer.diagnostics()["input_parted"] == 2
    assert {kind for _, kind in memory(optimizer)} == {"full 5"}
    assert torch.equal(kept(model, optimizer)["maps.k_proj.weight"], before)  # of the last time they were seen
    optimizer.zero_grad()
    expected = moments(model, [x := data(seed=3)])["maps.k_proj.weight"]
    backward(model, x)
    optimizer.step()
    torch.testing.assert_close(kept(model, optimizer)["maps.k_proj.weight"], (before + expected) / 2)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.attention, self.head = nn.Linear(5, 6), nn.MultiheadAttention(6, 2), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.lift(x))
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_multihead_attention_reads_out_of_sight_until_it_is_recorded():
    torch.manual_seed(7)
    model, x = SelfAttention().double(), data()
    with pytest.warns(UserWarning, match=r"cannot see the inputs of attention\.out_proj\.weight"):
        optimizer = newton(model)
    weight = model.attention.out_proj.weight
    backward(model, x)
    why = "hooks cannot see them: MultiheadAttention multiplies with it without calling the module"
    with pytest.raises(
        MissingInputsError, match=rf"^'attention.out_proj.weight' has a gradient.*\({why}\)\. Call opt\.rec"
    ):
        optimizer.step()
    optimizer.zero_grad()
    lifted = torch.tanh(model.lift(x)).detach().flatten(0, -2)
    heads = data(seed=4, width=6)
    backward(model, x)
    optimizer.record_input(weight, heads[:3])
    optimizer.record_input(weight, heads[3:])
    optimizer.step()
    rows = heads.flatten(0, -2)
    expected = {"attention.in_proj_weight": lifted.T @ lifted / 24, "attention.out_proj.weight": rows.T @ rows / 24}
    for name, moment in expected.items():
        torch.testing.assert_close(kept(model, optimizer)[name], moment, rtol=1e-12, atol=1e-13)


def test_inputs_by_hand_only_with_weights():
    model, x = net(), data()
    options = InputMoment(every=1, first=0, decay=0.0, structure="full", hooks=False)
    optimizer = newton(model, options)
    backward(model, x)
    rows, weights = {}, torch.rand(4, dtype=torch.float64)
    for place, (name, width) in enumerate(zip(NAMES, (5, 6, 6), strict=True)):
        rows[name] = data(seed=place, size=4, width=width)[:, 0]
        optimizer.record_input(model.get_parameter(name), rows[name], weights)
    optimizer.step()
    expected = {name: (z * weights[:, None]).T @ z / weights.sum() for name, z in rows.items()}
    assert_kept(model, optimizer, expected)


def test_inputs_recorded_inside_a_checkpoint_count_once():
    model, x, y = net(), data(), data(seed=2)
    optimizer = newton(model, InputMoment(every=1, first=0, decay=0.0, structure="full", hooks=False))
    expected = moments(model, [x, y])

    def run(x):
        for name in NAMES:
            module = getattr(model, name.removesuffix(".weight"))
            optimizer.record_input(module.weight, x)
            x = torch.tanh(module(x)) if name == "second.weight" else torch.relu(module(x))
        return model.head(x)

    checkpoint(run, x, use_reentrant=False).square().mean().backward()  # which runs it twice
    run(y).square().mean().backward()
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_reparametrized_weight_takes_muons_step_if_told_to():
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    plan = route(model, overrides={"1.*.weight.original": "matrix"})
    optimizer = newton(plan, InputMoment(every=1, first=0, decay=0.0, structure="full", missing="muon"))
    x = data()
    rows = x.flatten(0, -2)
    expected = {"0.weight": rows.T @ rows / 24}
    backward(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected, names=["0.weight"])
    assert optimizer.diagnostics()["input_missing"] == 1
