"""Checkpoints, copies and ranks of an optimizer that looks at layer inputs: a run that goes on goes on exactly."""

import copy
import io
import math
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steepest import InputMoment, Muon, NewtonMuon, NewtonMuonMax
from steepest.stages.inputs.stage import INPUT_LEADER, INPUT_SUM, UNSETTLED
from tests.optim.training import assert_same, snapshot
from tests.processes import join_ranks, leave_ranks

EVERY, STEPS, PARTS = 3, 10, 2
METHODS = {
    "default": lambda model: NewtonMuon(model, precondition=InputMoment(structure="auto", every=EVERY)),
    "paper": lambda model: NewtonMuon(model, precondition=InputMoment.preset("paper_record4", every=EVERY)),
    "staggered": lambda model: NewtonMuon(
        model,
        precondition=InputMoment(structure="auto", every=EVERY, stagger=True, exponents=(0.5, 0.5), anneal=(5, 8)),
    ),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return self.o_proj((self.q_proj(x) * self.k_proj(x)).tanh() + self.v_proj(x))


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 6), Attention(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4), nn.Linear(4, 2)
    ).to(dtype)


def backward(model, number, rows=slice(None)):
    """Gradients of micro-batch `number`, counted over all steps."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 5, generator=generator).to(model.get_parameter("0.weight").dtype)
    model(x[rows]).square().mean().div(PARTS).backward()


def advance(model, optimizer, numbers):
    for number in numbers:
        if number % PARTS == 0:
            optimizer.zero_grad()
        backward(model, number)
        if number % PARTS == PARTS - 1:
            optimizer.step()


def through_a_file(things):
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resuming_after_any_micro_batch_is_exact_to_the_bit(method):
    """Every step of three intervals, and in the middle of each; gradients are saved as a trainer would."""
    model = network()
    optimizer = METHODS[method](model)
    saved = []
    for number in range(STEPS * PARTS):
        things = {
            "model": model.state_dict(),
            "gradients": [p.grad for p in model.parameters()],
            "optimizer": optimizer.state_dict(),
        }
        saved.append(through_a_file(things))
        advance(model, optimizer, [number])
    expected = snapshot(model, optimizer)
    between = {
        number
        for number, things in enumerate(saved)
        if any(INPUT_SUM in s for s in things["optimizer"]["state"].values())
    }
    assert between  # some were saved with half of a refresh's inputs
    assert all(number % PARTS for number in between)
    for number, things in enumerate(saved):
        model = network()
        optimizer = METHODS[method](model)
        advance(model, optimizer, range(2 * EVERY * PARTS - 1))  # another run, to be overwritten
        optimizer.load_state_dict(things["optimizer"])
        model.load_state_dict(things["model"])
        for p, gradient in zip(model.parameters(), things["gradients"], strict=True):
            p.grad = gradient
        advance(model, optimizer, range(number, STEPS * PARTS))
        for ours, theirs in zip(expected, snapshot(model, optimizer), strict=True):
            assert_same(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [2 * PARTS + 1, 4 * PARTS])
def test_copies_look_at_their_own_models(method, clone, stop):
    model = network()
    optimizer = METHODS[method](model)
    advance(model, optimizer, range(stop))
    twin_model, twin = clone((model, optimizer))
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    assert str(twin.plan) == str(optimizer.plan)
    advance(twin_model, twin, range(stop, STEPS * PARTS))
    advance(model, optimizer, range(stop, STEPS * PARTS))
    for ours, theirs in zip(snapshot(model, optimizer), snapshot(twin_model, twin), strict=True):
        assert_same(ours, theirs)
    assert twin.diagnostics() == optimizer.diagnostics()
    again = METHODS[method](network())
    again.load_state_dict(twin.state_dict())
    twin.record_input(twin_model[0].weight, torch.ones(1, 5))


def test_half_precision_models_resume_with_single_precision_moments():
    model = network(torch.bfloat16)
    optimizer = METHODS["default"](model)
    stop = 2 * EVERY * PARTS - 1  # with half of the inputs of a refresh
    advance(model, optimizer, range(stop))
    other = network(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    resumed = METHODS["default"](other)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    advance(model, optimizer, range(stop, STEPS * PARTS))
    advance(other, resumed, range(stop, STEPS * PARTS))
    for ours, theirs in zip(snapshot(model, optimizer), snapshot(other, resumed), strict=True):
        assert_same(ours, theirs)
    types = {(key == "step", tensor.dtype) for state in resumed.state.values() for key, tensor in state.items()}
    assert types == {(False, torch.float32), (True, torch.int64)}


def reordered(names, state):
    """A state dict of the same parameters in another order, as a hook of the user would make it."""
    old = state["param_groups"][0]["param_names"]
    return {**state, "state": {new: state["state"][old.index(name)] for new, name in enumerate(names)}}


def test_moments_follow_their_layers_into_another_order():
    model = network()
    names = ["0.weight", "1.q_proj.weight", "1.k_proj.weight", "4.weight"]
    plan = {name: p for name, p in model.named_parameters() if name in names}

    def build(order):
        options = InputMoment(structure="auto", every=1, hooks=False)
        return NewtonMuon([(name, plan[name]) for name in order], precondition=options)

    first = build(names)
    for name in names:
        plan[name].grad = torch.ones_like(plan[name])
        first.record_input(plan[name], torch.randn(9, plan[name].size(1)))
    first.step()
    second = build(names[::-1])
    second.register_load_state_dict_pre_hook(lambda _, state: reordered(names[::-1], state))
    second.load_state_dict(first.state_dict())
    second.stages[0].refresh(second.state, [], None)  # makes what is made of moments
    used = [optimizer.stages[0].powers().powers for optimizer in (first, second)]
    for p in plan.values():
        assert torch.equal(used[0][id(p)][1], used[1][id(p)][1])


@pytest.mark.parametrize("leader", [7.0, math.nan])
def test_a_checkpoint_that_refers_to_no_moment_is_refused(leader):
    model = network()
    optimizer = METHODS["default"](model)
    advance(model, optimizer, range(EVERY * PARTS))
    saved = optimizer.state_dict()
    index = [name for g in saved["param_groups"] for name in g["param_names"]].index("1.k_proj.weight")
    saved["state"][index] = {**saved["state"][index], INPUT_LEADER: torch.tensor(leader)}
    del saved["state"][index]["input_moment"]
    with pytest.raises(ValueError, match=r"'1\.k_proj\.weight' refers to the moment of layer number .*damaged"):
        METHODS["default"](model).load_state_dict(saved)


def test_states_with_and_without_moments():
    model = network()
    newton, muon = METHODS["default"](model), Muon(model)
    advance(model, newton, range(EVERY * PARTS))
    with pytest.warns(UserWarning, match="moments of layer inputs, .* are dropped"):
        muon.load_state_dict(newton.state_dict())
    assert not any(key.startswith("input_") for state in muon.state.values() for key in state)
    advance(model, muon, range(EVERY * PARTS))
    newton.load_state_dict(muon.state_dict())
    assert newton.stages[0].powers() is None  # nothing is known yet, so steps are Muon's
    advance(model, newton, range(EVERY * PARTS))
    assert newton.stages[0].powers() is not None


def test_distributed_checkpoints_make_load_and_keep_the_state(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    with warnings.catch_warnings():  # torch's own notices about its checkpoint format
        warnings.simplefilter("ignore")
        model = network()
        optimizer = METHODS["default"](model)
        stop = (EVERY + 1) * PARTS
        advance(model, optimizer, range(stop))
        dcp.save(
            dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path
        )
        other = network()
        resumed = METHODS["default"](other)
        empty = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
        assert all(float(s.get(INPUT_LEADER, UNSETTLED)) == UNSETTLED for s in resumed.state.values())
        dcp.load(empty, checkpoint_id=tmp_path)
        set_state_dict(other, resumed, model_state_dict=empty["model"], optim_state_dict=empty["optimizer"])
    advance(model, optimizer, range(stop, STEPS * PARTS))
    advance(other, resumed, range(stop, STEPS * PARTS))
    for ours, theirs in zip(snapshot(model, optimizer), snapshot(other, resumed), strict=True):
        assert_same(ours, theirs)


RANKED = {
    "staggered": lambda model: NewtonMuon(model, precondition=InputMoment(structure="auto", every=EVERY, stagger=True)),
    "max": lambda model: NewtonMuonMax(
        model, 0.05, precondition=InputMoment(structure="auto", every=EVERY, exponents=(0.5, 0.5))
    ),
}


def run_ranked(rank, world):
    results = []
    for method in RANKED.values():
        model = network(torch.float64)
        wrapped = DistributedDataParallel(model) if world > 1 else model
        optimizer = method(wrapped)
        for step in range(2 * EVERY + 1):
            optimizer.zero_grad()
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            wrapped(10 * x[rank : rank + 1]).sum().backward()
            wrapped.zero_grad(set_to_none=step % 2 == 0)
            first, second = x.chunk(world)[rank].chunk(2)
            with wrapped.no_sync() if world > 1 else nullcontext():
                wrapped(first).square().mean().backward()
            wrapped(second).square().mean().backward()
            optimizer.step()
        report = optimizer.diagnostics()
        assert report["input_missing"] == report["input_parted"] == report["input_partial"] == 0
        results.append([p.detach().clone() for p in model.parameters()])
    return results


def rank_main(rank, world, folder):
    join_ranks(rank, world, folder)
    torch.save(run_ranked(rank, world), f"{folder}/{rank}.pt")
    leave_ranks()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_ranks_that_share_a_batch_are_one_process(tmp_path, world):
    expected = run_ranked(0, 1)
    mp.spawn(rank_main, args=(world, str(tmp_path)), nprocs=world)
    for rank in range(world):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
