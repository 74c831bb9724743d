"""Laws of preconditioned steps: when they are Muon's, what they do not depend on, and that they descend."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from steepest import InputMoment, Muon, NewtonMuon, View
from tests.cases import cases
from tests.optim.training import powers_of
from tests.reference import newton_muon as reference

STRUCTURES = {
    "full": {"structure": "full"},
    "block": {"structure": "block", "block_size": 3},
    "diagonal": {"structure": "diagonal"},
}
EXPONENTS = [(1.0, 0.0), (0.5, 0.5), (0.25, 1.0)]
AT_ONCE = {"every": 1, "normalize": False}


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(shape, seed, count=7):
    return [normal(*shape, seed=seed + step) for step in range(count)]


def handmade(gradients, inputs, *, method=NewtonMuon, start=None, view=None, **options):
    """Weights after each step of one matrix that is told its gradients and inputs, and its optimizer's state."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    group = {"params": [weight], **({} if view is None else {"view": view})}
    momentum = {"momentum": options.pop("momentum", 0.9)}
    if method is NewtonMuon:
        momentum["precondition"] = InputMoment(hooks=False, **{"structure": "auto", "exponents": (1.0, 0.0), **options})
    optimizer = method([group], 0.1, polar="svd", scale="none", **momentum)
    trajectory = []
    for gradient, x in zip(gradients, inputs, strict=True):
        weight.grad = gradient.clone()
        if method is NewtonMuon:
            optimizer.record_input(weight, x)
        optimizer.step()
        trajectory.append(weight.detach().clone())
    state = dict(optimizer.state[weight])
    if method is NewtonMuon:
        state["input_powers"] = powers_of(optimizer, weight)
    return torch.stack(trajectory), state


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def multilayer(seed=0, *, widths=(5, 12, 4, 3), bias=True):
    torch.manual_seed(seed)
    maps = [nn.Linear(n, m, bias=bias) for n, m in pairwise(widths)]
    return nn.Sequential(*[layer for map_ in maps for layer in (map_, nn.Tanh())][:-1]).double()


def train(model, optimizer, steps, *, move=None):
    """Regression; `move` is a map of the inputs. Returns the weights of each layer."""
    for step in steps:
        x = normal(16, model[0].in_features, seed=step)
        y = normal(16, model[-1].out_features, seed=100 + step)
        optimizer.zero_grad()
        (model(x if move is None else x @ move) - y).square().mean().backward()
        optimizer.step()
    return [layer.weight.detach().clone() for layer in model if isinstance(layer, nn.Linear)]


# Where it is Muon


@pytest.mark.parametrize("preset", ["default", "paper_record4"])
def test_steps_before_the_first_refresh_are_muons_to_the_bit(preset):
    options = InputMoment.preset(preset, every=4)
    ours, theirs = multilayer(), multilayer()
    newton, muon = NewtonMuon(ours, precondition=options), Muon(theirs)
    for step in range(3):
        for a, b in zip(train(ours, newton, [step]), train(theirs, muon, [step]), strict=True):
            assert torch.equal(a, b)
    after = zip(train(ours, newton, [3]), train(theirs, muon, [3]), strict=True)
    assert max((a - b).abs().max() for a, b in after) > 1e-3  # the fourth step refreshes, and applies what it found


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
def test_inputs_of_one_size_in_all_directions_are_muons(size, structure, exponents):
    gradients = tensors((4, 6), 10)
    white = (6 * size) ** 0.5 * torch.eye(6, dtype=torch.float64)  # six tokens, whose mean z zᵀ is size · I
    options = {"every": 2, "exponents": exponents, **STRUCTURES[structure]}
    close(handmade(gradients, [white] * 7, **options)[0], handmade(gradients, [white] * 7, method=Muon)[0], 1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_endless_ridge_is_muons(structure):
    gradients, inputs = tensors((4, 6), 10), tensors((9, 6), 30)
    options = {"every": 1, "ridge": 1e15, **STRUCTURES[structure]}
    close(handmade(gradients, inputs, **options)[0], handmade(gradients, inputs, method=Muon)[0], 1e-12)


@pytest.mark.parametrize(
    "options", [{"exponents": (0.0, 0.0)}, {"blend": 0.0}, {"structure": {"*": "none", "0*": "full"}}]
)
def test_what_is_switched_off_is_muons_to_the_bit(options):
    """The last: one layer of two is preconditioned, the other is not."""
    ours, theirs = multilayer(), multilayer()
    newton = NewtonMuon(ours, precondition=InputMoment(every=1, **{"structure": "auto", **options}))
    first, second = (train(*pair, range(1))[:2] for pair in ((ours, newton), (theirs, Muon(theirs))))
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[0], second[0]) == ("structure" not in options)
    looks = any(newton.stages[0].watch.looks_at(number) for number in range(2))
    assert looks == ("blend" not in options)


def test_the_end_of_an_anneal_is_muon_and_nobody_looks_any_more():
    model = multilayer()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=1, anneal=(2, 4)), momentum=0.0)
    watch, used = optimizer.stages[0].watch, []
    for step in range(6):
        used.append(optimizer.stages[0].options.blend_at(step))
        assert bool(watch.summing) == (step < 4)
        twin = multilayer()
        twin.load_state_dict(model.state_dict())
        muon = train(twin, Muon(twin, momentum=0.0), [step])
        newton = train(model, optimizer, [step])
        assert bool(watch.seen) is False
        assert torch.equal(newton[0], muon[0]) == (step >= 4)
    assert used == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]


def test_a_blend_is_between_the_gradient_and_the_preconditioned_gradient():
    gradient, x = normal(4, 6, seed=1), normal(9, 6, seed=2)
    options = {"every": 1, "blend": 0.3, "momentum": 0.0}
    (moved,), state = handmade([gradient], [x], **options)
    mixed = 0.7 * gradient + 0.3 * gradient @ state["input_powers"][0, 0]
    close(moved, handmade([mixed], [x], method=Muon)[0][0], 1e-13)


# What it does not depend on


@cases("unit", ["trace", "frobenius", "spectral"])
@cases("structure", STRUCTURES)
@cases("inputs_by, gradients_by", [(1e-3, 1.0), (1e3, 1.0), (1.0, 1e-3), (1.0, 1e3)])
def test_scales_of_inputs_and_of_gradients_do_not_matter(structure, unit, inputs_by, gradients_by):
    gradients, inputs = tensors((4, 6), 10), tensors((9, 6), 30)
    options = {"every": 2, "ridge_unit": unit, **STRUCTURES[structure]}
    scaled = [gradients_by * gradient for gradient in gradients], [inputs_by * x for x in inputs]
    close(handmade(*scaled, **options)[0], handmade(gradients, inputs, **options)[0], 1e-13)


def test_a_ridge_in_units_of_the_inputs_does_depend_on_their_scale():
    gradients, inputs = tensors((4, 6), 10), tensors((9, 6), 30)
    options = {"every": 2, "ridge": 0.0, "ridge_floor": 0.3}
    small = handmade(gradients, [1e-2 * x for x in inputs], **options)[0]
    assert (small - handmade(gradients, inputs, **options)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("on", ["momentum", "gradient"])
@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
def test_rotated_inputs_give_rotated_weights(exponents, on):
    rotation = torch.linalg.qr(normal(5, 5, seed=8)).Q
    options = InputMoment(every=2, structure="full", exponents=exponents, on=on, normalize=on == "momentum")
    plain, rotated = multilayer(), multilayer()
    with torch.no_grad():
        rotated[0].weight.copy_(plain[0].weight @ rotation)
    a = train(plain, NewtonMuon(plain, polar="svd", precondition=options), range(7))
    b = train(rotated, NewtonMuon(rotated, polar="svd", precondition=options), range(7), move=rotation)
    close(b[0], a[0] @ rotation, 1e-10)
    close(b[1], a[1], 1e-10)


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
def test_only_square_roots_on_both_sides_do_not_see_any_invertible_map_of_the_inputs(exponents):
    invertible = normal(5, 5, seed=8)
    options = InputMoment(structure={"*": "none", "0*": "full"}, exponents=exponents, ridge=0.0, **AT_ONCE)
    plain, mapped = multilayer(), multilayer()
    with torch.no_grad():
        mapped[0].weight.copy_(plain[0].weight @ invertible.inverse())
    a = train(plain, NewtonMuon(plain, polar="svd", precondition=options), range(5))
    b = train(mapped, NewtonMuon(mapped, polar="svd", precondition=options), range(5), move=invertible.T)
    error = (b[0] @ invertible - a[0]).abs().max()
    assert error < 1e-8 if exponents == (0.5, 0.5) else error > 1e-2


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("blocks_stay", [True, False])
def test_the_order_of_hidden_units_matters_to_blocks_only(structure, blocks_stay):
    generator = torch.Generator().manual_seed(4)
    order = torch.randperm(12, generator=generator)
    if blocks_stay:  # blocks change places, and units their places in blocks
        order = torch.cat([3 * b + torch.randperm(3, generator=generator) for b in (2, 0, 3, 1)])
    options = InputMoment(every=2, **{"structure": "auto", **STRUCTURES[structure]})
    plain, permuted = multilayer(widths=(6, 12, 4, 3)), multilayer(widths=(6, 12, 4, 3))
    with torch.no_grad():
        permuted[0].weight.copy_(plain[0].weight[order])
        permuted[0].bias.copy_(plain[0].bias[order])
        permuted[2].weight.copy_(plain[2].weight[:, order])
    a = train(plain, NewtonMuon(plain, polar="svd", precondition=options), range(7))
    b = train(permuted, NewtonMuon(permuted, polar="svd", precondition=options), range(7))
    error = (b[1] - a[1][:, order]).abs().max()
    assert error < 1e-10 if structure != "block" or blocks_stay else error > 1e-3


@pytest.mark.parametrize("parts", [[16], [8, 8], [2] * 8, [1, 10, 5]], ids=str)
def test_micro_batches_are_the_batch(parts):
    model = multilayer()
    optimizer = NewtonMuon(model, polar="svd", precondition=InputMoment(structure="auto", every=2))
    for step in range(5):
        optimizer.zero_grad()
        x, y = (normal(16, width, seed=100 * width + step) for width in (5, 3))
        for part, target in zip(x.split(parts), y.split(parts), strict=True):
            ((model(part) - target).square().sum() / 48).backward()
        optimizer.step()
    whole = multilayer()
    other = NewtonMuon(whole, polar="svd", precondition=InputMoment(structure="auto", every=2))
    for step in range(5):
        other.zero_grad()
        x, y = (normal(16, width, seed=100 * width + step) for width in (5, 3))
        (whole(x) - y).square().mean().backward()
        other.step()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        close(a, b, 1e-12)
    close(optimizer.state[model[0].weight]["input_moment"], other.state[whole[0].weight]["input_moment"], 1e-12)


# What it computes


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
def test_every_step_descends_whatever_positive_definite_matrix_it_is_given(exponents):
    """200 of them: ten layers, twenty steps."""
    parameters = [nn.Parameter(torch.zeros(8, 6, dtype=torch.float64)) for _ in range(10)]
    options = InputMoment(structure="auto", hooks=False, every=1000, first=0, exponents=exponents)
    optimizer = NewtonMuon(parameters, 1.0, momentum=0.0, nesterov=False, polar="svd", precondition=options)
    for step in range(20):
        before = [p.detach().clone() for p in parameters]
        for index, p in enumerate(parameters):
            p.grad = normal(8, 6, seed=1000 * step + index)
            values, vectors = torch.linalg.eigh(normal(6, 6, seed=7 + 1000 * step + index) + normal(6, 6, seed=3).T)
            if step:  # K of any condition up to 1e8, and its powers
                moment = 10 ** (4 * values / values.abs().max())
                for place, exponent in enumerate(options.powers):
                    powers_of(optimizer, p)[place].copy_((vectors * moment**-exponent) @ vectors.T)
            optimizer.record_input(p, torch.eye(6, dtype=torch.float64))
        optimizer.step()
        for p, old in zip(parameters, before, strict=True):
            assert (p.grad * (old - p.detach())).sum() > 0


def test_blocks_are_problems_of_their_own():
    gradients, inputs = tensors((4, 6), 10), tensors((9, 6), 30)
    slices = (slice(0, 3), slice(3, 6))
    _, state = handmade(gradients, inputs, every=2, **STRUCTURES["block"])
    halves = [handmade([g[:, s] for g in gradients], [x[:, s] for x in inputs], every=2)[1] for s in slices]
    close(state["input_moment"], torch.cat([half["input_moment"] for half in halves]), 1e-13)
    close(state["input_powers"], torch.cat([half["input_powers"] for half in halves], 1), 1e-13)
    (moved,), state = handmade(gradients[:1], inputs[:1], every=1, momentum=0.0, **STRUCTURES["block"])
    product = torch.cat(
        [gradients[0][:, s] @ power for s, power in zip(slices, state["input_powers"][0], strict=True)], 1
    )
    close(moved, handmade([product], inputs[:1], method=Muon)[0][0], 1e-13)


@pytest.mark.parametrize(
    ("exponents", "on"), [((1.0, 0.0), "momentum"), ((1.0, 0.0), "gradient"), ((0.5, 0.25), "momentum")]
)
def test_a_diagonal_divides_each_column(exponents, on):
    gradient, x = normal(4, 6, seed=1), normal(9, 6, seed=2)
    options = {
        "exponents": exponents,
        "on": on,
        "momentum": 0.0,
        "ridge_floor": 0.1,
        **AT_ONCE,
        **STRUCTURES["diagonal"],
    }
    moment = x.square().mean(0)
    damped = moment + 0.2 * moment.mean() + 0.1
    direction = handmade([gradient / damped ** exponents[0]], [x], method=Muon)[0][0]
    close(handmade([gradient], [x], **options)[0][0], direction / damped ** exponents[1], 1e-13)


def test_gradients_and_momenta_are_multiplied_alike_while_the_moment_stays():
    gradients, inputs = tensors((4, 6), 10, 9), tensors((9, 6), 30, 9)
    changed = {}
    for on in ("momentum", "gradient"):
        one = {"on": on, "first": 0, "every": 100}
        changed[on] = handmade(gradients, inputs, **one)[0], handmade(gradients, inputs, **{**one, "every": 4})[0]
    (kept, refreshed), (also_kept, also_refreshed) = changed.values()
    close(kept, also_kept, 1e-12)
    assert (refreshed - also_refreshed).abs().max() > 1e-3


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_factor_does_what_the_inverse_does(structure, normalize):
    gradients, inputs = tensors((4, 6), 10), tensors((9, 6), 30)
    both = [
        handmade(
            gradients, inputs, every=2, on="gradient", normalize=normalize, solver=solver, **STRUCTURES[structure]
        )[0]
        for solver in ("inverse", "factor")
    ]
    close(*both, 1e-12)


class Attention(nn.Module):
    """Three maps of the same inputs, or of copies of them."""

    def __init__(self, *, copies):
        super().__init__()
        self.copies = copies
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        q, k, v = (f(x.clone() if self.copies else x) for f in (self.q_proj, self.k_proj, self.v_proj))
        return (q * k).tanh() + v


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
def test_what_reads_the_same_inputs_shares_one_moment_and_is_the_better_for_it_by_memory_only(exponents):
    weights, held = [], []
    for copies in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(5, 6), Attention(copies=copies), nn.Linear(6, 3)).double()
        moment = InputMoment(structure="auto", every=2, exponents=exponents)
        optimizer = NewtonMuon(model, polar="svd", precondition=moment)
        train(model, optimizer, range(5))
        weights.append([p.detach().clone() for p in model.parameters()])
        states = [optimizer.state[f.weight] for f in (model[1].q_proj, model[1].k_proj, model[1].v_proj)]
        held.append(len({state["input_moment"].data_ptr() for state in states}))
        words = [optimizer.plan.row(f"1.{name}_proj.weight").inputs for name in "qkv"]
        assert words == (["full 6"] * 3 if copies else ["full 6", *["as 1.q_proj.weight"] * 2])
    assert held == [1, 3]
    for a, b in zip(*weights, strict=True):
        close(a, b, 1e-13)


def test_readers_that_part_go_on_with_a_copy_each():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 6), Attention(copies=False), nn.Linear(6, 3)).double()
    optimizer = NewtonMuon(model, polar="svd", precondition=InputMoment(structure="auto", every=2))
    train(model, optimizer, range(2))
    model[1].copies = True
    weight = model[1].k_proj.weight
    query, key = (optimizer.state[f.weight] for f in (model[1].q_proj, model[1].k_proj))
    old = query["input_moment"].clone()
    train(model, optimizer, range(2, 4))
    assert torch.equal(key["input_moment"], old)  # it was only compared, so not summed yet
    assert not torch.equal(query["input_moment"], old)
    copied = powers_of(optimizer, weight).clone()
    train(model, optimizer, range(4, 6))
    assert not torch.equal(key["input_moment"], old)
    assert not torch.equal(powers_of(optimizer, weight), copied)
    assert optimizer.diagnostics()["input_parted"] == 2


class Conv1D(nn.Module):
    """A map that is stored (in, out), as GPT-2's are."""

    def __init__(self, twin):
        super().__init__()
        self.nf, self.in_features = twin.out_features, twin.in_features
        self.weight, self.bias = nn.Parameter(twin.weight.detach().T.clone()), nn.Parameter(twin.bias.detach().clone())

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
def test_transposed_storage_is_multiplied_from_the_left(structure, exponents):
    options = InputMoment(every=2, exponents=exponents, **{"structure": "auto", **STRUCTURES[structure]})
    plain, stored = multilayer(widths=(6, 12, 4, 3)), multilayer(widths=(6, 12, 4, 3))
    stored[0], stored[2] = Conv1D(stored[0]), Conv1D(stored[2])
    optimizer = NewtonMuon(stored, polar="svd", precondition=options)
    train(plain, NewtonMuon(plain, polar="svd", precondition=options), range(5))
    train(stored, optimizer, range(5))
    assert str(optimizer.plan.row("0.weight").view) == "transposed"
    for index in (0, 2):
        close(stored[index].weight.T, plain[index].weight, 1e-12)


def test_each_matrix_of_a_stack_has_inputs_of_its_own():
    gradients, inputs = tensors((3, 4, 6), 10), tensors((3, 9, 6), 30)
    stacked, _ = handmade(gradients, inputs, every=2, view=View(experts=True))
    for expert in range(3):
        own = handmade([g[expert] for g in gradients], [x[expert] for x in inputs], every=2)[0]
        close(stacked[:, expert], own, 1e-13)


def test_tokens_count_by_their_weight():
    gradients, inputs = tensors((4, 6), 10, 1), normal(9, 6, seed=30)
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 0.0, 1.0, 3.0, 1.0])
    parameter = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = NewtonMuon([parameter], precondition=InputMoment(structure="auto", hooks=False, every=1))
    parameter.grad = gradients[0]
    optimizer.record_input(parameter, inputs, weight)
    optimizer.step()
    repeated = inputs.repeat_interleave(weight.long(), 0)
    own, state = handmade(gradients, [repeated], every=1), optimizer.state[parameter]
    close(state["input_moment"], own[1]["input_moment"], 1e-14)


# The published algorithm, written down twice: numpy's own and the library's agree step for step.

EVERY = 4
BLOCKS = {"0.weight": 1, "2.weight": 3}  # the second reads three times as many features as it writes


def two_layers():
    torch.manual_seed(11)
    layers = [nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)]  # the last is the head
    return nn.Sequential(*layers).double()


def inputs_and_gradients(model, step):
    """Of a batch of sequences, at the present weights."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    hidden = model[1](model[0](x)).detach()
    model.zero_grad()
    (model(x) - y).square().mean().backward()
    return {"0.weight": x.flatten(0, 1).T.numpy(), "2.weight": hidden.flatten(0, 1).T.numpy()}


@pytest.mark.parametrize("form", ["heavy-ball", "ema"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("preset", ["paper_record4", "paper_record28"])
def test_the_library_replays_algorithm_1(preset, nesterov, form):
    model = two_layers()
    options = InputMoment.preset(preset, every=EVERY)
    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    optimizer = NewtonMuon(model, 0.05, **settings, polar="svd", precondition=options)
    weights = {name: p for name, p in model.named_parameters() if name in BLOCKS}
    ridge = {"decay": options.decay, "ridge": options.ridge, "floor": options.ridge_floor}
    layers = {
        name: reference.NewtonMuon(w.detach().numpy(), blocks=BLOCKS[name], every=EVERY, **ridge)
        for name, w in weights.items()
    }
    for step in range(3 * EVERY + 5):
        inputs = inputs_and_gradients(model, step)
        gradients = {name: w.grad.numpy().copy() for name, w in weights.items()}
        optimizer.step()
        for name, layer in layers.items():
            layer.step(gradients[name], inputs[name], lr=0.05, mu=0.9, form=form, nesterov=nesterov, wd=0.1)
            state = optimizer.state[weights[name]]
            same(state["input_moment"], layer.k)
            if (powers := powers_of(optimizer, weights[name])) is None:  # there are none before the first refresh
                assert all(np.array_equal(one, np.eye(len(one))) for one in layer.inverse)
            else:
                same(powers[0], layer.inverse)
            same(weights[name].detach(), layer.w)
    assert all(np.ptp(np.linalg.eigvalsh(layer.inverse[0])) > 0.5 for layer in layers.values())  # far from Muon's


def same(actual, expected):
    expected = torch.from_numpy(np.stack(expected) if isinstance(expected, list) else expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
