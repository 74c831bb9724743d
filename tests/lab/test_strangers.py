"""Directories from strangers: what stands in the place of a file of a study or a run, met by every command."""

import contextlib
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from steepest.lab.cli import main
from steepest.lab.disk.packed import RECORDS, pack, unpack
from steepest.lab.runs.config import configure
from steepest.lab.runs.train import Interrupted, train_run
from steepest.lab.studies.pack import pack_study
from steepest.lab.studies.study import run_directory
from steepest.lab.tasks import make_task
from tests.cases import cases
from tests.lab.disk.test_files import SECRET, THINGS
from tests.lab.synthetic import Pace, run_dir, write_study

TRAIN = ["train", "--task", "digits", "--method", "adamw", "--steps", "8"]
CONTENTS = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe\n",
    "no JSON": b"ssh-ed25519 AAAA\n",
    "no object": b"[]\n",
    "deep": b"[" * 50_000 + b"\n",
    "control characters": b'{"kind": "a\\nssh-ed25519 AAAA\\u001b[2J"}\n',
}


def put(path, thing):
    """Something else in the place of a file."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    if thing in THINGS:
        THINGS[thing](path)
    elif thing == "giant":
        with path.open("wb") as file:
            file.truncate(2**42)
    else:
        path.write_bytes(CONTENTS[thing])


ALL = [*THINGS, *CONTENTS, "giant"]


@contextlib.contextmanager
def impatient():
    """A command that waits for a pipe does so for ever."""

    def stop(*_):
        raise AssertionError("the command hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(200)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def told(capsys, words, *, code, mentions):
    with impatient():
        assert main([*map(str, words)]) == code
    out, err = capsys.readouterr()
    if code:
        [line] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert all(text in line for text in mentions), line
    assert SECRET not in out + err
    assert "\x1b[2J" not in out + err
    assert not any(line.startswith("ssh-ed25519") for line in (out + err).splitlines())
    return out, err


def intact(tmp_path):
    outside = tmp_path / "outside"
    return not outside.exists() or outside.read_text() == SECRET


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("studies") / "study", {"adamw": Pace(), "muon": Pace(1.7)}, seeds=(0,))


@pytest.mark.slow
@cases("thing", ALL)
@cases("name", ["config.json", "result.json", "metrics.jsonl", "environment.json"])
def test_a_report_shows_what_is_wrong_with_a_run_and_nothing_of_what_a_link_points_to(
    study, tmp_path, capsys, monkeypatch, name, thing
):
    monkeypatch.setattr("steepest.lab.report.page.to_png", lambda _: b"")
    shutil.copytree(study, tmp_path / "study")
    run = sorted((tmp_path / "study" / "runs").iterdir())[0]
    (tmp_path / "study" / "runs" / "outside").write_text(SECRET)
    put(run / name, thing)
    told(capsys, ["report", tmp_path / "study"], code=0, mentions=[])
    page = (tmp_path / "study" / "report.html").read_text()
    assert SECRET not in page
    if (name, thing) == ("environment.json", "control characters"):
        return  # any object describes a machine; it is escaped where it is shown
    if (name, thing) == ("metrics.jsonl", "empty"):
        name = "result.json"  # which says more than the rows do
    assert f"{run.name}/{name}" in page
    assert (tmp_path / "study" / "runs" / "outside").read_text() == SECRET


@pytest.mark.slow
@cases("thing", ALL)
@cases("command", ["report", "critical-batch fit", "critical-batch plot", "work", "race"])
def test_a_study_that_is_none_is_named_by_every_command(tmp_path, capsys, command, thing):
    (tmp_path / "study").mkdir()
    put(tmp_path / "study" / "study.json", thing)
    directory = ["--task", "digits", "--out"] if command == "race" else []
    foreign = (command, thing) == ("race", "control characters")  # a document, and none of ours
    said = "study holds a study.json that the lab did not write" if foreign else "study.json: "
    told(capsys, [*command.split(), *directory, tmp_path / "study"], code=2 if foreign else 1, mentions=[said])
    assert intact(tmp_path)
    assert os.listdir(tmp_path / "study") in (["study.json"], ["lock", "study.json"], ["study.json", "lock"])


PACKS = {
    "bomb": lambda: lzma.compress(bytes(2**27), preset=0),
    "half": lambda: pack(b"{}" * 1000, {})[:-20],
    "greedy": lambda: lzma.compress(b"{}", filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**30}]),
    "packed no object": lambda: lzma.compress(b"ssh-ed25519 AAAA\n"),
    "packed deep": lambda: lzma.compress(b"[" * 2**20 + b"\n"),
    "packed control characters": lambda: pack(CONTENTS["control characters"], {}),
    "elsewhere": lambda: lzma.compress(b'{"format": 1, "study.json": "{}"}\n{"run": "../../outside"}\n'),
}


@pytest.mark.slow
@cases("thing", [*ALL, *PACKS])
@cases("command", ["report", "critical-batch fit", "critical-batch plot", "unpack", "pack"])
def test_a_packed_study_that_is_none_is_named_by_every_command(tmp_path, capsys, command, thing):
    (tmp_path / "study").mkdir()
    path = tmp_path / "study" / "runs.jsonl.xz"
    path.write_bytes(PACKS[thing]()) if thing in PACKS else put(path, thing)
    words = ["pack", "--delete"] if command == "pack" else command.split()
    told(capsys, [*words, tmp_path / "study"], code=1, mentions=["study/runs.jsonl.xz"])
    assert intact(tmp_path)
    assert sorted(os.listdir(tmp_path / "study")) in (["runs.jsonl.xz"], ["lock", "runs.jsonl.xz"])


@pytest.mark.slow
@cases("thing", CONTENTS)
@cases("name", RECORDS)
def test_a_report_shows_what_is_wrong_with_a_packed_run(study, tmp_path, capsys, monkeypatch, name, thing):
    monkeypatch.setattr("steepest.lab.report.page.to_png", lambda _: b"")
    shutil.copytree(study, tmp_path / "study")
    pack_study(tmp_path / "study", delete=True)
    content, runs = unpack(packed := tmp_path / "study" / "runs.jsonl.xz")
    changed = min(runs)
    if thing in ("empty", "not UTF-8"):
        return  # which no packed file can hold
    packed.write_bytes(pack(content, {**runs, changed: {**runs[changed], name: CONTENTS[thing]}}))
    told(capsys, ["report", tmp_path / "study"], code=0, mentions=[])
    page = (tmp_path / "study" / "report.html").read_text()
    assert (f"{changed}/{name}" in page) != ((name, thing) == ("environment.json", "control characters"))


@cases("thing", THINGS)
@cases("name", ["report.html", "plots/loss-steps.png", "plots"])
def test_a_report_is_written_to_regular_files(study, tmp_path, capsys, monkeypatch, name, thing):
    if (name, thing) == ("plots", "a directory"):
        return
    monkeypatch.setattr("steepest.lab.report.page.to_png", lambda _: b"")
    shutil.copytree(study, tmp_path / "study")
    (tmp_path / "study" / name).parent.mkdir(exist_ok=True)
    if "/" in name:
        name = next(f"plots/{key}.png" for key in keys_of(study))
    put(tmp_path / "study" / name, thing)
    told(capsys, ["report", tmp_path / "study"], code=1, mentions=[name])
    assert intact(tmp_path)
    if (tmp_path / "study" / "outside").exists():
        assert (tmp_path / "study" / "outside").read_text() == SECRET


def keys_of(study):
    from steepest.lab.studies.batch import figures as cb_figures
    from steepest.lab.studies.race import figures

    return (figures if json.loads((study / "study.json").read_text())["kind"] == "race" else cb_figures).KEYS


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was interrupted in the middle."""
    path = tmp_path_factory.mktemp("begun") / "run"
    config = configure(make_task("digits"), method="adamw", seed=0, steps=8)
    steps = iter(range(10))
    with pytest.raises(Interrupted):
        train_run(config, path, stop=lambda: next(steps) == 3)
    return path


@pytest.mark.slow
@cases("thing", ALL)
@cases("name", ["lock", "config.json", "metrics.jsonl", "environment.json", "checkpoint.pt", "result.json"])
def test_a_run_does_not_go_on_from_what_is_not_its_own(begun, tmp_path, capsys, name, thing):
    if (name, thing) == ("lock", "empty"):
        return  # as the kernel leaves it
    if (name, thing) == ("environment.json", "control characters"):
        return  # any object describes a machine; it is escaped where it is shown
    shutil.copytree(begun, tmp_path / "run")
    put(tmp_path / "run" / name, thing)
    foreign = (name == "lock" and thing not in THINGS) or (name, thing) == ("config.json", "control characters")
    before = sorted_tree(tmp_path / "run") if foreign and thing != "giant" else None
    said = f"run holds a {name} that the lab did not write" if foreign else f"{name}: "
    told(capsys, [*TRAIN, "--out", tmp_path / "run"], code=2 if foreign else 1, mentions=[said])
    assert intact(tmp_path)
    if before is not None:
        assert sorted_tree(tmp_path / "run") == before


@cases("thing", THINGS)
def test_a_run_whose_result_is_no_file_leaves_it_alone(begun, tmp_path, capsys, thing):
    shutil.copytree(begun, tmp_path / "run")
    put(tmp_path / "run" / "result.json", thing)
    told(capsys, [*TRAIN, "--out", tmp_path / "run"], code=1, mentions=["result.json: "])
    assert intact(tmp_path)


def sorted_tree(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


FOREIGN = {
    "model": {"config.json": '{"model_type": "bert"}', "model.safetensors": "mine"},
    "studies": {"study.json": '{"my": "study"}', "lock": "notes of mine"},
    "notes": {"notes.txt": "mine"},
    "metrics": {"metrics.jsonl": "mine", "result.json": "mine", "environment.json": "mine"},
    "lock": {"lock": "mine\n"},
    "hidden": {".secret.tmp": "mine"},
    "report": {"report.html": "mine", "rows.csv": "mine"},
    "runs": {"runs/monday/log": "mine"},
    "branches": {"0.json": "mine"},
    "step": {"step.json": "{}", "step.csv": "mine"},
}
COMMANDS = {
    "train": TRAIN,
    "race": ["race", "--task", "digits", "--methods", "adamw"],
    "sweep": ["sweep", "--task", "digits", "--methods", "adamw", "--lrs", "0.1"],
    "measure": ["critical-batch", "measure", "--task", "digits", "--batches", "4,8", "--targets", "0.1"],
    "bench step": ["bench", "step"],
    "bench train": ["bench", "train", "--task", "digits"],
    "bench accuracy": ["bench", "accuracy"],
    "bench passes": ["bench", "passes"],
    "bench scaling": ["bench", "scaling"],
}


@pytest.mark.slow
@cases("foreign", FOREIGN)
@cases("command", COMMANDS)
def test_a_folder_of_somebody_else_is_refused_before_anything_is_written(tmp_path, capsys, command, foreign):
    for name, content in FOREIGN[foreign].items():
        (tmp_path / "theirs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / name).write_text(content)
    before = sorted_tree(tmp_path)
    told(
        capsys, [*COMMANDS[command], "--out", tmp_path / "theirs"], code=2, mentions=["theirs ", "Choose another --out"]
    )
    assert sorted_tree(tmp_path) == before


@cases("foreign", FOREIGN)
def test_branches_are_refused_a_folder_of_somebody_else(begun, tmp_path, capsys, foreign):
    for name, content in FOREIGN[foreign].items():
        (tmp_path / "theirs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / name).write_text(content)
    before = sorted_tree(tmp_path)
    words = ["critical-batch", "branch", begun, "--batches", "16,32", "--samples", "32", "--out", tmp_path / "theirs"]
    told(capsys, words, code=2, mentions=["theirs ", "Choose another --out"])
    assert sorted_tree(tmp_path) == before


def test_what_the_lab_has_left_is_not_somebody_else_s(tmp_path):
    from steepest.lab.disk.ours import refusal

    out = write_study(tmp_path / "out", {"adamw": Pace()}, seeds=(0,))
    run = run_dir(out, "adamw", 0)
    (out / "lock").write_text("123\n")
    (out / "report.html").touch()
    assert refusal(out, "study") is None
    (out / "study.json").unlink()  # as a message may advise
    assert refusal(out, "study") is None
    assert refusal(run, "run") is None
    (tmp_path / "begun").mkdir()  # killed before it wrote its config
    for name, content in (("lock", ""), ("worker.log", "words"), (".config.json.12.0123abcd.tmp", "{")):
        (tmp_path / "begun" / name).write_text(content)
        assert refusal(tmp_path / "begun", "run") is None
    assert refusal(tmp_path / "nowhere", "study") is None


PLANTED = ("random", "torch", "steepest", "numpy", "json", "optuna", "sitecustomize_", "encodings_")


@pytest.mark.slow
def test_no_code_of_the_current_directory_runs_in_a_worker(tmp_path):
    """Somebody has modules of these names here; the race is started as the installed command is."""
    here = tmp_path / "here"
    for name in PLANTED:
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    start = "import sys; sys.path = [p for p in sys.path if p]; from steepest.lab.cli import main; sys.exit(main())"
    words = ["race", "--task", "digits", "--methods", "adamw", "--seeds", "1", "--steps", "2", "--workers", "1"]
    command = [sys.executable, "-P", "-c", start, *words, "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_no_code_of_the_current_directory_runs_in_the_command(tmp_path):
    """Python puts the directory first for `python -m`; what it is called with must find a study, and no module."""
    for name in ("random", "json", "argparse", "torch", "numpy", "optuna"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    command = [sys.executable, "-m", "steepest", "report", "nowhere"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "no study here" in ended.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_config_s_text_begins_no_line_of_a_log(tmp_path):
    config = configure(make_task("digits"), method="adamw", seed=0, steps=2)
    config = replace(config, code="0.1\nssh-ed25519 AAAA evil@example\n")
    run = run_directory(tmp_path, config)
    run.mkdir(parents=True)
    (run / "config.json").write_text(config.to_json())
    command = [sys.executable, "-Pm", "steepest.lab.engine.worker", str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "0.1\\nssh-ed25519 AAAA evil@example\\n" in ended.stderr.splitlines()[-1]
    assert not any(line.startswith("ssh-ed25519") for line in ended.stderr.splitlines())
