"""Trains one run in a process of its own, and sees how far it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steepest.lab.environment import WORKERS
from steepest.lab.worker import BUSY, INTERRUPTED

POLL_S = 0.25
BUSY_S = 5.0  # until a run that another process holds is given back, to be asked for again
STOP_S = 60.0  # a worker saves a checkpoint when it is told to stop; afterwards it is killed, which loses little
KILLS = 3  # a run whose worker was killed goes on from its checkpoint, but not for ever

Outcome = Literal["finished", "failed", "busy", "stopped"]


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, and the last training loss if there is one."""

    step: int
    loss: float | None


@dataclass(frozen=True)
class Pool:
    """How runs are trained on this machine. A process per run, so that the peak memory of each is its own.

    Args:
        workers: How many runs are trained at once; recorded with each.
        threads: CPU threads of each.
        data: Data of the user, passed on.
        stop: Set it to end all runs; they are saved first.
    """

    workers: int
    threads: int
    data: Path | None
    stop: threading.Event

    def train(self, run: Path) -> Outcome:
        """Bring a run to its end, from its checkpoint if there is one.

        Args:
            run: Its directory, with `config.json`.

        Returns:
            "finished"; "failed", with the reason in `worker.log`; "busy" if another process has the run; "stopped".
        """
        kills = 0
        while not self.stop.is_set():
            code = self._wait(self._start(run))
            if code == 0:
                return "finished"
            if code == BUSY:
                self.stop.wait(BUSY_S)
                return "busy"
            if code > 0 and code != INTERRUPTED:
                return "failed"
            if code < 0 and not self.stop.is_set():
                kills += 1
                with (run / "worker.log").open("a", encoding="utf-8") as log:
                    log.write(f"The worker was ended by signal {-code}.\n")
                if kills == KILLS:
                    return "failed"
        return "stopped"

    def _start(self, run: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "steepest.lab.worker", str(run), "--threads", str(self.threads)]
        command += ["--parent", str(os.getpid())]
        if self.data is not None:
            command += ["--data", str(self.data)]
        with (run / "worker.log").open("ab") as log:
            # a session of its own: Ctrl-C reaches only the study, which then lets its workers save their runs
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, WORKERS: str(self.workers)},
            )

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code; a process that is told to stop has time to save."""
        try:
            while not self.stop.is_set():
                try:
                    return process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    continue
            process.send_signal(signal.SIGTERM)
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def last_words(run_dir: Path) -> str:
    """The last line that the worker of a run left: the reason, if the run failed."""
    log = run_dir / "worker.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "no reason was recorded"


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
