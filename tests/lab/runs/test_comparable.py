"""Which runs count, and when methods may be ranked."""

from __future__ import annotations

from pathlib import Path

import pytest

from steepest.lab.studies.race.plan import RaceStudy
from steepest.lab.studies.race.results import choose
from steepest.lab.studies.records import read_study
from tests.cases import cases
from tests.lab.synthetic import Pace, change_options, write_study

OTHER = "f" * 64


def test_runs_that_differ_in_method_and_seed_only_all_count(tmp_path: Path) -> None:
    chosen = choose(read_study(write_study(tmp_path, {"adamw": Pace(), "muon": Pace(options={"lr": 0.3})}), RaceStudy))
    assert {name: len(runs) for name, runs in chosen.runs.items()} == {"adamw": 3, "muon": 3}
    assert chosen.set_aside == ()
    assert chosen.equally_tuned


@pytest.mark.parametrize(
    ("pace", "key", "own"),
    [(Pace(data_sha256=OTHER), "data sha256", OTHER), (Pace(code="0.2.0+1"), "code", "0.2.0+1")],
)
def test_runs_on_other_data_or_code_are_set_aside(tmp_path: Path, pace: Pace, key: str, own: str) -> None:
    chosen = choose(read_study(write_study(tmp_path, {"adamw": Pace(), "muon": pace}), RaceStudy))
    assert chosen.runs["muon"] == ()
    assert [(aside.run.config.method, aside.differences[0][:2]) for aside in chosen.set_aside] == [
        ("muon", (key, own))
    ] * 3


def test_on_a_tie_the_baseline_says_what_counts_wherever_it_stands(tmp_path: Path) -> None:
    paces = {"muon": Pace(), "adamw": Pace(data_sha256=OTHER)}
    chosen = choose(read_study(write_study(tmp_path, paces, baseline="adamw"), RaceStudy))
    assert (len(chosen.runs["adamw"]), len(chosen.runs["muon"])) == (3, 0)


def test_a_seed_with_other_options_is_set_aside(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": Pace(), "muon": Pace()})
    change_options(study, "muon", 1, {"lr": 0.07})
    chosen = choose(read_study(study, RaceStudy))
    assert [run.config.seed for run in chosen.runs["muon"]] == [0, 2]
    assert chosen.set_aside[0].differences == (("options", '{"lr": 0.07}', '{"lr": 0.02}'),)


@cases(
    "trials, refusal",
    [
        ((6, 6), None),
        ((None,), None),
        ((None, None), "unknown"),
        ((6, None), "unknown"),
        ((0, None), "unknown"),
        ((6, 1), "unequal"),
        ((6, 1, None), "unequal"),
    ],
)
def test_methods_are_ranked_only_with_known_and_equal_budgets(
    tmp_path: Path, trials: tuple[int | None, ...], refusal: str | None
) -> None:
    paces = {f"method-{i}": Pace(trials=budget) for i, budget in enumerate(trials)}
    chosen = choose(read_study(write_study(tmp_path, paces, seeds=(0,)), RaceStudy))
    assert chosen.refusal == refusal
    assert chosen.equally_tuned == (refusal is None)


def test_an_empty_study_has_nothing_to_set_aside(tmp_path: Path) -> None:
    chosen = choose(read_study(write_study(tmp_path, {"adamw": Pace(absent=(0,))}, seeds=(0,)), RaceStudy))
    assert (chosen.runs, chosen.set_aside, chosen.tuning) == ({"adamw": ()}, (), {})
