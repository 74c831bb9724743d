"""Headlines, verdict sentences and notices, scenario by scenario."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.report.statistics import Interval
from steepest.lab.studies.race import sentences
from steepest.lab.studies.race.plan import RaceStudy
from steepest.lab.studies.race.results import Race, read_race
from steepest.lab.studies.records import read_study
from tests.cases import cases
from tests.lab.synthetic import Pace, run_dir, write_scenario, write_study


def race(study_dir: Path, paces: dict[str, Pace], **changes: Any) -> Race:
    return read_race(read_study(write_study(study_dir, paces, **changes), RaceStudy))


def scenario(study_dir: Path, name: str) -> Race:
    return read_race(read_study(write_scenario(study_dir, name), RaceStudy))


def told(read: Race) -> str:
    """All pair sentences, with ordinary spaces."""
    every = sentences.pairs(read, first=True) + sentences.pairs(read, first=False)
    return _spaced("\n".join(f"{one.claim} {one.evidence}" for one in every))


def noticed(read: Race) -> str:
    found = sentences.notices(read)
    return _spaced("\n".join(f"[{one.level}] {one.title}: {' | '.join(one.lines)}" for one in found))


def _spaced(text: str) -> str:
    return re.sub(r"[^\S\n]", " ", text)


@pytest.mark.slow
@cases(
    "name, expected",
    [
        ("clear", "muon wins: the same loss in 58% of adamw’s steps"),
        ("undecided", "Undecided between adamw and muon"),
        ("diverged", "muon wins: the same loss in 58% of adamw’s steps; sgd diverged"),
        ("missing", "So far undecided between adamw and muon"),
        ("one-seed", "Undecided between adamw and muon"),
        ("unequal", "Not ranked: the methods were not tuned alike"),
        ("many", "Undecided between 5 methods; the other 4 are behind"),
    ],
)
def test_the_headline_says_who_won(tmp_path: Path, name: str, expected: str) -> None:
    assert _spaced(sentences.headline(scenario(tmp_path, name))) == expected


@pytest.mark.slow
@cases(
    "paces, changes, expected",
    [
        ({"adamw": Pace(), "sgd": Pace(speed=0.6)}, {}, "adamw, the baseline, wins"),
        ({"adamw": Pace()}, {}, "adamw: one method, nothing to compare"),
        ({"adamw": Pace(absent=(0,)), "muon": Pace(stops={0: 30})}, {"seeds": (0,)}, "No run has ended yet"),
        ({"adamw": Pace(diverges={0: 9}), "muon": Pace(diverges={0: 9})}, {}, "Every method diverged"),
        ({"adamw": Pace(), "muon": Pace(diverges={0: 9})}, {}, "Only adamw did not diverge"),
        ({"adamw": Pace(), "muon": Pace(speed=2)}, {"target": 2.0}, "muon wins: the target in 50% of adamw’s steps"),
        ({"adamw": Pace(), "muon": Pace(speed=2)}, {"target": 1.65}, "muon wins with a final loss of 1.547 ± 0.012"),
        (
            {"adamw": Pace(), "a": Pace(speed=1.9, noise=0.02), "b": Pace(speed=2, noise=0.02)},
            {},
            "Undecided between a and b; adamw is behind",
        ),
        (
            {"adamw": Pace(absent=(2,)), "muon": Pace(speed=3)},
            {},
            "So far: muon wins: the same loss in 33% of adamw’s steps",
        ),
    ],
)
def test_rarer_headlines(tmp_path: Path, paces: dict[str, Pace], changes: dict[str, Any], expected: str) -> None:
    assert _spaced(sentences.headline(race(tmp_path, paces, **changes))).startswith(expected)


@pytest.mark.slow
@cases(
    "name, expected",
    [
        (
            "clear",
            r"muon is better than adamw: final loss lower by 0\.\d+ \(95% interval 0\.\d+ to 0\.\d+; "
            r"p = 0\.\d+ after correction for 3 comparisons, 3 s",
        ),
        ("clear", r"muonadam is worse than muon: final loss higher by 0\.\d+ \(95%"),
        ("undecided", r"muon against adamw is undecided: final loss \w+ by .* on average \(95% interval −.* to \+"),
        ("undecided", r"About \d+ more seeds? would tell, if the difference is what it looks like\."),
        (
            "diverged",
            r"sgd and adamw are not compared: sgd diverged with seed 1, and a mean over the seeds that survived",
        ),
        ("one-seed", r"muon against adamw is undecided: one seed cannot tell; run at least 3 \(final loss lower by"),
        ("missing", r"muon against adamw is undecided: one seed cannot tell; run at least 3 .* with seed 0\)"),
    ],
)
def test_each_pair_has_a_plain_sentence(tmp_path: Path, name: str, expected: str) -> None:
    assert re.search(expected, told(scenario(tmp_path, name)))


def test_sentences_at_the_edges(tmp_path: Path) -> None:
    same = Pace(noise=0)
    assert "There is no difference for more seeds to find." in told(race(tmp_path / "same", {"a": same, "b": same}))
    fixed = told(race(tmp_path / "fixed", {"a": Pace(noise=0), "b": Pace(noise=0, end=1.5)}))
    assert re.search(r"b is better than a: final loss lower by 0\.230 .*p < 0\.001", fixed)
    apart = race(tmp_path / "apart", {"a": Pace(absent=(1,)), "b": Pace(absent=(0,))}, seeds=(0, 1))
    assert "b and a are not compared yet: no seed has ended for both." in told(apart)
    undecided = scenario(tmp_path / "undecided", "undecided")
    hopeless = replace(undecided, verdicts=(replace(undecided.verdicts[0], more_seeds=None),))
    assert "At a difference as small as it looks, even 1,000 seeds would not tell." in told(hopeless)


def test_refused_races_have_no_verdicts_and_say_why(tmp_path: Path) -> None:
    read = scenario(tmp_path, "unequal")
    assert told(read) == ""
    assert sentences.facts(read) == ()
    assert noticed(read).startswith(
        "[stop] Not ranked: unequal tuning: adamw was tuned with 6 tried settings, muon was tuned with 1 tried setting "
        "and sgd was tuned with an unknown number of tried settings. | Whoever searches longer finds more. "
        "Tune all of them over the same number of settings, then race again."
    )


@pytest.mark.slow
@cases(
    "paces, expected",
    [
        (
            {"muon": Pace(data_sha256="f" * 64)},
            rf"\[stop\] Runs made under other .*: muon, seed 0: data sha256 {'f' * 64} instead of",
        ),
        (
            {"muon": Pace(diverges={1: 64})},
            r"\[warning\] Diverged: muon, seed 1: the loss was not finite, or above 1e\+100, after step 64 \|",
        ),
        (
            {"muon": Pace(absent=(2,), stops={1: 37})},
            r"\[warning\] 2 of 6 runs missing: muon, seed 2: not started \| muon, seed 1: at step 37 of 150 \| Repeat",
        ),
        ({"muon": Pace(stops={1: 0})}, r"1 of 6 runs missing: muon, seed 1: not started"),
        (
            {"muon": Pace(edge=True)},
            r"\[warning\] Tuned at the edge of the grid: The best setting of muon lay at the edge",
        ),
        (
            {"muon": Pace(environment={"threads": 8})},
            r"\[note\] More than one environment: The runs differ in threads: read times",
        ),
    ],
)
def test_what_weakens_a_conclusion_is_said(tmp_path: Path, paces: dict[str, Pace], expected: str) -> None:
    assert re.search(expected, noticed(race(tmp_path, {"adamw": Pace(), **paces})))


def test_nothing_is_noticed_in_a_clean_race(tmp_path: Path) -> None:
    assert noticed(scenario(tmp_path, "clear")) == ""


def test_one_seed_and_unknown_tuning_are_noticed(tmp_path: Path) -> None:
    assert "[warning] One seed: The spread between seeds is unknown" in noticed(scenario(tmp_path / "one", "one-seed"))
    unknown = race(tmp_path / "unknown", {"adamw": Pace(trials=None), "muon": Pace(trials=None)})
    assert noticed(unknown).startswith("[stop] Not ranked: tuning unknown: adamw was tuned with an unknown number of ")
    assert sentences.headline(unknown) == "Not ranked: how the options were found is not recorded"
    assert told(unknown) == ""
    assert unknown.method("muon").ratio is None


def test_times_that_differ_where_the_work_is_the_same_are_not_to_be_compared(tmp_path: Path) -> None:
    paces = {"adamw": Pace(), "muon": Pace(forward_backward_s=0.15), "sgd": Pace(forward_backward_s=0.14)}
    assert re.search(
        r"\[warning\] Do not compare times: Forward and backward pass took 15\d ms with muon and 12\d ms with adamw, "
        r"though they are the same work for every method: the machine was shared or uneven\.",
        noticed(race(tmp_path / "uneven", paces)),
    )
    assert noticed(race(tmp_path / "even", {"adamw": Pace(), "muon": Pace(forward_backward_s=0.13)})) == ""


def test_an_interval_that_leaves_out_0_does_not_contradict_an_undecided_pair(tmp_path: Path) -> None:
    read = scenario(tmp_path, "clear")
    interval = Interval(-0.0812, -0.0021)
    verdict = replace(read.verdicts[0], outcome="undecided", difference=-0.04165, interval=interval, p=0.072)
    assert (
        "lower by 0.0416 on average (95% interval −0.0812 to −0.0021; "
        "p = 0.072 after correction for 3 comparisons, 3 seeds)"
    ) in told(replace(read, verdicts=(verdict, *read.verdicts[1:])))
    assert "Intervals are for one pair alone" in " ".join(sentences.methodology(read))


def test_a_damaged_run_is_noticed_with_its_file(tmp_path: Path) -> None:
    study = write_study(tmp_path, {"adamw": Pace(), "muon": Pace()})
    run = run_dir(study, "muon", 1)
    (run / "result.json").write_text("{")
    expected = (
        rf"1 of 6 runs missing: muon, seed 1: runs/{run.name}/result\.json: not valid JSON .* Delete the directory"
    )
    assert re.search(expected, noticed(read_race(read_study(study, RaceStudy))))


def test_the_facts_say_by_how_much_and_how_sure(tmp_path: Path) -> None:
    steps, change, sure = sentences.facts(scenario(tmp_path, "clear"))
    assert (steps.number, _spaced(steps.meaning)) == (
        "58%",
        "of adamw’s steps to the same loss; 95% interval 55% to 61%",
    )
    assert change.number == "−0.0603"
    assert _spaced(change.meaning).startswith("in final loss, 1.588 ± 0.012 against 1.648 ± 0.0")
    assert "of muonadam, the next; 95% interval −0.0" in _spaced(change.meaning)
    assert _spaced(sure.meaning) == "paired t-test over 3 seeds and the evaluated examples, corrected for 3 comparisons"


def test_the_summary_names_task_sizes_seeds_and_data(tmp_path: Path) -> None:
    text = _spaced(sentences.summary(scenario(tmp_path / "a", "clear")))
    assert text.startswith("adamw, muon and muonadam trained the same model on the task text, preset demo: ")
    assert "150 steps of 2,048 tokens, 3 seeds each (0, 1, 2)" in text
    assert "python-stdlib 3.11.7, 12.3 MB, SHA-256 3a6eb0790f39…" in text
    empty = race(tmp_path / "b", {"adamw": Pace(absent=(0,))}, seeds=(0,))
    assert _spaced(sentences.summary(empty)).endswith("1 seed each (0). No run has been started.")
    assert "of 2,048 samples" in _spaced(sentences.summary(scenario(tmp_path / "c", "many")))


def test_the_pair_that_decides_comes_first_and_is_what_the_facts_are_of(tmp_path: Path) -> None:
    paces = {"adamw": Pace(), "sgd": Pace(speed=0.6), "muon": Pace(speed=2), "muonadam": Pace(speed=1.6)}
    read = race(tmp_path, paces)
    assert sentences.winner(read) == "muon"
    verdict = sentences.deciding(read)
    assert verdict is not None
    assert {verdict.first, verdict.second} == {"muon", "muonadam"}
    assert sentences.pairs(read, first=True)[0].claim == "muonadam is worse than muon:"
    _, change, _ = sentences.facts(read)
    assert change.number.startswith("−0.0")
    assert "of muonadam, the next" in _spaced(change.meaning)


def test_a_winner_by_seeds_alone_is_none_where_the_examples_leave_it_open(tmp_path: Path) -> None:
    fast = Pace(end=1.725, noise=0.0002, blocks=0.05)
    read = race(tmp_path / "new", {"adamw": Pace(noise=0.0002, blocks=0.05), "muon": fast})
    assert _spaced(sentences.headline(read)) == "Undecided between adamw and muon"
    assert re.search(r"3 seeds, of which the examples leave ± 0\.0\d+ open\)", told(read))
    old = race(tmp_path / "old", {"adamw": Pace(blocks=None), "muon": Pace(speed=3, blocks=None)})
    assert sentences.headline(old) == "Undecided: how far the losses themselves may be off is not recorded"
    assert "[warning] Not all sources of error are counted" in noticed(old)
    assert "what the examples leave open not counted" in told(old)
    assert sentences.pairs(old, first=True)[0].claim == "muon is better than adamw by the seeds alone:"
    assert "by which options may have been chosen, too" in sentences.summary(old)
    assert "that served for nothing else" in sentences.summary(read)
    alike = race(tmp_path / "alike", {"adamw": Pace(blocks=None), "muon": Pace(speed=1.001, blocks=None)})
    assert "would tell" not in told(alike)
    assert sentences.winner(old) is None
    assert sentences.facts(old) == ()
