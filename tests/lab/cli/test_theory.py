"""The commands about the theory: what they print and draw, and how they refuse."""

import json

import pytest
from PIL import Image

from steepest.lab.cli import main
from tests.cases import cases


def run(capsys, *words):
    """Exit code, standard output, standard error; argparse exits by itself."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directories of two short runs on images, with their weights."""
    root = tmp_path_factory.mktemp("trained")
    for method in ("adamw", "muon"):
        words = ["train", "--task", "digits", "--method", method, "--steps", "2", "--keep-checkpoint"]
        assert main([*words, "--out", str(root / method)]) == 0
    return root


@pytest.mark.parametrize("command", ["scores", "spike", "directions"])
def test_every_command_has_help_with_examples(capsys, command):
    code, out, _ = run(capsys, "theory", command, "--help")
    assert code == 0
    assert f"  steepest theory {command}" in out.split("examples:")[1]


def test_spike_counts_steps_and_draws_them(capsys, tmp_path):
    code, out, _ = run(capsys, "theory", "spike", "--plot", tmp_path / "spike.png")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.count("/") == 6}
    assert list(rows) == ["2", "4", "16", "64", "256"]
    assert all(row.rstrip().endswith("13 / 13 / 13") for row in rows.values())
    assert "885 / 885 / 885   231 / 1771 / 1772" in rows["256"]
    with Image.open(tmp_path / "spike.png") as image:
        assert image.width == 1640
    code, out, _ = run(capsys, "theory", "spike", "--kappa", "3", "--eps", "0.5", "--json")
    content = json.loads(out)
    assert content["eps"] == 0.5
    assert content["rows"][0]["kappa"] == 3
    assert content["rows"][0]["newton-muon"] == {"reached": 2, "settled": 2, "guaranteed": 2}


@pytest.mark.slow
def test_scores_are_printed_and_drawn(capsys, tmp_path):
    words = ["theory", "scores", "--case", "few-tokens", "--simulations", "1"]
    code, out, _ = run(capsys, *words, "--plot", tmp_path / "scores.png", "--json")
    assert code == 0
    content = json.loads(out)
    assert content["of_newton"]["few-tokens"]["newton"] == 1
    assert content["scores"]["few-tokens"]["newton-muon"] > 2 * content["scores"]["few-tokens"]["muon"]
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, *words)
    share = f"{content['of_newton']['few-tokens']['muon']:.3f}"
    assert next(line for line in out.splitlines() if line.split()[:1] == ["muon"]).split()[-1] == share


def test_directions_of_a_trained_model(capsys, trained, tmp_path):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    words = ["theory", "directions", trained / "adamw", "--examples", "32"]
    code, out, err = run(capsys, *words, "--plot", tmp_path / "directions.png", "--json")
    assert (code, err) == (0, "")
    (layer,) = json.loads(out)["layers"]
    assert (layer["layer"], layer["shape"], layer["ridge_raised"]) == ("head", [10, 128], 0)
    assert layer["condition"] is None  # 32 images cannot span 128 inputs
    assert list(layer["scores"])[:3] == ["gradient", "adam", "muon"]
    gradient = layer["scores"]["gradient"]
    assert gradient["alignment"] == pytest.approx(1)
    assert gradient["decrease"] == pytest.approx(gradient["gradient_norm"] ** 2 * gradient["score"] / 2)
    assert (tmp_path / "directions.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "head (condition inf)" in out
    assert f"{gradient['score']:.3g}" in next(line for line in out.splitlines() if " gradient " in line)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_a_run_without_second_moments_has_the_sign(capsys, trained, monkeypatch):
    monkeypatch.setattr("steepest.lab.runs.trained.code_version", lambda: "another")
    code, out, err = run(capsys, "theory", "directions", trained / "muon", "--ridge", "0", "--json")
    assert code == 0
    assert "note: another version of the code trained this run" in err
    (layer,) = json.loads(out)["layers"]
    assert "adam" in layer["scores"]  # the head is Adam's in this method
    assert layer["ridge_raised"] > 0
    code, out, _ = run(capsys, "theory", "directions", trained / "muon", "--ridge", "0")
    assert "ridge x 10" in out


def test_directions_without_a_score_are_counted_in_the_plot():
    from steepest.lab.report.theory_png import directions_png
    from steepest.theory import LayerDirections, Score

    flat = Score(alignment=0.1, curvature=0.0, gradient_norm=1.0, status="zero curvature")
    good = Score(alignment=0.5, curvature=2.0, gradient_norm=1.0, status="positive")
    some = LayerDirections("a", (2, 2), 1.0, 0, {"gradient": flat, "muon": good})
    none = LayerDirections("b", (2, 2), 1.0, 0, {"gradient": flat, "muon": flat})
    all_good = LayerDirections("b", (2, 2), 1.0, 0, {"gradient": good, "muon": good})
    images = [directions_png(layers) for layers in ([some], [none], [some, none], [all_good])]
    assert len(set(images)) == 4


def test_a_missing_checkpoint_is_wrong_usage(capsys, trained, tmp_path):
    (tmp_path / "config.json").write_bytes((trained / "muon" / "config.json").read_bytes())
    code, _, err = run(capsys, "theory", "directions", tmp_path)
    assert code == 2
    assert f"error: {tmp_path} holds no checkpoint: runs delete it when they are finished. Train into a new" in err


def test_damaged_files_are_a_failure(capsys, trained, tmp_path):
    code, _, err = run(capsys, "theory", "directions", tmp_path)
    assert code == 1
    assert "config.json: no run here. Give the directory of a run" in err
    config = (trained / "muon" / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    code, _, err = run(capsys, "theory", "directions", tmp_path)
    assert code == 1
    assert "checkpoint.pt: the checkpoint cannot be used" in err
    (tmp_path / "checkpoint.pt").write_bytes((trained / "adamw" / "checkpoint.pt").read_bytes())
    code, _, err = run(capsys, "theory", "directions", tmp_path)
    assert code == 1
    assert "it must hold" in err or "it is of the run" in err
    content = json.loads(config)
    content["data"]["sha256"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(content))
    code, _, err = run(capsys, "theory", "directions", tmp_path)
    assert code == 2
    assert "runs on different data are never mixed" in err


@cases(
    "words, message",
    [
        (["theory"], "the following arguments are required: COMMAND"),
        (["theory", "score"], "invalid choice: 'score'"),
        (["theory", "scores", "--case", "few"], "invalid choice: 'few'"),
        (["theory", "scores", "--simulations", "0"], "'0' must be a whole number of at least 1"),
        (["theory", "spike", "--plot", "spike.pdf"], "'spike.pdf' must end in .png"),
        (["theory", "spike", "--kappa", "0.5"], "kappa must be a finite number of at least 1, got 0.5"),
        (["theory", "spike", "--eps", "-1"], "A path takes eps above 0"),
        (["theory", "directions", "RUN", "--layers", "haed"], "Unknown linear layer 'haed': did you mean 'head'?"),
        (["theory", "directions", "RUN", "--ridge", "-1"], "ridge must be a finite number of at least 0, got -1"),
        (["theory", "directions", "RUN", "--data", "text"], "The task 'digits' has its own images"),
    ],
)
def test_wrong_usage_ends_with_two_and_says_what_to_do(capsys, trained, words, message):
    code, _, err = run(capsys, *(trained / "muon" if word == "RUN" else word for word in words))
    assert code == 2
    assert message in err


def test_a_plot_that_cannot_be_written_is_a_failure(capsys, tmp_path):
    code, _, err = run(capsys, "theory", "spike", "--plot", tmp_path / "nowhere" / "spike.png")
    assert code == 1
    assert "nowhere" in err
