"""Trains the runs of a study in worker processes, a few at a time, until none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from steepest.lab.worker import BUSY, INTERRUPTED

POLL_S = 0.25
BUSY_S = 5.0  # until a run that another process holds is asked for again
STOP_S = 60.0  # a worker saves a checkpoint when it is told to stop; afterwards it is killed, which loses little
KILLS = 3  # a run whose worker was killed goes on from its checkpoint, but not for ever


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, and the last training loss if there is one."""

    step: int
    loss: float | None


@dataclass
class Pool:
    """Worker processes over a list of run directories.

    Args:
        workers: How many runs are trained at once.
        threads: CPU threads of each.
        data: Data of the user, passed on.
    """

    workers: int
    threads: int = 1
    data: Path | None = None
    _running: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict[Path, "subprocess.Popen[bytes]"])

    def train(self, run_dirs: Sequence[Path], *, tick: Callable[[], None]) -> list[Path]:
        """Bring every run to its end.

        Args:
            run_dirs: Runs whose `config.json` is written; finished ones cost nothing.
            tick: Called a few times a second.

        Returns:
            Runs that failed; the reason is in the `worker.log` of each.

        Raises:
            KeyboardInterrupt: After every worker has saved its run and ended.
        """
        waiting = deque(run for run in run_dirs if not (run / "result.json").exists())
        failed: list[Path] = []
        killed: Counter[Path] = Counter()
        not_before: defaultdict[Path, float] = defaultdict(float)
        try:
            while waiting or self._running:
                for _ in range(len(waiting)):
                    run = waiting.popleft()
                    if len(self._running) < self.workers and not_before[run] <= time.monotonic():
                        self._running[run] = self._start(run)
                    else:
                        waiting.append(run)
                tick()
                time.sleep(POLL_S)
                for run, process in list(self._running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del self._running[run]
                    if code < 0:
                        killed[run] += 1
                        with (run / "worker.log").open("a", encoding="utf-8") as log:
                            log.write(f"The worker was ended by signal {-code}.\n")
                    if code == BUSY:
                        not_before[run] = time.monotonic() + BUSY_S
                    if code in (BUSY, INTERRUPTED) or (code < 0 and killed[run] < KILLS):
                        waiting.append(run)  # another process had it, or somebody ended just this worker
                    elif code != 0:
                        failed.append(run)
            tick()
        finally:
            self._stop()
        return failed

    def _start(self, run: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "steepest.lab.worker", str(run), "--threads", str(self.threads)]
        command += ["--parent", str(os.getpid())]
        if self.data is not None:
            command += ["--data", str(self.data)]
        with (run / "worker.log").open("ab") as log:
            # a session of its own: Ctrl-C reaches only the race, which then lets its workers save their runs
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "STEEPEST_WORKERS": str(self.workers)},
            )

    def _stop(self) -> None:
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for process in self._running.values():
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


def read_progress(run_dir: Path, *, steps: int) -> Progress:
    """How far a run is, from the last whole line of its metrics.

    Args:
        run_dir: Its directory.
        steps: How many steps it has in all, for a run that has ended early or whose rows are elsewhere.

    Returns:
        The progress; a run that has ended, diverged or not, counts as complete.
    """
    step, loss = 0, None
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().split(b"\n")[:-1]
        for line in reversed(lines):
            row = json.loads(line)
            if row["kind"] == "train":
                step, loss = int(row["step"]), row["loss"]
                break
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a display may be late or show nothing; the records themselves are read with care elsewhere
    return Progress(steps if (run_dir / "result.json").exists() else step, loss)
