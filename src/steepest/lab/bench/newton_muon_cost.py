"""What Newton-Muon costs beyond Muon: training steps of both in turns, in one process.

Each pair is one training step (forward, backward, optimizer) of either, on models with the same weights and the same
batch, in alternating order. Ordinary steps and steps that refresh are measured apart, and weighed as one refresh in
`--every` steps: ratio = (every - 1) / every · median ordinary ratio + 1 / every · median refresh ratio. In the
benchmark one step in four refreshes, so that both medians have enough pairs.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steepest import InputMoment, Muon, NewtonMuon, SteepestDescent
from steepest.lab.models.gpt import GPT, GPTConfig

WARM_UP = 4
CYCLE = 4
TINY = 1e-9  # learning rate: the weights stay where they are, so that every pair does the same work
CASES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "full for every layer": {"structure": "full"},
    "paper_record4": {"preset": "paper_record4"},
}


class Trainer:
    """A model and an optimizer."""

    def __init__(self, config: GPTConfig, optimizer: Callable[..., SteepestDescent], **options: object) -> None:
        torch.manual_seed(0)
        self.model = GPT(config)
        self.optimizer = optimizer(self.model, TINY, **options)

    def seconds(self, tokens: Tensor) -> float:
        """Of one training step."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def newton_muon_cost(name: str, config: GPTConfig, tokens: Tensor, *, every: int, pairs: int) -> dict[str, object]:
    """One row of the table.

    Args:
        name: A key of `CASES`.
        config: Of the model.
        tokens: (batch, time + 1), what a step reads.
        every: Steps per refresh, for the weighed ratio.
        pairs: Of training steps.
    """
    options = dict(CASES[name])
    moment = InputMoment.preset(str(options.pop("preset", "default")), every=CYCLE, **options)
    base, newton = Trainer(config, Muon), Trainer(config, NewtonMuon, precondition=moment)
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for index in range(WARM_UP + pairs):
        if index % 2:
            second, first = newton.seconds(tokens), base.seconds(tokens)
        else:
            first, second = base.seconds(tokens), newton.seconds(tokens)
        if index >= WARM_UP:
            times[index % CYCLE == CYCLE - 1].append((first, second))
    quarters = {kind: statistics.quantiles([n / b for b, n in own], n=4) for kind, own in times.items()}
    ordinary, refresh = (quarters[kind] for kind in (False, True))
    keys = ("input_moment", "input_mass", "input_powers")
    kept = {state[k].data_ptr(): state[k] for state in newton.optimizer.state.values() for k in keys if k in state}
    held = sum(tensor.nbytes for tensor in kept.values())  # layers that share a moment hold the same tensors
    planned = sum(row.moment_bytes + row.inverse_bytes for row in newton.optimizer.plan)
    return {
        "case": name,
        "width": config.width,
        "layers": config.layers,
        "tokens": tokens[:, 1:].numel(),
        "pairs": pairs,
        "muon_step_ms": round(1e3 * statistics.median(b for own in times.values() for b, _ in own), 1),
        "ordinary_ratio": round(ordinary[1], 4),
        "ordinary_quartiles": f"{ordinary[0]:.4f} to {ordinary[2]:.4f}",
        "refresh_ratio": round(refresh[1], 4),
        "every": every,
        "ratio": round((ordinary[1] * (every - 1) + refresh[1]) / every, 4),
        "planned_bytes": planned,
        "held_bytes": held,
    }
