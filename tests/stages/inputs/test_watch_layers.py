"""Layers that share inputs, have several, have none, or hide them: what is kept of each."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from steepest import InputMoment, MissingInputsError
from steepest.anatomy import EXPERTS, route
from tests.stages.inputs.watched import NAMES, assert_kept, backward, data, kept, moments, net, newton


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
    powers = optimizer.state[model.sometimes.weight]["input_powers"].clone()
    model.skip = True
    optimizer.zero_grad()
    later = {**expected, "always.weight": moments(model, [y])["always.weight"]}
    backward(model, y)
    optimizer.step()
    assert_kept(model, optimizer, later, names=["always.weight", "sometimes.weight"])
    assert torch.equal(optimizer.state[model.sometimes.weight]["input_powers"], powers)
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
