"""Forks of a checkpoint: the run itself at its own batch size, and comparable everywhere else."""

import json
import re

import pytest
import torch

from steepest.lab.disk.fields import RecordError
from steepest.lab.runs.branch import Branch, NoBranchError, Window, local_answer, train_branch, train_branches
from steepest.lab.runs.config import configure
from steepest.lab.runs.train import Interrupted, train_run
from steepest.lab.tasks import make_task
from tests.cases import cases

START, STEPS, BATCH = 12, 20, 8


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """Interrupted runs with checkpoints at step START, and their uninterrupted twins."""
    found = {}
    for method in ("muon", "adamw", "muonmax-momo"):
        for schedule in ("constant", "cooldown"):
            out = tmp_path_factory.mktemp(f"{method}-{schedule}")
            task = make_task("quadratic" if method == "muonmax-momo" else "digits")
            config = configure(
                task, method=method, seed=3, steps=STEPS, batch_size=BATCH, eval_every=STEPS, schedule=schedule
            )
            train_run(config, out / "whole", threads=1)
            steps = iter(range(1, STEPS))
            with pytest.raises(Interrupted):
                train_run(config, out / "parent", threads=1, stop=lambda steps=steps: next(steps) == START)
            found[method, schedule] = out
    return found


@pytest.mark.slow
@cases("method", ["muon", "adamw", "muonmax-momo"])
@cases("schedule", ["constant", "cooldown"])
def test_at_its_own_batch_size_a_fork_is_the_run_bit_for_bit(parents, method, schedule):
    out = parents[method, schedule]
    window = Window((STEPS - START) * BATCH)
    fork = train_branch(out / "parent", batch_size=BATCH, window=window)
    train = [row["loss"] for row in rows(out / "whole") if row["kind"] == "train"]
    assert list(fork.losses) == train[START:]
    assert fork.final_loss == [row["loss"] for row in rows(out / "whole") if row["kind"] == "eval"][-1]


@pytest.mark.slow
def test_forking_changes_nothing_in_the_run_or_in_the_process(parents):
    out = parents["muon", "constant"]
    before = {path.name: path.read_bytes() for path in (out / "parent").iterdir() if path.is_file()}
    window = Window(16)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train_branch(out / "parent", batch_size=4, window=window)
    assert {path.name: path.read_bytes() for path in (out / "parent").iterdir() if path.is_file()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("rule", "power"), [("sqrt", 0.5), ("linear", 1.0), ("constant", 0.0)])
def test_every_fork_sees_the_same_examples_at_the_rate_of_its_rule(parents, monkeypatch, rule, power):
    from steepest.lab.runs.branch import _Fork

    taken, rates = {}, {}

    def watch(self, recorder):
        key = self.config.batch_size
        rates.setdefault(key, set()).add(self.optimizer.param_groups[0]["lr"])
        order = self.order.state_dict()
        taken.setdefault(key, []).append((order["epoch"], order["position"]))
        return original(self, recorder)

    original = _Fork.train_step
    monkeypatch.setattr(_Fork, "train_step", watch)
    for batch in (4, 8, 16):
        fork = train_branch(parents["muon", "constant"] / "parent", batch_size=batch, window=Window(32, rule))
        assert len(fork.losses) == 32 // batch
    assert [taken[batch][0] for batch in (4, 8, 16)] == [(0, START * BATCH)] * 3
    for batch in (4, 16):
        (rate,), (own,) = rates[batch], rates[8]
        assert rate == pytest.approx(own * (batch / 8) ** power, rel=1e-12)


def test_a_schedule_goes_on_by_examples_seen(parents, monkeypatch):
    from steepest.lab.runs.branch import _Fork

    rates = {}
    original = _Fork.train_step

    def watch(self, recorder):
        rates.setdefault(self.config.batch_size, []).append(self.optimizer.param_groups[0]["lr"])
        return original(self, recorder)

    monkeypatch.setattr(_Fork, "train_step", watch)
    for batch in (4, 8, 16):
        train_branch(parents["muon", "cooldown"] / "parent", batch_size=batch, window=Window(48, "constant"))
    assert rates[16] == pytest.approx(rates[8][::2], rel=1e-12)
    assert rates[8] == pytest.approx(rates[4][::2], rel=1e-12)
    assert rates[8] == sorted(rates[8], reverse=True)
    assert rates[8][-1] < rates[8][0]


def test_repetitions_follow_each_other_on_the_data_without_a_gap_or_an_overlap(parents, monkeypatch):
    from steepest.lab.runs.branch import _Fork

    taken = []
    original = _Fork.train_step

    def watch(self, recorder):
        order = self.order.state_dict()
        taken.append((order["epoch"], order["position"]))
        return original(self, recorder)

    monkeypatch.setattr(_Fork, "train_step", watch)
    for repeat in range(3):
        train_branch(parents["muon", "constant"] / "parent", batch_size=16, window=Window(32), repeat=repeat)
    assert taken == [(0, START * BATCH + 16 * step) for step in range(6)]


def test_finished_forks_are_kept_and_damaged_ones_named(parents, tmp_path, monkeypatch):
    run, window = parents["muon", "constant"] / "parent", Window(16, repeats=2)
    first = train_branches(run, tmp_path, batches=(8, 16), window=window)
    assert [(branch.repeat, branch.batch_size) for branch in first] == [(0, 8), (0, 16), (1, 8), (1, 16)]
    assert first[0].losses != first[2].losses  # another stretch of the data
    kept = sorted(tmp_path.glob("*.json"))
    kept[0].unlink()
    monkeypatch.setattr("steepest.lab.runs.branch.train_branch", lambda *_, **__: trained.append(1) or train(*_, **__))
    trained, train = [], train_branch
    assert train_branches(run, tmp_path, batches=(8, 16), window=window) == first
    assert trained == [1]
    other = {**json.loads(kept[1].read_text()), "batch_size": 7}
    for content, message in (
        ('{"format": 1}', "batch_size is missing"),
        (json.dumps(other), "batch_size must be .* got 7"),
    ):
        kept[1].write_text(content)
        with pytest.raises(RecordError, match=rf"{message}.*\. Delete this file: only this branch"):
            train_branches(run, tmp_path, batches=(8, 16), window=window)


def test_what_cannot_be_forked_is_refused(parents, tmp_path):
    run = parents["muon", "cooldown"] / "parent"
    with pytest.raises(NoBranchError, match="A window of 20 samples is no whole number of batches of 8"):
        train_branch(run, batch_size=8, window=Window(20))
    with pytest.raises(NoBranchError, match="no whole number of batches of 48"):
        train_branches(run, tmp_path / "out", batches=(8, 16, 48), window=Window(64))
    assert not (tmp_path / "out").exists()  # nothing was trained first
    with pytest.raises(NoBranchError, match=r"schedule ends at step 20, and the window goes from step 12 to 22"):
        train_branch(run, batch_size=8, window=Window(80))
    with pytest.raises(NoBranchError, match=r"holds no checkpoint\. Give the directory of a run with a checkpoint"):
        train_branch(parents["muon", "cooldown"] / "whole", batch_size=8, window=Window(8))
    with pytest.raises(RecordError, match="no run here"):
        train_branch(tmp_path, batch_size=8, window=Window(8))
    with pytest.raises(ValueError, match=r"Unknown rate rule 'root'\. Valid: constant, linear, sqrt"):
        Window(8, "root")
    for name in ("samples", "repeats"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Window(**{"samples": 8, name: 0})
    other = tmp_path / "other"
    other.mkdir()
    config = re.sub(r'"code": "[^"]*"', '"code": "0.0.0+old"', (run / "config.json").read_text())
    (other / "config.json").write_text(config)
    (other / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    with pytest.raises(NoBranchError, match=r"trained by the code 0\.0\.0\+old, this is"):
        train_branch(other, batch_size=8, window=Window(8))


def forks(losses):
    return [Branch(batch, r, (), loss) for batch, own in losses.items() for r, loss in enumerate(own)]


@cases(
    "losses, best, worse",
    [
        ({8: [1.0], 16: [1.005], 32: [1.03]}, 16, 32),
        ({8: [1.0], 16: [1.005], 32: [1.008]}, 32, None),
        ({8: [1.0], 16: [1.2], 32: [1.0]}, 8, 16),
        ({8: [1.0, 1.3, 1.1], 16: [1.05, 1.35, 1.151]}, 8, 16),  # the same excess on all stretches
        ({8: [1.0, 1.3, 1.1], 16: [1.3, 1.0, 1.2]}, 16, None),  # no more than noise
        ({8: [1.0, 1.0], 16: [None, 1.0]}, 8, 16),
    ],
    ["worse", "none", "not monotone", "paired", "noise", "diverged"],
)
def test_the_answer_is_the_largest_that_is_not_worse(losses, best, worse):
    answer = local_answer(forks(losses), tolerance=0.01)
    assert (answer.best, answer.worse) == (best, worse)
    if worse is None:
        assert f"at least {best}" in answer.sentence
    else:
        below = f"below {worse}, which is worse than {best}, the smallest"
        assert (below if best == 8 else f"{best}; {worse} is worse") in answer.sentence


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -0.1])
def test_an_answer_needs_a_tolerance_that_is_a_number(tolerance):
    with pytest.raises(ValueError, match="tolerance must be a finite number of nats of at least 0, got "):
        local_answer(forks({8: [1.0], 16: [1.0]}), tolerance=tolerance)


def test_an_answer_needs_two_sizes_and_a_smallest_that_lives():
    with pytest.raises(ValueError, match=r"needs two batch sizes to compare, got \[8\]"):
        local_answer(forks({8: [1.0]}), tolerance=0.01)
    answer = local_answer(forks({8: [None], 16: [None]}), tolerance=0.01)
    assert answer.sentence.startswith("No answer: the smallest batch size 8 diverged")


@pytest.mark.parametrize("sizes", [2, 5, 10])
def test_forks_that_are_no_worse_are_seldom_called_so(sizes):
    """1,000 studies of three repetitions with equal true losses: at most one in twenty, plus three standard errors."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(1000):
        common, own = torch.randn(3, generator=generator), 0.02 * torch.randn(sizes, 3, generator=generator)
        losses = {8 * 2**i: (1 + common + own[i]).tolist() for i in range(sizes)}
        wrong += local_answer(forks(losses), tolerance=0.0).worse is not None
    assert 0.01 < wrong / 1000 < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5


def test_forks_that_are_worse_are_found():
    """Five sizes, the largest 0.1 higher at a spread of 0.02: missed in less than one study of ten."""
    generator = torch.Generator().manual_seed(1)
    found = 0
    for _ in range(200):
        common, own = torch.randn(3, generator=generator), 0.02 * torch.randn(5, 3, generator=generator)
        losses = {8 * 2**i: (1 + common + own[i] + 0.1 * (i == 4)).tolist() for i in range(5)}
        found += local_answer(forks(losses), tolerance=0.01).worse == 128
    assert found > 180
