import dataclasses
import json

import pytest

from steepest.lab.disk.fields import RecordError
from steepest.lab.runs.result import Result, read_result

RESULT = Result("finished", 150, 1.73, None, 21.0, 1.2, 19.8, 123456789, "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize("change", [{}, {"status": "diverged", "final_loss": None}, {"final_accuracy": 0.5}])
def test_a_result_survives_its_file(tmp_path, change):
    result = dataclasses.replace(RESULT, **change)
    (tmp_path / "result.json").write_text(result.to_json())
    assert read_result(tmp_path / "result.json") == result


def test_no_file_is_no_result(tmp_path):
    assert read_result(tmp_path / "result.json") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"status": "won"}, "status must be 'diverged' or 'finished', got 'won'"), ({"format": 2}, "format must be 1")],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**json.loads(RESULT.to_json()), **change}))
    with pytest.raises(RecordError, match=rf"result.json: {message}.*Delete this file and repeat the command"):
        read_result(path)
