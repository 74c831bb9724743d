"""`steepest bench passes`: what it prints and writes, and what it refuses."""

import csv
import json

import pytest

from steepest.lab.cli import main

SMALL = ["bench", "passes", "--width", "8", "16", "--layers", "1", "--pairs", "3"]


def test_files_hold_rows_raw_times_and_what_led_to_them(tmp_path, capsys):
    out = tmp_path / "new" / "passes"
    assert main([*SMALL, "--out", str(out), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((out / "passes.json").read_text())
    assert {"command", "commit", "environment", "threads", "pairs", "rows", "cases"} == set(content)
    assert len(content["cases"]["gpt2 16"]["seconds"]["plain"]) == 3
    with (out / "passes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["gpt2 8"] * 4 + ["gpt2 16"] * 4
    assert [row["passes"] for row in rows[:2]] == ["plain", "plain, load by load"]
    assert float(rows[0]["ratio"]) == 1
    assert (out / "passes.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_line_for_each_way(capsys):
    assert main([*SMALL, "--threads", "1"]) == 0
    lines = capsys.readouterr().out
    assert "gpt2 8: 6 matrices, 0.000768 M entries, 1 load(s), float32, 1 thread(s)" in lines
    for way in ("plain", "plain, load by load", "steepest, no decay", "steepest, with decay"):
        assert f" {way} " in lines


def test_sets_without_width_have_one_case(capsys):
    assert main(["bench", "passes", "--shapes", "many-small", "--pairs", "2", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["cases"]) == ["many-small"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--shapes", "gpt"], "Unknown set of shapes 'gpt': did you mean 'gpt2'"),
        (["--pairs", "1"], "at least 2 pairs"),
        (["--shapes", "many-small", "--width", "8"], "many-small has neither width nor layers"),
    ],
)
def test_wrong_usage_is_told(options, text, capsys):
    assert main(["bench", "passes", *options]) == 2
    assert text in capsys.readouterr().err
