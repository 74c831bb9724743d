"""`steepest bench step`: what it prints and writes, and what it refuses."""

import csv
import dataclasses
import inspect
import json
import shlex
import sys

import pytest

from steepest.lab import bench
from steepest.lab.bench import SHAPE_SETS
from steepest.lab.bench import contestants as everybody
from steepest.lab.cli import main
from steepest.lab.cli.bench import CONTESTANTS, SHAPES, Step
from tests.cases import cases

SMALL = "--width 8 --layers 1 --pairs 2 --warm-up 1 --peers torch-fp32"


def run(capsys, words):
    """Exit code, standard output, standard error; argparse exits by itself."""
    try:
        code = main(["bench", "step", *shlex.split(words)])
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_prints_a_row_per_contestant_and_the_floor(capsys):
    code, out, err = run(capsys, SMALL)
    assert code == 0
    assert "gpt2 8: 6 matrices, 0.000768 M entries" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert "1.000 (1.000 to 1.000)" in rows["steepest"]
    assert "float32" in rows["torch-fp32"]
    assert "floor of float32 products: " in out
    assert "limit, the same with the fastest product found: " in out
    assert "/ limit" in out
    assert "CPU time / wall time of the rounds: " in out
    assert "gpt2 8: 2 rounds of steepest, torch-fp32" in err


@pytest.mark.parametrize(("share", "told"), [(0.5, True), (1.0, False)])
def test_it_says_when_the_machine_was_busy(capsys, monkeypatch, share, told):
    measured = bench.measure
    monkeypatch.setattr(
        bench,
        "measure",
        lambda bench, tell: [dataclasses.replace(case, cpu_share=share) for case in measured(bench, tell=tell)],
    )
    _, out, _ = run(capsys, SMALL)
    assert f"CPU time / wall time of the rounds: {share:.2f}" in out
    assert ("the machine was busy with something else: repeat this" in out) == told


def test_json_and_files_hold_the_same(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    code, out, err = run(capsys, f"{SMALL},pytorch-optimizer --json --out {tmp_path}")
    assert code == 0
    printed, written = json.loads(out), json.loads((tmp_path / "step.json").read_text())
    assert printed == written
    assert written["environment"]["threads"] == 1
    assert written["commit"] == written["environment"]["git_commit"]
    assert len(written["cases"][0]["seconds"]["torch-fp32"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"step.json", "step.csv", "step.png"}
    assert str(tmp_path / "step.png") in err
    words = "--shapes gpt2 --width 8 --layers 1 --peers torch-fp32,pytorch-optimizer --pairs 2 --warm-up 1"
    assert written["command"] == f"steepest bench step {words} --dtype float32 --device cpu --seed 0 --threads 1"
    ours, _, missing = csv.DictReader((tmp_path / "step.csv").read_text().splitlines())
    assert (float(ours["ratio_median"]), ours["reason"]) == (1, "")
    assert missing["reason"].startswith("pytorch_optimizer is not installed")
    assert missing["milliseconds_median"] == ""


def test_a_missing_peer_says_why(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)  # which Python takes for missing
    code, out, _ = run(capsys, f"{SMALL},pytorch-optimizer")
    assert code == 0
    reason = "pytorch_optimizer is not installed. Peers come with: pip install 'steepest[bench]'."
    assert f"pytorch-optimizer has no numbers. {reason}" in out


@cases(
    "words, text",
    [
        ("--peers tosch", "Unknown contestant 'tosch': did you mean 'torch'"),
        ("--shapes gpt", "Unknown set of shapes 'gpt': did you mean 'gpt2'"),
        ("--pairs 1", "at least 2 pairs"),
        ("--shapes many-small --width 8", "many-small has neither width nor layers"),
        ("--pairs none", "must be a whole number of at least 1"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_remedy(capsys, words, text):
    code, out, err = run(capsys, words)
    assert (code, out) == (2, "")
    assert text in err


def test_help_names_every_set_and_contestant(capsys):
    assert SHAPES.split(", ") == list(SHAPE_SETS)
    assert CONTESTANTS.split(", ") == list(everybody.CONTESTANTS)
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert inspect.getdoc(Step).split("\n\n", 1)[1] in out
