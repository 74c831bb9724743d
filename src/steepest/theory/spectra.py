"""The synthetic study: scores of six directions on quadratics of known curvature and inputs.

H has the eigenvalues exp(-τ (k-1)^p) from 1 down to 1e-4. Inputs are normal with variance `spike` along one axis and
1 along the others; W - W* is standard normal. One simulation draws both and scores the directions on the surrogate.

H is diagonal here. A rotation of the outputs turns W - W*, whose distribution has no preferred axes, and all six
directions turn with it: the scores have the same distribution.

Source:
    arXiv:2604.01472, section 4.2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from steepest.linalg import polar
from steepest.names import unknown_name
from steepest.theory.scores import surrogate_score
from steepest.theory.surrogate import preconditioned

Direction = Literal["gradient", "muon", "muon-ns5", "newton-muon", "newton-muon-ns5", "newton"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SMALLEST = 1e-4  # eigenvalue of H


@dataclass(frozen=True)
class Case:
    """One setting.

    Args:
        tokens: N, inputs per simulation.
        decay: p; 0.3 leaves a few large eigenvalues, 2.4 many.
        spike: Variance of the inputs along one axis.
    """

    tokens: int
    decay: float
    spike: float


CASES: Mapping[str, Case] = {
    "few-large": Case(8192, 0.3, 64.0),
    "many-large": Case(8192, 2.4, 64.0),
    "few-tokens": Case(1024, 0.3, 64.0),
    "no-spike": Case(8192, 0.3, 1.0),
}
"""The problems of `steepest theory scores`, by name."""


def simulate(case: str | Case, *, simulations: int, seed: int = 0, size: int = 512) -> dict[Direction, Tensor]:
    """Score the six directions on random quadratics.

    Args:
        case: A key of `CASES`, or a case.
        simulations: How many; the paper has 1024. The first ones do not depend on their number.
        seed: Of the random numbers.
        size: m = n.

    Returns:
        For each direction (simulations,), units of the loss.

    Raises:
        ValueError: If the case is unknown, a number is below 1 (`size`: 2), or there are fewer tokens than inputs.
    """
    if isinstance(case, str):
        if case not in CASES:
            raise ValueError(unknown_name("case", case, CASES))
        case = CASES[case]
    if simulations < 1 or size < 2:
        raise ValueError(
            f"A study takes simulations of at least 1 and size of at least 2, got {simulations} and {size}."
        )
    if case.tokens < size:
        raise ValueError(
            f"{case.tokens} tokens leave the moment of {size} inputs singular. Take at least {size} tokens."
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    eigenvalues = curvature_spectrum(size, decay=case.decay)
    rows = [_scores(case, eigenvalues, generator) for _ in range(simulations)]
    return {name: torch.stack([row[name] for row in rows]) for name in DIRECTIONS}


def curvature_spectrum(size: int, *, decay: float) -> Tensor:
    """Eigenvalues exp(-τ (k-1)^p), k = 1 ... size, with τ such that the last is `SMALLEST`.

    Args:
        size: Number of eigenvalues.
        decay: p.

    Returns:
        (size,), falling from 1.
    """
    places = torch.linspace(0, 1, size, dtype=torch.float64, device="cpu")
    return torch.exp(math.log(SMALLEST) * places**decay)


def _scores(case: Case, eigenvalues: Tensor, generator: torch.Generator) -> dict[Direction, Tensor]:
    size = len(eigenvalues)
    displacement = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
    inputs = torch.randn(size, case.tokens, generator=generator, dtype=torch.float64, device="cpu")
    inputs[0] *= math.sqrt(case.spike)
    moment = inputs @ inputs.mT / case.tokens
    gradient = eigenvalues.unsqueeze(-1) * displacement @ moment
    newton_muon = preconditioned(gradient, moment)
    directions: dict[Direction, Tensor] = {
        "gradient": gradient,
        "muon": polar(gradient, method="svd"),
        "muon-ns5": polar(gradient, method="newton-schulz", coefficients="jordan"),
        "newton-muon": polar(newton_muon, method="svd"),
        "newton-muon-ns5": polar(newton_muon, method="newton-schulz", coefficients="jordan"),
        "newton": displacement,
    }
    curvature = torch.diag(eigenvalues)
    return {name: surrogate_score(q, gradient, curvature, moment) for name, q in directions.items()}
