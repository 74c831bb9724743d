"""Waiting for workers, also after Ctrl-C, `kill` or a closed terminal: they save their runs before all ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steepest.lab.engine.pool import Pool

POLL_S = 0.25
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def attend(
    slots: Sequence[Future[Any]],
    pool: Pool,
    *,
    update: Callable[[], None],
    tell: Callable[[str], None],
    patience_s: float,
) -> None:
    """Wait until every slot has come to its end; an error in one, or a signal, stops the others.

    Args:
        slots: What trains.
        pool: What they train with, and its means to stop them.
        update: Called now and then.
        tell: Says something to the user.
        patience_s: How long a worker may take to save, for what is said.

    Raises:
        KeyboardInterrupt: If a signal asked to stop; all workers have ended by then.
    """
    with counting_signals() as received:
        try:
            while (now := wait(slots, POLL_S, FIRST_EXCEPTION)).not_done and not received:
                if any(slot.exception() for slot in now.done):
                    break
                update()
        finally:
            pool.stop.set()
        told = 0
        while True:
            with contextlib.suppress(OSError):  # of a terminal that is gone
                while told < min(len(received), 3):
                    told += 1
                    tell(_answer(told, patience_s))
                update()
            if len(received) > 2:
                pool.kill.set()
            if not wait(slots, POLL_S).not_done:
                break
    if received:
        raise KeyboardInterrupt


def _answer(times: int, patience_s: float) -> str:
    if times == 1:
        return "Stopping: the workers save their runs first."
    if times == 2:
        return (
            f"The workers are still saving; each has {patience_s:g} s from the first signal on. Once more ends them at "
            "once, and their runs go on from their last checkpoints."
        )
    return "Ending the workers; their runs go on from their last checkpoints."


@contextlib.contextmanager
def counting_signals() -> Generator[list[int]]:
    """Let SIGINT, SIGTERM and SIGHUP be counted instead of ending the process, where this is its main thread.

    One that is ignored, as SIGHUP is under nohup, stays so.
    """
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    counted = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in counted:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in counted.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
