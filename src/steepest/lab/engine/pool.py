"""Trains one run in a process of its own, and sees how far it is."""

from __future__ import annotations

import os
import signal
import site
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

import steepest
from steepest.lab.disk.fields import Count, decode
from steepest.lab.disk.files import RecordError, append_line, exists, one_line, open_to_append, read_tail
from steepest.lab.engine.stopping import POLL_S
from steepest.lab.engine.worker import BUSY, FULL, INTERRUPTED
from steepest.lab.runs.environment import WORKERS

BUSY_S = 5.0  # until a run that another process holds is given back, to be asked for again
STOP_S = 60.0  # a worker saves a checkpoint when it is told to stop; afterwards it is killed, which loses little
KILLS = 3  # a run whose worker was killed goes on from its checkpoint, but not for ever


class DiskFullError(OSError):
    """A worker found no space to save its run; nothing that was saved before is lost."""

    def __init__(self, run: Path) -> None:
        super().__init__(
            f"The disk of {run} is full, and its run has stopped. Free some space and repeat the command: every run "
            "goes on from its last checkpoint."
        )


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
        kill: Set it, too, to end those that still save.
        under_way: Directories of the runs that are trained now.
    """

    workers: int
    threads: int
    data: Path | None
    stop: threading.Event
    kill: threading.Event = field(default_factory=threading.Event)
    under_way: set[Path] = field(default_factory=set[Path])

    def train(self, run: Path) -> Outcome:
        """Bring a run to its end, from its checkpoint if there is one.

        Args:
            run: Its directory, with `config.json`.

        Returns:
            "finished"; "failed", with the reason in `worker.log`; "busy" if another process has the run; "stopped".

        Raises:
            DiskFullError: If the worker could not write; every other run would end like this one.
        """
        self.under_way.add(run)
        try:
            return self._train(run)
        finally:
            self.under_way.discard(run)

    def _train(self, run: Path) -> Outcome:
        kills = 0
        while not self.stop.is_set():
            code = self._wait(self._start(run))
            if code == 0:
                return "finished"
            if code == FULL:
                raise DiskFullError(run)
            if code == BUSY:
                self.stop.wait(BUSY_S)
                return "busy"
            if code > 0 and code != INTERRUPTED:
                return "failed"
            if code < 0 and not self.stop.is_set():
                kills += 1
                append_line(run / "worker.log", f"The worker was ended by signal {-code}.")
                if kills == KILLS:
                    return "failed"
        return "stopped"

    def _start(self, run: Path) -> subprocess.Popen[bytes]:
        # P: without it, modules of the directory that one happens to be in would come before all others
        command = [sys.executable, "-Pm", "steepest.lab.engine.worker", str(run), "--threads", str(self.threads)]
        command += ["--parent", str(os.getpid())]
        if self.data is not None:
            command += ["--data", str(self.data)]
        log = open_to_append(run / "worker.log")
        try:
            # a session of its own: Ctrl-C reaches only the study, which then lets its workers save their runs
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **_path(), WORKERS: str(self.workers)},
            )
        finally:
            os.close(log)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code; a process that is told to stop has time to save."""
        try:
            while not self.stop.is_set():
                try:
                    return process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    continue
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            while time.monotonic() < deadline and not self.kill.is_set():
                try:
                    return process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    continue
            return process.wait(0)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _path() -> dict[str, str]:
    """Where a worker finds this very package, if that is no place that Python knows by itself."""
    here = str(Path(steepest.__file__).resolve().parents[1])
    if here in {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")}:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), here)))}


def last_words(run_dir: Path) -> str:
    """The last line that the worker of a run left: the reason, if the run failed; or why it cannot be read."""
    log = run_dir / "worker.log"
    try:
        lines = read_tail(log).decode(errors="replace").strip().splitlines() if exists(log) else []
    except RecordError as problem:
        return str(problem)
    return one_line(lines[-1]) if lines else "no reason was recorded"


class _Row(msgspec.Struct):
    kind: str
    step: Count = 0
    loss: float | None = None


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
        metrics = run_dir / "metrics.jsonl"
        lines = read_tail(metrics, size=4096).split(b"\n")[:-1]
        for line in reversed(lines):
            row = decode(_Row, line.decode(), metrics, remedy="")
            if row.kind == "train":
                step, loss = min(row.step, steps), row.loss
                break
    except (OSError, ValueError):
        pass  # a display may be late or show nothing; the records themselves are read with care elsewhere
    return Progress(steps if exists(run_dir / "result.json") else step, loss)
