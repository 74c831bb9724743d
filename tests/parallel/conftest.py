"""Worlds of ranks, and what one process comes to, once for all tests of this folder."""

import functools

import pytest
import torch

from tests.parallel.training import STEPS, steps_given, steps_trained, weights
from tests.processes import World


@pytest.fixture(scope="session")
def world():
    """The world of a number of ranks."""
    started = {}
    yield lambda size: started.setdefault(size, World(size))
    for each in started.values():
        each.end()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The file of the weights after each step of one process, by method, and by whether gradients are set by hand."""
    folder = tmp_path_factory.mktemp("references")

    @functools.cache
    def written(method, *, given):
        found, shares = [], []
        for laid, optimizer in (steps_given if given else steps_trained)(method, "alone"):
            found.append(weights(laid))
            shares.append(optimizer.diagnostics().get("t"))
        assert shares[0] is None or sum(t < 1 for t in shares) >= STEPS / 4, "Momo decided nothing"
        torch.save(found, folder / f"{method} {given}.pt")
        return str(folder / f"{method} {given}.pt")

    return written
