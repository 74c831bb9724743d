"""Layers whose inputs hooks do not see, and what the optimizer says of wrong uses."""

import re

import pytest
import torch
from torch import nn

from steepest import InputMoment, Momo, Muon, MuonMax, NewtonMuon, SteepestDescent, View, route
from steepest.stages.inputs.refresh import INPUT_MASS, INPUT_MOMENT
from steepest.stages.inputs.stage import MissingInputsError
from tests.optim.training import assert_same, network, powers_of


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Bypassed(nn.Module):
    """A map whose module is not called, as in fused kernels."""

    def __init__(self):
        super().__init__()
        self.inner, self.hidden, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(nn.functional.linear(self.inner(x).tanh(), self.hidden.weight).tanh())


def run_bypassed(optimizer_of, *, steps=4, record=False):
    torch.manual_seed(1)
    model = Bypassed().double()
    optimizer = optimizer_of(model)
    for step in range(steps):
        optimizer.zero_grad()
        x = normal(8, 4, seed=step)
        model(x).square().mean().backward()
        if record:
            optimizer.record_input(model.hidden.weight, model.inner(x).tanh())
        optimizer.step()
    return model, optimizer


def test_a_layer_whose_inputs_were_not_seen_is_an_error_that_says_what_to_do():
    expected = (
        r"'hidden\.weight' has a gradient, but its inputs since the last step are missing \(no call of its module had "
        r"a backward pass that adds .*\)\. Call opt\.record_input\(parameter, inputs\) before step\(\), "
        r"give it InputMoment\(structure=\{'hidden\.weight': 'none'\}\), or .*InputMoment\(missing='muon'\)"
    )
    with pytest.raises(MissingInputsError, match=expected):
        run_bypassed(lambda model: NewtonMuon(model, precondition=InputMoment(structure="auto", every=2)))
    run_bypassed(
        lambda model: NewtonMuon(model, precondition=InputMoment(structure="auto", every=2)), steps=1
    )  # nobody looked yet
    run_bypassed(lambda model: NewtonMuon(model, precondition=InputMoment(structure="auto", every=2)), record=True)
    options = InputMoment(every=2, structure={"*": "auto", "hidden.weight": "none"})
    run_bypassed(lambda model: NewtonMuon(model, precondition=options))


def test_why_hooks_cannot_see_a_layer_is_part_of_the_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    torch.nn.utils.parametrizations.orthogonal(model[1])
    with pytest.warns(
        UserWarning, match=r"cannot see the inputs of 1\.param.*: .*parametriz.*record_input.*'none'"
    ) as told:
        optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=1))
    assert told[0].filename == __file__
    assert "not seen by hooks: the weight is computed" in str(optimizer.plan)
    model(torch.ones(3, 4)).sum().backward()
    with pytest.raises(MissingInputsError, match=r"\(hooks cannot see them: the weight is computed by a parametriz"):
        optimizer.step()


def test_what_was_refused_for_missing_inputs_changed_nothing_and_may_be_tried_again():
    torch.manual_seed(1)
    model = Bypassed().double()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=1))
    before = [p.detach().clone() for p in model.parameters()]
    for again in (False, True):
        model(normal(8, 4, seed=0)).square().mean().backward()
        if again:
            optimizer.record_input(model.hidden.weight, normal(8, 4, seed=1))
            optimizer.step()
        else:
            with pytest.raises(MissingInputsError):
                optimizer.step()
            assert_same(before, list(model.parameters()))
            assert all(not state[INPUT_MASS].any() for state in optimizer.state.values() if INPUT_MASS in state)
            assert not any(state["step"] or state["momentum_buffer"].any() for state in optimizer.state.values())
            optimizer.zero_grad()
    torch.testing.assert_close(optimizer.state[model.inner.weight][INPUT_MASS].item(), 0.05)


def test_layers_that_were_not_seen_take_muons_step_if_asked_and_are_counted():
    ours, optimizer = run_bypassed(
        lambda model: NewtonMuon(model, precondition=InputMoment(structure="auto", every=1, missing="muon")), steps=1
    )
    theirs, _ = run_bypassed(Muon, steps=1)
    assert optimizer.diagnostics()["input_missing"] == 1
    assert torch.equal(ours.hidden.weight, theirs.hidden.weight)
    assert not torch.equal(ours.inner.weight, theirs.inner.weight)


def test_an_unseen_layer_does_not_borrow_the_powers_of_those_whose_names_are_like_its_own():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.q_proj(x) * nn.functional.linear(x, self.k_proj.weight)

    models = []
    for method in (
        lambda model: NewtonMuon(model, precondition=InputMoment(structure="auto", every=1, missing="muon")),
        Muon,
    ):
        torch.manual_seed(1)
        model = nn.Sequential(Mixer(), nn.Linear(4, 2))
        optimizer = method(model)
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        optimizer.step()
        models.append(model[0])
    assert not torch.equal(models[0].q_proj.weight, models[1].q_proj.weight)
    assert torch.equal(models[0].k_proj.weight, models[1].k_proj.weight)


def test_a_step_that_moves_nothing_needs_no_inputs():
    """As torch's distributed checkpoints take one, with gradients of zero and no learning rate, to make the state."""
    model = network()
    optimizer = NewtonMuon(model, 0.0, precondition=InputMoment(structure="auto", every=1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert_same(before, list(model.parameters()))
    assert all(key in optimizer.state[model[5].weight] for key in (INPUT_MOMENT, INPUT_MASS))


def hand(shape=(3, 4), *, view=None, **options):
    weight = nn.Parameter(torch.zeros(shape))
    group = {"params": [("stack", weight)], **({} if view is None else {"view": view})}
    return weight, NewtonMuon([group], precondition=InputMoment(hooks=False, **{"structure": "auto", **options}))


def masked_step(mask):
    model = network()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=1))
    with optimizer.input_mask(mask):
        model(torch.ones(3, 2, 4, 4)).sum().backward()


GRADIENT = InputMoment(structure="auto", on="gradient")
NEEDS_MOMENTUM = r"InputMoment\(on='gradient'\) averages preconditioned gradients, .* as Momo, .*Set on='momentum'"
WRONG = {
    "momo": (lambda: NewtonMuon(network(), momo=True, precondition="paper_record4"), ValueError, NEEDS_MOMENTUM),
    "momo's options": (
        lambda: NewtonMuon(network(), step_size=Momo(1.0), precondition=GRADIENT),
        ValueError,
        NEEDS_MOMENTUM,
    ),
    "regularised": (lambda: MuonMax(network(), precondition=GRADIENT), ValueError, NEEDS_MOMENTUM),
    "a product": (
        lambda: SteepestDescent(network(), product="euclid", precondition=GRADIENT),
        ValueError,
        NEEDS_MOMENTUM,
    ),
    "no options": (lambda: NewtonMuon(network(), precondition=0.95), TypeError, r"precondition must be .*, got 0\.95"),
    "no preset": (lambda: NewtonMuon(network(), precondition="track4"), ValueError, "'track4'.*track3"),
    "no matrix": (
        lambda: NewtonMuon(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4))),
        ValueError,
        r"no matrix is left to precondition.*structure='full' for all, or leave out precondition=",
    ),
    "no layer": (
        lambda: NewtonMuon(network(), precondition=InputMoment(structure="none")),
        ValueError,
        r"no matrix is left to precondition",
    ),
    "parameters without a model": (
        lambda: NewtonMuon(list(network().named_parameters())),
        ValueError,
        r"no module is known that feeds '0\.weight' .*Pass the model \(or steepest\.route.*record_input\(\)",
    ),
    "foreign inputs": (
        lambda: hand()[1].record_input(torch.zeros(3, 4), torch.zeros(4)),
        ValueError,
        r"record_input: the parameter of shape \(3, 4\) is not preconditioned .*opt\.plan lists",
    ),
    "narrow inputs": (
        lambda: (lambda w, opt: opt.record_input(w, torch.zeros(5, 3)))(*hand()),
        ValueError,
        r"record_input: 'stack' takes inputs \(\*tokens, 4\), got \(5, 3\)",
    ),
    "inputs of a number": (
        lambda: (lambda w, opt: opt.record_input(w, torch.zeros(())))(*hand()),
        ValueError,
        r"record_input: 'stack' takes inputs \(\*tokens, 4\), got \(\)",
    ),
    "inputs of another stack": (
        lambda: (lambda w, opt: opt.record_input(w, torch.zeros(5, 4)))(*hand((2, 3, 4), view=View(experts=True))),
        ValueError,
        r"record_input: 'stack' takes inputs \(2, \*tokens, 4\), got \(5, 4\)",
    ),
    "weights of other tokens": (
        lambda: (lambda w, opt: opt.record_input(w, torch.zeros(5, 4), torch.zeros(4)))(*hand()),
        ValueError,
        r"the weight of 'stack' must have the shape \(5,\) of the tokens, got \(4,\)",
    ),
    "inputs for Muon": (
        lambda: Muon(network()).record_input(torch.zeros(1), torch.zeros(1)),
        RuntimeError,
        r"record_input: this optimizer looks at no inputs; build it with precondition=InputMoment\(\)",
    ),
    "a mask for Muon": (
        lambda: Muon(network()).input_mask(torch.ones(1)).__enter__(),
        RuntimeError,
        r"input_mask: this optimizer looks at no inputs",
    ),
    "a mask of other tokens": (lambda: masked_step(torch.ones(5)), ValueError, r"mask of inputs has shape \(5,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_uses_are_told_what_is_wrong(case):
    build, kind, message = WRONG[case]
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        build()


def test_inputs_recorded_in_steps_that_look_at_none_are_dropped():
    weight, optimizer = hand(every=3)
    for step in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.record_input(weight, torch.full((2, 4), 1.0 + step))
        assert bool(optimizer.stages[0].watch.given) == (step == 2)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[weight][INPUT_MOMENT].max().item(), 0.05 * 9.0)


def test_tokens_outside_of_the_mask_do_not_count():
    x, mask = normal(3, 5, 6, seed=1), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    moments = []
    for masked in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).double()
        optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=1))
        if masked:
            with optimizer.input_mask(mask):
                loss = model(x).square().sum()
        else:
            loss = model(x[mask.bool()]).square().sum()
        loss.backward()
        optimizer.step()
        moments.append(optimizer.state[model[0].weight][INPUT_MOMENT])
        assert optimizer.stages[0].watch.weights is None
    torch.testing.assert_close(*moments, rtol=0, atol=1e-14)


def test_a_plan_knows_the_modules_too():
    model = network()
    optimizer = NewtonMuon(route(model), precondition=InputMoment(structure="auto", every=1))
    model(torch.ones(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    assert optimizer.state[model[5].weight][INPUT_MASS].item() == pytest.approx(0.05)


def test_groups_added_later_take_muons_step():
    model = network()
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="auto", every=1))
    late = nn.Parameter(torch.zeros(4, 3))
    optimizer.add_param_group({"params": [late]})
    twin = nn.Parameter(torch.zeros(4, 3))
    muon = Muon([twin])
    late.grad, twin.grad = (torch.arange(12.0).view(4, 3) for _ in range(2))
    model(torch.ones(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    muon.step()
    assert torch.equal(late, twin)
    assert optimizer.plan[-1].inputs is None
    assert powers_of(optimizer, late) is None
    assert powers_of(optimizer, model[5].weight) is not None


@pytest.mark.parametrize("how", ["inputs", "grad"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_backward_pass_that_stops_at_the_first_layer_is_among_the_reasons_and_its_remedy_works(how, whole):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = NewtonMuon(model, precondition=InputMoment(structure="full", every=1))
    x = torch.ones(3, 4, requires_grad=True)
    wanted = [*model.parameters(), *([x] if whole else [])]
    loss = model(x).sum()
    if how == "inputs":
        loss.backward(inputs=wanted)
    else:
        for parameter, gradient in zip(wanted, torch.autograd.grad(loss, wanted), strict=True):
            parameter.grad = gradient
    if whole:
        optimizer.step()
        assert optimizer.diagnostics()["input_missing"] == 0
        return
    reason = r"'0\.weight' .*backward\(inputs=\.\.\.\) or autograd\.grad with the weights alone stopped at this layer"
    with pytest.raises(MissingInputsError, match=reason):
        optimizer.step()
