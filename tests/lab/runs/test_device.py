"""Which device, its clock and its memory; CUDA's events are stood in for."""

import os

import pytest
import torch

from steepest.lab.cli.runs import AUTO as TYPED
from steepest.lab.errors import UsageError
from steepest.lab.runs import device as module
from steepest.lab.runs.device import (
    AUTO,
    Stopwatch,
    clocked,
    deterministic,
    extra_bytes,
    find_device,
    most_bytes,
    synchronize,
)
from steepest.lab.runs.memory import peak_memory
from tests.cases import cases

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def accelerator(monkeypatch):
    """torch.accelerator of a machine that has one: what is called, in order."""
    calls = []

    class Fake:
        @staticmethod
        def is_available():
            return True

        @staticmethod
        def current_accelerator():
            return CUDA

        @staticmethod
        def synchronize(device):
            calls.append(("synchronize", device.type))

        @staticmethod
        def reset_peak_memory_stats(device):
            calls.append(("reset", device.type))

        @staticmethod
        def memory_allocated(device):
            return 100

        @staticmethod
        def max_memory_allocated(device):
            calls.append(("peak", device.type))
            return 350

    monkeypatch.setattr(torch, "accelerator", Fake)
    return calls


def test_a_machine_without_an_accelerator_has_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert find_device("cpu") == find_device(AUTO) == CPU
    with pytest.raises(UsageError, match=r"--device cuda: this machine has cpu\. Give one of them, or auto\."):
        find_device("cuda")
    assert TYPED == AUTO


@pytest.mark.usefixtures("accelerator")
def test_auto_is_the_accelerator():
    assert find_device(AUTO) == find_device("cuda") == CUDA
    assert find_device("cpu") == CPU
    with pytest.raises(UsageError, match="--device xpu: this machine has cpu and cuda"):
        find_device("xpu")


def test_marks_on_the_cpu_are_readings_of_the_clock():
    readings = iter([1.0, 3.0, 3.5])
    watch = Stopwatch(CPU, clock=lambda: next(readings))
    assert watch.seconds() == []
    for _ in range(3):
        watch.mark()
    assert watch.seconds() == [2.0, 0.5]


def test_marks_on_cuda_are_events_and_wait_for_nothing_until_asked(accelerator):
    done = []

    class Event:
        def __init__(self):
            self.place = len(done)

        def record(self):
            done.append(f"record {self.place}")

        def synchronize(self):
            done.append(f"wait for {self.place}")

        def elapsed_time(self, other):
            return 1000.0 * (other.place - self.place)

    watch = Stopwatch(CUDA, event=Event)
    for _ in range(3):
        watch.mark()
    assert done == ["record 0", "record 1", "record 2"]
    assert watch.seconds() == [1.0, 1.0]
    assert done[3:] == ["wait for 2"]
    assert accelerator == []


def test_other_accelerators_are_waited_for_at_each_mark(accelerator):
    readings = iter([1.0, 3.0])
    watch = Stopwatch(torch.device("mps"), clock=lambda: next(readings))
    watch.mark()
    watch.mark()
    assert watch.seconds() == [2.0]
    assert accelerator == [("synchronize", "mps")] * 2


def test_the_clock_runs_while_the_work_does():
    done = []
    assert clocked(lambda: done.append(torch.ones(3).sum()), device="cpu") > 0
    assert len(done) == 1


def test_only_accelerators_are_waited_for(accelerator):
    synchronize(CPU)
    assert accelerator == []
    synchronize(CUDA)
    assert accelerator == [("synchronize", "cuda")]


def test_memory_is_that_of_the_process_or_of_tensors_on_the_device(accelerator):
    assert most_bytes(CPU) == pytest.approx(peak_memory(), rel=0.1)
    assert most_bytes(CUDA) == 350
    accelerator.clear()
    assert extra_bytes(lambda: accelerator.append("work"), device=CUDA) == 250
    assert accelerator == [("reset", "cuda"), "work", ("peak", "cuda")]


@cases("asked", [True, False])
def test_determinism_is_asked_for_and_given_back(asked, monkeypatch):
    monkeypatch.delenv(module._WORKSPACE, raising=False)
    with deterministic(asked):
        assert torch.are_deterministic_algorithms_enabled() == asked
        assert torch.backends.cudnn.deterministic == asked
        assert (module._WORKSPACE in os.environ) == asked
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert module._WORKSPACE not in os.environ
    monkeypatch.setenv(module._WORKSPACE, ":16:8")
    with deterministic(asked):
        assert os.environ[module._WORKSPACE] == ":16:8"
    assert os.environ[module._WORKSPACE] == ":16:8"
