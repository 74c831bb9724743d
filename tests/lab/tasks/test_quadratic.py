import pytest
import torch

from steepest.anatomy import route
from steepest.lab.methods import METHODS, build_optimizer, options_of
from steepest.lab.tasks import make_task
from steepest.lab.tasks.quadratic import EXAMPLES
from steepest.optim import SteepestDescent
from tests.cases import cases


@pytest.fixture(scope="module")
def task():
    return make_task("quadratic")


def model_at(task, weight):
    model = task.build_model(0)
    with torch.no_grad():
        model.weight.copy_(weight)
    return model


def test_the_minimum_is_zero_and_the_start_is_known(task):
    assert task.evaluate(model_at(task, task.target), "report", whole=True).loss == 0
    assert task.evaluate(task.build_model(0), "report", whole=True).loss == pytest.approx(task.f0)
    assert task.f0 == pytest.approx(35.2 / 25, rel=0.5)  # its mean over all W*; 1.1 for this one
    assert task.evaluate(task.build_model(0), "tuning", whole=False) == task.evaluate(
        task.build_model(0), "report", whole=True
    )
    assert task.evaluate(task.build_model(0), "report", whole=True).accuracy is None


def test_f_is_its_definition(task, rng):
    weight = torch.randn(8, 16, generator=rng)
    difference = (weight - task.target).double()
    H = torch.diag(torch.linspace(0.1, 1, 8, dtype=torch.float64))
    expected = torch.trace(difference.T @ H @ difference) / 2
    assert task.evaluate(model_at(task, weight), "report", whole=True).loss == pytest.approx(
        expected.item(), rel=1e-5
    )  # float32


def test_the_gradient_of_a_batch_is_that_of_f_plus_its_mean_noise(task, rng):
    weight = torch.randn(8, 16, generator=rng)
    model, examples = model_at(task, weight), torch.tensor([3, 40_000, 65_535])
    task.loss(model, task.batch(examples)).backward()
    expected = task.curvature * (weight - task.target) + task.noise_table[examples].mean(0)
    torch.testing.assert_close(model.weight.grad, expected)


def test_the_noise_has_mean_zero_exactly_and_the_stated_size(task):
    noise = task.noise_table.double()
    assert len(noise) == task.train_size == EXAMPLES
    assert (noise.sum(0) == 0).all()  # multiples of 2^-16: the sums are exact
    assert noise.square().mean(0).sqrt().sub(1).abs().max() < 0.02  # 5 standard errors of 32,768 draws
    covariance = torch.einsum("bik,bjk->ij", noise, noise) / EXAMPLES
    root = torch.linalg.eigvalsh(covariance).sqrt().sum().item()
    assert root == pytest.approx(task.noise, rel=2e-3)
    assert task.noise == 32


def test_the_smoothness_is_attained_and_never_exceeded(task, rng):
    assert task.smoothness == pytest.approx(4.4, rel=1e-6)
    orthogonal = torch.linalg.qr(torch.randn(16, 8, generator=rng)).Q.T
    for step in (orthogonal, torch.randn(50, 8, 16, generator=rng)):
        change = torch.linalg.matrix_norm(task.curvature * step, ord="nuc")
        ratio = change / torch.linalg.matrix_norm(step, ord=2)
        assert ratio.max() <= task.smoothness * (1 + 1e-5)
    attained = torch.linalg.matrix_norm(task.curvature * orthogonal, ord="nuc").item()
    assert attained == pytest.approx(task.smoothness, rel=1e-5)


def test_the_seed_of_a_run_changes_nothing_of_the_problem(task):
    state = torch.get_rng_state()
    assert all((task.build_model(seed).weight == 0).all() for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    other = make_task("quadratic", "small")
    assert other.data_identity() == task.data_identity()


def test_the_weight_is_routed_as_a_matrix(task):
    assert route(task.build_model(0)).counts() == {"matrix": 1, "embedding": 0, "head": 0, "vector": 0}


@pytest.mark.slow
@cases("method", sorted(METHODS.keys() - {"torch-muon"}))  # its AdamW would have no parameters
def test_every_method_descends(task, method):
    model = task.build_model(0)
    radius = options_of(method).get("radius", 1)  # where there is a ball, a rate is a part of its radius
    optimizer = build_optimizer(method, model, {"lr": 0.02 / radius})
    for step in range(30):
        loss = task.loss(model, task.batch(torch.arange(64) + 64 * step))
        loss.backward()
        optimizer.step(loss=loss) if isinstance(optimizer, SteepestDescent) else optimizer.step()
        optimizer.zero_grad()
    assert task.evaluate(model, "report", whole=True).loss < 0.9 * task.f0
