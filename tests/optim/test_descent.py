"""The optimizer as torch's ecosystem uses it: gradients, types, schedulers, scalers, copies, checkpoints."""

import copy
import io
import math
import pickle
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steepest import (
    AdaInf,
    Adam,
    Frobenius,
    Muon,
    MuonAdam,
    NonFiniteError,
    Sign,
    Spectral,
    SteepestDescent,
    View,
    route,
)
from steepest.optim.guard import Guard

RECIPES = {
    "muon": lambda params, **options: Muon(params, lr=0.02, weight_decay=0.1, **options),
    "muon_adam": lambda params, **options: MuonAdam(params, lr=0.02, **options),
    "adam": lambda params, **options: Adam(params, lr=1e-2, **options),
    "own": lambda params, **options: SteepestDescent(
        params, lr=0.01, norms={"matrix": Frobenius(), "vector": Sign(), "head": "sign"}, **options
    ),
}


def network(dtype=torch.float32):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.GroupNorm(2, 6),
        nn.Flatten(),
        nn.Linear(24, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )
    return model.to(dtype)


def batch(step, dtype=torch.float32, size=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, 4, 4, generator=generator)
    return x.to(dtype), torch.randint(0, 4, (size,), generator=generator)


def backward(model, step, dtype=torch.float32):
    x, y = batch(step, dtype)
    loss = nn.functional.cross_entropy(model(x).float(), y)
    loss.backward()
    return loss


def train(model, optimizer, steps, dtype=torch.float32):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, dtype)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def snapshot(model, optimizer):
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters() if p in optimizer.state]
    return [p.detach().clone() for p in model.parameters()], state


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            assert_same(list(one.values()), list(other.values()))
        else:
            assert torch.equal(one, other)


@pytest.fixture(params=RECIPES, ids=str)
def recipe(request):
    return RECIPES[request.param]


def test_every_recipe_learns_and_leaves_gradients_alone(recipe):
    model = network()
    optimizer = recipe(model)
    first = backward(model, 0).item()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert_same(gradients, [p.grad for p in model.parameters()])
    train(model, optimizer, [0] * 40)
    assert backward(model, 0).item() < 0.5 * first


def test_a_parameter_without_a_gradient_is_left_alone(recipe):
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(3))
    idle = model[5].weight
    before, count = idle.detach().clone(), optimizer.state[idle]["step"].clone()
    backward(model, 3)
    idle.grad = None
    optimizer.step()
    assert torch.equal(idle, before)
    assert torch.equal(optimizer.state[idle]["step"], count)
    optimizer.zero_grad()
    optimizer.step()  # no gradient anywhere: nothing happens
    assert torch.equal(idle, before)


def test_frozen_parameters_wait_in_their_group_until_they_are_thawed(recipe):
    model = network()
    model[0].requires_grad_(False)
    optimizer = recipe(model)
    frozen = model[0].weight.detach().clone()
    train(model, optimizer, range(2))
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight not in optimizer.state
    model[0].requires_grad_(True)
    train(model, optimizer, range(2))
    assert not torch.equal(model[0].weight, frozen)


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
        assert all(tensor.dtype == torch.float32 for tensor in mine.values())
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


def test_tensor_learning_rates_equal_numbers(recipe):
    runs = []
    for make in (float, lambda lr: torch.tensor(lr, dtype=torch.float64)):
        model = network(torch.float64)
        optimizer = recipe(model)
        for group in optimizer.param_groups:
            group["lr"] = make(group["lr"])
        runs.append(train(model, optimizer, range(4), torch.float64))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_accumulated_gradients_are_one_batch(recipe):
    whole, parts = network(torch.float64), network(torch.float64)
    optimizers = recipe(whole), recipe(parts)
    for step in range(3):
        x, y = batch(step, torch.float64)
        nn.functional.cross_entropy(whole(x), y).backward()
        for micro in range(4):
            chunk = slice(2 * micro, 2 * micro + 2)
            (nn.functional.cross_entropy(parts(x[chunk]), y[chunk]) / 4).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


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
    cyclic = torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=1e-3, max_lr=2e-2)
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


def test_huge_finite_gradients_do_not_become_infinite_averages(recipe):
    weight = nn.Parameter(torch.zeros(3, 3))
    optimizer = recipe([weight])
    for size in (1e20, 1e37, 1.0, 1.0):
        weight.grad = torch.full((3, 3), size)
        optimizer.step()
    assert weight.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in optimizer.state[weight].values())


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


def test_hooks_of_the_user_may_reorder_a_state_dict():
    first, second = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    saved = Muon([("a", first), ("b", second)])
    first.grad, second.grad = torch.full((2, 2), 1.0), torch.full((2, 2), 2.0)
    saved.step()
    optimizer = Muon([("b", second), ("a", first)])

    def by_name(target, state_dict):
        names = state_dict["param_groups"][0]["param_names"]
        order = [names.index(name) for name in target.param_groups[0]["param_names"]]
        state = {new: state_dict["state"][old] for new, old in enumerate(order)}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(by_name)
    after = []
    optimizer.register_load_state_dict_post_hook(lambda o: after.append(o.state[first]["momentum_buffer"].clone()))
    optimizer.load_state_dict(saved.state_dict())
    assert torch.equal(optimizer.state[first]["momentum_buffer"], saved.state[first]["momentum_buffer"])
    assert torch.equal(after[0], saved.state[first]["momentum_buffer"])


def test_loaded_state_is_a_copy():
    model = network()
    optimizer = Muon(model)
    train(model, optimizer, [0])
    saved = optimizer.state_dict()
    other = Muon(model)
    other.load_state_dict(saved)
    weight = model[5].weight
    assert other.state[weight]["momentum_buffer"].data_ptr() != optimizer.state[weight]["momentum_buffer"].data_ptr()


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


def test_averaging_of_weights_works_beside_it():
    model = network()
    optimizer = Muon(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, range(2))
    averaged.update_parameters(model)
    assert torch.isfinite(averaged(batch(0)[0])).all()


def test_a_closure_is_run_with_gradients_and_its_loss_returned(recipe):
    a, b = network(), network()
    first, second = recipe(a), recipe(b)

    def closure():
        first.zero_grad()
        return backward(a, 0)

    loss = first.step(closure)
    assert loss.item() == backward(b, 0).item()
    second.step()
    assert_same(list(a.parameters()), list(b.parameters()))


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


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resuming_anywhere_is_exact_to_the_bit(recipe, stop):
    model = network()
    expected = train(model, recipe(model), range(6))
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = network()
    train(model, recipe(model), [7])  # other weights, to be overwritten
    model.load_state_dict(saved["model"])
    optimizer = recipe(model)
    optimizer.load_state_dict(saved["optimizer"])
    assert_same(expected, train(model, optimizer, range(stop, 6)))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_continue_on_their_own(recipe, clone):
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(3))
    twin_model, twin = clone((model, optimizer))
    assert str(twin.plan) == str(optimizer.plan)
    expected = train(model, optimizer, range(3, 6))
    assert_same(expected, train(twin_model, twin, range(3, 6)))


def test_half_precision_models_resume_with_single_precision_state(recipe):
    model = network(torch.bfloat16)
    optimizer = recipe(model)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, torch.bfloat16)
        optimizer.step()
    other = recipe(model)
    other.load_state_dict(state_dict=optimizer.state_dict())  # by keyword, as distributed checkpoints call it
    for p in model.parameters():
        assert_same([optimizer.state[p]], [other.state[p]])


def test_options_come_from_the_checkpoint_and_norms_from_the_optimizer():
    model = network()
    saved = Muon(model, lr=0.5, scale="none").state_dict()
    assert all(isinstance(group["norm"], str) for group in saved["param_groups"])
    optimizer = Muon(model, lr=0.1, scale="spectral")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["norm"] == Spectral(scale="spectral")


def test_distributed_checkpoints_can_initialise_state():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    with warnings.catch_warnings():  # torch's own notices about its checkpoint format
        warnings.simplefilter("ignore")
        model = network()
        optimizer = Muon(model, weight_decay=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        fresh = get_optimizer_state_dict(model, optimizer)
        assert_same(before, list(model.parameters()))
        optimizer = Muon(model, weight_decay=0.1)
        train(model, optimizer, range(3))
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        expected = train(model, optimizer, range(3, 5))
        model = network()
        optimizer = Muon(model, weight_decay=0.1)
        train(model, optimizer, range(3))
        weights = copy.deepcopy(model.state_dict())
        optimizer = Muon(model, weight_decay=0.1)
        model.load_state_dict(weights)
        optimizer.zero_grad()
        set_optimizer_state_dict(model, optimizer, saved)
        assert fresh["state"].keys() == saved["state"].keys()
        assert_same(expected, train(model, optimizer, range(3, 5)))


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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_leaves_no_trace_and_is_counted(recipe, bad):
    model = network()
    optimizer = recipe(model)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    model[5].weight.grad[3, 3] = bad
    with pytest.warns(RuntimeWarning, match=r"the gradient of '5\.weight' is not finite: this step is skipped") as seen:
        optimizer.step()
    assert seen[0].filename == __file__
    optimizer.step()  # the second time it is only counted
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    assert optimizer.diagnostics()["skipped_steps"] == 2
    resumed = recipe(model)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.diagnostics()["skipped_steps"] == 2  # and no second warning of what was warned about


@pytest.mark.parametrize("how", ["loss", "closure"])
def test_a_non_finite_loss_is_a_step_not_taken(recipe, how):
    model = network()
    optimizer = recipe(model)
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="the loss is not finite"):
        optimizer.step(loss=math.nan) if how == "loss" else optimizer.step(lambda: torch.tensor(torch.inf))
    assert_same(before, list(model.parameters()))


def test_raising_changes_nothing_and_names_the_parameter(recipe):
    model = network()
    optimizer = recipe(model, on_nonfinite="raise")
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    model[2].bias.grad[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the gradient of '2\.bias' is not finite; nothing was changed"):
        optimizer.step()
    assert_same(before, list(model.parameters()))


def test_the_masked_step_of_an_accelerator_equals_the_early_return(recipe, monkeypatch):
    """On the CPU the answer of the guard is read at once; here it stays a tensor, as it would on an accelerator."""
    expected_model = network()
    expected = train(expected_model, recipe(expected_model), range(3))

    def stay_on_device(self, names, gradients, loss):
        finite = torch.stack([g.isfinite().all() for g in gradients]).all()
        self._skipped = self._skipped + (~finite).long()
        return finite

    monkeypatch.setattr(Guard, "admit", stay_on_device)
    model = network()
    optimizer = recipe(model)
    assert_same(expected, train(model, optimizer, range(3)))
    before = snapshot(model, optimizer)
    backward(model, 3)
    model[0].weight.grad[0] = torch.nan
    optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    with pytest.warns(RuntimeWarning, match="is not finite"):
        assert optimizer.diagnostics()["skipped_steps"] == 1


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


@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6), skip=st.sets(st.integers(0, 5)))
@settings(max_examples=25, deadline=None)
def test_skipped_steps_are_as_if_they_never_were(seed, steps, skip):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(4, 3, generator=generator) for _ in range(steps)]
    with_bad, without = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    a, b = Muon([with_bad]), Muon([without])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, gradient in enumerate(gradients):
            if index in skip:
                with_bad.grad = torch.full_like(gradient, torch.nan)
                a.step()
            with_bad.grad, without.grad = gradient.clone(), gradient.clone()
            a.step()
            b.step()
    assert torch.equal(with_bad, without)


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
