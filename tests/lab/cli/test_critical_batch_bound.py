"""`steepest critical-batch bound`: what it prints, and what it refuses."""

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from steepest.geometry import ScaleRule
from steepest.lab.cli import main
from steepest.lab.cli.bound import Scale
from tests.cases import cases

KNOWN = "--m 8 --n 16 --L 4.4 --nu 32 --lr 0.002 --momentum 0.9 --no-nesterov --eps 2 --gap 1.59 --gradient 3.39"


def run(capsys, words):
    """Exit code, standard output, standard error; argparse exits by itself."""
    try:
        code = main(["critical-batch", "bound", *shlex.split(words)])
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def whole(number):
    return f"{float(f'{number:.4g}'):,.0f}"


def lines(out):
    return {line.split("  ")[0]: re.split(r" {2,}", line)[1:] for line in out.splitlines() if "  " in line}


def test_it_prints_the_bound_its_batch_sizes_and_their_units(capsys):
    code, out, err = run(capsys, f"{KNOWN} --batch 32 64 256")
    assert (code, err) == (0, "")
    rows = lines(out)
    y, z = 64 * (0.1 / 1.9) ** 0.5, 4.4 * 0.002 * 18.5
    least = (y / (2 - z)) ** 2
    steps = 3 * (1.59 / 0.002 + 18 * 3.39) / (2 - z)
    assert rows["X"] == [f"{1.59 / 0.002 + 18 * 3.39:.4g}", "loss/weight * steps"]
    assert rows["Y"] == [f"{y:.4g}", "loss/weight * sqrt(samples)"]
    assert rows["Z"][0] == f"{z:.4g}"
    assert rows["b_min"][0] == f"{least:.4g}"
    assert rows["b*"][0] == f"{2.25 * least:.4g}"
    assert rows["K(b*)"] == [whole(steps), "steps"]
    assert rows["SFO(b*)"][0] == whole(2.25 * least * steps)
    assert rows["SFO(32)"] == ["never", "b is not above b_min"]
    assert rows["SFO(256)"][1].startswith("gradients of samples in ")
    assert rows["overshoot"] == ["1.1236", "polar_express"]
    assert "ball radius" not in rows
    assert "An upper bound for exact polar factors" in out
    assert "Its b* need not be near the measured one." in out


def test_json_holds_the_same_numbers(capsys):
    _, out, _ = run(capsys, f"{KNOWN} --batch 32 256 --json")
    content = json.loads(out)
    assert content["critical"]["status"] == "reachable"
    assert content["critical"]["best"] == pytest.approx(2.25 * content["critical"]["least"])
    assert content["batches"][0] == {"batch": 32, "steps": None, "sfo": None}
    assert content["batches"][1]["sfo"] == pytest.approx(256 * content["batches"][1]["steps"])
    assert content["ball"]["regime"] == "no decay"
    assert content["ball"]["radius"] is None
    assert content["shape"] == [8, 16]
    assert content["refusal"] is None


def test_decay_draws_a_ball_and_its_target_is_the_gap(capsys):
    code, out, _ = run(capsys, f"{KNOWN} --wd 0.1 --scale match_rms_adamw --coefficients jordan")
    rows = lines(out)
    assert code == 0
    assert rows["bound"][1].startswith("on the mean Frank-Wolfe gap")
    assert rows["scale c"] == ["0.8", "match_rms_adamw, 8 x 16"]
    assert rows["ball radius"] == [f"{1.2024 * 0.8 / 0.1:.4g}", "weight, spectral norm"]
    assert float(rows["gradient <="][0]) == pytest.approx(2 * 4.4 * 9.619, rel=1e-3)
    assert "Regime: lr * weight_decay = 0.0002 <= 1: weights inside the ball stay there, surely." in out
    _, out, _ = run(capsys, f"{KNOWN} --wd 0.1 --coefficients exact --star-convex --eps 50 --gap 100")
    rows = lines(out)
    assert rows["bound"] == ["X exp(-lr wd T) + Y/sqrt(b) + Z", "on the loss above its infimum after T steps, loss"]
    assert rows["X"] == ["100", "loss"]
    assert rows["overshoot"] == ["1.0000", "exact"]


@pytest.mark.parametrize(
    ("wd", "shown", "sentence"),
    [
        (750, {"limit": 0.004494}, "1 < lr * weight_decay = 1.5 < 2: weights may leave the ball; keep lr below"),
        (1000, {}, "lr * weight_decay = 2 >= 2: weights may grow without end; keep lr below 1 / weight_decay = 0.001"),
    ],
)
def test_beyond_the_ball_there_is_no_bound(capsys, wd, shown, sentence):
    code, out, _ = run(capsys, f"{KNOWN} --wd {wd} --batch 64")
    rows = lines(out)
    assert code == 0
    assert "X" not in rows
    assert "SFO(64)" not in rows
    assert f"No bound: it needs lr * weight_decay <= 1, got {wd * 0.002:.3g}." in out
    assert sentence in out
    assert {name: float(rows[name][0]) for name in ("limit",) if name in rows} == pytest.approx(shown, rel=1e-3)


def test_a_target_below_the_floor_is_answered_with_the_remedy(capsys):
    code, out, _ = run(capsys, f"{KNOWN} --lr 0.02 --eps 1 --batch 64 --json")
    content = json.loads(out)
    assert code == 0
    assert content["critical"]["status"] == "below the floor"
    assert content["critical"]["best"] is None
    assert content["batches"] == []
    _, out, _ = run(capsys, f"{KNOWN} --lr 0.02 --eps 1 --batch 64")
    assert "No batch size: no batch size is large enough: the target 1 is not above Z = 1.63" in out
    assert "lower lr to less than 0.614 times its value" in out
    assert "b_min" not in lines(out)


def test_sigma_and_rank_make_nu(capsys):
    words = KNOWN.replace("--nu 32", "--sigma {}")
    for sigma, extra, nu in ((11.3137085, "", 32), (4, "--rank 2", 32**0.5)):
        _, out, _ = run(capsys, f"{words.format(sigma)} {extra} --json")
        assert json.loads(out)["problem"]["noise"] == pytest.approx(nu)


def test_the_examples_run(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    examples = [line for line in out.replace("\\\n", "").splitlines() if line.startswith("  steepest")]
    assert len(examples) == 2
    for line in examples:
        code, out, _ = run(capsys, line.split(" bound ", 1)[1])
        assert code == 0
        assert "b*" in lines(out)


def test_the_scale_rules_are_the_library_s():
    assert set(get_args(Scale)) == set(get_args(ScaleRule))


def test_the_page_shows_what_the_command_prints(capsys):
    page = (Path(__file__).parents[3] / "docs" / "critical_batch_bounds.md").read_text()
    shown = re.findall(r"```(?:console)?\n\$ steepest critical-batch bound ((?:.*\\\n)*.*)\n((?:.*\n)*?)```", page)
    assert shown
    for words, expected in shown:
        assert run(capsys, words.replace("\\\n", " "))[1] == expected


@cases(
    "words, message",
    [
        (f"{KNOWN} --sigma 1", "not allowed with argument --nu"),
        (f"{KNOWN} --rank 2", "--rank turns --sigma into --nu; leave it out with --nu"),
        (KNOWN.replace("--nu 32", "--sigma 1 --rank 9"), "--rank 9 is above min(m, n) = 8"),
        (KNOWN.replace("--nu 32", "--sigma 1 --rank 0"), "rank must be finite and at least 1, got 0.0"),
        (f"{KNOWN} --momentum 1", "momentum must be in [0, 1), got 1.0"),
        (f"{KNOWN} --lr 0", "Setting: lr must be finite and above 0, got 0.0"),
        (f"{KNOWN} --eps -1", "A target must be a finite number above 0, got -1.0"),
        (f"{KNOWN} --batch 0", "'0' must be a whole number of at least 1"),
        (f"{KNOWN} --scale orignal", "invalid choice: 'orignal'"),
        (f"{KNOWN} --coefficients jordn", "Unknown coefficients 'jordn': did you mean 'jordan'?"),
        (f"{KNOWN} --star-convex", "The star-convex bound needs weight_decay above 0"),
        ("--m 8", "the following arguments are required"),
    ],
)
def test_wrong_usage_ends_with_two_and_says_what_to_do(capsys, words, message):
    code, _, err = run(capsys, words)
    assert code == 2
    assert message in err


def test_below_a_batch_of_one_the_answer_is_one(capsys):
    code, printed, _ = run(capsys, KNOWN.replace("--nu 32", "--nu 1e-3"))
    assert code == 0
    assert re.search(r"^b\* +1  samples; the formula's minimum is below a batch of one$", printed, re.MULTILINE)
    assert "SFO(b*)" not in printed
