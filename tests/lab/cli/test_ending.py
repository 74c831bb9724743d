"""How commands end: what is finished is not pretended to be done again, and the system's errors come with a remedy."""

import ast
import errno
import importlib
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import steepest
from steepest.lab.cli import main
from steepest.lab.cli.outcome import INTERRUPTED
from tests.cases import cases
from tests.lab.processes import ended
from tests.lab.processes import steepest as start

TRAIN = ("train", "--task", "digits", "--method", "muon", "--steps", "4", "--out")


@pytest.mark.parametrize("option", ["--keep-checkpoint", "--diagnostics"])
def test_a_finished_run_does_not_pretend_to_keep_more(tmp_path, capsys, option):
    assert main([*TRAIN, str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main([*TRAIN, str(tmp_path / "plain"), option]) == 2
    told = capsys.readouterr()
    assert f"error: {option}: the run in {tmp_path}/plain is finished, and was trained without it." in told.err
    assert "Train it into another directory" in told.err
    assert told.out == ""
    assert main([*TRAIN, str(tmp_path / "kept"), option]) == 0
    assert main([*TRAIN, str(tmp_path / "kept"), option]) == 0
    assert main([*TRAIN, str(tmp_path / "plain")]) == 0


@cases(
    "problem, told",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            "out/x: No space left on device. The disk is full:",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded. The disk is full: free some space and"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied. Make it writable and"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "out: Read-only file system. Make it writable and"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "out"), "out: Not a directory."),
    ],
)
def test_errors_of_the_system_come_with_path_and_remedy(monkeypatch, capsys, problem, told):
    def fail(*_):
        raise problem

    monkeypatch.setattr("steepest.lab.studies.report.write_report", fail)
    assert main(["report", "out"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {told}")


@pytest.mark.slow
def test_a_disk_without_space_is_told_by_name(tmp_path):
    """A limit on the size of files stands for a full disk: the checkpoint does not fit."""
    command = [sys.executable, "-m", "steepest", *TRAIN, str(tmp_path / "run")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=300, check=False)
    assert ended.returncode == 1
    assert "checkpoint.pt: File too large. The disk is full: free some space and repeat the command" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 0  # with space


@pytest.mark.parametrize(("words", "saves"), [(["report", "out"], False), ([*TRAIN, "out"], True)])
def test_an_interrupted_command_says_what_is_so(monkeypatch, capsys, tmp_path, words, saves):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("steepest.lab.studies.report.write_report", interrupt)
    monkeypatch.setattr("steepest.lab.runs.train.train_run", interrupt)
    assert main(words) == INTERRUPTED
    told = capsys.readouterr().err
    assert "Interrupted." in told
    assert ("Everything so far is saved" in told) == saves


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_before_the_first_worker_is_quiet(tmp_path, number):
    words = ("race", "--task", "digits", "--methods", "sgd", "--seeds", "1", "--steps", "100000")
    process = start(*words, "--out", tmp_path / "out")
    while not (tmp_path / "out").exists():
        time.sleep(0.01)
    process.send_signal(number)
    told = ended(process, code=INTERRUPTED)
    assert "Interrupted. Everything so far is saved" in told
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.3, 0.8, 1.5, 2.5])
def test_an_interruption_while_libraries_are_imported_is_quiet(tmp_path, after_s):
    words = ("race", "--task", "digits", "--methods", "sgd", "--seeds", "1", "--steps", "100000")
    process = start(*words, "--out", tmp_path / "out")
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    told = ended(process, code=INTERRUPTED)
    assert "Traceback" not in told
    assert "Error" not in told


def test_help_needs_no_torch():
    code = "import sys, steepest.lab.cli; steepest.lab.cli._parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"


@pytest.mark.slow
def test_commands_run_without_docstrings():
    words = ["theory", "spike", "--kappa", "3", "--eps", "0.5", "--json"]
    for command in (["--help"], words):
        ended = subprocess.run([sys.executable, "-OO", "-m", "steepest", *command], capture_output=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, b"")


def test_the_names_of_the_library_are_where_they_are_said_to_be():
    for node in ast.walk(ast.parse(Path(steepest.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steepest."):
            room = importlib.import_module(node.module)
            for name in room.__all__ if node.names[0].name == "*" else [alias.name for alias in node.names]:
                assert getattr(steepest, name) is getattr(room, name)
                assert name in steepest.__all__
    assert set(steepest.__all__) <= set(dir(steepest))
    assert steepest.optim is importlib.import_module("steepest.optim")
    with pytest.raises(AttributeError, match="has no attribute 'muon'"):
        _ = steepest.muon
