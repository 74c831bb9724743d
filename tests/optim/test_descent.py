"""The optimizer as torch's ecosystem uses it: gradients, types, schedulers, scalers, accumulation."""

from functools import partial

import pytest
import torch
from torch import nn

from steepest import (
    Ada2,
    Adam,
    ColNorm,
    Fixed,
    Frobenius,
    Momo,
    Muon,
    MuonAdam,
    MuonMax,
    Nuclear,
    PolarGrad,
    RowNorm,
    Schatten,
    Scion,
    Sign,
    Spectral,
    SteepestDescent,
    View,
)
from steepest.optim.guard import Guard
from steepest.optim.momo.clipping import Witness
from tests.optim.training import RECIPES, assert_same, backward, batch, network, snapshot, train


@pytest.mark.slow
def test_every_recipe_learns_and_leaves_gradients_alone(recipe):
    model = network()
    optimizer = recipe(model)
    first = backward(model, 0).item()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert_same(gradients, [p.grad for p in model.parameters()])
    train(model, optimizer, [0] * 40)
    assert backward(model, 0).item() < 0.5 * first


# All but MuonMax, in whose norm layers depend on each other
@pytest.mark.parametrize("recipe", [own for name, own in RECIPES.items() if "muon_max" not in name])
def test_parameters_of_one_layout_move_as_they_would_alone(recipe):
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(5)]
    start += [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(3)]
    together = [nn.Parameter(w.clone()) for w in start]
    alone = [nn.Parameter(w.clone()) for w in start]
    optimizers = [recipe(together), *(recipe([w]) for w in alone)]
    for step in range(4):
        for a, b in zip(together, alone, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.clone()
        if step == 2:  # different ages within one bucket
            together[1].grad = alone[1].grad = None
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_single_precision_state(recipe, dtype):
    half, single = network(dtype), network(dtype).float()
    optimizers = recipe(half), recipe(single)
    for step in range(3):
        backward(single, step)
        for a, b in zip(half.parameters(), single.parameters(), strict=True):
            a.grad = b.grad.to(dtype)
            b.grad = a.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(half.parameters(), single.parameters(), strict=True):
        mine, wide = optimizers[0].state[a], optimizers[1].state[b]
        assert mine["step"].dtype == torch.int64  # float32 counts to 2^24 only
        assert all(tensor.dtype == torch.float32 for key, tensor in mine.items() if key != "step")
        assert_same([mine], [wide])  # the same gradients make the same averages
        # three roundings of the weight, one a step, each of half a unit in the last place
        assert ((a.float() - b).abs() <= 2 * torch.finfo(dtype).eps * b.abs().clamp(min=0.05)).all()


def test_small_decay_is_not_lost_to_half_precision():
    weight = nn.Parameter(torch.full((2, 2), 1.0, dtype=torch.bfloat16))
    optimizer = Muon([weight], lr=2**-8, weight_decay=0.5, scale="none", polar="svd")
    weight.grad = torch.full((2, 2), 1.0, dtype=torch.bfloat16)
    optimizer.step()
    # decay takes 2^-9 and the step 2^-8 / 2: together one unit below 1; one by one, each would be rounded away
    assert weight.float().unique().tolist() == [1 - 2**-8]


def test_clipping_works_and_does_not_matter_to_a_direction():
    clipped, plain = network(torch.float64), network(torch.float64)
    optimizers = [SteepestDescent(model, lr=0.01, norms=dict.fromkeys(("matrix", "head", "vector"), Frobenius()))
                  for model in (clipped, plain)]  # fmt: skip
    for model, optimizer in zip((clipped, plain), optimizers, strict=True):
        backward(model, 0, torch.float64)
        if model is clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    for a, b in zip(clipped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: torch.optim.lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_scale_every_group_alike(name):
    model = network()
    optimizer = Muon(model, lr=0.02)
    scheduler = SCHEDULERS[name](optimizer)
    changed = False
    for step in range(6):
        train(model, optimizer, [step])
        scheduler.step()
        rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        assert rates["head"] == pytest.approx(rates["matrix"] / 10)
        changed |= rates["matrix"] != 0.02
    assert changed


def test_schedulers_with_arguments_of_their_own_work():
    model = network()
    optimizer = Muon(model, lr=0.02)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.002, 0.002], total_steps=5)
    momenta = set()
    for step in range(4):
        momenta.add(tuple(group["momentum"] for group in optimizer.param_groups))
        train(model, optimizer, [step])
        one_cycle.step()
    assert len(momenta) > 2  # what the step reads is what the scheduler cycles, in every group
    optimizer = Muon(model, lr=0.02)
    cyclic = torch.optim.lr_scheduler.CyclicLR(optimizer, [1e-3, 1e-4, 1e-4], [2e-2, 2e-3, 2e-3])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(4):
        train(model, optimizer, [step])
        cyclic.step()
        plateau.step(1.0)


def test_momentum_written_into_a_group_counts_for_every_norm():
    a, b = network(torch.float64), network(torch.float64)
    changed, built = Muon(a), Muon(b, momentum=0.5, betas=(0.5, 0.95))
    for group in changed.param_groups:
        group["momentum"] = 0.5
    for x, y in zip(train(a, changed, range(3), torch.float64), train(b, built, range(3), torch.float64), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_averaging_of_weights_works_beside_it():
    model = network()
    optimizer = Muon(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, range(2))
    averaged.update_parameters(model)
    assert torch.isfinite(averaged(batch(0)[0])).all()


def test_a_grad_scaler_unscales_before_the_step_and_skips_overflows(recipe):
    scaled, plain = network(), network()
    optimizers = recipe(scaled), recipe(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = batch(0)
    scaler.scale(nn.functional.cross_entropy(scaled(x), y)).backward()
    backward(plain, 0)
    scaler.step(optimizers[0])
    scaler.update()
    optimizers[1].step()
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    before = snapshot(scaled, optimizers[0])
    scaler.scale(nn.functional.cross_entropy(scaled(x), y)).backward()
    scaled[0].weight.grad[0] = torch.inf
    scaler.step(optimizers[0])
    scaler.update()
    for part, other in zip(before, snapshot(scaled, optimizers[0]), strict=True):
        assert_same(part, other)


def test_a_zero_gradient_only_decays():
    model = network()
    optimizer = Muon(model, lr=0.1, weight_decay=0.5)
    before = model[5].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[5].weight, before * 0.95)


def test_parameters_without_entries_are_harmless(recipe):
    empty, full = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = recipe([empty, full])
    empty.grad, full.grad = torch.zeros(0, 3), torch.ones(2, 3)
    optimizer.step()
    assert (full < 1).all()
    optimizer.load_state_dict(optimizer.state_dict())


# A step never reads a number off the device: on the meta device, that has no numbers, reading one is an error.

METHODS = {
    "muon": lambda model, **o: Muon(model, weight_decay=0.1, **o),
    "muon_adam": lambda model, **o: MuonAdam(model, **o),
    "scion": lambda model, **o: Scion(model, **o),
    "polar_grad": lambda model, **o: PolarGrad(model, torch.tensor(0.1), **o),
    "muon_max": lambda model, **o: MuonMax(model, weight_decay=0.1, **o),
    "muon_max_stale": lambda model, **o: MuonMax(model, dual="stale", **o),
    "adam": lambda model, **o: Adam(model, betas=(0.9, 0.9), **o),
}


@pytest.mark.slow
@pytest.mark.parametrize("step_size", [Fixed(), Momo(), Momo("auto"), Momo(bookkeeping="direct")], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_nothing(method, step_size, monkeypatch):
    monkeypatch.setattr(Witness, "look", lambda self: None)  # which reads at steps 1, 2, 4, ...
    model = network().to("meta")
    optimizer = METHODS[method](model, step_size=step_size)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step(loss=torch.empty((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.diagnostics()


# A matrix, or a row, whose gradient is zero comes to rest; one whose gradients are tiny goes on.

ROLE = {"role": "matrix", "view": View(experts=True)}
NORMS = {
    "spectral": Spectral(),
    "newton-schulz": Spectral(polar="newton-schulz", coefficients="jordan"),
    "gram": Spectral(polar="gram"),
    "svd": Spectral(polar="svd"),
    "row": RowNorm(),
    "col": ColNorm(),
    "sign": Sign(),
    "nuclear": Nuclear(),
    "schatten": Schatten(3.0),
}
OPTIONS = {
    "plain": {},
    "nesterov": {"nesterov": True},
    "momo": {"step_size": Momo(-1e6)},
    "direct": {"step_size": Momo(-1e6, bookkeeping="direct")},
    "sum": {"product": "sum"},
}
BETA, LAST = 0.7, 280 + 61  # after so many steps nothing may move any more


def gradient(step, dtype=torch.float32):
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float32).to(dtype)


def idle(norm, dtype=torch.float32, steps=LAST + 5, **options):
    """The second of two experts has gradients in three steps only."""
    weight = nn.Parameter(torch.ones(2, 5, 4, dtype=dtype))
    optimizer = SteepestDescent(
        [{"params": [weight], **ROLE}], lr=0.5, momentum=BETA, norms={"matrix": norm}, **options
    )
    moved = []
    for step in range(steps):
        weight.grad = gradient(step, dtype)
        if step >= 3:
            weight.grad[1] = 0
        before = weight.detach().clone()
        optimizer.step(loss=1.0)
        moved.append((weight.detach() - before).abs().amax((1, 2)))
    return torch.stack(moved), optimizer.state[weight]["momentum_buffer"]


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_an_idle_expert_comes_to_rest_under_every_norm(norm):
    moved, average = idle(NORMS[norm])
    assert (moved[:60, 1] > 0).all()  # while there is an average
    assert not moved[LAST:, 1].any()
    assert not average[1].any()
    assert (moved[:, 0] > 0).all()  # the other has gradients all the time


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_an_idle_expert_comes_to_rest_with_every_option(options):
    moved, _ = idle(Spectral(), **OPTIONS[options])
    assert not moved[LAST:, 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_idle_expert_comes_to_rest_in_every_type(dtype):
    moved, average = idle(Sign(), dtype)
    assert not moved[LAST:, 1].any()
    assert not average[1].any()


@pytest.mark.parametrize("stale", [False, True])
def test_an_idle_expert_comes_to_rest_where_steps_are_masked(stale, monkeypatch):
    monkeypatch.setattr(Guard, "admit", lambda self, names, gradients, loss: torch.tensor(True))
    options = {"product": "hybrid", "regularized": True, "dual": "stale"} if stale else {}
    moved, average = idle(Sign(), **options)
    assert not moved[LAST:, 1].any()
    assert not average[1].any()


def test_the_row_of_a_token_seen_once_comes_to_rest():
    table = nn.Embedding(4, 3)
    optimizer = SteepestDescent(table, lr=0.01, momentum=BETA, norms={"embedding": Sign()})
    for step in range(LAST + 5):
        optimizer.zero_grad(set_to_none=False)
        table(torch.tensor([step % 3 if step else 3])).sum().backward()
        before = table.weight.detach()[3].clone()
        optimizer.step()
    assert torch.equal(table.weight.detach()[3], before)


@pytest.mark.parametrize("size", [1e-30, 1e-38])
@pytest.mark.parametrize("norm", [Spectral(), Sign(), Frobenius(), ColNorm(), Ada2()], ids=str)
def test_tiny_gradients_count_for_ever(norm, size):
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = SteepestDescent([weight], lr=1.0, momentum=BETA, norms={"matrix": norm})
    for _ in range(150):
        weight.grad = size * (1 + torch.rand(3, 4))
        before = weight.detach().clone()
        optimizer.step()
        assert ((weight - before).abs() > 1e-2).any()


def test_going_on_from_a_checkpoint_forgets_at_the_same_step():
    def run(saved_at):
        weight = nn.Parameter(torch.ones(2, 5, 4))
        optimizer = Muon([{"params": [weight], **ROLE}], momentum=BETA)
        for step in range(LAST):
            if step == saved_at:
                saved = optimizer.state_dict()
                optimizer = Muon([{"params": [weight], **ROLE}], momentum=BETA)
                optimizer.load_state_dict(saved)
            weight.grad = gradient(step)
            weight.grad[1] = weight.grad[1] if step < 3 else 0
            optimizer.step()
        return weight.detach()

    assert_same([run(None)], [run(77)])


@pytest.mark.parametrize(
    "method", [Muon, partial(Muon, step_size=Momo(0.5)), MuonMax, partial(MuonMax, dual="stale"), PolarGrad]
)
def test_an_optimizer_for_each_parameter_in_backward_is_right_or_refused(method):
    """Where layers move on their own it is the step of one optimizer after backward, bit for bit."""

    def group(parameter):
        return {"params": [parameter], "role": "matrix" if parameter.ndim > 1 else "vector"}

    model, twin = network(), network()
    together = method([*map(group, twin.parameters())])
    own = {parameter: method([group(parameter)]) for parameter in model.parameters()}

    def step(parameter):
        own[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    if together._combine.needs_duals:
        with pytest.raises(RuntimeError, match=r"called during backward.* needs a number of all layers"):
            backward(model, 0)
        return
    for index in range(3):
        backward(model, index)
        together.zero_grad()
        backward(twin, index)
        together.step()
    assert_same(list(model.parameters()), list(twin.parameters()))


def test_groups_that_an_optimizer_refuses_are_printed_all_the_same():
    optimizer = Muon(network())
    optimizer.param_groups.append({"params": [nn.Parameter(torch.zeros(3))]})
    assert repr(optimizer).splitlines()[-2].split() == ["None", "1", "3", "None", "None", "-", "-", "None", "None"]


def test_an_optimizer_prints_as_a_page_about_its_groups():
    model = network()
    optimizer = MuonMax(model, lr=0.5, weight_decay=0.1, step_size=Momo(lower_bound=1.5))
    train_step = backward(model, 0)
    optimizer.step(loss=train_step)
    first, *lines, last = repr(optimizer).splitlines()
    assert first == "MuonMax: regularized descent, Momo(lower_bound=1.5, bookkeeping='recurrent')"
    table = [line.split() for line in lines]
    assert table[0] == ["name", "tensors", "numbers", "lr", "momentum", "nesterov", "beta2", "weight_decay", "norm"]
    for group, line in zip(optimizer.param_groups, table[1:], strict=True):
        assert line[0] == group["name"]
        assert int(line[1]) == len(group["params"])
        assert int(line[2].replace(",", "")) == sum(p.numel() for p in group["params"])
        assert [float(line[3]), float(line[4]), float(line[7])] == [
            group["lr"],
            group["momentum"],
            group["weight_decay"],
        ]
    assert last == "1 steps taken; see .plan for each parameter"
