"""One process at a time writes to a directory of the lab; whose it is otherwise, `tests/lab/test_strangers.py` asks."""

import multiprocessing
import os

import pytest

from steepest.lab.disk.ours import RunBusyError, locked


def test_what_a_killed_writer_left_half_written_is_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "checkpoint.pt").write_bytes(b"whole")
    (tmp_path / ".config.json.123.tmp").write_bytes(b"of somebody who plans runs just now")
    with locked(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".config.json.123.tmp", "checkpoint.pt", "lock"]


def hold(run_dir, held, release):
    with locked(run_dir):
        held.set()
        release.wait(30)


@pytest.mark.slow
def test_a_second_process_is_told_who_is_there_and_a_killed_one_lets_go(tmp_path):
    context = multiprocessing.get_context("forkserver")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(30)
    with pytest.raises(RunBusyError, match=rf"being trained by process {process.pid}\. Wait until"), locked(tmp_path):
        pass
    process.kill()
    process.join()
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with locked(tmp_path):  # released after use
        pass
