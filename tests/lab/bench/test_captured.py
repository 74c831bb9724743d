"""Steps that are captured and compiled; CUDA's graphs and streams are stood in for."""

import contextlib

import pytest
import torch

from steepest.lab.bench.captured import Captured, captured, compiled
from steepest.lab.bench.contestants import CONTESTANTS, Settings
from steepest.lab.bench.examine import examine, make_workload


@pytest.fixture
def cuda(monkeypatch):
    """What is done, in order; a graph replays what was done while it was captured."""
    done = []

    class Graph:
        def __init__(self):
            self.taped = None

        def replay(self):
            done.append("replay")

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def capturing(graph):
        done.append("capture")
        yield
        done.append("end")

    @contextlib.contextmanager
    def on(stream):
        done.append(f"on {stream.name}")
        yield
        done.append("back")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    return done


def test_a_step_is_taken_three_times_captured_once_and_replayed(cuda):
    step = Captured(lambda: cuda.append("step"))
    step()
    first = ["side waits for main", "on side", "step", "back", "main waits for side"]
    assert cuda == first
    step()
    step()
    assert cuda == first * 3
    step()
    assert cuda[15:] == ["capture", "step", "end", "replay"]
    step()
    step()
    assert cuda[19:] == ["replay", "replay"]


def test_variants_are_contestants_of_their_own():
    own = captured(CONTESTANTS["steepest"])
    assert (own.name, own.note, own.ours) == ("steepest-graph", "defaults, in a CUDA graph", True)
    assert own.examined() is CONTESTANTS["steepest"]
    assert own.products_dtype(torch.float32, "cuda") == torch.bfloat16
    assert own.products_dtype(torch.float32, "cpu") == torch.float32
    other = compiled(CONTESTANTS["heavyball"])
    assert (other.name, other.note) == ("heavyball-compiled", "compiled, torch.compile, inductor")
    assert other.examined() is CONTESTANTS["heavyball-eager"]


@pytest.mark.slow
def test_a_compiled_step_is_the_step():
    plain = CONTESTANTS["torch-fp32"]
    grads = [torch.randn(4, 6), torch.randn(6, 4)]
    moved = []
    for one in (plain, compiled(plain, backend="eager")):
        params = [torch.ones(4, 6, requires_grad=True), torch.ones(6, 4, requires_grad=True)]
        step = one.build(list(params), Settings())
        for _ in range(2):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            step()
        moved.append(params)
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other)


def test_without_cuda_a_capture_fails_with_a_reason():
    work = make_workload([(4, 6)], dtype=torch.float32, device="cpu", seed=0, settings=Settings(), exact=False)
    found = examine(captured(CONTESTANTS["torch-fp32"]), work)
    assert isinstance(found, str)
