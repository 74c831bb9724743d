import csv
import json

import pytest

from steepest.lab.bench import scaling
from steepest.lab.bench.machine import Machine
from steepest.lab.cli import main

MACHINE = Machine(((64, 100e9),), *[((2**20, 10e9),)] * 3, 1e-6)
SIZES = ["--widths", "8", "16", "--layers", "1", "--aspects", "2", "--rounds", "3"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scaling, "calibrate", lambda *, clock: MACHINE)
    monkeypatch.setattr(scaling, "SIDE", 8)


def test_files_hold_rows_raw_times_and_the_machine(tmp_path, capsys):
    out = tmp_path / "new" / "scaling"
    assert main(["bench", "scaling", *SIZES, "--out", str(out), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((out / "scaling.json").read_text())
    assert {"command", "commit", "environment", "machine", "rows", "seconds"} == set(content)
    assert content["machine"]["products"] == [[64, 100e9]]
    assert list(map(len, content["seconds"].values())) == [3] * 4
    with (out / "scaling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("width", "8"),
        ("width", "16"),
        ("layers", "1"),
        ("aspect", "2"),
    ]
    assert int(rows[0]["parameters"]) == 12 * 8 * 8
    for row in rows:
        assert float(row["error"]) == pytest.approx(float(row["predicted_ms"]) / float(row["ms"]) - 1)
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_names_the_worst_point(capsys):
    assert main(["bench", "scaling", *SIZES]) == 0
    lines = capsys.readouterr().out
    assert " width 16 " in lines
    assert "of 4; the worst is " in lines


def test_wrong_usage_is_told(capsys):
    assert main(["bench", "scaling", "--widths", "8", "8", "--rounds", "3"]) == 2
    assert "each point once, got 'width 8' twice" in capsys.readouterr().err
    assert main(["bench", "scaling", "--rounds", "2"]) == 2
    assert "rounds of at least 3" in capsys.readouterr().err
