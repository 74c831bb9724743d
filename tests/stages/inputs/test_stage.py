"""What training programs do that a look at layer inputs must survive."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from steepest import InputMoment, Muon, NewtonMuon, View, route
from steepest.stages.inputs import find_readers
from tests.optim.training import powers_of

NOW = {"every": 1, "first": 0}


def network(width=8):
    torch.manual_seed(0)
    layers = [nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width), nn.Linear(width, 3)]
    return nn.Sequential(*layers).double()


def inputs(seed=0, rows=16, width=8):
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def powers(model, optimizer):
    return [powers_of(optimizer, p) for p in model.parameters() if powers_of(optimizer, p) is not None]


@pytest.mark.parametrize(
    "options",
    [{"solver": "factor"}, {"exponents": (0.5, 0.0)}, {"exponents": (0.0, 1.0)}, {"normalize": False}],
    ids=str,
)
@pytest.mark.parametrize("back", [False, True])
def test_powers_are_made_anew_under_other_options(options, back):
    both = {"structure": "full", "every": 100, "first": 0}
    model, twin = network(), network()
    first, second = (InputMoment(**both, **own) for own in ((options, {}) if back else ({}, options)))
    saving, expected = NewtonMuon(model, precondition=first), NewtonMuon(twin, precondition=second)
    step(model, saving, inputs())
    step(twin, expected, inputs())
    clone = copy.deepcopy(model)
    loading = NewtonMuon(clone, precondition=second)
    loading.load_state_dict(saving.state_dict())
    step(clone, loading, inputs())  # not one that looks at inputs
    theirs = powers(twin, expected)
    assert len(theirs) > 1
    for one, other in zip(powers(clone, loading), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_momenta_of_another_kind_are_refused():
    model = network()
    saving = NewtonMuon(model, precondition=InputMoment(on="gradient", **NOW))
    step(model, saving, inputs())
    with pytest.raises(ValueError, match=r"saved with InputMoment\(on=gradient\), here it is on='momentum'"):
        NewtonMuon(model, precondition=InputMoment(**NOW)).load_state_dict(saving.state_dict())


class Crossed(nn.Module):
    """Names of one input for two, and names of two for one."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.this, self.that = (nn.Linear(5, 5) for _ in range(4))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        y = self.q_proj(x) * self.k_proj(x.flip(0))
        return self.head(torch.tanh(self.this(y)) * torch.sigmoid(self.that(y)))


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_do_not_depend_on_who_was_found_to_share(flat):
    def made():
        torch.manual_seed(0)
        model = Crossed().double()
        return model, NewtonMuon(model, precondition=InputMoment(structure="full", every=2))

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = made()
    for index in range(3):
        step(model, optimizer, inputs(index, width=5))
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    fresh, resumed = made()
    template = get_optimizer_state_dict(fresh, resumed, options=options)
    if flat:
        assert template.keys() == saved.keys()
    else:
        assert all(template["state"][name].keys() == entries.keys() for name, entries in saved["state"].items())
    fresh.load_state_dict(model.state_dict())
    set_optimizer_state_dict(fresh, resumed, copy.deepcopy(saved), options=options)
    for index in range(3, 6):
        for each, own in ((model, optimizer), (fresh, resumed)):
            step(each, own, inputs(index, width=5))
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    leaders = [
        [float(state["input_leader"]) for state in own.state.values() if "input_leader" in state]
        for own in (resumed, optimizer)
    ]
    assert leaders[0] == leaders[1]


def test_making_the_state_of_a_fresh_optimizer_is_no_step():
    model = network()
    optimizer = NewtonMuon(model, precondition=InputMoment(every=4))
    assert optimizer.state_dict()["state"] == {}  # to look at it makes none, or torch would take it for made
    saved = get_optimizer_state_dict(model, optimizer)
    assert all("momentum_buffer" in saved["state"][name] for name, _ in model.named_parameters())
    assert optimizer.stages[0].steps == 0


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x, chosen):
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y.index_add(0, (own := (chosen == number).nonzero()[:, 0]), expert(x[own]))
        return self.head(y)


def test_an_expert_that_is_called_without_tokens_keeps_its_moment():
    torch.manual_seed(0)
    model = Routed().double()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="full", **NOW))
    state = optimizer.state[model.experts[1].weight]
    for chosen in (torch.arange(8) % 2, torch.zeros(8, dtype=torch.int64)):
        before = {key: value.clone() for key, value in state.items() if key.startswith("input_")}
        optimizer.zero_grad()
        model(inputs(rows=8, width=6), chosen).square().sum().backward()
        optimizer.step()
    assert model.experts[1].weight.grad is not None
    assert before.keys() <= state.keys()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_a_layer_with_a_zero_gradient_need_not_have_been_called():
    model = network()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="full", **NOW))
    step(model, optimizer, inputs())
    optimizer.zero_grad(set_to_none=False)
    model[2:](inputs(width=32)).square().mean().backward()  # the first layer is skipped
    assert not model[0].weight.grad.any()
    optimizer.step()


def test_hand_given_inputs_outlive_cleared_gradients_and_do_not_count_without_gradients():
    model = network()
    weight = model[2].weight
    optimizer = NewtonMuon(model, precondition=InputMoment(hooks=False, **NOW))
    hidden = model[:2](x := inputs()).detach()
    loss = model(x).square().mean()
    optimizer.record_input(weight, hidden)
    with torch.no_grad():
        optimizer.record_input(weight, 100 * hidden)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["input_moment"][0] / 0.05, hidden.square().mean(0))


def test_a_refresh_that_fell_into_a_skipped_step_is_made_in_the_next():
    model = network()
    optimizer = NewtonMuon(model, precondition=InputMoment(every=3))
    for index in range(2):
        step(model, optimizer, inputs(index))
    with pytest.warns(RuntimeWarning, match="not finite"):
        step(model, optimizer, inputs() * float("nan"))
    assert "input_moment_age" not in optimizer.diagnostics()
    step(model, optimizer, inputs())
    assert "input_moment_age" in optimizer.diagnostics()


def test_residual_streams_may_be_added_to_in_place_under_autocast():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            h = x.clone()
            h += self.down(torch.relu(self.up(h)))
            return h

    model = Residual()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", **NOW))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs().float()).square().mean()
    loss.backward()
    optimizer.step()
    assert "input_moment_age" in optimizer.diagnostics()


def test_a_layer_that_changes_its_inputs_first_is_not_taken_for_a_linear_one():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x / x.norm(dim=-1, keepdim=True))

    model = nn.Sequential(Scaled(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    plan = route(model)
    readers = find_readers([row for row in plan if row.role == "matrix"], InputMoment(structure="full"))
    assert readers[0].unseen == "Scaled has a forward() of its own, which may change the inputs first"
    assert readers[1].unseen is None


def test_heads_of_inputs_have_blocks_of_their_own():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    plan = route(model, overrides={"1.weight": View(heads=4, heads_dim="in")})
    readers = find_readers([row for row in plan if row.role == "matrix"], InputMoment(structure="full"))
    assert [str(reader.layout) for reader in readers] == ["full 8", "4 blocks of 2"]


def test_a_run_may_end_as_muon():
    model = network()
    newton = NewtonMuon(model, precondition=InputMoment(**NOW))
    step(model, newton, inputs())
    muon = Muon(model)
    with pytest.warns(UserWarning, match="are dropped"):
        muon.load_state_dict(newton.state_dict())
    step(model, muon, inputs())
