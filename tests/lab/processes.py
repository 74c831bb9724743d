"""Commands run in processes of their own, and what they leave behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TIMED = ("forward_backward_s", "optimizer_s", "train_s")


def steepest(*words, **environment):
    """A command in a session of its own; its output and errors come together."""
    return subprocess.Popen(
        [sys.executable, "-m", "steepest", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # shells start what runs in the background with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, **environment},
    )


def ended(process, *, code=0, timeout=240):
    """Wait for a command, and return its output."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output.decode()
    return output.decode()


def rows_of(out):
    """All rows of all runs but for times: what must not depend on interruptions."""
    return {
        path.parent.name: [
            {key: value for key, value in json.loads(line).items() if key not in TIMED}
            for line in path.read_text().splitlines()
        ]
        for path in sorted(out.glob("runs/*/metrics.jsonl"))
    }


def modified(out):
    """When each result was written; one that changes was trained again."""
    return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}


def sessions(out):
    """How many processes have trained each run: every one leaves a file for TensorBoard."""
    return {run.name: len(list(run.glob("events.out.tfevents.*"))) for run in out.glob("runs/*")}


def rows_written(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob("runs/*/metrics.jsonl"))


def wait_for(condition, *, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(out):
    """Process ids by run, of the processes that train the runs of a study now."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "steepest.lab.engine.worker" in words and (run := Path(words[3])).is_relative_to(out):
                found[run.name] = int(path.parent.name)
    return found
