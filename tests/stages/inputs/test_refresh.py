"""Refreshes: their numbers, when they come, what they cost in memory, and what broken or too few inputs do."""

import copy

import pytest
import torch
from torch import nn

from steepest import InputMoment, NewtonMuon
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.optim.guard import Guard
from steepest.stages.inputs.refresh import INPUT_MASS, INPUT_MOMENT, INPUT_POWERS
from steepest.stages.inputs.stage import INPUT_LEADER
from tests.optim.training import assert_same, backward, network, powers_of, snapshot, train

KEYS = (INPUT_MOMENT, INPUT_MASS)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_state(optimizer, parameter):
    own = {key: optimizer.state[parameter][key].clone() for key in KEYS}
    return {**own, INPUT_POWERS: powers_of(optimizer, parameter).clone()}


def one_matrix(x, *, steps=1, **options):
    """State, report and weight after a few refreshes with the same inputs."""
    weight = nn.Parameter(torch.zeros(5, x.size(-1), dtype=x.dtype))
    plain = {"every": 1, "structure": "full", "exponents": (1.0, 0.0)}
    optimizer = NewtonMuon([weight], precondition=InputMoment(hooks=False, **{"structure": "auto", **plain, **options}))
    for _ in range(steps):
        weight.grad = normal(*weight.shape, seed=9)
        optimizer.record_input(weight, x)
        optimizer.step()
    return {**optimizer.state[weight], INPUT_POWERS: powers_of(optimizer, weight)}, optimizer.diagnostics(), weight


# The numbers


@pytest.mark.parametrize("structure", ["full", "block", "diagonal"])
@pytest.mark.parametrize("unit", ["trace", "frobenius", "spectral"])
def test_the_ridge_is_in_its_unit(structure, unit):
    x = normal(9, 6, seed=2)
    options = {"structure": structure, "block_size": 3, "ridge_unit": unit, "normalize": False}
    state = one_matrix(x, ridge=0.5, ridge_floor=0.1, exponents=(0.5, 0.0), **options)[0]
    mean = x.T @ x / 9
    pieces = {"full": [mean], "block": [mean[:3, :3], mean[3:, 3:]], "diagonal": [mean.diagonal().diag()]}[structure]
    powers = state[INPUT_POWERS][0]
    for piece, power in zip(pieces, powers, strict=True):
        values = torch.linalg.eigvalsh(piece)
        size = {"trace": values.mean(), "frobenius": values.square().mean().sqrt(), "spectral": values.max()}[unit]
        damped = piece + (0.5 * size + 0.1) * torch.eye(len(piece), dtype=piece.dtype)
        root = power.diag() if structure == "diagonal" else power
        torch.testing.assert_close(root @ damped @ root, torch.eye(len(piece), dtype=piece.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("structure", ["full", "block", "diagonal"])
@pytest.mark.parametrize("solver", ["inverse", "factor"])
def test_normalised_powers_have_a_mean_diagonal_of_one(structure, solver):
    state = one_matrix(30 * normal(9, 6, seed=2), structure=structure, block_size=3, solver=solver)[0]
    power = state[INPUT_POWERS][0]
    if structure == "diagonal":
        assert power.mean().item() == pytest.approx(1)
    else:
        inverse = torch.cholesky_inverse(power) if solver == "factor" else power
        assert inverse.diagonal(dim1=-2, dim2=-1).mean(-1).tolist() == pytest.approx([1.0] * len(inverse))


@pytest.mark.parametrize(("corrected", "init"), [(True, 0.0), (False, 0.0), (False, 0.7)])
def test_moments_are_averaged_over_refreshes(corrected, init):
    x = normal(9, 6, seed=2)
    options = {"bias_correction": corrected, "init": init, "decay": 0.75, "normalize": False, "ridge": 0.0}
    state = one_matrix(x, steps=3, **options)[0]
    mean, left = x.T @ x / 9, 0.75**3
    expected = (1 - left) * mean + left * init * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(state[INPUT_MOMENT][0], expected, rtol=0, atol=1e-13)
    assert state[INPUT_MASS].item() == pytest.approx(1 - left)
    inverse = torch.linalg.inv(expected / (1 - left) if corrected else expected)
    torch.testing.assert_close(state[INPUT_POWERS][0, 0], inverse, rtol=0, atol=1e-9)


def test_dead_units_and_fewer_tokens_than_features_are_bounded_by_the_ridge():
    x = normal(4, 12, seed=2).relu()
    x[:, 3:6] = 0
    for exponent in (0.5, 1.0):
        state, report, weight = one_matrix(x, ridge=0.25, exponents=(exponent, 0.0), normalize=False)
        ridge = 0.25 * x.square().mean().item()
        top = torch.linalg.eigvalsh(state[INPUT_POWERS][0, 0])[-1].item()
        assert top == pytest.approx(ridge**-exponent, rel=1e-9)
        assert weight.isfinite().all()
        assert report["input_ridge_raised"] == report["input_kept_powers"] == 0


@pytest.mark.parametrize("solver", ["inverse", "factor"])
def test_without_a_ridge_a_singular_moment_gets_the_least_that_works(solver):
    state, report, weight = one_matrix(normal(4, 12, seed=2).relu(), ridge=0.0, solver=solver)
    assert report["input_ridge_raised"] == 1
    assert report["input_kept_powers"] == 0
    assert state[INPUT_POWERS].isfinite().all()
    assert weight.isfinite().all()


def test_inputs_of_zero_leave_a_layer_to_muon():
    state, report, weight = one_matrix(torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(state[INPUT_POWERS][0, 0], torch.eye(6, dtype=torch.float64))
    assert report["input_kept_powers"] == 1
    assert weight.isfinite().all()


# Broken moments


def broken_by_infinity(state):
    state[INPUT_MOMENT][0, 1, 1] = torch.inf


def broken_by_sign(state):
    state[INPUT_MOMENT].copy_(-1e12 * torch.eye(state[INPUT_MOMENT].size(-1)))


@pytest.mark.parametrize("break_", [broken_by_infinity, broken_by_sign])
@pytest.mark.parametrize(
    "options", [{}, {"exponents": (0.5, 0.5)}, {"exponents": (1.0, 0.5)}, {"exponents": (1.0, 0.0), "solver": "factor"}]
)
def test_a_broken_moment_keeps_the_powers_of_its_own_layer_only(break_, options):
    def run(*, broken):
        model = network(torch.float64)
        optimizer = NewtonMuon(model, precondition=InputMoment(every=2, structure="full", **options))
        train(model, optimizer, range(3), torch.float64)
        before = own_state(optimizer, model[2].weight)
        if broken:
            break_(optimizer.state[model[2].weight])
        train(model, optimizer, [3], torch.float64)
        return model, optimizer, before

    (sound, healthy, _), (model, optimizer, before) = run(broken=False), run(broken=True)
    groups = len(before[INPUT_MOMENT])  # a convolution in two groups: infinity breaks one of its matrices, the sign all
    lost = 1 if break_ is broken_by_infinity else groups
    after = own_state(optimizer, model[2].weight)
    assert torch.equal(after[INPUT_POWERS][:, :lost], before[INPUT_POWERS][:, :lost])
    for place in range(lost, groups):
        assert not torch.equal(after[INPUT_POWERS][:, place], before[INPUT_POWERS][:, place])
    for other in (0, 5):
        assert_same([own_state(healthy, sound[other].weight)], [own_state(optimizer, model[other].weight)])
        assert torch.equal(model[other].weight, sound[other].weight)
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.diagnostics()["input_kept_powers"] == lost
    assert healthy.diagnostics()["input_kept_powers"] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_inputs_that_are_not_finite_change_no_moment_and_are_counted(masked, monkeypatch):
    if masked:
        monkeypatch.setattr(Guard, "admit", lambda self, names, gradients, loss: torch.tensor(True))
    a, b = (nn.Parameter(torch.zeros(3, 6, dtype=torch.float64)) for _ in range(2))
    optimizer = NewtonMuon([a, b], precondition=InputMoment(structure="auto", every=1, hooks=False))
    for step in range(2):
        before = own_state(optimizer, a) if step else None
        for index, weight in enumerate((a, b)):
            weight.grad = normal(3, 6, seed=step)
            x = normal(9, 6, seed=10 * step + index)
            optimizer.record_input(weight, x)
        if step:
            optimizer.record_input(a, torch.full((1, 6), torch.inf))
        optimizer.step()
    assert_same([before], [own_state(optimizer, a)])
    assert optimizer.state[b][INPUT_MASS].item() == pytest.approx(1 - 0.95**2)
    assert optimizer.diagnostics()["input_kept_powers"] == 1


# When


def test_a_step_that_is_skipped_leaves_moments_alone():
    model = network()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=1))
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    model[5].weight.grad[3, 3] = torch.nan
    with pytest.warns(RuntimeWarning, match="is not finite"):
        optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    assert not optimizer.stages[0].watch.seen  # nor will the next step see what this one saw
    assert optimizer.diagnostics()["input_moment_age"] == 1


def test_moments_grow_old_after_an_anneal():
    model = network()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=2, anneal=(1, 5)))
    train(model, optimizer, range(1))
    assert "input_moment_age" not in optimizer.diagnostics()
    train(model, optimizer, range(1, 9))
    assert optimizer.diagnostics()["input_moment_age"] == 5  # steps 1 and 3 refreshed
    resumed = NewtonMuon(network(), precondition=InputMoment(structure="auto", every=2, anneal=(1, 5)))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.diagnostics()["input_moment_age"] == 5


def test_a_step_that_an_accelerator_rejects_leaves_moments_alone(monkeypatch):
    def stay_on_device(self, names, gradients, loss):
        return torch.stack([g.isfinite().all() for g in gradients]).all()

    def run():
        model = network()
        optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=1))
        return model, optimizer, train(model, optimizer, range(3))

    expected = run()[2]
    monkeypatch.setattr(Guard, "admit", stay_on_device)
    model, optimizer, actual = run()
    assert_same(expected, actual)
    before = snapshot(model, optimizer)
    for first in (False, True):  # and also the very first step
        if first:
            model = network()
            optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=1))
            before = [p.detach().clone() for p in model.parameters()], None
        backward(model, 3)
        model[0].weight.grad[0] = torch.nan
        optimizer.step()
        weights, state = snapshot(model, optimizer)
        assert_same(before[0], weights)
        if not first:
            assert_same(before[1], state)
        model.zero_grad()
    twin = network()
    assert_same(
        train(model, optimizer, range(2)),
        train(twin, NewtonMuon(twin, precondition=InputMoment(structure="auto", every=1)), range(2)),
    )


def test_steps_that_do_not_refresh_read_nothing_off_the_device():
    model = network().to("meta")
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=4))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    assert INPUT_MOMENT in optimizer.state[model[5].weight]


@pytest.mark.parametrize("first", [None, 0, 2])
def test_staggered_layers_take_turns(first):
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())], nn.Linear(4, 2))
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=4, stagger=True, first=first))
    matrices = [model[index].weight for index in range(0, 12, 2)]
    refreshed = {index: [] for index in range(6)}
    for step in range(20):
        masses = [optimizer.state[w][INPUT_MASS].item() if optimizer.state[w] else 0.0 for w in matrices]
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        now = [index for index, w in enumerate(matrices) if optimizer.state[w][INPUT_MASS].item() != masses[index]]
        assert len(now) < 3
        for index in now:
            refreshed[index].append(step)
    start = 3 if first is None else first
    for index, steps in refreshed.items():
        assert steps == list(range(start + index * 4 // 6, 20, 4))
    ages = [19 - steps[-1] for steps in refreshed.values()]
    assert optimizer.diagnostics()["input_moment_age"] == max(ages)


# Memory


def gpt():
    model = GPT(GPTConfig(vocabulary=11, layers=2, width=16, head_size=8))
    return model, torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


def mlp():
    return nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 2)), torch.ones(3, 5)


def convolutions():
    return network(), torch.ones(2, 2, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("build", [gpt, mlp, convolutions])
@pytest.mark.parametrize(
    "options", [{}, {"exponents": (0.5, 0.25), "normalize": False}, {"structure": "full"}], ids=str
)
def test_the_plan_promises_the_bytes_that_are_held(build, options, dtype):
    model, x = build()
    model = model.to(dtype)
    optimizer = NewtonMuon(model, precondition=InputMoment(every=1, **{"structure": "auto", **options}))
    promised = {row.name: (row.moment_bytes, row.inverse_bytes) for row in copy.deepcopy(optimizer.plan)}
    model(x if x.dtype == torch.int64 else x.to(dtype)).square().sum().backward()
    optimizer.step()
    seen = set()
    held = {
        row.name: (
            bytes_of([t for key, t in optimizer.state[row.parameter].items() if key in KEYS], seen),
            bytes_of(
                [] if powers_of(optimizer, row.parameter) is None else [powers_of(optimizer, row.parameter)], seen
            ),
        )
        for row in optimizer.plan
    }
    assert held == promised
    assert {row.name: (row.moment_bytes, row.inverse_bytes) for row in optimizer.plan} == promised
    others = {key for state in optimizer.state.values() for key in state if key.startswith("input")} - {*KEYS}
    assert others == {INPUT_LEADER}  # one number
    assert f"moments of layer inputs: {sum(moment for moment, _ in held.values()):,} bytes" in str(optimizer.plan)


def bytes_of(tensors, seen):
    """Of tensors that were not seen before: those that share a moment hold the same ones."""
    own = {t.data_ptr(): t.nbytes for t in tensors}
    new = {pointer: size for pointer, size in own.items() if pointer not in seen}
    seen.update(new)
    return sum(new.values())
