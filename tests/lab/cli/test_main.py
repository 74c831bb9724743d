"""The command line: what it prints, and how it ends."""

import json
import re
import sys

import pytest
import torch

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


@cases("command", ["race", "sweep", "work", "train", "plan", "report", "verify", "data pack", "data check"])
def test_every_command_has_help_with_examples(capsys, command):
    code, out, _ = run(capsys, *command.split(), "--help")
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


def test_help_names_the_published_models(capsys):
    from steepest.lab.models.published import PUBLISHED

    _, out, _ = run(capsys, "plan", "--help")
    assert f"{', '.join(PUBLISHED)}, or package.module:function" in " ".join(out.split())


def test_a_plan_of_ranks_tells_what_the_busiest_takes(capsys):
    words = ["plan", "--model", "gpt2", "--layout", "hsdp=Nx4", "--world", "8", "16"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "GPT-2 124M, muon: 0.1244 B parameters, 0.1235 B active" in out
    shown = [line.split() for line in out.splitlines() if "hsdp=" in line]
    code, out, _ = run(capsys, *words, "--exchange-dtype", "bfloat16", "--tokens", "100", "--json")
    assert code == 0
    content = json.loads(out)
    assert content["parameters"] == 124_439_808
    for row, line in zip(content["rows"], shown, strict=True):
        assert [f"{row['ranks']:,}", row["layout"]] == line[:2]
        assert f"{row['parameters']['most'] / 1e6:.3g} MB" == " ".join(line[2:4])
        assert f"{row['flops']['most'] / 1e12:.3g}" == line[10]
        assert f"{2 * row['sent']['most'] / 1e6:.3g} MB" == " ".join(line[12:14])  # in half the bytes
        assert row["parameters"]["mean"] == 124_439_808
        assert 0 < row["step_s"] < 1
        assert row["forward_backward_s"] == pytest.approx(6 * content["active_parameters"] * 100 / 4e14)


def test_a_plan_of_ranks_takes_the_model_of_a_task_and_of_a_function(capsys, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build(): return nn.Sequential(nn.Linear(10**6, 10**5), nn.ReLU(), nn.Linear(10**5, 8)), None, ()\n"
        "def wrong(): return 3\n"
        "def numbers(): return nn.Linear(int(nn.Linear(2, 3).weight.sum()), 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    words = ["plan", "--layout", "fsdp=4", "--json"]
    _, out, _ = run(capsys, *words, "--task", "digits", "--method", "adam", "--tokens", "2.5")
    assert json.loads(out)["model"] == "digits demo"
    _, out, _ = run(capsys, *words, "--model", "mine:build")
    assert json.loads(out)["active_parameters"] == 10**11 + 8 * 10**5
    code, _, err = run(capsys, *words, "--model", "mine:wrong")
    assert code == 2
    assert "mine:wrong returned int; it must return a module, or a tuple that begins with one." in err
    code, _, err = run(capsys, *words, "--model", "mine:numbers")
    assert code == 2
    assert "mine:numbers cannot be called on torch's meta device" in err
    assert "Name a function that makes the model alone." in err
    code, _, err = run(capsys, *words, "--model", "mine:nothing")
    assert code == 2
    assert "mine has no function 'nothing'" in err


def test_one_run_can_be_trained_and_is_not_trained_twice(capsys, tmp_path):
    words = ["train", "--task", "digits", "--method", "muon", "--steps", "3", "--out", str(tmp_path / "run")]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert re.match(r"Final loss \d\.\d{4} after 3 steps in \d+\.\d s: ", out)
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 3


def test_a_task_that_knows_no_accelerator_trains_on_the_cpu_if_that_is_left_open(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    words = ["train", "--task", "digits", "--method", "muon", "--steps", "2", "--out", str(tmp_path / "run")]
    assert run(capsys, *words, "--device", "auto")[0] == 0
    code, _, err = run(capsys, *words, "--device", "cuda")
    assert code == 2
    assert "--device cuda: the task 'digits' is trained by one process, on the CPU" in err


def test_determinism_is_asked_of_torch_while_a_run_trains(capsys, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.SGD.step

    def looked_at(*given):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(*given)

    monkeypatch.setattr(torch.optim.SGD, "step", looked_at)
    words = ["train", "--task", "digits", "--method", "sgd", "--steps", "2"]
    assert run(capsys, *words, "--deterministic", "--out", str(tmp_path / "one"))[0] == 0
    assert run(capsys, *words, "--out", str(tmp_path / "other"))[0] == 0
    assert seen == [True] * 2 + [False] * 2
    assert not torch.are_deterministic_algorithms_enabled()


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
        (["race", "--preset", "dmo"], "Unknown preset 'dmo': did you mean 'demo'? Valid: deep, demo, small, tiny."),
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
        *(
            (
                ["train", "--method", method, "--task", "digits", "--set", "table_lr=-1", "--out", "OUT"],
                "table_lr must be finite and at least 0, got -1.0. Leave it out",
            )
            for method in ("adamw", "muon", "newton-muon")
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
        (["plan", "--model", "gpt3", "--layout", "fsdp=2"], "Unknown model 'gpt3': did you mean 'gpt2'?"),
        (["plan", "--model", "no.such:thing"], "there is no module 'no' here or on PYTHONPATH"),
        (["plan", "--layout", "fsdp=N"], "one number may be N, which is what the others leave of --world"),
        (["plan", "--world", "8"], "--world is about ranks: give --layout, such as fsdp=8, too."),
        (["plan", "--exchange-dtype", "bfloat16"], "--exchange-dtype is about ranks: give --layout"),
        (["plan", "--model", "qwen3-moe", "--layout", "tp=2"], "it is not known how tp divides it"),
        (
            ["plan", "--model", "gpt2", "--experts-per-token", "2", "--layout", "ddp=2"],
            "--experts-per-token is for --model package.module:function",
        ),
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
