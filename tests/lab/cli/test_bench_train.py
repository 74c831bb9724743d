import csv
import json

import pytest

from steepest.lab.bench import train_share
from steepest.lab.bench.train_share import Seconds
from steepest.lab.cli import main
from steepest.lab.cli.bench import OTHERS
from steepest.lab.methods import METHODS

NAMES = ("adamw", "muon", "newton-muon")


@pytest.fixture
def timed(monkeypatch):
    """Training that takes no time, but says it does."""

    def time_steps(task, methods, *, steps):
        return {method: [Seconds(0.003, 0.001 * (1 + place))] * steps for place, method in enumerate(methods)}

    monkeypatch.setattr(train_share, "time_steps", time_steps)


def test_files_hold_rows_raw_times_and_what_led_to_them(timed, tmp_path, capsys):
    out = tmp_path / "new" / "share"
    command = ["bench", "train", "--task", "digits", "--preset", "demo", "tiny", "--methods", ",".join(NAMES)]
    assert main([*command, "--steps", "8", "--every", "16", "--out", str(out), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((out / "train.json").read_text())
    assert {"command", "commit", "environment", "steps", "rows", "seconds"} == set(content)
    assert len(content["seconds"]["tiny"]["newton-muon"]) == 8
    with (out / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["preset"], row["method"]) for row in rows] == [(p, m) for p in ("demo", "tiny") for m in NAMES]
    assert [row["every"] for row in rows[:3]] == ["", "", "16"]
    assert float(rows[0]["share"]) == pytest.approx(0.25)
    assert float(rows[0]["step_ratio"]) == pytest.approx(0.8)
    assert float(rows[2]["optimizer_ratio"]) == pytest.approx(1.5)
    assert (out / "train.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_line_for_each_method_that_is_usual(timed, capsys):
    assert main(["bench", "train", "--task", "digits"]) == 0
    lines = capsys.readouterr().out
    for method in ("adamw", "muon", "muonadam", "newton-muon (a refresh in 32)", "muonmax-momo"):
        assert f" {method} " in lines
    assert "torch-muon" not in lines  # takes no convolutions


def test_the_default_methods_exist():
    assert set(OTHERS) <= set(METHODS)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--methods", "adamw"], "'muon' among them"),
        (["--methods", "muon,muonn"], "muonn"),
        (["--steps", "6"], "whole cycles of 4"),
        (["--preset", "huge"], "huge"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_told(options, text, capsys):
    assert main(["bench", "train", "--task", "digits", *options]) == 2
    assert text in capsys.readouterr().err
