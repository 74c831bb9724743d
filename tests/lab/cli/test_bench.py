"""`steepest bench`: what its commands print and write, and what they refuse."""

import csv
import dataclasses
import inspect
import json
import shlex
import sys

import pytest
import torch

from steepest import Muon
from steepest.lab import bench
from steepest.lab.bench import SHAPE_SETS, certified, cost, gpu, scaling, train_share
from steepest.lab.bench import contestants as everybody
from steepest.lab.bench.machine import Machine
from steepest.lab.bench.momenta import SETS
from steepest.lab.bench.train_share import Seconds
from steepest.lab.cli import main
from steepest.lab.cli.bench import CONTESTANTS, GROUP, OTHERS, SHAPES, Step
from steepest.lab.disk.ours import refusal
from steepest.lab.methods import METHODS
from steepest.lab.studies.batch import coverage
from tests.cases import cases

MACHINE = Machine(((64, 100e9),), *[((2**20, 10e9),)] * 3, 1e-6)
STEP = "step --width 8 --layers 1 --pairs 2 --warm-up 1 --peers torch-fp32"
TRAIN = "train --task digits"
SCALING = "scaling --widths 8 16 --layers 1 --aspects 2 --rounds 3"
ACCURACY = "accuracy --task quadratic --steps 6 --at 2,6"
PASSES = "passes --width 8 16 --layers 1 --pairs 3"
ORIGIN = {"command", "commit", "environment"}


@pytest.fixture
def run(capsys):
    """Exit code, standard output, standard error; argparse exits by itself."""

    def run(words):
        try:
            code = main(["bench", *shlex.split(words)])
        except SystemExit as left:
            code = left.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def written(run, tmp_path):
    """The JSON, which is that on the terminal, and rows of the CSV, of a benchmark that writes its files."""

    def written(words, name, *, drawn=True, page=False):
        out = tmp_path / "new" / name
        code, printed, err = run(f"{words} --out {out} --json")
        assert code == 0
        content = json.loads((out / f"{name}.json").read_text())
        assert content == json.loads(printed)
        assert content["commit"] == content["environment"]["git_commit"]
        endings = {"json", "csv", *(["png"] if drawn else []), *(["html"] if page else [])}
        assert {path.name for path in out.iterdir()} == {f"{name}.{ending}" for ending in endings}
        assert all(f"{out / name}.{ending}\n" in err for ending in endings)
        assert not drawn or (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert refusal(out, "bench") is None  # the same command may write there again
        with (out / f"{name}.csv").open(newline="") as file:
            return content, list(csv.DictReader(file))

    return written


@pytest.fixture
def timed(monkeypatch):
    """Training that takes no time, but says it does."""

    def time_steps(task, methods, *, steps, device):
        return {method: [Seconds(0.003, 0.001 * (1 + place))] * steps for place, method in enumerate(methods)}

    monkeypatch.setattr(train_share, "time_steps", time_steps)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(scaling, "calibrate", lambda *, clock: MACHINE)
    monkeypatch.setattr(scaling, "SIDE", 8)


def test_step_has_a_row_per_contestant_and_the_floor(run):
    code, out, err = run(STEP)
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
def test_step_says_when_the_machine_was_busy(run, monkeypatch, share, told):
    measured = bench.measure
    monkeypatch.setattr(
        bench,
        "measure",
        lambda bench, tell: [dataclasses.replace(case, cpu_share=share) for case in measured(bench, tell=tell)],
    )
    _, out, _ = run(STEP)
    assert f"CPU time / wall time of the rounds: {share:.2f}" in out
    assert ("the machine was busy with something else: repeat this" in out) == told


def test_step_writes_every_choice_and_every_round_and_says_why_a_peer_is_missing(run, written, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)  # which Python takes for missing
    content, (ours, _, missing) = written(f"{STEP},pytorch-optimizer", "step")
    words = "--shapes gpt2 --width 8 --layers 1 --peers torch-fp32,pytorch-optimizer --pairs 2 --warm-up 1"
    assert content["command"] == f"steepest bench step {words} --dtype float32 --device cpu --seed 0 --threads 1"
    assert content["environment"]["threads"] == 1
    assert len(content["cases"][0]["seconds"]["torch-fp32"]) == 2
    assert (float(ours["ratio_median"]), ours["reason"]) == (1, "")
    reason = "pytorch_optimizer is not installed. Peers come with: pip install 'steepest[bench]'."
    assert (missing["reason"], missing["milliseconds_median"]) == (reason, "")
    code, out, _ = run(f"{STEP},pytorch-optimizer")
    assert code == 0
    assert f"pytorch-optimizer has no numbers. {reason}" in out


def test_help_names_every_set_and_contestant(run):
    assert SHAPES.split(", ") == list(SHAPE_SETS)
    assert CONTESTANTS.split(", ") == list(everybody.CONTESTANTS)
    code, out, _ = run("step --help")
    assert code == 0
    assert inspect.getdoc(Step).split("\n\n", 1)[1] in out


def test_train_writes_shares_and_raw_times(timed, written):
    names = ("adamw", "muon", "newton-muon")
    words = f"{TRAIN} --preset demo tiny --methods {','.join(names)} --steps 8 --every 16"
    content, rows = written(words, "train")
    assert {*ORIGIN, "steps", "rows", "seconds"} == set(content)
    assert len(content["seconds"]["tiny"]["newton-muon"]) == 8
    assert [(row["preset"], row["method"]) for row in rows] == [(p, m) for p in ("demo", "tiny") for m in names]
    assert [row["every"] for row in rows[:3]] == ["", "", "16"]
    assert float(rows[0]["share"]) == pytest.approx(0.25)
    assert float(rows[0]["step_ratio"]) == pytest.approx(0.8)
    assert float(rows[2]["optimizer_ratio"]) == pytest.approx(1.5)


def test_train_has_a_line_for_each_method_that_is_usual(timed, run):
    assert set(OTHERS) <= set(METHODS)
    code, lines, _ = run(TRAIN)
    assert code == 0
    for method in ("adamw", "muon", "muonadam", "newton-muon (a refresh in 32)", "muonmax-momo"):
        assert f" {method} " in lines
    assert "torch-muon" not in lines  # takes no convolutions


def test_scaling_writes_rows_raw_times_and_the_machine(small, written):
    content, rows = written(SCALING, "scaling")
    assert {*ORIGIN, "machine", "rows", "seconds"} == set(content)
    assert content["machine"]["products"] == [[64, 100e9]]
    assert list(map(len, content["seconds"].values())) == [3] * 4
    points = [("width", "8"), ("width", "16"), ("layers", "1"), ("aspect", "2")]
    assert [(row["axis"], row["value"]) for row in rows] == points
    assert int(rows[0]["parameters"]) == 12 * 8 * 8
    for row in rows:
        assert float(row["error"]) == pytest.approx(float(row["predicted_ms"]) / float(row["ms"]) - 1)


def test_scaling_names_the_worst_point(small, run):
    code, lines, _ = run(SCALING)
    assert code == 0
    assert " width 16 " in lines
    assert "of 4; the worst is " in lines


@pytest.mark.slow
def test_accuracy_writes_rows_and_spectra(written):
    content, rows = written(ACCURACY, "accuracy")
    assert {*ORIGIN, "spectra", "rows"} == set(content)
    assert [own["source"] for own in content["spectra"]] == ["step 2", "step 6", "normal"]
    assert [row["coefficients"] for row in rows] == [*SETS] * 3
    assert {row["dtype"] for row in rows} == {"float32"}
    assert all(float(row["distance"]) < 1 for row in rows)


def test_accuracy_names_every_source_and_what_is_refused(run):
    code, lines, _ = run(f"{ACCURACY} --dtype bfloat16")
    assert code == 0
    for source in ("step 2", "step 6", "normal"):
        assert f"quadratic demo, bfloat16 products: {source}, 1 matrices" in lines
    nonic = next(line for line in lines.splitlines() if line.split()[:1] == ["nonic"])
    assert nonic.split()[1:] == ["refused"] * 6
    assert lines.count("Refused: Coefficients 'nonic' need products in a wider type than torch.bfloat16") == 1


def test_passes_writes_rows_and_raw_times(written):
    content, rows = written(PASSES, "passes")
    assert {*ORIGIN, "threads", "pairs", "rows", "cases"} == set(content)
    assert len(content["cases"]["gpt2 16"]["seconds"]["plain"]) == 3
    assert [row["case"] for row in rows] == ["gpt2 8"] * 4 + ["gpt2 16"] * 4
    assert [row["passes"] for row in rows[:2]] == ["plain", "plain, load by load"]
    assert float(rows[0]["ratio"]) == 1


def test_passes_has_a_line_for_each_way_and_a_case_where_there_is_no_width(run):
    code, lines, _ = run(f"{PASSES} --threads 1")
    assert code == 0
    assert "gpt2 8: 6 matrices, 0.000768 M entries, 1 load(s), float32, 1 thread(s)" in lines
    for way in ("plain", "plain, load by load", "steepest, no decay", "steepest, with decay"):
        assert f" {way} " in lines
    assert list(json.loads(run("passes --shapes many-small --pairs 2 --json")[1])["cases"]) == ["many-small"]


@pytest.mark.slow
def test_newton_muon_has_a_row_for_every_case_and_width(written):
    content, rows = written("newton-muon --width 64 --tokens 64 128 --pairs 8 --every 16", "cost", drawn=False)
    assert content["command"].startswith("steepest bench newton-muon --width 64 --layers 1 --tokens 64 128 --every 16")
    assert [(row["case"], row["tokens"]) for row in rows] == [(case, n) for n in ("64", "128") for case in cost.CASES]
    for row in rows:
        weighed = (15 * float(row["ordinary_ratio"]) + float(row["refresh_ratio"])) / 16
        assert float(row["ratio"]) == pytest.approx(weighed, abs=1e-4)
        assert row["planned_bytes"] == row["held_bytes"]


@pytest.mark.slow
def test_momo_has_a_row_for_every_recipe_and_kind_of_dual_norms(run, monkeypatch):
    monkeypatch.setattr(cost, "RECIPES", {"Muon": Muon})
    code, out, _ = run("momo --task digits --pairs 2 --json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [(row["method"], row["dual"]) for row in rows] == [("Muon", "stale"), ("Muon", "cached")]
    assert all(row["extra_memory_momo_mb"] > 0 and row["step_ratio"] > 0 for row in rows)


@cases("words", [f"{TRAIN} --device cuda", f"{STEP} --device cuda", "gpu --device cuda --rehearsal"])
def test_a_device_that_is_not_there_is_refused(run, words, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    code, out, err = run(words)
    assert (code, out) == (2, "")
    assert "--device cuda: this machine has cpu. Give one of them, or auto." in err


def test_a_gpu_is_asked_for_where_there_is_none(run, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    code, _, err = run("gpu")
    assert code == 2
    assert "Run it on a machine with CUDA, or add --rehearsal to go through it here with tiny shapes." in err


@pytest.mark.slow
def test_gpu_writes_json_rows_and_a_page(run, written, tmp_path, monkeypatch):
    content, rows = written("gpu --device cpu --rehearsal", "gpu", drawn=False, page=True)
    assert content["command"] == "steepest bench gpu --device cpu --rehearsal --minutes 12.0 --threads 1"
    assert {*ORIGIN, "polars", "steps", "cases", "additions", "training", "left_out", "wrong"} <= set(content)
    assert list(dict.fromkeys(row["part"] for row in rows)) == ["polar", "method", "step", "addition", "training"]
    page = (tmp_path / "new" / "gpu" / "gpu.html").read_text()
    for text in ("all checks passed", "A rehearsal", "no CUDA graphs", "Steps of a layer as they come", "Newton-Muon"):
        assert text in page


def test_gpu_ends_with_1_where_something_is_off(run, monkeypatch, tmp_path):
    def measured(device, **_):
        found = gpu.Findings(device, "<b>a card</b>", rehearsal=False)
        found.polars += [
            certified.Polar("jordan", "float32", "gram", "4 x 4", 0.7, 1.2, allowed=1e-4, reason="not finite"),
            certified.Polar("jordan", "float32", "gram", "8 x 8", 0.7, 1.2, 0.8, 1.1, 0.0, 1e-4),
            certified.Polar("nonic", "bfloat16", "gram", "4 x 4", 0.7, 1.2, reason="refused"),
        ]
        found.steps.append(certified.Steps("muon", "float32", "0.weight", None, 2e-3))
        found.training = gpu.Trained("small", 3, 1.0, 10.0, 5.0, None, 0.1, 2**20)
        found.left_out.append("a part: no time")
        return found

    monkeypatch.setattr(gpu, "measure_gpu", measured)
    code, out, err = run(f"gpu --device cpu --rehearsal --out {tmp_path / 'out'}")
    assert code == 1
    assert (
        "error: Not as it should be: jordan in float32, gram, 4 x 4, steps of muon, a training, which diverged." in err
    )
    assert out.count("not finite") == 5 + 3  # cells of a set and of a method
    assert "Refused, as products in a wider type are needed: nonic in bfloat16." in out
    assert "Symmetric products in bfloat16 are those of torch.matmul." in out
    assert "Left out: a part: no time" in out
    page = (tmp_path / "out" / "gpu.html").read_text()
    assert "not all checks passed" in page
    assert "&lt;b&gt;a card&lt;/b&gt;" in page
    assert "<b>a card" not in page
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["wrong"][0] == "jordan in float32, gram, 4 x 4"


def test_every_benchmark_may_write_where_it_has_written_before(tmp_path):
    for name, one in GROUP.parts.items():
        out = tmp_path / name
        out.mkdir()
        (out / f"{one.files or name}.json").write_text(json.dumps(dict.fromkeys(ORIGIN)))
        assert refusal(out, "bench") is None


def test_coverage_counts_intervals_that_hold_the_truth(written, monkeypatch):
    first = coverage.settings()[:1]
    monkeypatch.setattr(coverage, "settings", lambda: first)
    _, (row,) = written("coverage --replications 4 --resamples 100", "coverage", drawn=False)
    tally = coverage.measure(first[0], replications=4, resamples=100)
    assert float(row["covered"]) == pytest.approx(tally.covered / tally.numbers, abs=1e-3)


@cases(
    "words, text",
    [
        ("step --peers tosch", "Unknown contestant 'tosch': did you mean 'torch'"),
        ("step --shapes gpt", "Unknown set of shapes 'gpt': did you mean 'gpt2'"),
        ("step --pairs 1", "at least 2 pairs"),
        ("step --shapes many-small --width 8", "many-small has neither width nor layers"),
        ("step --pairs none", "must be a whole number of at least 1"),
        (f"{TRAIN} --methods adamw", "'muon' among them"),
        (f"{TRAIN} --methods muon,muonn", "muonn"),
        (f"{TRAIN} --steps 6", "whole cycles of 4"),
        (f"{TRAIN} --preset huge", "huge"),
        ("scaling --widths 8 8 --layers 1 --aspects 1 --rounds 3", "each point once, got 'width 8' twice"),
        ("scaling --rounds 2", "rounds of at least 3"),
        ("gpu --device cpu", "bench gpu measures a GPU, and --device cpu is the cpu here."),
        ("gpu --device cpu --rehearsal --minutes 0", "'0' must be a finite number above 0"),
        (f"{ACCURACY} --at 2,7", "at takes steps from 1 to steps=6, got [2, 7]"),
        (f"{ACCURACY} --at 2,x", "'x' must be a whole number of at least 1"),
        (f"{ACCURACY} --dtype float23", "Unknown dtype 'float23': did you mean 'float32'"),
        (f"{ACCURACY} --preset dmeo", "did you mean 'demo'"),
        ("passes --shapes gpt", "Unknown set of shapes 'gpt': did you mean 'gpt2'"),
        ("passes --pairs 1", "at least 2 pairs"),
        ("passes --shapes many-small --width 8", "many-small has neither width nor layers"),
        ("ranks --rounds 1", "at least 2 rounds, got 1"),
        ("momo --pairs 1", "'1' must be a whole number of at least 2"),
        ("newton-muon --pairs 7", "'7' must be a whole number of at least 8"),
        ("coverage --resamples 5", "'5' must be a whole number of at least 100"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_remedy(run, words, text):
    code, out, err = run(words)
    assert (code, out) == (2, "")
    assert text in err
