"""Losses of a few steps of every method, as the declared version of the training code gives them.

If one of them moves by more than rounding does, raise `TRAINING` in `steepest/lab/runs/version.py` and write the new
losses here: `python tests/lab/runs/test_version.py` prints them.
"""

import pytest
import torch

from steepest.lab.methods import DERIVED, METHODS, build_optimizer, options_of
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.runs.config import configure
from steepest.lab.runs.train import train_run
from steepest.lab.runs.version import TRAINING, code_version
from steepest.lab.tasks import make_task
from steepest.optim import SteepestDescent
from tests.cases import cases

VERSION = 3
LOSSES = {
    "adamw": [3.465736, 3.349246, 3.214725, 3.053614, 2.866299, 2.682447],
    "sgd": [3.465736, 3.448676, 3.424884, 3.39546, 3.361332, 3.323214],
    "torch-muon": [3.465736, 3.391382, 3.305632, 3.201537, 3.075806, 2.92961],
    "muon": [3.465736, 3.391382, 3.304164, 3.195704, 3.060805, 2.89946],
    "muon-plain": [3.465736, 3.391382, 3.304164, 3.195738, 3.060248, 2.901273],
    "muon-jordan": [3.465736, 3.391382, 3.305621, 3.201471, 3.075686, 2.92942],
    "muon-nonic": [3.465736, 3.391382, 3.302802, 3.190746, 3.050003, 2.884314],
    "muon-wd": [3.465736, 3.391382, 3.304421, 3.196864, 3.063726, 2.904792],
    "muon-plain-wd": [3.465736, 3.391382, 3.304421, 3.196907, 3.063179, 2.906708],
    "adam": [3.465736, 3.349246, 3.214725, 3.053614, 2.866299, 2.682447],
    "newton-muon": [3.465736, 3.391382, 3.305614, 3.201229, 3.071871, 2.919092],
    "parts": [3.465736, 3.322196, 3.163944, 2.990008, 2.802493, 2.606698],
    "scion": [3.465736, 3.405841, 3.334303, 3.246646, 3.139357, 3.014776],
    "scion-momo": [3.465736, 3.405841, 3.334303, 3.246646, 3.159503, 3.159503],
    "muonadam": [3.465736, 3.322196, 3.159162, 2.974187, 2.768404, 2.562098],
    "polargrad": [3.465736, 3.322196, 3.168849, 2.991333, 2.780534, 2.563949],
    "muonmax": [3.465736, 3.322196, 3.182863, 3.047041, 2.912492, 2.777094],
    "muonadam-momo": [3.465736, 3.322196, 3.199213, 3.199213, 3.199213, 3.199213],
    "polargrad-momo": [3.465736, 3.322196, 3.20376, 3.202367, 3.201693, 3.2013],
    "muonmax-momo": [3.465736, 3.322196, 3.210763, 3.207104, 3.205221, 3.204079],
    "shampoo-muon": [3.465736, 3.398586, 3.325659, 3.245036, 3.156095, 3.053451],
    "shampoo-muon-momo": [3.465736, 3.398586, 3.325659, 3.245036, 3.188971, 3.188971],
    "sign-descent": [3.465736, 3.45807, 3.449874, 3.441054, 3.431504, 3.421115],
    "pethick-scion": [3.465736, 3.30322, 3.145213, 2.995215, 2.855947, 2.726734],
    "newton-muon-max": [3.465736, 3.322196, 3.182863, 3.047041, 2.912492, 2.777094],
    "sign-descent-momo": [3.465736, 3.45807, 3.449874, 3.441054, 3.431504, 3.421115],
    "pethick-scion-momo": [3.465736, 3.30322, 3.211285, 3.207292, 3.205238, 3.203995],
    "newton-muon-max-momo": [3.465736, 3.322196, 3.210763, 3.207104, 3.205221, 3.204079],
}
RUN = (2.29249400, 2.28896267)  # final and tuning loss of four steps on digits
STEPS = 6


def losses(method: str) -> list[float]:
    """Training losses of a small transformer on a repeating text; no file, no generator but torch's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocabulary=32, layers=2, width=32, head_size=16))
    tokens = (torch.arange(8 * 33, device="cpu").view(8, 33) ** 2 + torch.arange(33, device="cpu")) % 32
    changes = {"newton-muon": {"every": 2, "first": 1}}  # so that layers are looked at within these steps
    changes["parts"] = {"powers": 0.3, "powers_every": 2, "metric": "noise", "slow": 0.98, "table_lr": 0.04}
    changes |= {name: {"lower_bound": 3.2} for name in METHODS if name.endswith("-momo")}  # so that it shortens steps
    optimizer = build_optimizer(method, model, {**options_of(method), **changes.get(method, {})})
    found: list[float] = []
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step(loss=loss) if isinstance(optimizer, SteepestDescent) else optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_the_losses_are_of_the_declared_version():
    assert TRAINING == VERSION
    assert code_version() == f"training {VERSION}"
    newcomers = {*DERIVED, *(f"{name}-momo" for name in DERIVED)}  # may wait for the next version
    assert set(METHODS) - newcomers <= set(LOSSES) <= set(METHODS)


@pytest.mark.slow
@cases("method", LOSSES)
def test_every_method_trains_as_its_version_does(method):
    # 1e-4: processors round differently, and torch's Muon multiplies in bfloat16
    assert losses(method) == pytest.approx(LOSSES[method], rel=2e-3 if method == "torch-muon" else 1e-4)


def test_a_run_sees_its_examples_in_the_order_of_its_version(tmp_path):
    config = configure(make_task("digits"), method="muon", seed=0, steps=4)
    result = train_run(config, tmp_path / "run")
    assert (result.final_loss, result.tuning_loss) == pytest.approx(RUN, rel=1e-3)


if __name__ == "__main__":
    for name in METHODS:
        print(f"    {name!r}: {[float(f'{loss:.7g}') for loss in losses(name)]},")  # noqa: T201
