"""The rows of a run: whole lines, as far as its checkpoint goes."""

import json

import pytest

from steepest.lab.disk.fields import RecordError
from steepest.lab.runs.recorder import MetricsFile
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
