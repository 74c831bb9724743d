"""What may be passed as params, and what the optimizer says of it."""

import re

import pytest
import torch
from torch import nn

from steepest import AdaInf, Muon, Sign, SteepestDescent, View, route
from tests.optim.training import backward, network, train


def test_a_plan_can_be_passed_and_changed_first():
    model = network()
    plan = route(model, overrides={"5.weight": "vector"})
    groups = {group["role"]: group["param_names"] for group in Muon(plan).param_groups}
    assert "5.weight" in groups["vector"]
    assert "5.weight" not in groups["matrix"]


def test_an_unknown_layout_is_warned_about_and_a_plan_settles_it():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing = nn.Parameter(torch.zeros(4, 4))

    model = nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"The layout of 1\.mixing is not known") as seen:
        Muon(model)
    assert seen[0].filename == __file__
    Muon(route(model, overrides={"1.mixing": "matrix"}))


def test_frozen_integers_of_a_model_are_left_out():
    model = network()
    model.register_parameter("codes", nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False))
    names = [name for group in Muon(model).param_groups for name in group["param_names"]]
    assert "codes" not in names


def test_each_group_has_a_tensor_learning_rate_of_its_own():
    lr = torch.tensor(0.02)
    optimizer = Muon(network(), lr=lr, adam_lr=lr)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups[1:]] == pytest.approx([0.02, 0.02])
    assert lr.item() == pytest.approx(0.02)


def test_a_group_that_sets_an_option_needs_no_default_for_its_role():
    weights = nn.Parameter(torch.zeros(2, 2))
    optimizer = SteepestDescent([{"params": [weights], "role": "head", "lr": 0.1}], lr={"matrix": 0.02})
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_diagnostics_remember_the_rate_of_their_step():
    lr = torch.tensor(0.5)
    weights = nn.Parameter(torch.zeros(2, 2))
    weights.grad = torch.eye(2)
    optimizer = SteepestDescent([weights], lr=lr, norms={"matrix": Sign()})
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(100.0)
    assert optimizer.diagnostics()["matrix/update_rms"] == pytest.approx(0.5 * 0.5**0.5)


def test_groups_added_later_train_and_follow_the_defaults():
    model = network()
    optimizer = Muon(list(model[:5].parameters()), lr=0.02, scale="none")
    optimizer.add_param_group({"params": model[5].parameters(), "role": "vector"})
    optimizer.add_param_group({"params": model[7].weight, "lr": 0.3, "norm": Sign(), "role": "head"})
    before = model[7].weight.detach().clone()
    train(model, optimizer, [0])
    moved = (model[7].weight - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.3))
    assert [group["role"] for group in optimizer.param_groups] == ["matrix", "vector", "vector", "head"]
    assert optimizer.param_groups[2]["norm"] == AdaInf()


def test_a_groups_view_decides_what_its_matrices_are(rng):
    fused = nn.Parameter(torch.randn(12, 5, generator=rng, dtype=torch.float64))
    fused.grad = torch.randn(12, 5, generator=rng, dtype=torch.float64)
    before = fused.detach().clone()
    Muon([{"params": [fused], "view": View(split=(6, 2, 4))}], lr=1.0, scale="none", polar="svd").step()
    for part in (before - fused.detach()).split((6, 2, 4)):
        torch.testing.assert_close(torch.linalg.svdvals(part), torch.ones(min(part.shape), dtype=torch.float64))


def test_diagnostics_say_how_far_weights_moved(rng):
    weight = nn.Parameter(torch.randn(6, 24, generator=rng, dtype=torch.float64))
    before = weight.detach().clone()
    weight.grad = torch.randn(6, 24, generator=rng, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.3, scale="match_rms_adamw", polar="svd")
    optimizer.step()
    report = optimizer.diagnostics()
    assert report["matrix/update_rms"] == pytest.approx((weight - before).square().mean().sqrt().item())
    assert report["matrix/update_rms"] == pytest.approx(0.3 * 0.2)
    assert report["matrix/orthogonality_error"] < 1e-12
    optimizer = Muon([weight], coefficients=[(1.0, 0.0, 0.0)])  # no orthogonalisation: the matrix over its norm
    optimizer.step()
    s = torch.linalg.svdvals(weight.grad / weight.grad.norm())
    expected = (s**3 - s).norm() / s.norm()
    assert optimizer.diagnostics()["matrix/orthogonality_error"] == pytest.approx(expected.item())
    weight.grad = torch.outer(weight.grad[:, 0], weight.grad[0])  # rank one: orthogonal where there is anything
    optimizer = Muon([weight], polar="svd")
    optimizer.step()
    assert optimizer.diagnostics()["matrix/orthogonality_error"] < 1e-12


def test_the_plan_shows_norms_and_learning_rates():
    optimizer = Muon(network(), lr=0.02)
    row = next(row for row in optimizer.plan if row.name == "2.weight")
    assert (row.role, row.lr, str(row.view)) == ("matrix", 0.02, "groups=2")
    optimizer.param_groups[0]["lr"] = 0.01
    assert next(row for row in optimizer.plan if row.name == "2.weight").lr == 0.01
    assert "spectral" in str(optimizer.plan).lower()


def test_one_model_of_one_linear_layer_is_a_matrix():
    assert [group["role"] for group in Muon(nn.Linear(3, 3)).param_groups] == ["matrix", "vector"]


def test_named_parameters_keep_their_names():
    model = network()
    optimizer = Muon(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    backward(model, 0)
    model[0].weight.grad[0] = torch.nan
    with pytest.warns(RuntimeWarning, match=re.escape("the gradient of '0.weight' is not finite")):
        optimizer.step()
