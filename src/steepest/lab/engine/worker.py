"""A process that trains one run: `python -m steepest.lab.engine.worker RUN_DIR`. A race starts several of them.

It stops at a signal, and when the process that started it is gone: it saves a checkpoint first, so that whoever comes
next goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from steepest.lab.disk.files import one_line
from steepest.lab.disk.ours import RunBusyError
from steepest.lab.runs.config import read_config
from steepest.lab.runs.train import Interrupted, train_run

INTERRUPTED = 130  # as a shell reports Ctrl-C
BUSY = 75  # EX_TEMPFAIL: another process has the run; try again
FULL = 74  # EX_IOERR: no space to write
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ORPHAN_S = 60.0  # a worker whose parent is gone has so long to come to the end of a step and to save


def main(arguments: list[str] | None = None) -> int:
    """Train the run whose `config.json` is in a directory.

    Args:
        arguments: Command line without the program; None takes the process's own.

    Returns:
        Exit code: 0 finished, INTERRUPTED, BUSY, FULL; anything else comes with an exception.
    """
    parser = argparse.ArgumentParser(prog="python -m steepest.lab.engine.worker")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parent", type=int, default=os.getppid(), help="stop when this process is gone")
    options = parser.parse_args(arguments)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    threading.Thread(target=_end_without, args=(options.parent,), daemon=True).start()
    config = read_config(options.run_dir, remedy="Repeat the race's command: it writes the file anew.")
    try:
        train_run(
            config,
            options.run_dir,
            data=options.data,
            threads=options.threads,
            stop=lambda: stopped or os.getppid() != options.parent,
        )
    except Interrupted:
        return INTERRUPTED
    except RunBusyError as busy:
        print(busy, file=sys.stderr)  # noqa: T201 - the race keeps this in the run's log
        return BUSY
    except OSError as failure:
        if failure.errno not in NO_SPACE:
            raise
        with contextlib.suppress(OSError):  # the log is on the same disk
            print(f"{type(failure).__name__}: {failure}", file=sys.stderr)  # noqa: T201
        return FULL
    return 0


def _end_without(parent: int) -> None:
    """End this process, in the middle of a step if need be, when its parent is gone and it does not end by itself."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(ORPHAN_S)
    os._exit(INTERRUPTED)


def _report(_: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback for the run's log, in which no text that comes from a file can begin a line."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        _report(type(before), before, before.__traceback__)
    traceback.print_tb(trace)
    told = "".join(traceback.format_exception_only(error)).strip()
    print(one_line(told), file=sys.stderr)  # noqa: T201 - as above


if __name__ == "__main__":
    sys.excepthook = _report
    raise SystemExit(main())
