"""What is shown when words are missing can be typed as it stands."""

import re
import shlex
from types import SimpleNamespace

import pytest

from steepest.lab.cli import _parser, main
from tests.cases import cases
from tests.lab.cli.test_numbers import commands
from tests.lab.data.tiny_tokenizer import write_tokenizer

COMMANDS = {" ".join(words): parser for words, parser in commands(_parser()).items() if parser.get_default("command")}
TRAINED = SimpleNamespace(final_loss=1.0, steps=1, train_s=1.0)
INCOMPLETE = [name for name, parser in COMMANDS.items() if any(action.required for action in parser._actions)]


def shown(capsys, words):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert "error: " in told
    return re.sub(r"\\\n", " ", told.split("\nexample:\n")[1]).splitlines()


@cases("name", COMMANDS)
def test_every_command_shows_an_example_when_a_word_is_wrong(capsys, name):
    *before, own = shown(capsys, [*name.split(), "--no-such-option"])
    assert own.startswith(f"  steepest {name}")
    assert all(line.startswith("  steepest ") for line in before)


@cases("words", ["", "theory", "critical-batch", "bench", "critical-batch noise", "--no"])
def test_what_is_no_command_yet_shows_an_example_of_its_first(capsys, words):
    [own] = shown(capsys, words.split())
    group = words.split()[0] if words[:1].isalpha() else "race"
    assert own.startswith(f"  steepest {group} ")


@cases("name", INCOMPLETE)
def test_the_example_is_complete(capsys, monkeypatch, tmp_path, name):
    """Training itself is left out, so that commands that need a trained run say that it is missing, and no more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "steepest.lab.engine.study.run_study", lambda plan, out, **_: plan.configs() and out / "report.html"
    )
    write_tokenizer(tmp_path / "gpt2")
    (tmp_path / "notes.txt").write_text("a line of mine\n" * 40)
    monkeypatch.setattr("steepest.lab.runs.train.train_run", lambda config, out, **_: TRAINED)
    *before, own = shown(capsys, name.split())
    for line in before:
        assert main(shlex.split(line)[1:]) == int(line.startswith("  steepest pack"))  # without runs
    last = name.split()[-1]
    needs_a_run = last in ("report", "work", "pack", "unpack", "directions", "fit", "plot", "branch")
    needs_a_run &= not name.startswith("data ")
    assert (needs_a_run or name == "data check") == bool(before)
    assert main(shlex.split(own)[1:]) == int(needs_a_run)
    assert re.search("no (run|study) here", capsys.readouterr().err) or not needs_a_run
