"""A scheduler that gives all groups one rate, where they were built with different ones, is told how to keep them."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from steepest import Momo, MuonAdam, MuonMax, SteepestDescent
from tests.optim.training import backward, network

LR = {"matrix": 0.1, "vector": 0.01, "embedding": 0.01, "head": 0.01, "norm": 0.01}
METHODS = {
    "muon_adam": lambda params, lr, **o: MuonAdam(params, lr=lr, **o),
    "muon_max": lambda params, lr, **o: MuonMax(params, lr=lr, **o),
    "descent": lambda params, lr, **o: SteepestDescent(params, lr=lr, **o),
    "momo": lambda params, lr, **o: MuonAdam(params, lr=lr, step_size=Momo(), **o),
}


def groups_of(model):
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return [
        {"params": matrices, "role": "matrix", "lr": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "role": "vector", "lr": 0.01},
    ]


def build(method="muon_adam", **options):
    model = network()
    return model, METHODS[method](groups_of(model), 1.0, **options)


def step(model, optimizer, index=0, scheduler=None):
    optimizer.zero_grad()
    optimizer.step(loss=backward(model, index))
    if scheduler is not None:
        scheduler.step()


def by_hand(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.05


FLATTENING = {
    "one_cycle": (lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=10), r"max_lr=\[0\.1, 0\.01\]"),
    "cyclic": (lambda o: schedulers.CyclicLR(o, base_lr=0.02, max_lr=0.1), r"=\[0\.02, 0\.002\]"),
    "swa": (lambda o: SWALR(o, swa_lr=0.05), r"swa_lr=\[0\.05, 0\.005\]"),
    "by_hand": (by_hand, r"=\[0\.05, 0\.005\]"),
}


@pytest.mark.parametrize("way", FLATTENING)
@pytest.mark.parametrize("method", METHODS)
def test_one_number_for_all_groups_is_told_what_to_write(method, way):
    flatten, remedy = FLATTENING[way]
    model, optimizer = build(method)
    flatten(optimizer)
    with pytest.warns(UserWarning, match=rf"built with .*differ: matrix 0\.1, vector 0\.01\..*{remedy}") as told:
        step(model, optimizer)
    assert told[0].filename == __file__
    step(model, optimizer, 1)  # no second warning


@pytest.mark.parametrize("way", FLATTENING)
def test_it_is_told_whenever_it_happens(way):
    model, optimizer = build()
    step(model, optimizer)
    FLATTENING[way][0](optimizer)
    with pytest.warns(UserWarning, match="ratio is lost"):
        step(model, optimizer)


def test_a_copy_remembers():
    model, optimizer = copy.deepcopy(build())
    by_hand(optimizer)
    with pytest.warns(UserWarning, match="ratio is lost"):
        step(model, optimizer)


def test_rates_as_tensors_are_read_here():
    model = network()
    first, second = groups_of(model)
    optimizer = MuonAdam([{**first, "lr": torch.tensor(0.1)}, {**second, "lr": torch.tensor(0.01)}])
    for group in optimizer.param_groups:
        group["lr"].fill_(0.05)
    with pytest.warns(UserWarning, match="ratio is lost"):
        step(model, optimizer)


KEEPING = {
    "one_cycle": lambda o: schedulers.OneCycleLR(o, max_lr=[0.1, 0.01], total_steps=12),
    "cyclic": lambda o: schedulers.CyclicLR(o, base_lr=[0.02, 0.002], max_lr=[0.1, 0.01], step_size_up=3),
    "swa": lambda o: SWALR(o, swa_lr=[0.05, 0.005], anneal_epochs=3),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 8, eta_min=1e-4),  # one floor for all is torch's only one
    "warm_up": lambda o: schedulers.LambdaLR(o, lambda step: min(1.0, step / 3)),  # 0 at first
    "linear": lambda o: schedulers.LinearLR(o, total_iters=4),
    "plateau": lambda o: None,
}


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", KEEPING)
@pytest.mark.parametrize("method", METHODS)
def test_what_keeps_the_ratio_is_not_told(method, scheduler):
    model, optimizer = build(method)
    made = KEEPING[scheduler](optimizer)
    for index in range(10):
        step(model, optimizer, index, made)


def test_groups_that_were_built_alike_may_stay_alike():
    model = network()
    optimizer = SteepestDescent(model, lr=0.1)
    scheduler = schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
    for index in range(3):
        step(model, optimizer, index, scheduler)


def test_loaded_rates_are_meant():
    _, optimizer = build()
    by_hand(optimizer)
    other, resumed = build()
    resumed.load_state_dict(optimizer.state_dict())
    step(other, resumed)


def test_a_step_that_only_makes_the_state_is_not_told():
    model, optimizer = build()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_momentum_may_be_cycled(method):
    model, optimizer = build(method)
    made = schedulers.OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=12, base_momentum=0.5, max_momentum=0.9)
    seen = set()
    for index in range(10):
        step(model, optimizer, index, made)
        seen.add(float(optimizer.param_groups[0]["momentum"]))
        assert all(p.isfinite().all() for p in model.parameters())
    assert min(seen) < 0.6
    assert max(seen) > 0.85
