"""`steepest critical-batch fit` and `plot`: what they print, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from steepest.batch_size.curve import FAMILIES
from steepest.lab.cli import critical_batch as fit
from steepest.lab.cli import main
from tests.lab.studies.batch.cases import written


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory, "varied")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error; argparse exits by itself."""
    try:
        code = main(["critical-batch", *map(str, words)])
    except SystemExit as left:
        code = int(left.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_families_of_the_help_are_those_of_the_library() -> None:
    assert fit.FAMILIES.split(",") == list(FAMILIES)


def test_it_prints_each_arm_with_both_batch_sizes(capsys: pytest.CaptureFixture[str], study: Path) -> None:
    code, out, err = run(capsys, "fit", study)
    assert (code, err) == (0, "")
    assert "muon momentum=0.8, target 0.05: 9 of 18 runs arrived" in out
    assert "muon momentum=0.9, target 0.05" in out
    assert out.count("b*, least b K(b)") == out.count("B_crit, knee") == 2
    assert "+AICc" in out
    assert "SFO-minimising b*" in out
    assert fit.NOTE in out


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str], study: Path) -> None:
    code, out, _ = run(capsys, "fit", study, "--families", "H,S", "--level", "0.8", "--target", "0.05", "--json")
    content = json.loads(out)
    assert code == 0
    assert content["listed"] == content["ended"]
    first = content["results"][0]
    assert {one["key"] for one in first["families"]} == {"H", "S"}
    assert (first["chosen"], first["level"], first["target"]) == ("S", 0.8, 0.05)
    assert "80% intervals" in first["recommendation"]


def test_a_study_that_has_just_begun_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    code, out, _ = run(capsys, "fit", written(tmp_path_factory, "started"))
    assert code == 0
    assert "Refused (muon, target loss 0.05): No run to be counted has ended." in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "0.001"], "The target 0.001 is below 0.05"),
        (["--target", "x"], "'x' must be a loss above 0"),
        (["--families", "Q"], "'Q'"),
        (["--level", "1"], "'1' must lie between 0 and 1"),
    ],
)
def test_wrong_usage_is_refused(
    capsys: pytest.CaptureFixture[str], study: Path, words: list[str], message: str
) -> None:
    code, _, err = run(capsys, "fit", study, *words)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("command", ["fit", "plot"])
def test_no_study_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    code, _, err = run(capsys, command, tmp_path)
    assert code == 1
    assert "no study here" in err


def test_plot_prints_what_it_wrote(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = shutil.copytree(written(tmp_path_factory, "started"), tmp_path / "study")
    code, out, err = run(capsys, "plot", folder)
    assert (code, err) == (0, "")
    names = [Path(line).name for line in out.splitlines()]
    assert names == ["learning_rates.png", "rows.csv", "crossings.csv", "estimates.csv", "learning_rates.csv"]
