"""Momenta taken out of a run, and sets of coefficients judged by what they do to singular values."""

import math

import pytest
import torch

from steepest.lab.bench import momenta as module
from steepest.lab.bench.accuracy import consult
from steepest.lab.bench.momenta import (
    NORMAL,
    SETS,
    assess,
    collect_momenta,
    compare,
    look_at_spectra,
    momenta_of,
    normal_like,
)
from steepest.lab.bench.pictures import momenta_png
from steepest.lab.methods import build_optimizer, resolve
from steepest.lab.tasks import make_task
from steepest.lab.tasks.order import ExampleOrder
from steepest.linalg import flops, polar
from steepest.optim import Muon
from tests.cases import cases


@pytest.fixture(scope="module")
def task():
    """One matrix of 8 x 16."""
    return make_task("quadratic")


def test_the_first_momentum_is_a_part_of_the_first_gradient(task):
    (found,) = collect_momenta(task, steps=3, at=[1], seed=5)[1]
    model = task.build_model(5)
    task.loss(model, task.batch(ExampleOrder(task.train_size, seed=5).take(task.budget.batch_size))).backward()
    (gradient,) = (parameter.grad for parameter in model.parameters())
    beta = resolve("muon", task=task.name, preset=task.preset, options={}).options["momentum"]
    torch.testing.assert_close(found, (1 - beta) * gradient)


def test_momenta_are_those_of_the_steps_asked_for(task):
    found = collect_momenta(task, steps=6, at=[6, 2, 2], seed=0)
    assert list(found) == [2, 6]
    (alone,) = collect_momenta(task, steps=6, at=[6], seed=0)[6]
    assert torch.equal(found[6][0], alone)
    assert not torch.equal(found[2][0], found[6][0])
    (longer,) = collect_momenta(task, steps=60, at=[6], seed=0)[6]  # whose rate has not fallen yet
    assert not torch.equal(longer, alone)


def test_the_rate_and_options_are_the_labs(task, monkeypatch):
    seen = []

    def build(method, model, options):
        optimizer = build_optimizer(method, model, options)
        optimizer.register_step_pre_hook(lambda own, *_: seen.append(own.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(module, "build_optimizer", build)
    collect_momenta(task, steps=10, at=[10], seed=0)
    lr = resolve("muon", task=task.name, preset=task.preset, options={}).options["lr"]
    assert seen == pytest.approx([lr * min(1, (10 - step) / 7) for step in range(10)])


def test_convolutions_are_seen_as_matrices_and_vectors_not_at_all(rng):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    optimizer = Muon(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    optimizer.step()
    found = momenta_of(optimizer)
    assert (4, 27) in [matrix.shape for matrix in found]
    assert all(matrix.ndim == 2 for matrix in found)


def singular(values, rng, shape):
    """A matrix with these singular values."""
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=rng, dtype=torch.float64), full_matrices=False)
    return ((u * torch.tensor(values, dtype=torch.float64)) @ vh).float()


@cases("name", SETS)
@cases("shape", [(3, 5), (5, 3)])
def test_findings_are_what_the_map_does_to_singular_values(name, shape, rng):
    chosen, s = SETS[name], torch.tensor([1.0, 0.5, 0.02], dtype=torch.float64)
    found = assess("here", name, [consult(singular(s.tolist(), rng, shape))], dtype=torch.float32)
    images = chosen(s / torch.linalg.vector_norm(s, 8 if chosen.norm == "schatten8" else 2))
    assert (found.source, found.coefficients, found.reason) == ("here", name, None)
    assert found.flops == flops(*shape, coefficients=chosen)
    assert (found.smallest, found.median, found.largest) == pytest.approx(images.sort().values.tolist(), abs=2e-4)
    assert found.distance == pytest.approx(float((images - 1).norm()) / math.sqrt(3), abs=2e-4)
    assert found.orthogonality_error == pytest.approx(float((images**2 - 1).norm()) / math.sqrt(3), abs=2e-4)
    assert found.alignment == pytest.approx(float((s * images).sum() / s.sum()), abs=2e-4)


def test_several_matrices_give_means_of_errors_and_the_range_of_all(rng):
    each = [consult(torch.randn(shape, generator=rng)) for shape in [(4, 4), (3, 8)]]
    both = assess("", "nonic", each, dtype=torch.float32)
    single = [assess("", "nonic", [one], dtype=torch.float32) for one in each]
    for name in ("flops", "distance", "orthogonality_error", "alignment"):
        assert getattr(both, name) == pytest.approx(sum(getattr(one, name) for one in single) / 2)
    assert both.smallest == min(one.smallest for one in single)
    assert both.largest == max(one.largest for one in single)


def test_an_exact_polar_factor_has_no_errors(rng, monkeypatch):
    monkeypatch.setattr(module, "polar", lambda matrix, **_: polar(matrix, method="svd"))
    found = assess("", "jordan", [consult(torch.randn(6, 9, generator=rng))], dtype=torch.float32)
    assert (found.distance, found.orthogonality_error) == pytest.approx((0, 0), abs=1e-6)
    assert (found.alignment, found.smallest, found.median, found.largest) == pytest.approx((1, 1, 1, 1), abs=1e-6)


def test_sets_that_do_not_bear_a_dtype_are_refused(rng):
    known = [consult(torch.randn(4, 4, generator=rng))]
    found = assess("", "nonic", known, dtype=torch.bfloat16)
    assert found.reason is not None
    assert "need products in a wider type than torch.bfloat16" in found.reason
    assert (found.flops, found.distance, found.smallest) == (None, None, None)
    assert assess("", "polar_express", known, dtype=torch.bfloat16).reason is None


def test_spectra_are_relative_to_the_largest_singular_value(rng):
    known = [consult(singular([4.0, 2.0, 2.0], rng, (3, 5))), consult(singular([1.0, 1.0, 1.0], rng, (3, 3)))]
    found = look_at_spectra("here", known)
    assert (found.source, found.matrices) == ("here", 2)
    assert found.frobenius == pytest.approx((math.sqrt(1.5) + math.sqrt(3)) / 2)
    assert found.schatten8 == pytest.approx(((1 + 2 / 256) ** 0.125 + 3**0.125) / 2)
    assert (found.median, found.tenth) == pytest.approx((1.0, 0.5))


def test_normal_matrices_have_the_shapes_of_the_momenta():
    shapes = [(3, 4), (5, 2)]
    found = normal_like([torch.zeros(shape) for shape in shapes], seed=0)
    assert [matrix.shape for matrix in found] == shapes
    assert all(map(torch.equal, found, normal_like(found, seed=0)))


def test_every_source_is_compared_by_every_set_and_drawn(rng):
    taken = {step: [torch.randn(4, 6, generator=rng)] for step in (2, 9)}
    spectra, findings = compare(taken, dtype=torch.bfloat16, seed=0)
    sources = ["step 2", "step 9", NORMAL]
    assert [own.source for own in spectra] == sources
    assert [(found.source, found.coefficients) for found in findings] == [
        (one, name) for one in sources for name in SETS
    ]
    assert momenta_png(findings).startswith(b"\x89PNG")


@pytest.mark.parametrize("at", [[], [0, 2], [4]], ids=str)
def test_steps_outside_of_the_run_are_refused(task, at):
    with pytest.raises(ValueError, match=r"at takes steps from 1 to steps=3, got \["):
        collect_momenta(task, steps=3, at=at, seed=0)


def test_a_momentum_without_direction_is_refused(task, monkeypatch):
    monkeypatch.setattr(module, "momenta_of", lambda _: [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match=r"A momentum is zero after step 2 and has no direction\. Look at a later"):
        collect_momenta(task, steps=3, at=[2], seed=0)


def test_a_loss_that_is_not_finite_ends_the_run(task, monkeypatch):
    monkeypatch.setattr(type(task), "loss", lambda *_: torch.tensor(math.inf))
    with pytest.raises(ValueError, match=r"The loss became inf in step 1\. Take fewer steps, or another seed"):
        collect_momenta(task, steps=3, at=[2], seed=0)
