"""A small linear regression onto every entry of parameters of all roles: for the optimizers and for the reference.

Losses and gradients belong together, batches differ from step to step, and the smallest loss is FLOOR.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steepest import Ada2, AdaInf, Norm, Sign, Spectral, View
from tests.reference.grid import Array, Block
from tests.reference.maximise import SCALES

ROWS, BATCH, FLOOR = 40, 16, 1.0
ROLES = ("matrix", "embedding", "head", "vector")
GROUPS: Mapping[str, tuple[str, list[tuple[int, ...]]]] = {  # role and shapes
    "dense": ("matrix", [(4, 5), (4, 5), (6, 3)]),
    "experts": ("matrix", [(2, 3, 4)]),  # two matrices for a norm on matrices, else one tensor
    "embedding": ("embedding", [(5, 3)]),
    "head": ("head", [(3, 4)]),
    "gains": ("vector", [(4,), (4,)]),
}
NAMES = {Spectral: "spectral", Sign: "sign", AdaInf: "ada_inf", Ada2: "ada_2"}
Norms = Mapping[str, Norm]


@lru_cache
def _data() -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(5)
    size = sum(int(np.prod(shape)) for _, shapes in GROUPS.values() for shape in shapes)
    return rng.normal(size=(ROWS, size)) / size**0.5, rng.normal(size=ROWS), rng.normal(size=size) / 4


@lru_cache
def _batch(step: int) -> tuple[Array, Array]:
    rows = np.random.default_rng(100 + step).choice(ROWS, BATCH, replace=False)
    return _data()[0][rows], _data()[1][rows]


def oracle(weights: list[Array], step: int) -> tuple[float, list[Array]]:
    """Loss and gradients by hand."""
    design, targets = _batch(step)
    residual = design @ np.concatenate([w.ravel() for w in weights]) - targets
    gradient = np.split(design.T @ residual / BATCH, np.cumsum([w.size for w in weights])[:-1])
    return FLOOR + 0.5 * (residual**2).mean(), [g.reshape(w.shape) for g, w in zip(gradient, weights, strict=True)]


def loss_of(parameters: list[nn.Parameter], step: int) -> Tensor:
    """The same loss, for autograd."""
    design, targets = (torch.from_numpy(x) for x in _batch(step))
    return FLOOR + 0.5 * (design @ torch.cat([p.flatten() for p in parameters]) - targets).square().mean()


def train(optimizer: Any, parameters: list[nn.Parameter], steps: int) -> list[Array]:
    """All weights after each step, as one vector."""
    trajectory = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(parameters, step)
        loss.backward()
        optimizer.step(loss=loss)
        trajectory.append(torch.cat([p.detach().flatten() for p in parameters]).numpy())
    return trajectory


def _pieces() -> list[tuple[str, str, Array]]:
    """Group, role and starting point of each parameter."""
    pieces, start = [], _data()[2]
    for name, (role, shapes) in GROUPS.items():
        for shape in shapes:
            piece, start = np.split(start, [int(np.prod(shape))])
            pieces.append((name, role, piece.reshape(shape)))
    return pieces


def parameter_groups() -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """For an optimizer; and all parameters in order."""
    groups: dict[str, dict[str, Any]] = {}
    parameters = []
    for name, role, start in _pieces():
        view = {"view": View(experts=True)} if start.ndim == 3 else {}
        parameters.append(nn.Parameter(torch.from_numpy(start.copy())))
        groups.setdefault(name, {"params": [], "role": role, **view})["params"].append(parameters[-1])
    return list(groups.values()), parameters


def blocks(norms: Norms, options: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """For the reference: one per matrix for norms on matrices, else one per tensor; `options` are per role."""
    found = []
    for _, role, start in _pieces():
        norm = norms[role]
        scale = SCALES[norm.scale] if isinstance(norm, Spectral) else lambda m, n: 1.0
        for w in start if start.ndim == 3 and norm.matrix else [start]:
            own = scale(*w.shape) if norm.matrix else 1.0
            found.append(Block(start=w, label=role, norm=NAMES[type(norm)], scale=own, **options[role]))
    return found
