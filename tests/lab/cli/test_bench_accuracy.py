"""`steepest bench accuracy`: what it prints and writes, and what it refuses."""

import csv
import json

import pytest

from steepest.lab.bench.momenta import SETS
from steepest.lab.cli import main

SMALL = ["bench", "accuracy", "--task", "quadratic", "--steps", "6", "--at", "2,6"]


@pytest.mark.slow
def test_files_hold_rows_spectra_and_what_led_to_them(tmp_path, capsys):
    out = tmp_path / "new" / "accuracy"
    assert main([*SMALL, "--out", str(out), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((out / "accuracy.json").read_text())
    assert {"command", "commit", "environment", "spectra", "rows"} == set(content)
    assert [own["source"] for own in content["spectra"]] == ["step 2", "step 6", "normal"]
    with (out / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["coefficients"] for row in rows] == [*SETS] * 3
    assert {row["dtype"] for row in rows} == {"float32"}
    assert all(float(row["distance"]) < 1 for row in rows)
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_name_every_source_and_what_is_refused(capsys):
    assert main([*SMALL, "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out
    for source in ("step 2", "step 6", "normal"):
        assert f"quadratic demo, bfloat16 products: {source}, 1 matrices" in lines
    nonic = next(line for line in lines.splitlines() if line.split()[:1] == ["nonic"])
    assert nonic.split()[1:] == ["refused"] * 6
    assert lines.count("Refused: Coefficients 'nonic' need products in a wider type than torch.bfloat16") == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--at", "2,7"], "at takes steps from 1 to steps=6, got [2, 7]"),
        (["--dtype", "float23"], "Unknown dtype 'float23': did you mean 'float32'"),
        (["--preset", "dmeo"], "did you mean 'demo'"),
    ],
)
def test_wrong_usage_is_told(options, text, capsys):
    assert main([*SMALL, *options]) == 2
    assert text in capsys.readouterr().err


def test_steps_are_whole_numbers(capsys):
    with pytest.raises(SystemExit) as left:
        main([*SMALL, "--at", "2,x"])
    assert left.value.code == 2
    assert "'x' must be a whole number of at least 1" in capsys.readouterr().err
