import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steepest import Fixed, Momo, Muon, MuonMax, NonFiniteError, SteepestDescent
from steepest.optim.guard import Guard
from steepest.optim.momo.model import SCALARS
from tests.optim.training import assert_same, backward, network, snapshot, train


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_anywhere_is_found_and_named(dtype, bad):
    guard = Guard("skip")
    largest = torch.finfo(dtype).max / (1 if dtype == torch.float16 else 8)  # room for differences in the average
    gradients = [torch.full((3, 4), largest, dtype=dtype), torch.zeros(5, dtype=dtype)]
    assert guard.admit(lambda: ["a", "b"], gradients, None) is True
    gradients[1][2] = bad
    with pytest.warns(RuntimeWarning, match="the gradient of 'b' is not finite"):
        assert guard.admit(lambda: ["a", "b"], gradients, None) is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert guard.admit(lambda: ["a", "b"], gradients, None) is False
    assert guard.skipped_steps() == 2


@pytest.mark.parametrize("loss", [math.nan, torch.tensor(math.inf), torch.tensor([1.0, math.nan])])
def test_a_bad_loss_is_found(loss):
    guard = Guard("skip")
    with pytest.warns(RuntimeWarning, match="the loss is not finite"):
        assert guard.admit(lambda: ["a"], [torch.zeros(2)], loss) is False


def test_raising_says_what_to_do():
    message = "the gradient of 'a' is not finite; nothing was changed. Look for an overflow"
    with pytest.raises(NonFiniteError, match=re.escape(message)):
        Guard("raise").admit(lambda: ["a"], [torch.tensor([math.nan])], None)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match=r"Unknown on_nonfinite 'skp': did you mean 'skip'\? Valid: raise, skip"):
        Guard("skp")


# What is not finite leaves no trace.


def test_huge_finite_gradients_do_not_become_infinite_averages(recipe):
    weight = nn.Parameter(torch.zeros(3, 3))
    optimizer = recipe([weight])
    for size in (1e20, 1e37, 1.0, 1.0):
        weight.grad = torch.full((3, 3), size)
        optimizer.step()
    assert weight.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in optimizer.state[weight].values())


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
    for one, other in zip(expected, train(model, optimizer, range(3)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # unmasked, decay and move may be one pass
    before = snapshot(model, optimizer)
    backward(model, 3)
    model[0].weight.grad[0] = torch.nan
    optimizer.step()
    for part, other in zip(before, snapshot(model, optimizer), strict=True):
        assert_same(part, other)
    with pytest.warns(RuntimeWarning, match="is not finite"):
        assert optimizer.diagnostics()["skipped_steps"] == 1


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


@pytest.mark.parametrize("dual", ["cached", "stale"])
@pytest.mark.parametrize("step_size", [Fixed(), Momo("auto")], ids=["fixed", "momo"])
def test_a_gradient_that_is_looked_ahead_to_is_masked_too(dual, step_size, monkeypatch):
    monkeypatch.setattr(Guard, "admit", stay_on_device)
    weights = []
    for bad in (False, True):
        weight = nn.Parameter(torch.ones(3, 4))
        options = {"product": "hybrid", "regularized": True, "dual": dual, "step_size": step_size}
        optimizer = SteepestDescent([weight], lr=0.01, nesterov=True, **options)
        for step in range(5):
            if bad and step == 2:
                weight.grad = torch.full((3, 4), torch.nan)
                optimizer.step(loss=1.0)
            weight.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step(loss=1.0)
        weights.append(weight.detach().clone())
    assert torch.equal(*weights)


def stay_on_device(self, names, gradients, loss):
    """A guard whose answer is not read, as on an accelerator."""
    finite = torch.stack([g.isfinite().all() for g in gradients]).all()
    return finite if loss is None else finite & torch.as_tensor(loss).isfinite()


@pytest.mark.parametrize("dual", ["cached", "stale"])
def test_momo_on_an_accelerator_equals_momo_here_and_forgets_what_it_must_not_see(dual, monkeypatch):
    def run(bad_at=None):
        model = network()
        optimizer = MuonMax(model, 1.0, weight_decay=0.01, dual=dual, step_size=Momo("auto"))
        lengths = []
        for step in range(6):
            optimizer.zero_grad()
            loss = backward(model, step)
            if step == bad_at:
                optimizer.step(loss=math.nan)
            optimizer.step(loss=loss)
            lengths.append(optimizer.diagnostics()["t"])
        return lengths, snapshot(model, optimizer), optimizer.state_dict()["param_groups"][0]

    lengths, (weights, state), group = run()
    assert min(lengths) < 1

    monkeypatch.setattr(Guard, "admit", stay_on_device)
    for bad_at in (None, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masked, (masked_weights, masked_state), masked_group = run(bad_at)
        assert masked == lengths
        assert_same(weights, masked_weights)
        assert_same(state, masked_state)
        assert {key: group[key] for key in SCALARS} == {key: masked_group[key] for key in SCALARS}
