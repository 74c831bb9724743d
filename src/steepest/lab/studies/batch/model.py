"""What the model of a study means for batch sizes: batch normalisation, and how much of it Muon does not move."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from steepest.anatomy import route
from steepest.lab.tasks import make_task


@dataclass(frozen=True)
class ModelFacts:
    """What a look at the model found.

    Args:
        normalised: Names of its batch normalisations.
        others: Part of its parameters that are in no matrix, and so under Adam with a Muon.
        problem: Why it could not be built; None if it could.
    """

    normalised: tuple[str, ...]
    others: float
    problem: str | None = None


def look(task: str, preset: str) -> ModelFacts:
    """Build the model of a task once.

    Args:
        task: As `study.json` says, which may be anything.
        preset: Likewise.
    """
    try:
        model = make_task(task, preset).build_model(0)
    except (ValueError, OSError) as problem:  # unknown names, or data that are elsewhere
        return ModelFacts((), 0.0, str(problem))
    plan = route(model)
    sizes = {row.name: row.parameter.numel() for row in plan if row.trainable}
    others = sum(sizes[row.name] for row in plan if row.trainable and row.role != "matrix")
    kinds = (nn.modules.batchnorm._BatchNorm,)
    names = tuple(name for name, module in model.named_modules() if isinstance(module, kinds))
    return ModelFacts(names, others / sum(sizes.values()))
