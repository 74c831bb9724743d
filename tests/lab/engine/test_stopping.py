"""Signals let workers save first; what is said meanwhile is true, and nothing is left running."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from steepest.lab.engine.pool import Pool
from steepest.lab.engine.stopping import SIGNALS, attend, counting_signals
from tests.lab.processes import ended, rows_written, steepest, wait_for, workers_of

COMMAND = ("race", "--task", "digits", "--methods", "adamw,muon", "--seeds", 1, "--steps", 100_000, "--workers", 2)


def attended(pool, work, *signals):
    """Attend to one worker while signals come in, each after the answer to the one before."""
    told, before = [], signal.getsignal(signal.SIGINT)

    def send():
        wait_for(lambda: signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, before), timeout=20)
        for number, sent in enumerate(signals, start=1):
            os.kill(os.getpid(), sent)
            wait_for(lambda number=number: len(told) >= number, timeout=20)

    with ThreadPoolExecutor(2) as threads:
        slots = [threads.submit(work, pool)]
        sender = threads.submit(send)
        try:
            attend(slots, pool, update=lambda: None, tell=told.append, patience_s=60)
        finally:
            sender.result()
    return told


def saves(pool):
    pool.stop.wait()
    pool.kill.wait(1.5)


def saves_for_ever(pool):
    assert pool.kill.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_stops_the_workers_and_waits_until_they_have_saved(sent):
    pool, before = Pool(1, 1, None, threading.Event()), [signal.getsignal(number) for number in SIGNALS]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        attended(pool, saves, sent)
    assert time.monotonic() - start > 1
    assert not pool.kill.is_set()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_second_says_what_goes_on_and_the_third_ends_it():
    pool, told = Pool(1, 1, None, threading.Event()), []

    def work(pool):
        saves_for_ever(pool)
        told.append("ended")

    with pytest.raises(KeyboardInterrupt):
        told += attended(pool, work, signal.SIGINT, signal.SIGINT, signal.SIGINT)
    assert told == ["ended"]
    assert pool.kill.is_set()


def test_what_is_said():
    from steepest.lab.engine.stopping import _answer

    assert _answer(1, 60) == "Stopping: the workers save their runs first."
    assert _answer(2, 60).startswith("The workers are still saving; each has 60 s from the first signal on. Once more")
    assert "go on from their last checkpoints" in _answer(3, 60)


def test_an_error_of_one_stops_the_others():
    pool = Pool(2, 1, None, threading.Event())

    def fails():
        raise ValueError("one")

    with ThreadPoolExecutor(2) as threads:
        slots = [threads.submit(fails), threads.submit(pool.stop.wait, 60)]
        attend(slots, pool, update=lambda: None, tell=print, patience_s=60)
    assert slots[1].result() is True


def test_what_is_ignored_stays_ignored():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with counting_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert received == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_no_signal_is_touched():
    with ThreadPoolExecutor(1) as threads:
        counted = threads.submit(lambda: counting_signals().__enter__()).result(10)
    assert counted == []


@pytest.mark.slow
@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGHUP,), (signal.SIGTERM,)], ids=str)
def test_a_command_ends_quietly_with_its_workers(tmp_path, signals):
    out = tmp_path / "out"
    process = steepest(*COMMAND, "--out", out)
    wait_for(lambda: rows_written(out) >= 5)
    for sent in signals:
        process.send_signal(sent)
        time.sleep(0.1)
    told = ended(process, code=130)
    assert "Traceback" not in told
    assert "Exception" not in told
    assert told.index("the workers save their runs first") < told.index("Interrupted. Everything so far is saved")
    assert not workers_of(out)
    assert list(out.glob("runs/*/checkpoint.pt"))
