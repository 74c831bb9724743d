"""Preconditioned directions under Momo and under product norms: what is predicted is what the loss would do."""

import pytest
import torch
from torch import nn

from steepest import InputMoment, Momo, MuonMax, NewtonMuon, NewtonMuonMax
from tests.optim.training import assert_same, backward, network, train

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
