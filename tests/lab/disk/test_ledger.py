import json
import multiprocessing
import os

import pytest

from steepest.lab.disk.fields import RecordError
from steepest.lab.disk.ledger import MetricsFile, RunBusyError, locked, write_whole
from tests.cases import cases


def rows(last: int) -> list[dict[str, object]]:
    """Rows of a run up to and including step `last`, evaluated every second step."""
    out: list[dict[str, object]] = [{"kind": "eval", "step": 0, "loss": 9.0}]
    for step in range(1, last + 1):
        out.append({"kind": "train", "step": step, "loss": 1 / step})
        if step % 2 == 0:
            out.append({"kind": "eval", "step": step, "loss": 2 / step})
    return out


def text(content: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in content)


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    write_whole(path, b"new\xff")
    assert path.read_bytes() == b"new\xff"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def fail(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"


@cases("step", [0, 1, 2, 3])
@cases("tail", ["", '{"kind": "train", "st', '{"kind": "tr\n'[:-1]])
def test_going_on_drops_later_rows_and_a_line_cut_short(tmp_path, step, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text(rows(4)) + tail)
    metrics = MetricsFile(path, step=step)
    kept = [] if step == 0 else rows(step)
    assert path.read_text() == text(kept)
    metrics.append({"kind": "train", "step": step + 1})
    assert path.read_text() == text([*kept, {"kind": "train", "step": step + 1}])
    metrics.sync()
    metrics.close()


def test_rows_that_are_missing_are_noticed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(RecordError, match=r"the checkpoint is at step 2, but 0 training rows lead up to it.*Delete"):
        MetricsFile(path, step=2)
    path.write_text(text([row for row in rows(4) if (row["kind"], row["step"]) != ("train", 2)]))
    with pytest.raises(RecordError, match="the checkpoint is at step 3, but 2 training rows"):
        MetricsFile(path, step=3)


def test_a_damaged_row_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text(rows(1)) + "{]\n" + text(rows(1)))
    with pytest.raises(RecordError, match=r"metrics.jsonl: line 3: not valid JSON"):
        MetricsFile(path, step=1)


def test_numbers_that_json_does_not_know_are_not_written(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.append({"loss": float("nan")})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


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
