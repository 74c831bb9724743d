"""What an addition to a method costs: training steps with and without it, in turns, in one process.

Each pair is one training step (forward, backward, optimizer) of either, on models with the same weights and the same
batch; ratios are taken within pairs. The weights stay where they are, so that every pair does the same work.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest import InputMoment, Momo, Muon, MuonAdam, MuonMax, NewtonMuon, PolarGrad, Scion, SteepestDescent
from steepest.lab.bench.timing import paired_ratio, quartiles
from steepest.lab.bench.train_share import CYCLE, Trainer, apart, in_turns, weighed
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.tasks.task import Batch, Task
from steepest.stages import RowScaling
from steepest.stages.inputs import InputMoments

TINY = 1e-9  # learning rate
RECIPES: Mapping[str, Callable[..., SteepestDescent]] = {
    "Muon": Muon,
    "MuonAdam": MuonAdam,
    "Scion": Scion,
    "PolarGrad": PolarGrad,
    "MuonMax": MuonMax,
}
CASES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "full for every layer": {"structure": "full"},
    "paper_record4": {"preset": "paper_record4"},
}


_LOOKS = InputMoment(every=CYCLE, first=CYCLE - 1)
ADDITIONS: Mapping[str, tuple[Callable[..., SteepestDescent], Mapping[str, Any]]] = {
    "Muon": (Muon, {}),
    "Muon, rows of one length": (Muon, {"stages": [RowScaling()]}),
    "Muon with Momo": (Muon, {"step_size": Momo()}),
    "MuonMax": (MuonMax, {}),
    "MuonMax with Momo": (MuonMax, {"step_size": Momo()}),
    "Newton-Muon": (NewtonMuon, {"precondition": _LOOKS}),
}
REFRESHING = ("Newton-Muon",)


def momo_cost(task: Task, name: str, dual: str, *, pairs: int, device: str = "cpu") -> dict[str, object]:
    """One row of the table: a method and its Momo version.

    Args:
        task: Whose model and batches.
        name: A key of `RECIPES`.
        dual: "cached" or "stale".
        pairs: Of training steps.
        device: Where they are taken.
    """

    def trainer(**options: object) -> Trainer:
        model = task.build_model(0).to(device)
        return Trainer(name, model, task.loss, RECIPES[name](model, TINY, **options), device=device)

    base = trainer(**({"dual": dual} if name == "MuonMax" else {}))
    momo = trainer(dual=dual, step_size=Momo())
    examples = torch.arange(task.budget.batch_size, device="cpu")
    batches = (task.batch(examples + index) for index in range(CYCLE + pairs))
    times = in_turns({"base": base, "momo": momo}, batches)
    ratio = paired_ratio([one.whole for one in times["momo"]], [one.whole for one in times["base"]])
    batch = task.batch(examples)
    return {
        "method": name,
        "dual": dual,
        "pairs": pairs,
        "step_ms": round(1e3 * statistics.median(one.whole for one in times["base"]), 2),
        "step_ratio": round(ratio.median, 4),
        "step_ratio_quarter": round(ratio.low, 4),
        "step_ratio_three_quarters": round(ratio.high, 4),
        "optimizer_ms": round(1e3 * statistics.median(one.optimizer for one in times["base"]), 2),
        "optimizer_momo_ms": round(1e3 * statistics.median(one.optimizer for one in times["momo"]), 2),
        "extra_memory_mb": round(base.extra_bytes(batch) / 1e6, 2),
        "extra_memory_momo_mb": round(momo.extra_bytes(batch) / 1e6, 2),
    }


def additions_cost(
    config: GPTConfig, tokens: Tensor, *, every: int, pairs: int, device: str, narrow: bool
) -> list[dict[str, object]]:
    """What each addition takes beside plain Muon: one row for each, of training steps in turns.

    One step in four refreshes layer inputs, where that is done at all; they are weighed as one in `every`.

    Args:
        config: Of the model.
        tokens: A batch (batch, time + 1), as `random_tokens` makes it.
        every: Steps per refresh.
        pairs: Rounds: whole cycles of four, at least two.
        device: Where.
        narrow: Whether forward and backward pass are in bfloat16.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=narrow):
            return _cross_entropy(model, batch)

    trainers: dict[str, Trainer] = {}
    for name, (recipe, options) in ADDITIONS.items():
        torch.manual_seed(0)
        model = GPT(config).to(device)
        trainers[name] = Trainer(name, model, loss, recipe(model, TINY, **options), device=device)
    batch = tokens[:, :-1], tokens[:, 1:]
    seconds = in_turns(trainers, itertools.repeat(batch, CYCLE + pairs))
    base = seconds["Muon"]
    rows: list[dict[str, object]] = []
    for name, own in seconds.items():
        period = every if name in REFRESHING else None
        together = list(zip(own, base, strict=True))
        rows.append(
            {
                "addition": name,
                "every": period,
                "step_ms": weighed([1e3 * one.whole for one in own], every=period).median,
                "optimizer_ms": weighed([1e3 * one.optimizer for one in own], every=period).median,
                "step_ratio": weighed([one.whole / muon.whole for one, muon in together], every=period).median,
                "optimizer_ratio": weighed([a.optimizer / b.optimizer for a, b in together], every=period).median,
                "extra_mib": trainers[name].extra_bytes(batch) / 2**20,
            }
        )
    return rows


def random_tokens(count: int) -> Tensor:
    """At least so many bytes as a step of a language model reads them: (batch, time + 1)."""
    window = min(1024, count)
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randint(256, (count // window, window + 1), generator=generator, device="cpu")


def newton_muon_cost(
    name: str, config: GPTConfig, tokens: Tensor, *, every: int, pairs: int, device: str = "cpu"
) -> dict[str, object]:
    """One row of the table: Muon and Newton-Muon.

    One step in four refreshes, so that both kinds of step have enough pairs. They are measured apart and weighed as
    one refresh in `every` steps: ((every - 1) · median ordinary ratio + median refresh ratio) / every.

    Args:
        name: A key of `CASES`.
        config: Of the model.
        tokens: (batch, time + 1), what a step reads.
        every: Steps per refresh, for the weighed ratio.
        pairs: Of training steps.
    """
    options = dict(CASES[name])
    moment = InputMoment.preset(str(options.pop("preset", "default")), every=CYCLE, **options)

    def trainer(recipe: Callable[..., SteepestDescent], **options: object) -> Trainer:
        torch.manual_seed(0)
        model = GPT(config)
        model = model.to(device)
        return Trainer(recipe.__name__, model, _cross_entropy, recipe(model, TINY, **options), device=device)

    base, newton = trainer(Muon), trainer(NewtonMuon, precondition=moment)
    batches = itertools.repeat((tokens[:, :-1], tokens[:, 1:]), CYCLE + pairs)
    times = in_turns({"base": base, "newton": newton}, batches)
    ratios = [own.whole / one.whole for own, one in zip(times["newton"], times["base"], strict=True)]
    ordinary, refresh = map(quartiles, apart(ratios))
    optimizer = cast(SteepestDescent, newton.optimizer)
    plan = optimizer.plan
    (stage,) = (one for one in optimizer.stages if isinstance(one, InputMoments))
    tensors = [state[k] for state in optimizer.state.values() for k in ("input_moment", "input_mass") if k in state]
    tensors += [powers for row in plan if (powers := stage.powers_of(row.parameter)) is not None]
    kept = {one.data_ptr(): one for one in tensors}
    return {
        "case": name,
        "width": config.width,
        "layers": config.layers,
        "tokens": tokens[:, 1:].numel(),
        "pairs": pairs,
        "muon_step_ms": round(1e3 * statistics.median(one.whole for one in times["base"]), 1),
        "ordinary_ratio": round(ordinary.median, 4),
        "ordinary_quartiles": ordinary.span(".4f"),
        "refresh_ratio": round(refresh.median, 4),
        "every": every,
        "ratio": round((ordinary.median * (every - 1) + refresh.median) / every, 4),
        "planned_bytes": sum(row.moment_bytes + row.inverse_bytes for row in plan),
        "held_bytes": sum(one.nbytes for one in kept.values()),  # layers that share a moment hold the same tensors
    }


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
