"""The command line: what it prints, and how it ends."""

import json
import re

import pytest

from steepest.lab.cli import main
from steepest.lab.tasks import TASKS
from tests.cases import cases


def run(capsys, *words):
    """Exit code, standard output, standard error; argparse exits by itself."""
    try:
        code = main(words)
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@cases("command", ["race", "sweep", "work", "train", "plan", "report", "verify"])
def test_every_command_has_help_with_examples(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"  steepest {command} " in out.split("examples:")[1]


@cases("words", ["race", "sweep", "train", "critical-batch measure", "bench train"])
def test_help_names_every_method(capsys, words):
    from steepest.lab.methods import METHODS

    _, out, _ = run(capsys, *words.split(), "--help")
    assert f"of {', '.join(sorted(METHODS))}" in " ".join(out.split()).replace("- ", "-")


def test_the_plan_lists_every_parameter(capsys):
    code, out, _ = run(capsys, "plan", "--task", "digits")
    assert code == 0
    assert "0 unknown" in out
    code, out, _ = run(capsys, "plan", "--task", "digits", "--json")
    rows = json.loads(out)
    assert {row["role"] for row in rows} == {"matrix", "head", "vector"}
    assert all(row["lr"] > 0 for row in rows)


def test_one_run_can_be_trained_and_is_not_trained_twice(capsys, tmp_path):
    words = ["train", "--task", "digits", "--method", "muon", "--steps", "3", "--out", str(tmp_path / "run")]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert re.match(r"Final loss \d\.\d{4} after 3 steps in \d+\.\d s: ", out)
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 3


@pytest.mark.slow
def test_the_report_can_be_written_anew(capsys, tmp_path):
    out = tmp_path / "race"
    words = ["race", "--task", "digits", "--methods", "adamw", "--seeds", "1", "--out", str(out), "--json"]
    code, printed, _ = run(capsys, *words)
    assert code == 0
    report = json.loads(printed)["report"]
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    code, printed, _ = run(capsys, "report", str(out))
    assert code == 0
    assert printed == f"Report: {report}\n"
    assert (out / "report.html").read_bytes() == before


@pytest.mark.slow
@cases(
    "words, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["rase"], "invalid choice: 'rase'"),
        (["race", "--methods", "adamw,moun", "--out", "OUT"], "Unknown method 'moun': did you mean 'muon'?"),
        (["race", "--methods", "adamw,,muon"], "'adamw,,muon' has an empty name; write them as adamw,muon"),
        (["race", "--seeds", "0"], "'0' must be a whole number of at least 1"),
        (["race", "--seeds", "many"], "'many' must be a whole number of at least 1"),
        (["race", "--workers", "-2"], "'-2' must be a whole number of at least 1"),
        (
            ["race", "--task", "txt"],
            f"Unknown task 'txt': did you mean 'text'? Valid: {', '.join(sorted(TASKS))}.",
        ),
        (["race", "--preset", "dmo"], "Unknown preset 'dmo': did you mean 'demo'? Valid: demo, small, tiny."),
        (["race", "--task", "digits", "--data", "x"], "The task 'digits' has its own images, got --data 'x'"),
        (["race", "--data", "/nowhere/text"], "/nowhere/text"),
        (["race", "--task", "digits", "--baseline", "sgd", "--out", "OUT"], "The baseline 'sgd', which is not among"),
        (["race", "--task", "digits", "--set", "lr=1", "--out", "OUT"], "write METHOD.OPTION=VALUE"),
        (["race", "--set", "muon.lr"], "'muon.lr' must look like lr=0.02"),
        (["race", "--task", "digits", "--set", "muon.lrr=1", "--out", "OUT"], "did you mean 'lr'?"),
        (["race", "--task", "digits", "--set", "muon.lr=high", "--out", "OUT"], "takes a float, got 'high'"),
        (["race", "--task", "digits", "--set", "sgd.lr=1", "--out", "OUT"], "An option is given for 'sgd'"),
        (["train", "--method", "muon"], "the following arguments are required: --out"),
        (
            ["train", "--method", "mun", "--task", "digits", "--out", "OUT"],
            "Unknown method 'mun': did you mean 'muon'?",
        ),
        (
            ["train", "--method", "muon", "--task", "digits", "--seed", "-1", "--out", "OUT"],
            "seed must be a whole number",
        ),
        (
            ["train", "--method", "muon", "--task", "digits", "--set", "lr=-1", "--out", "OUT"],
            "lr must be finite and at",
        ),
        (["train", "--method", "muon", "--task", "digits", "--set", "lr=NaN", "--out", "OUT"], "lr"),
        (
            ["race", "--task", "digits", "--set", "muon.lr=-1", "--out", "OUT"],
            "lr must be finite and at least 0, got -1",
        ),
        (
            ["race", "--task", "digits", "--methods", "torch-muon", "--out", "OUT"],
            "'torch-muon' takes 2-D matrices only",
        ),
        (["plan", "--task", "digits", "--method", "torch-muon"], "'torch-muon' takes 2-D matrices only"),
        (["sweep", "--task", "digits", "--out", "OUT"], "the following arguments are required: --lrs"),
        (["sweep", "--task", "digits", "--lrs", "1:2", "--out", "OUT"], "--lrs 1:2: write LOW:HIGH:logN"),
        (["sweep", "--task", "digits", "--lrs", "sgd=1", "--out", "OUT"], "Learning rates are given for 'sgd', which"),
        (["sweep", "--task", "digits", "--lrs", "muon=1", "--out", "OUT"], "No learning rates for 'adamw'; add --lrs"),
        (
            ["sweep", "--task", "digits", "--lrs", "1", "--set", "muon.lr=0", "--out", "OUT"],
            "muon has lr 0 and other_lr 0.01, which have no ratio to keep",
        ),
        (["race", "--task", "digits", "--storage", "db", "--out", "OUT"], "The storage is not a URL of a database"),
        (["work", "postgresql://me@host/db"], "Behind a URL, --runs DIR says where the runs are"),
        (["work", "mysql://me@host/db", "--runs", "OUT"], "A storage of the kind 'mysql' is not supported"),
        (["work", "OUT", "--runs", "elsewhere"], "--runs elsewhere another one. Leave --runs out"),
        (["plan", "--method", "adamw"], "'adamw' is not a method of this library and has no plan"),
    ],
)
def test_wrong_usage_ends_with_two_and_says_what_to_do(capsys, tmp_path, words, message):
    code, _, err = run(capsys, *(str(tmp_path / "out") if word == "OUT" else word for word in words))
    assert code == 2
    assert message in err


def test_a_directory_without_a_study_is_a_failure(capsys, tmp_path):
    code, _, err = run(capsys, "report", str(tmp_path))
    assert code == 1
    assert f"{tmp_path}/study.json: no study here. Give the directory that race or sweep was" in err


def test_a_directory_without_a_study_cannot_be_joined(capsys, tmp_path):
    code, _, err = run(capsys, "work", str(tmp_path))
    assert code == 1
    assert f"error: {tmp_path}/study.json: no study here" in err


@pytest.mark.slow
def test_a_sweep_can_be_repeated_word_by_word_but_for_the_password(capsys, tmp_path):
    import shlex

    out, database = tmp_path / "a sweep", f"sqlite:///{tmp_path}/shared.db"
    words = [
        "sweep",
        "--task",
        "digits",
        "--methods",
        "sgd",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--set",
        "sgd.momentum=0.5",
    ]
    code, printed, err = run(
        capsys, *words, "--lrs", "1", "--lrs", "sgd=0.1", "--out", str(out), "--storage", database, "--json"
    )
    assert code == 0, err
    assert json.loads(printed) == {"report": f"{out}/report.html"}
    study = json.loads((out / "study.json").read_text())
    assert (tmp_path / "shared.db").exists()
    assert not (out / "optuna.db").exists()
    before = next(out.glob("runs/*/result.json")).stat().st_mtime_ns
    assert run(capsys, *shlex.split(study["command"])[1:])[0] == 0
    assert json.loads((out / "study.json").read_text()) == study
    assert next(out.glob("runs/*/result.json")).stat().st_mtime_ns == before


def test_a_database_that_does_not_answer_is_a_failure(capsys, tmp_path):
    (tmp_path / "broken.db").write_text("this is not a database, but it is there")
    words = ["race", "--task", "digits", "--methods", "sgd", "--seeds", "1", "--out", str(tmp_path / "out")]
    code, _, err = run(capsys, *words, "--storage", f"sqlite:///{tmp_path}/broken.db")
    assert code == 1
    assert re.fullmatch(
        r"error: The storage sqlite:////.*broken.db is damaged: file is not a database\. Delete .*broken.db and .*\n",
        err,
    )


def test_an_output_that_cannot_be_written_is_a_failure(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "race", "--task", "digits", "--out", str(tmp_path / "file"))
    assert code == 1
    assert "file" in err


def test_a_corrupt_run_directory_is_a_failure(capsys, tmp_path):
    words = ["train", "--task", "digits", "--method", "sgd", "--steps", "2", "--out", str(tmp_path / "run")]
    assert run(capsys, *words)[0] == 0
    (tmp_path / "run" / "result.json").write_text("{broken")
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "result.json: not valid JSON" in err


def test_another_run_in_the_directory_is_refused(capsys, tmp_path):
    words = ["train", "--task", "digits", "--method", "sgd", "--steps", "2", "--out", str(tmp_path / "run")]
    assert run(capsys, *words)[0] == 0
    code, _, err = run(capsys, *words, "--seed", "1")
    assert code == 2
    assert "holds another run: seed is 0 there, 1 here" in err


def test_the_lab_is_needed_and_named(capsys, monkeypatch):
    import builtins

    real = builtins.__import__

    def without_rich(name, *arguments, **options):
        if name.startswith("rich") or name == "steepest.lab.studies.race.plan":
            raise ModuleNotFoundError("No module named 'rich'", name="rich")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    code, _, err = run(capsys, "race", "--task", "digits")
    assert code == 1
    assert "pip install 'steepest[lab]'" in err
