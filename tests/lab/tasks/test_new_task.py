"""A task is one class and one registration: this one is trained, raced and reported on without another change."""

import re
from html import unescape

import pytest
import torch

from steepest.lab.runs.train import train_run
from steepest.lab.studies.batch.plan import BatchSweep, make_arms
from steepest.lab.studies.race.plan import Race
from steepest.lab.studies.report import write_report
from steepest.lab.studies.study import run_directory, write_study
from steepest.lab.tasks import TASKS, Entry, make_task
from steepest.lab.tasks.held_out import HeldOut, Sizes, evaluation
from steepest.lab.tasks.task import Budget, DataIdentity


class Coins:
    """Tell heads from tails by two noisy looks."""

    name = "coins"
    tokens_per_example = 1
    own_data = True
    train_size = 64
    budget = Budget(steps=4, batch_size=8, eval_every=2)

    def __init__(self, preset):
        self.preset = preset
        self.sides = torch.arange(128) % 2
        noise = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
        self.looks = self.sides[:, None] - 0.5 + noise / 4
        self.held_out = HeldOut(32, 32, Sizes(32, 32, 32))

    def data_identity(self):
        return DataIdentity("a purse", "0" * 64, 128)

    def build_model(self, seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    def batch(self, examples):
        return self.looks[examples], self.sides[examples]

    def loss(self, model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model, part, *, whole):
        examples = 64 + self.held_out.examples(part, whole=whole)
        logits = model(self.looks[examples])
        losses = torch.nn.functional.cross_entropy(logits, self.sides[examples], reduction="none")
        return evaluation(losses, logits.argmax(-1) == self.sides[examples])


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setitem(TASKS, "coins", Entry(f"{__name__}:Coins", examples="coins"))
    return make_task("coins")


def page(study):
    return re.sub(r"\s+", " ", unescape(write_report(study).read_text()))


@pytest.mark.slow
def test_it_is_raced_and_reported(task, tmp_path):
    race = Race(task=task, methods=("adamw", "muon"), seeds=(0, 1), options={}, baseline="adamw")
    write_study(tmp_path, race, race.configs(), command="steepest race --task coins")
    for config in race.configs():
        train_run(config, run_directory(tmp_path, config))
    text = page(tmp_path)
    assert "the task coins, preset demo: 4 steps of 8 samples" in text
    assert "Data: a purse" in text
    assert "Final accuracy" in text


def test_batch_sizes_are_counted_in_its_own_words(task, tmp_path):
    arms = make_arms(("muon",), ())
    rest = {"methods": ("muon",), "seeds": (0,), "options": {}, "targets": (0.1,), "most_steps": 9, "most_samples": 99}
    plan = BatchSweep(task=task, arms=arms, batches=(8, 16), **rest)
    write_study(tmp_path, plan, plan.configs(), command="steepest critical-batch measure --task coins")
    assert "batch sizes 8, 16 in coins" in page(tmp_path)


def test_data_of_the_user_is_refused_in_its_own_words(task):
    with pytest.raises(ValueError, match="The task 'coins' has its own coins, got --data 'x'"):
        make_task("coins", data="x")
