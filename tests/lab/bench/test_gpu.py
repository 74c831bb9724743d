"""The whole benchmark of a GPU, rehearsed on the processor."""

import json

import pytest
import torch

from steepest.lab.bench import gpu
from steepest.lab.bench.certified import Polar, Steps
from steepest.lab.bench.gpu import FULL, REHEARSAL, Findings, Trained, measure_gpu, train_for
from steepest.lab.bench.shapes import make_shapes

PARTS = [
    "coefficients against their certificates",
    "steps of every method against float64",
    "steps of a layer, as they come",
    "additions to Muon",
    "a training",
    "steps of a layer, torch-fp32 compiled",
]


@pytest.fixture(scope="module")
def found():
    told = []
    found = measure_gpu("cpu", rehearsal=True, minutes=5, tell=told.append)
    assert told == PARTS
    return found


@pytest.mark.slow
def test_a_rehearsal_does_everything(found):
    assert found.wrong == []
    assert list(found.seconds) == PARTS
    assert found.left_out == ["steps of a layer, in CUDA graphs: the processor has no CUDA graphs"]
    assert [(model, way) for model, way, _ in found.cases] == [("a layer", "as they come"), ("a layer", "compiled")]
    plain, compiled = (case for _, _, case in found.cases)
    assert [row.contestant for row in plain.rows] == ["steepest", "torch", "torch-fp32"]
    assert [row.contestant for row in compiled.rows] == ["steepest", "torch-fp32-compiled"]
    assert all(row.milliseconds is not None and row.gaussian is None for row in (*plain.rows, *compiled.rows))
    assert [row["addition"] for row in found.additions][::5] == ["Muon", "Newton-Muon"]
    assert found.additions[0]["step_ratio"] == 1
    assert [row["every"] for row in found.additions] == [None] * 5 + [32]


@pytest.mark.slow
def test_a_training_ends_after_its_steps(found):
    trained = found.training
    assert (trained.preset, trained.steps) == ("demo", REHEARSAL.steps)
    assert trained.last_loss < trained.first_loss == pytest.approx(5.545, abs=1e-3)  # ln 256
    assert trained.tokens_per_second == pytest.approx(3 * 16 * 128 / trained.seconds)
    assert 0 < trained.optimizer_share < 1


@pytest.mark.slow
def test_the_content_is_plain(found):
    content = json.loads(json.dumps(found.content(), allow_nan=False))
    assert content["cases"][0]["model"] == "a layer"
    assert {"device", "card", "rehearsal", "polars", "steps", "cases", "additions", "training", "wrong"} <= set(content)


def fast(monkeypatch, *, trains=lambda: None):
    """Parts that take no time."""
    monkeypatch.setattr(gpu, "check_polars", lambda device, shapes: [])
    monkeypatch.setattr(gpu, "check_steps", lambda methods, config, tokens, device: [])
    monkeypatch.setattr(gpu, "_case", lambda *_: None)
    monkeypatch.setattr(gpu, "additions_cost", lambda *_, **__: [])
    monkeypatch.setattr(gpu, "train_for", lambda *_, **__: trains())


def test_it_says_what_multiplies_symmetric_matrices(monkeypatch):
    fast(monkeypatch)
    assert measure_gpu("cpu", rehearsal=True, minutes=4, tell=lambda _: None).symmetric is None
    monkeypatch.setattr(gpu, "kernel_for", lambda rows, dtype, device: torch.bmm if device.type == "cpu" else None)
    found = measure_gpu("cpu", rehearsal=True, minutes=4, tell=lambda _: None)
    assert found.symmetric.endswith(".bmm")


def test_what_there_is_no_time_for_is_left_out_and_named(monkeypatch):
    fast(monkeypatch)
    times = iter(range(0, 10_000, 50))
    found = measure_gpu("cpu", rehearsal=True, minutes=0.5, tell=lambda _: None, clock=lambda: next(times))
    assert list(found.seconds) == PARTS[:2]  # they begin after 50 and 150 s, but numbers are checked in any case
    assert found.left_out[0] == "steps of a layer, as they come: the 0.5 minutes were over. Give more --minutes."
    assert [line.partition(":")[0] for line in found.left_out][-2:] == PARTS[-2:]
    assert found.wrong == []


def test_a_part_that_fails_ends_no_other(monkeypatch):
    def fails():
        raise RuntimeError("no kernel\nand more")

    fast(monkeypatch, trains=fails)
    monkeypatch.setattr(gpu, "additions_cost", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    found = measure_gpu("cpu", rehearsal=True, minutes=4, tell=lambda _: None)
    assert found.failed == found.wrong == ["a training: RuntimeError, no kernel"]
    assert "additions to Muon: it does not fit into the memory, full" in found.left_out
    assert list(found.seconds) == PARTS


def test_what_is_off_is_named():
    found = Findings("cuda", "a card", rehearsal=False)
    found.polars.append(Polar("jordan", "bfloat16", "gram", "4 x 4", 0.7, 1.2, 0.5, 1.1, 0.2, 0.06))
    found.steps += [Steps("muon", "bfloat16", "w", 0.5, 0.1), Steps("adam", "bfloat16", "w", 0.05, 0.1)]
    found.training = Trained("small", 7, 1.0, 1.0, 5.0, None, 0.1, 1)
    assert found.wrong == ["jordan in bfloat16, gram, 4 x 4", "steps of muon", "a training, which diverged"]


def test_a_training_ends_in_time():
    trained = train_for("demo", device="cpu", seconds=0.0, steps=gpu.ENDLESS)
    assert trained.steps == 1


def test_the_full_plan_is_of_published_sizes():
    entries = [sum(m * n for m, n in make_shapes(model.shapes)) for model in FULL.models]
    # twelve squares of the width a layer; Llama's from its config: 2 · 2048² + 2 · 512 · 2048 + 3 · 8192 · 2048
    assert entries == [12 * 12 * 768**2, 24 * 12 * 1024**2, 16 * 60_817_408]
    assert FULL.methods is None
    assert FULL.seconds == 120
