"""Directions that look at the weights: the brake on what leads out, and the floor under rows."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from steepest import Momo, Muon, MuonMax, RadialBrake, RowFloor, RowScaling, Sphere, SteepestDescent, View
from steepest.optim.guard import Guard
from steepest.testing import check_stage, network
from tests.optim.test_guard import stay_on_device
from tests.stages.around import WAYS, check_against_reference

BOTH = [RowFloor(0.9), RadialBrake(0.25)]  # the brake is the inner one


def braked(d, w, outward):
    """Of the step -d, less of what leads out, as long as before; entry by entry."""
    m, n = d.shape
    out = -sum(d[i, j] * w[i, j] for i in range(m) for j in range(n)) / sum(x**2 for x in w.ravel())
    if out <= 0:
        return d
    radial = -out * w
    new = (d - radial) + outward * radial
    return new * np.linalg.norm(d) / np.linalg.norm(new)


def floored(d, w, part):
    rows = [row * max(1.0, part * np.linalg.norm(own) / np.linalg.norm(row)) for row, own in zip(d, w, strict=True)]
    return np.array(rows)


KINDS = {
    "brake": ([RadialBrake()], lambda d, w: braked(d, w, 0.5)),
    "floor": ([RowFloor(1.1)], lambda d, w: floored(d, w, 1.1)),
    "both": (BOTH, lambda d, w: floored(braked(d, w, 0.25), w, 0.9)),
}


@pytest.mark.filterwarnings("ignore:The loss was below:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_are_those_of_the_reference(kind, way):
    stages, plain = KINDS[kind]
    changed = []

    def beside(d, w):
        new = plain(d, w)
        changed.append(not np.allclose(new, d))
        return new

    check_against_reference(stages, None, way, beside=beside)
    assert any(changed)


@pytest.mark.parametrize(
    "stage", [RadialBrake(), RadialBrake(0.0), RadialBrake(1.0), RowFloor(), RowFloor(3.0)], ids=str
)
def test_they_keep_the_laws_of_stages(stage):
    check_stage(stage)


def moved(start, gradient, *stages, **options):
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=1.0, nesterov=False, polar="svd", scale="none", stages=stages, **options)
    weight.grad = gradient
    optimizer.step()
    return weight.detach() - start, optimizer


def matrices(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("outward", [0.0, 0.5])
def test_what_leads_out_is_less_and_what_leads_in_as_it_was(outward):
    start, gradient = matrices(0, 5, 3)
    gradient = gradient - start  # so that the step leads out
    plain, _ = moved(start, gradient)
    out, inward = ((own * start).sum() for own in (plain, moved(start, -gradient)[0]))
    assert out > 0 > inward
    found, _ = moved(start, gradient, RadialBrake(outward))
    tangent = plain - out / (start * start).sum() * start
    turned = found - (found * start).sum() / (start * start).sum() * start
    assert float(found.norm()) == pytest.approx(float(plain.norm()))
    torch.testing.assert_close(turned / turned.norm(), tangent / tangent.norm())
    ratio = float((found * start).sum() / turned.norm()) / float(out / tangent.norm())
    assert ratio == pytest.approx(outward, abs=1e-12)
    assert torch.equal(moved(start, -gradient, RadialBrake(outward))[0], moved(start, -gradient)[0])


def test_without_a_weight_or_with_all_of_it_nothing_is_braked():
    start, gradient = matrices(1, 4, 6)
    torch.testing.assert_close(moved(start, gradient, RadialBrake(1.0))[0], moved(start, gradient)[0])
    zero = torch.zeros_like(start)
    assert torch.equal(moved(zero, gradient, RadialBrake(0.0))[0], moved(zero, gradient)[0])


def test_rows_are_as_long_as_the_floor_says_or_as_they_were():
    start, gradient = matrices(2, 6, 4)
    gradient[1] = 0
    start = 2 * start
    plain, found = moved(start, gradient)[0], moved(start, gradient, RowFloor(0.3))[0]
    least, lengths = 0.3 * start.norm(dim=1), plain.norm(dim=1)
    assert bool((lengths < least).any())
    assert bool((lengths > least).any())
    assert lengths[1] < 1e-12
    due = torch.maximum(least, lengths)
    due[1] = lengths[1]
    torch.testing.assert_close(found, plain * (due / lengths.where(lengths > 0, 1.0)).unsqueeze(1))


def test_each_matrix_of_a_view_is_looked_at_by_itself():
    start, gradient = matrices(3, 3, 4, 5)
    for stages in ([RadialBrake()], [RowFloor(1.0)], BOTH):
        weight = nn.Parameter(start.clone())
        group = {"params": [weight], "view": View(experts=True), "role": "matrix"}
        optimizer = SteepestDescent([group], lr=0.1, stages=stages)
        weight.grad = gradient
        optimizer.step()
        for index in range(3):
            alone = nn.Parameter(start[index].clone())
            alone.grad = gradient[index]
            SteepestDescent([alone], lr=0.1, stages=stages).step()
            torch.testing.assert_close(weight.detach()[index], alone.detach())


def test_a_direction_that_would_climb_is_none_and_counted():
    """The weight is so much along the momentum's small part that without it the direction goes up."""
    start = torch.diag(torch.tensor([-0.3, -1.0], dtype=torch.float64))  # as in the sphere's test, leading out
    gradient = torch.diag(torch.tensor([1.0, 20.0], dtype=torch.float64))
    change, optimizer = moved(start, gradient, RadialBrake(0.0))
    assert not change.any()
    assert optimizer.diagnostics()["climbing_directions"] == 1
    change, optimizer = moved(start, gradient, RadialBrake(0.5))
    assert bool(change.any())
    assert optimizer.diagnostics()["climbing_directions"] == 0


@pytest.mark.parametrize("stages", [[RadialBrake()], BOTH, [RowScaling(), RowFloor()]], ids=str)
def test_momo_knows_what_is_applied(stages):
    """On a linear loss its value after a step is the loss there."""
    slopes, start = matrices(4, 5, 3)
    weight = nn.Parameter(start)
    optimizer = SteepestDescent([weight], lr=0.1, weight_decay=Sphere(), stages=stages, step_size=Momo(-100.0))
    for _ in range(4):
        optimizer.zero_grad()
        loss = (slopes * weight).sum()
        loss.backward()
        optimizer.step(loss=loss.detach())
        value = optimizer.state_dict()["param_groups"][0]["momo_value"]
        assert value == pytest.approx(float((slopes * weight.detach()).sum()), rel=1e-9)


def test_lower_bits_of_weights_count():
    """The brake of a bfloat16 weight whose lower bits are kept is that of the float32 weight."""
    torch.manual_seed(0)
    half, wide = (nn.Parameter(torch.randn(6, 4).to(torch.bfloat16)) for _ in range(2))
    wide = nn.Parameter(half.detach().float())
    kept = Muon([half], lr=0.05, rounding="kept", stages=BOTH)
    full = Muon([wide], lr=0.05, stages=BOTH)
    for step in range(6):
        half.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        wide.grad = half.grad.float()
        kept.step()
        full.step()
    assert torch.equal(half.detach(), wide.detach().to(torch.bfloat16))


def test_steps_that_are_not_accepted_move_nothing(monkeypatch):
    monkeypatch.setattr(Guard, "admit", stay_on_device)
    model = network()
    optimizer = MuonMax(model, stages=BOTH)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step(loss=1.0)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RadialBrake(1.1), ValueError, "RadialBrake: outward"),
        (lambda: RadialBrake("half"), TypeError, "RadialBrake: outward"),
        (lambda: RowFloor(-0.1), ValueError, "RowFloor: part"),
        (lambda: RowFloor(None), TypeError, "RowFloor: part"),
    ],
)
def test_options_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()
