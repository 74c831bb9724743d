"""Every recipe against a short reference, step for step, and against torch's own optimizers."""

import pytest
import torch
from torch import nn

import steepest
from steepest import Adam, Muon, MuonAdam, PethickScion
from tests.reference import muon as reference
from tests.reference.scion import scion

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
