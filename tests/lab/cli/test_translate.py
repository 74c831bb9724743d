"""`steepest translate`: what it prints, and what it refuses."""

import json
import shlex

import steepest
from steepest.integrations.peers import PEERS, translate
from steepest.lab.cli import main
from steepest.lab.cli.translate import PEERS as LISTED
from tests.cases import cases


def run(capsys, words):
    """Exit code, standard output, standard error; argparse exits by itself."""
    try:
        code = main(["translate", *shlex.split(words)])
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_help_lists_every_peer():
    assert LISTED.split(", ") == sorted(PEERS)


@cases(
    "words, options",
    [
        ("dion --lr 0.02 --set mu=0.9 --set adjust_lr=None", {"lr": 0.02, "mu": 0.9, "adjust_lr": None}),
        ("torch.optim.AdamW --weight-decay 0.1 --set betas=0.9,0.95", {"weight_decay": 0.1, "betas": (0.9, 0.95)}),
        ("optax --lr 0.1 --set nesterov=false", {"learning_rate": 0.1, "nesterov": False}),
        ("muonium --lr 0.1 --weight-decay 0.2 --shape 8 2", {"lr": 0.1, "weight_decay": 0.2, "shape": (8, 2)}),
    ],
)
def test_it_prints_what_the_library_says(capsys, words, options):
    code, out, err = run(capsys, words)
    wanted = translate(words.split()[0], **options)
    assert (code, err) == (0, "")
    assert out == f"{wanted}\n"
    code, out, err = run(capsys, f"{words} --json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["call"] == wanted.call
    assert getattr(steepest, content["recipe"])
    assert content["options"] == json.loads(json.dumps(dict(wanted.options)))
    assert len(content["rows"]) == len(wanted.rows)
    assert {row["theirs"] for row in content["rows"] if row["ours"] is None} == {row.theirs for row in wanted.lost}


@cases(
    "words, told",
    [
        ("dionn", "did you mean 'dion'"),
        ("dion --set momentum=0.9", "dion has no option 'momentum'"),
        ("dion --lr -1", "lr must be finite and at least 0"),
        ("muonium", "give lr=, which has no default"),
        ("dion --shape 8", "shape must be two whole numbers"),
        ("dion --set nesterov=1", "nesterov must be True or False"),
    ],
)
def test_what_is_wrong_is_wrong_usage(capsys, words, told):
    code, out, err = run(capsys, words)
    assert (code, out) == (2, "")
    assert told in err
