"""`steepest critical-batch measure` and `branch`: what is understood, what is refused, what is repeated."""

import json
import shlex

import pytest

from steepest.lab.cli import main
from steepest.lab.studies.batch.plan import BatchSweep
from tests.cases import cases


@pytest.fixture
def asked(monkeypatch):
    """The plan and the command of a study that would be trained."""
    found = []

    def train(plan, out, *, command, **_):
        found.append((plan, out, command))
        return out / "report.html"

    monkeypatch.setattr("steepest.lab.engine.study.run_study", train)
    return found


def measure(words):
    return main(["critical-batch", "measure", *shlex.split(words)])


@pytest.mark.slow
def test_the_command_is_understood_and_repeats_itself(asked, capsys):
    words = (
        "--task digits --methods muon,sgd --batches 4:64:x4 --targets 0.1,0.3 --seeds 2 --vary muon.momentum=0.7,0.9"
    )
    assert measure(f"{words} --set muon.nesterov=false --most-steps 50 --out out/x") == 0
    plan, out, command = asked[0]
    assert isinstance(plan, BatchSweep)
    assert (plan.batches, plan.targets, plan.seeds) == ((4, 16, 64), (0.3, 0.1), (0, 1))
    assert [arm.label for arm in plan.arms] == ["muon momentum=0.7", "muon momentum=0.9", "sgd"]
    assert (plan.most_steps, plan.most_samples) == (50, 10 * 300 * 64)
    assert str(out) == "out/x"
    capsys.readouterr()
    assert main(shlex.split(command)[1:]) == 0
    (first, *same), (second, *again) = asked
    assert [*same, *first.configs()] == [*again, *second.configs()]
    assert second.own_fields() == first.own_fields()


def test_defaults_are_muon_and_adamw_in_a_directory_of_their_own(asked):
    assert measure("--task quadratic --batches 16,64 --targets 1") == 0
    plan, out, _ = asked[0]
    assert plan.methods == ("muon", "adamw")
    assert str(out) == "out/critical-batch-quadratic-demo"


@cases(
    "words, message",
    [
        ("--task digits --batches 16 --targets 0.1 --methods muonn", "Unknown method 'muonn': did you mean 'muon'"),
        ("--task digits --batches 16:4:x2 --targets 0.1", "LOW is at least 1 and at most HIGH"),
        ("--task digits --batches 16 --targets -1", "Targets must be losses above 0"),
        ("--task digits --batches 16 --targets 0.1 --vary sgd.momentum=0.9", "a method among muon, adamw"),
        ("--task digits --batches 16 --targets 0.1 --vary muon.moment=0.9", "did you mean 'momentum'"),
        ("--task digit --batches 16 --targets 0.1", "Unknown task 'digit': did you mean 'digits'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(asked, capsys, words, message):
    assert measure(words) == 2
    assert message in capsys.readouterr().err
    assert not asked


@pytest.mark.parametrize("words", ["--targets low", "--vary muon=0.9", "--vary muon.momentum=", "--seeds 0"])
def test_options_that_cannot_be_read_are_refused(words, capsys):
    with pytest.raises(SystemExit) as left:
        measure(f"--task digits --batches 16 --targets 0.1 {words}")
    assert left.value.code == 2
    assert "error: argument" in capsys.readouterr().err


def test_a_run_is_trained_and_forked(tmp_path, capsys):
    parent = tmp_path / "parent"
    train = "train --task quadratic --method muon --schedule constant --steps 8 --diagnostics"
    train += f" --keep-checkpoint --out {parent}"
    assert main(shlex.split(train)) == 0
    rows = [json.loads(line) for line in (parent / "metrics.jsonl").read_text().splitlines()]
    numbers = next(row["numbers"] for row in rows if row["kind"] == "diagnostics")
    assert any(name.endswith("/spectral_norm") for name in numbers)
    capsys.readouterr()
    branch = f"critical-batch branch {parent} --batches 32,64,128 --samples 256 --repeats 2"
    assert main(shlex.split(branch)) == 0
    printed = capsys.readouterr()
    assert "Local critical batch size: " in printed.out
    assert "batch 128, repetition 2: loss " in printed.err
    assert main(shlex.split(f"{branch} --json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert set(again["losses"]) == {"32", "64", "128"}
    assert len(again["branches"]) == 6
    assert len(list((parent / "branches").glob("*.json"))) == 6
    for wrong, message in (
        ("--batches 32", "two sizes at least"),
        ("--batches 32,48", "no whole number of batches of 48"),
    ):
        assert main(shlex.split(f"critical-batch branch {parent} {wrong} --samples 256")) == 2
        assert message in capsys.readouterr().err
    assert main(["critical-batch", "branch", str(tmp_path), "--batches", "32,64", "--samples", "64"]) == 1
    assert "no run here" in capsys.readouterr().err
