"""Every recipe against a short reference, step for step, and against torch's own optimizers."""

import pytest
import torch
from torch import nn

import steepest
from steepest import (
    Adam,
    InputMoment,
    Momo,
    Muon,
    MuonAdam,
    MuonMax,
    NewtonMuon,
    NewtonMuonMax,
    PethickScion,
    RowScaling,
    ShampooMuon,
    ShampooPowers,
)
from steepest.optim.recipes import SHAMPOO_RATIOS
from tests.optim.training import assert_same, backward, network, train
from tests.reference import muon as reference
from tests.reference.muon import scion

STEPS = 50
SHAPES = [(5, 9), (9, 5), (6, 6), (1, 4)]
VARIANTS = [(False, 0.0), (True, 0.0), (False, 0.3), (True, 0.3)]


def tensors(shape, rng, count=STEPS):
    return [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(count)]


def run(optimizer, parameters, gradients):
    """Feed fixed gradients; returns the trajectory of each parameter."""
    trajectory = []
    for step in range(len(gradients[0])):
        for parameter, sequence in zip(parameters, gradients, strict=True):
            parameter.grad = sequence[step].clone()
        optimizer.step()
        trajectory.append([parameter.detach().clone() for parameter in parameters])
    return trajectory


@pytest.mark.slow
@pytest.mark.parametrize(("nesterov", "weight_decay"), VARIANTS)
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw", "spectral", "none"])
def test_the_four_variants_of_muon_equal_the_formulas(nesterov, weight_decay, scale, rng):
    parameters = [nn.Parameter(tensors(shape, rng, 1)[0]) for shape in SHAPES for _ in range(2)]
    gradients = [tensors(parameter.shape, rng) for parameter in parameters]
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    start = [parameter.detach().clone() for parameter in parameters]
    trajectory = run(Muon(parameters, **options, scale=scale, polar="svd"), parameters, gradients)
    for index, parameter in enumerate(parameters):
        m, n = parameter.shape
        factor = {
            "original": max(1, m / n) ** 0.5,
            "match_rms_adamw": 0.2 * max(m, n) ** 0.5,
            "spectral": (m / n) ** 0.5,
            "none": 1.0,
        }[scale]
        expected = reference.muon(start[index], gradients[index], **options, scale=factor)
        for step in range(STEPS):
            torch.testing.assert_close(trajectory[step][index], expected[step], rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("nesterov", "weight_decay"), VARIANTS)
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_equals_torch_under_its_coefficients_and_dtype(nesterov, weight_decay, scale, rng):
    start = [torch.randn(shape, generator=rng) for shape in [(24, 48), (48, 24), (32, 32)]]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    gradients = [[torch.randn(w.shape, generator=rng) for _ in range(STEPS)] for w in start]
    options = {"lr": 0.02, "momentum": 0.95, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = Muon(ours, **options, scale=scale, coefficients="jordan", dtype=torch.bfloat16, polar="newton-schulz")
    peer = torch.optim.Muon(theirs, **options, adjust_lr_fn=scale)
    a, b = run(optimizer, ours, gradients), run(peer, theirs, gradients)
    for step in range(STEPS):
        for w, mine, other in zip(start, a[step], b[step], strict=True):
            travelled = (other - w).norm()
            # one rounding of bfloat16 is 2^-9; five steps of three products, and the two normalise in another order
            assert (mine - other).norm() <= 2**-5 * travelled


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam_equals_the_formulas_and_torch(weight_decay, rng):
    shapes = [(4, 3), (4, 3), (2, 3, 3, 3)]
    start = [tensors(shape, rng, 1)[0] for shape in shapes]
    gradients = [tensors(shape, rng) for shape in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    a = run(Adam(ours, **options), ours, gradients)
    b = run(torch.optim.AdamW(theirs, **options), theirs, gradients)
    for index, w in enumerate(start):
        expected = reference.adam(w, gradients[index], **options)
        for step in range(STEPS):
            torch.testing.assert_close(a[step][index], expected[step], rtol=0, atol=1e-12)
            torch.testing.assert_close(a[step][index], b[step][index], rtol=0, atol=1e-12)


def test_muon_adam_equals_the_formulas(rng):
    matrix, vector = nn.Parameter(tensors((4, 7), rng, 1)[0]), nn.Parameter(tensors((5,), rng, 1)[0])
    gradients = [tensors((4, 7), rng), tensors((5,), rng)]
    start = [matrix.detach().clone(), vector.detach().clone()]
    optimizer = MuonAdam([matrix, vector], lr=0.1, adam_lr=0.03, weight_decay=0.2, polar="svd")
    trajectory = run(optimizer, [matrix, vector], gradients)
    expected = [
        reference.muon(start[0], gradients[0], lr=0.1, momentum=0.95, nesterov=False, weight_decay=0.2, scale=1.0),
        reference.adam(start[1], gradients[1], lr=0.03, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.0),
    ]
    for step in range(STEPS):
        for index in range(2):
            torch.testing.assert_close(trajectory[step][index], expected[index][step], rtol=0, atol=1e-10)


@pytest.mark.parametrize("step_size", [None, Momo(1.0)])
def test_shampoo_muon_is_muon_around_powers(step_size):
    models = [network(), network()]
    powers = ShampooPowers(exponent=0.4, every=2, split=True)
    ours = ShampooMuon(models[0], 0.1, powers=powers, stages=[RowScaling()], step_size=step_size)
    options = {"momentum": 0.85, "betas": (0.85, 0.975), "step_size": step_size}
    families = {role: {"lr": 0.1 * ratio} for role, ratio in SHAMPOO_RATIOS.items()}
    theirs = Muon(models[1], 0.1, stages=[powers, RowScaling()], families=families, **options)
    for step in range(4):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss = backward(model, step)
            optimizer.step(loss=loss if step_size else None)
    assert_same(list(models[0].parameters()), list(models[1].parameters()))


def test_rates_of_shampoo_muon_are_parts_of_its_own_or_what_is_asked_for():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 3))

    def rates(**options):
        return {group["role"]: group["lr"] for group in ShampooMuon(model, 0.1, **options).param_groups}

    assert rates() == pytest.approx({"matrix": 0.1, "embedding": 0.035, "head": 0.018, "vector": 0.07})
    assert rates(adam_lr=0.3) == {"matrix": 0.1, "embedding": 0.3, "head": 0.3, "vector": 0.3}
    assert set(rates(scale="match_rms_adamw").values()) == {0.1}


def test_nesterov_is_for_matrices_and_decay_is_not_for_vectors():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3))
    groups = {group["role"]: group for group in Muon(model, lr=0.02, weight_decay=0.1).param_groups}
    assert list(groups) == ["matrix", "embedding", "head", "vector"]
    assert [groups[role]["nesterov"] for role in groups] == [True, False, False, False]
    assert [groups[role]["weight_decay"] for role in groups] == [0.1, 0.1, 0.1, 0.0]
    assert [groups[role]["lr"] for role in groups] == pytest.approx([0.02, 0.002, 0.002, 0.002])
    matched = Muon(model, lr=3e-3, scale="match_rms_adamw").param_groups
    assert [group["lr"] for group in matched] == [3e-3] * 4


def test_scale_comes_from_the_view_of_a_convolution_not_from_its_kernel(rng):
    conv = nn.Parameter(torch.randn(8, 2, 3, 3, generator=rng, dtype=torch.float64))
    before = conv.detach().clone()
    conv.grad = torch.randn(conv.shape, generator=rng, dtype=torch.float64)
    Muon([conv], lr=1.0, scale="spectral", polar="svd").step()
    moved = (before - conv.detach()).reshape(8, 18)
    assert torch.linalg.matrix_norm(moved, ord=2).item() == pytest.approx((8 / 18) ** 0.5, abs=1e-12)


def test_the_recipes_are_exported():
    assert {"SteepestDescent", "Muon", "MuonAdam", "Adam", "route", "Spectral"} <= set(steepest.__all__)


@pytest.mark.parametrize("constrained", [True, False])
def test_scion_of_its_authors_equals_the_formulas(constrained, rng):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 7)).double()
    optimizer = PethickScion(model, 0.01, radius=5.0, head_radius=30.0, constrained=constrained, polar="svd")
    kinds = {row.parameter: row.role for row in optimizer.plan}
    assert sorted(kinds.values()) == ["embedding", "head", "matrix", "vector", "vector"]
    parameters = list(model.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    gradients = [tensors(parameter.shape, rng) for parameter in parameters]
    trajectory = run(optimizer, parameters, gradients)
    for index, parameter in enumerate(parameters):
        radius = 30.0 if kinds[parameter] == "head" else 5.0
        options = {"kind": kinds[parameter], "radius": radius, "constrained": constrained}
        expected = scion(start[index], gradients[index], lr=0.01, momentum=0.9, **options)
        for step in range(STEPS):
            torch.testing.assert_close(trajectory[step][index], expected[step], rtol=0, atol=1e-10)
    if constrained:  # every layer ends inside of its ball, give or take where it began
        assert parameters[0].square().mean(1).sqrt().max() < 5 + start[0].square().mean(1).sqrt().max()


@pytest.mark.parametrize("name", ["radius", "head_radius"])
def test_a_ball_has_a_finite_radius_above_zero(name):
    with pytest.raises(ValueError, match=f"^PethickScion: {name} must be finite and above 0, got -1"):
        PethickScion(nn.Linear(2, 2), **{name: -1})


# Preconditioned directions under Momo and under product norms: what is predicted is what the loss would do.

BETA, BOUND = 0.9, 0.5
EXPONENTS = [(1.0, 0.0), (0.5, 0.5)]
# Steps large enough for Momo to cut them.
METHODS = {
    "plain": lambda model, **o: NewtonMuon(model, 3.0, nesterov=False, momentum=BETA, **o),
    "nesterov": lambda model, **o: NewtonMuon(model, 3.0, nesterov=True, momentum=BETA, **o),
    "max": lambda model, **o: NewtonMuonMax(model, 3.0, momentum=BETA, **o),
    "max stale": lambda model, **o: NewtonMuonMax(model, 3.0, dual="stale", momentum=BETA, **o),
}


def averaged(history, beta):
    """Averages of raw gradients as `Adam` and `Muon` weigh them, per parameter."""
    weights = [(1 - beta) * beta**age / (1 - beta ** len(history)) for age in range(len(history))]
    return [
        sum(w * g for w, g in zip(weights, gradients, strict=True))
        for gradients in zip(*reversed([g for _, _, g in history]), strict=True)
    ]


def lines(history, weights, beta):
    """The averaged linear model of the loss at the present weights, and with Nesterov's weights, by definition."""
    values = [
        loss + sum(((w - p) * g).sum().item() for w, p, g in zip(weights, past, gradients, strict=True))
        for loss, past, gradients in history
    ]
    count = len(values)
    plain = sum((1 - beta) * beta**age / (1 - beta**count) * v for age, v in enumerate(reversed(values)))
    ahead = (beta * (1 - beta**count) * plain + (1 - beta) * values[-1]) / (1 - beta ** (count + 1))
    return plain, ahead


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
@pytest.mark.parametrize("method", ["plain", "nesterov", "max", "max stale"])
@pytest.mark.parametrize("stagger", [False, True])
def test_momos_model_of_the_loss_is_that_of_the_raw_gradients(method, exponents, stagger):
    model, history = network(torch.float64), []
    options = InputMoment(every=2, stagger=stagger, structure="full", exponents=exponents, blend=0.8)
    optimizer = METHODS[method](model, step_size=Momo(BOUND), precondition=options)
    parameters, cut = list(model.parameters()), 0
    for step in range(7):
        optimizer.zero_grad()
        loss = backward(model, step, torch.float64)
        history.append((loss.item(), [p.detach().clone() for p in parameters], [p.grad.clone() for p in parameters]))
        plain, ahead = lines(history, history[-1][1], BETA)
        optimizer.step(loss=loss)
        report = optimizer.diagnostics()
        assert report["gap"] == pytest.approx((ahead if method == "nesterov" else plain) - BOUND, abs=1e-9)
        cut += 0 < report["t"] < 1
    assert cut > 3


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
@pytest.mark.parametrize("method", ["plain", "max"])
def test_the_predicted_decrease_is_what_the_averaged_raw_gradient_says_of_the_applied_direction(method, exponents):
    model, history = network(torch.float64), []
    options = InputMoment(every=2, structure="full", exponents=exponents)
    optimizer = METHODS[method](model, step_size=Momo(BOUND), precondition=options)
    parameters = list(model.parameters())
    for step in range(6):
        optimizer.zero_grad()
        loss = backward(model, step, torch.float64)
        before = [p.detach().clone() for p in parameters]
        history.append((loss.item(), before, [p.grad.clone() for p in parameters]))
        optimizer.step(loss=loss)
        report = optimizer.diagnostics()
        moves = [(p.detach() - old) / report["t"] for p, old in zip(parameters, before, strict=True)]
        gained = -sum((m * move).sum().item() for m, move in zip(averaged(history, BETA), moves, strict=True))
        decrease = report["dual_norm"] ** 2 if method == "max" else report["dual_norm"]  # N², or N
        assert gained == pytest.approx(decrease, rel=1e-9)
        assert gained > 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "lr"), [(NewtonMuon, 0.1), (NewtonMuonMax, 0.05)])
@pytest.mark.parametrize("momo", [True, False])
@pytest.mark.parametrize("options", [{}, {"exponents": (0.5, 0.5)}, {"exponents": (1.0, 0.0)}], ids=str)
def test_a_loss_goes_down(method, lr, momo, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = method(
        model, (3 if momo else 1) * lr, momo=momo, precondition=InputMoment(every=4, **{"structure": "auto", **options})
    )
    x = torch.randn(64, 6) * torch.logspace(0, -1, 6)
    y = (x @ torch.randn(6, 4)).argmax(1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("momo", [True, False])
def test_muon_max_takes_the_option_that_makes_it_newtons(momo):
    weights = []
    for build in (
        lambda model: NewtonMuonMax(model, momo=momo),
        lambda model: MuonMax(model, momo=momo, precondition="default"),
        lambda model: MuonMax(model, momo=momo, precondition=InputMoment(structure="auto")),
    ):
        model = network()
        optimizer = build(model)
        for group in optimizer.param_groups:
            group["lr"] *= 0.1
        optimizer.stages[0].options = InputMoment(structure="auto", every=2)  # the default, but sooner
        optimizer.stages[0].expect()
        for step in range(5):
            optimizer.zero_grad()
            optimizer.step(loss=backward(model, step))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert_same(weights[0], weights[1])
    assert_same(weights[0], weights[2])


def test_a_norm_that_is_not_the_spectral_one_is_preconditioned_as_well_and_adams_is_not():
    model = network()
    optimizer = NewtonMuonMax(model, precondition=InputMoment(structure="auto", every=1))
    train(model, optimizer, range(2))
    kept = {row.name: row.inputs for row in optimizer.plan}
    assert [name for name, words in kept.items() if words] == ["0.weight", "2.weight", "5.weight"]
