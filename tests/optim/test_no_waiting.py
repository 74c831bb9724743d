"""A step never reads a number off the device: on the meta device, that has no numbers, reading one is an error."""

import pytest
import torch

from steepest import Adam, Fixed, Momo, Muon, MuonAdam, MuonMax, PolarGrad, Scion
from steepest.optim.momo.clipping import Witness
from tests.optim.training import network

METHODS = {
    "muon": lambda model, **o: Muon(model, weight_decay=0.1, **o),
    "muon_adam": lambda model, **o: MuonAdam(model, **o),
    "scion": lambda model, **o: Scion(model, **o),
    "polar_grad": lambda model, **o: PolarGrad(model, torch.tensor(0.1), **o),
    "muon_max": lambda model, **o: MuonMax(model, weight_decay=0.1, **o),
    "muon_max_stale": lambda model, **o: MuonMax(model, dual="stale", **o),
    "adam": lambda model, **o: Adam(model, betas=(0.9, 0.9), **o),
}


@pytest.mark.slow
@pytest.mark.parametrize("step_size", [Fixed(), Momo(), Momo("auto"), Momo(bookkeeping="direct")], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_nothing(method, step_size, monkeypatch):
    monkeypatch.setattr(Witness, "look", lambda self: None)  # which reads at steps 1, 2, 4, ...
    model = network().to("meta")
    optimizer = METHODS[method](model, step_size=step_size)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step(loss=torch.empty((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.diagnostics()
