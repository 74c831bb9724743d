"""Stages in a run of all kinds of parameters, beside the reference."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from steepest import Ada2, AdaInf, Euclid, Hybrid, Max, Momo, Spectral, SteepestDescent
from tests.reference import grid
from tests.reference.regression import ROLES, blocks, oracle, parameter_groups, train

STEPS = 50
LR = {"matrix": 0.5, "embedding": 0.2, "head": 0.2, "vector": 0.2}
PLACES = (0, 1, 2, 3, 3)  # of the reference's matrices, the parameters: the last has two
MODES = {
    "constrained": (Max(), ("max", *ROLES), False, AdaInf()),
    "regularized": (Euclid(), ("euclid", *ROLES), True, Ada2()),
    "hybrid": (Hybrid(), ("euclid", ("max", "matrix"), "embedding", "head", "vector"), True, Ada2()),
}


def sometimes(step):
    """A lower bound that binds on every third step only."""
    return 1.3 if step % 3 == 2 else 0.0


WAYS = {  # mode, Nesterov, decay, Momo's options, dual
    "plain": ("constrained", False, 0.0, None, "cached"),
    "nesterov, decay": ("constrained", True, 0.3, None, "cached"),
    "regularized": ("regularized", False, 0.0, None, "cached"),
    "momo": ("constrained", True, 0.3, {"lower_bound": sometimes}, "cached"),
    "momo, direct": ("hybrid", False, 0.3, {"lower_bound": 1.3, "bookkeeping": "direct"}, "cached"),
    "momo, stale": ("hybrid", True, 0.3, {"lower_bound": 1.3}, "stale"),
}


def check_against_reference(
    stages, around: Callable[[int], grid.Around] | None, way: str, error: float = 1e-9, *, beside=None
):
    """Fifty steps of all parameters equal those of the reference.

    Args:
        stages: Of the optimizer.
        around: From the place of a matrix' parameter to the reference's stage; None: nothing around the norm.
        way: One of `WAYS`.
        error: Of weights, where rounding grows in matrices that are nearly singular.
        beside: What weights make of directions.

    Returns:
        The optimizer, and the reference's steps.
    """
    mode, nesterov, decay, momo, dual = WAYS[way]
    product, tree, regularized, other = MODES[mode]
    norms = {"matrix": Spectral(scale="none", polar="svd"), **dict.fromkeys(ROLES[1:], other)}
    groups, parameters = parameter_groups()
    optimizer = SteepestDescent(
        groups,
        lr=LR,
        momentum=0.9,
        nesterov={role: nesterov and role == "matrix" for role in ROLES},
        weight_decay=decay,
        betas=(0.9, 0.95),
        norms=norms,
        product=product,
        regularized=regularized,
        step_size=None if momo is None else Momo(**momo),
        dual=dual,
        stages=stages,
    )
    options = {
        role: {"lr": LR[role], "weight_decay": decay, "nesterov": nesterov and role == "matrix"} for role in ROLES
    }
    staged = [
        replace(block, around=around and around(PLACES[place]), beside=beside) if block.label == "matrix" else block
        for place, block in enumerate(blocks(norms, options))
    ]
    method = grid.Method(
        tree,
        regularized=regularized,
        lower_bound=None if momo is None else momo["lower_bound"],
        stale=dual == "stale",
    )
    expected = grid.descend(staged, oracle, STEPS, method)
    for ours, theirs in zip(train(optimizer, parameters, STEPS), expected, strict=True):
        np.testing.assert_allclose(ours, np.concatenate([w.ravel() for w in theirs.weights]), rtol=0, atol=error)
    if momo is not None:
        assert optimizer.diagnostics()["t"] == pytest.approx(expected[-1].length, rel=1e-6)
        assert any(step.length < 1 for step in expected)  # or Momo would not have been tested
    return optimizer, expected
