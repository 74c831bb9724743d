import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from steepest.lab.methods.combined import CombinedOptimizer


def twins() -> tuple[nn.Linear, nn.Linear]:
    one, two = nn.Linear(4, 3), nn.Linear(4, 3)
    two.load_state_dict(one.state_dict())
    return one, two


def combine(model: nn.Linear) -> CombinedOptimizer:
    return CombinedOptimizer(SGD([model.weight], lr=0.1, momentum=0.9), AdamW([model.bias], lr=0.01))


def train(model: nn.Module, optimizers, schedulers, rng: torch.Generator, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(5, 4, generator=rng)).square().sum().backward()
        for part in (*optimizers, *schedulers):
            part.step()
        for part in optimizers:
            part.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [lambda o: CosineAnnealingLR(o, 10), lambda o: LambdaLR(o, lambda t: 1 / (1 + t))])
def test_it_is_its_parts_one_after_the_other(schedule):
    one, two = twins()
    whole = combine(one)
    parts = [SGD([two.weight], lr=0.1, momentum=0.9), AdamW([two.bias], lr=0.01)]
    train(one, [whole], [schedule(whole)], torch.Generator().manual_seed(1), 6)
    train(two, parts, [schedule(part) for part in parts], torch.Generator().manual_seed(1), 6)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_a_restored_one_goes_on_exactly(rng):
    one, two = twins()
    first, second = combine(one), combine(two)
    train(one, [first], [scheduler := LambdaLR(first, lambda t: 0.9**t)], rng, 3)
    two.load_state_dict(one.state_dict())
    restored = LambdaLR(second, lambda t: 0.9**t)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch would share the tensors
    restored.load_state_dict(scheduler.state_dict())
    train(one, [first], [scheduler], torch.Generator().manual_seed(2), 3)
    train(two, [second], [restored], torch.Generator().manual_seed(2), 3)
    assert torch.equal(one.weight, two.weight)
    assert [g["lr"] for g in second.param_groups] == pytest.approx([0.1 * 0.9**6, 0.01 * 0.9**6])
    assert second.parts[1].param_groups[0] is second.param_groups[1]


def test_a_closure_runs_once_with_gradients():
    model, _ = twins()
    optimizer = combine(model)
    calls: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).square().sum()
        loss.backward()
        calls.append(loss.item())
        return calls[-1]

    before = model.bias.detach().clone()
    assert optimizer.step(closure) == calls[0]
    assert len(calls) == 1
    assert not torch.equal(model.bias, before)


def test_a_state_of_other_parts_is_refused():
    optimizer = combine(nn.Linear(2, 2))
    state = {"parts": optimizer.state_dict()["parts"][:1]}
    with pytest.raises(ValueError, match="The state is of 1 optimizers, this one combines 2"):
        optimizer.load_state_dict(state)
