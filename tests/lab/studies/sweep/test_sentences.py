"""Headlines, facts and notices of sweeps: what may be said, and what may not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.report.notices import Notice
from steepest.lab.runs.version import code_version
from steepest.lab.studies.records import read_study
from steepest.lab.studies.sweep import sentences as lr_sentences
from steepest.lab.studies.sweep.plan import SweepStudy
from steepest.lab.studies.sweep.results import Sweep, read_results
from tests.cases import cases
from tests.lab.synthetic import FINE, Valley, write_scenario, write_sweep

NARROW = Valley(0.12, FINE, flat=0.3)
WIDE = Valley(0.12, FINE, flat=1.2)


def results(study_dir: Path, valleys: Mapping[str, Valley], **changes: Any) -> Sweep:
    return read_results(read_study(write_sweep(study_dir, valleys, **changes), SweepStudy))


def headline(study_dir: Path, valleys: Mapping[str, Valley], **changes: Any) -> str:
    return lr_sentences.headline(results(study_dir, valleys, **changes))


def without_numbers(text: str) -> str:
    """Widths as "#": their values are tested where they are computed."""
    return re.sub(r"\d+\.\d\d", "#", text.replace("\N{NO-BREAK SPACE}", " "))


def titles(notices: tuple[Notice, ...]) -> list[str]:
    return [notice.title for notice in notices]


@pytest.mark.slow
@cases(
    "valleys, seeds, expected",
    [
        ({"adamw": NARROW, "muon": WIDE}, (0, 1), "muon has the widest basin: # decades; adamw #"),
        ({"adamw": WIDE, "muon": NARROW}, (0, 1), "adamw has the widest basin: # decades"),
        ({"adamw": NARROW, "muon": WIDE}, (0,), "With one seed, muon has the widest basin: # decades"),
        ({"muon": WIDE}, (0, 1), "muon: # decades of learning rate within 5% of its best loss"),
        (
            {"adamw": NARROW, "muon": replace(WIDE, lrs=FINE[:8])},
            (0, 1),
            "Not ranked: the methods were not tried alike",
        ),
        (
            {"adamw": NARROW, "muon": replace(WIDE, absent=[(FINE[0], 0)])},
            (0, 1),
            "Not ranked yet: 1 of 36 runs missing",
        ),
        ({"adamw": replace(NARROW, limit=0.0), "muon": replace(WIDE, limit=0.0)}, (0,), "Every learning rate diverged"),
        ({"adamw": replace(NARROW, best=-2.0)}, (0,), "No basin to measure: some losses are not above 0"),
        (
            {"adamw": replace(NARROW, lrs=[0.1]), "muon": replace(NARROW, lrs=[0.2])},
            (0, 1),
            "No basin is wider than a single learning rate",
        ),
        ({"adamw": replace(NARROW, absent=[(lr, 0) for lr in FINE])}, (0,), "No run has ended yet"),
    ],
    [
        "wins",
        "baseline wins",
        "one seed",
        "alone",
        "unequal",
        "pending",
        "diverged",
        "negative",
        "single rates",
        "empty",
    ],
)
def test_headlines(tmp_path: Path, valleys: dict[str, Valley], seeds: tuple[int, ...], expected: str) -> None:
    assert without_numbers(headline(tmp_path, valleys, seeds=seeds)) == expected


def test_a_basin_that_reaches_the_end_of_its_grid_may_be_wider_than_the_widest(tmp_path: Path) -> None:
    valleys = {"adamw": NARROW, "muon": WIDE, "edgy": replace(NARROW, at=10.0)}
    sweep = results(tmp_path, valleys, seeds=(0, 1))
    assert [method.name for method in lr_sentences.rivals(sweep)] == ["edgy"]
    text = without_numbers(lr_sentences.headline(sweep))
    assert text == "Undecided which basin is the widest: muon (#) and edgy (≥ #)"
    assert lr_sentences.facts(sweep) == ()


def test_a_basin_that_is_wider_with_some_seed_is_a_rival_and_many_are_counted(tmp_path: Path) -> None:
    sweep = results(tmp_path, {"adamw": NARROW, "muon": WIDE}, seeds=(0, 1))
    narrow, wide = sweep.methods
    assert lr_sentences.rivals(sweep) == ()
    close = replace(narrow, by_seed={0: 0.1, 1: 9.9})
    assert lr_sentences.rivals(replace(sweep, methods=(close, wide))) == (close,)
    many = tuple(replace(close, name=f"m{i}") for i in range(4))
    text = lr_sentences.headline(replace(sweep, methods=(close, wide, *many)))
    assert without_numbers(text) == "Undecided which basin is the widest: muon (#) and 5 others"


def test_what_is_missing_makes_it_so_far(tmp_path: Path) -> None:
    valleys = {name: replace(valley, stops=[(FINE[0], 1)]) for name, valley in (("adamw", NARROW), ("muon", WIDE))}
    sweep = results(tmp_path, valleys, seeds=(0, 1))
    assert sweep.ranked
    assert lr_sentences.headline(sweep).startswith("So far: muon has the widest basin")


def test_facts_of_a_clear_sweep(tmp_path: Path) -> None:
    sweep = results(tmp_path, {"adamw": NARROW, "muon": WIDE}, seeds=(0, 1))
    width, loss, one = lr_sentences.facts(sweep)
    narrow, wide = (f"{method.of_all[0.05].width:.2f}" for method in sweep.methods)
    assert float(wide) > 2.4
    assert (width.number, one.number) == (wide, f"{sweep.method('muon').expected[0]:.3f}")
    assert width.meaning == f"decades of learning rate within 5% of the best, muon; adamw {narrow}"
    assert loss.number == f"{sweep.best:.3f}"
    assert loss.meaning.startswith("lowest final loss, ")
    assert loss.meaning.endswith("at lr 0.1")
    assert one.meaning == "expected after one random learning rate of the grid, muon"


def test_a_clean_sweep_has_no_notices(tmp_path: Path) -> None:
    assert lr_sentences.notices(results(tmp_path, {"adamw": NARROW, "muon": WIDE}, seeds=(0, 1))) == ()


def test_every_trouble_has_its_notice(tmp_path: Path) -> None:
    notices = lr_sentences.notices(read_results(read_study(write_scenario(tmp_path, "sweep-troubled"), SweepStudy)))
    assert titles(notices) == [
        "Not ranked: the methods were not tried alike",
        "A learning rate that changed nothing",
        "4 of 51\N{NO-BREAK SPACE}runs missing",
        "Best at the edge of the grid",
        "Nothing but divergence",
        "Few runs",
    ]
    text = "\n".join(line for notice in notices for line in notice.lines).replace("\N{NO-BREAK SPACE}", " ")
    assert notices[1].level == "stop"
    assert "Such a learning rate was not in effect" in notices[1].lines[-1]
    for expected in (
        "adamw: 3 learning rates of 4, 8 runs; wild: 4 learning rates of 4, 12 runs",
        "stuck: lr 0.001, 0.01, 0.1 and 1 gave exactly the same losses",
        "adamw: 3 runs not started",
        "adamw, lr 0.1, seed 2: at step 37 of 150",
        "edgy is best at lr 1, the highest that was tried",
        "stuck is best at lr 0.001, the lowest that was tried",
        "wild diverged at every learning rate that has ended",
        "One learning rate: single cannot have a basin.",
    ):
        assert expected in text


def test_momo_may_take_the_same_steps_at_large_rates(tmp_path: Path) -> None:
    constant = replace(NARROW, constant=True)
    momo = results(tmp_path / "momo", {"adamw": NARROW, "muonmax-momo": constant}, seeds=(0, 1))
    notice = next(n for n in lr_sentences.notices(momo) if n.title == "A learning rate that changed nothing")
    assert notice.level == "warning"
    assert "Where Momo cuts every single step" in notice.lines[-1]
    both = results(tmp_path / "both", {"muon": constant, "muonmax-momo": constant}, seeds=(0, 1))
    notice = next(n for n in lr_sentences.notices(both) if n.title == "A learning rate that changed nothing")
    assert notice.level == "stop"
    assert "was not in effect" in notice.lines[-1]
    assert lr_sentences.headline(both) == "Not ranked: a learning rate changed nothing"


def test_negative_losses_one_seed_and_damaged_runs_have_notices(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"adamw": replace(NARROW, best=-2.0)}, seeds=(0,))
    run = min((path / "runs").iterdir())
    (run / "metrics.jsonl").write_text("?\n")
    notices = lr_sentences.notices(read_results(read_study(path, SweepStudy)))
    assert titles(notices)[:2] == ["No basins", "1 of 9\N{NO-BREAK SPACE}runs missing"]
    assert f"seed 0: runs/{run.name}/metrics.jsonl: line 1: not valid JSON" in notices[1].lines[0]
    assert any("One seed: how much" in line for line in notices[-1].lines)


def test_many_missing_runs_are_counted(tmp_path: Path) -> None:
    stops = [(lr, seed) for lr in FINE for seed in (0, 1)]
    [notice] = lr_sentences.notices(results(tmp_path, {"adamw": replace(NARROW, stops=stops)}, seeds=(0, 1)))
    assert notice.title == "18 of 18\N{NO-BREAK SPACE}runs missing"
    assert len(notice.lines) == 14
    assert notice.lines[-2] == "and 6\N{NO-BREAK SPACE}more runs"


def test_runs_whose_config_is_all_there_is_have_not_started_and_say_nothing_of_their_machine(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"adamw": NARROW}, seeds=(0, 1))
    for run in sorted((path / "runs").iterdir())[:2]:
        for name in ("metrics.jsonl", "result.json", "environment.json"):
            (run / name).unlink()
    [notice] = lr_sentences.notices(read_results(read_study(path, SweepStudy)))
    assert notice.title == "2 of 18\N{NO-BREAK SPACE}runs missing"
    assert notice.lines[0] == "adamw: 2\N{NO-BREAK SPACE}runs not started"


def test_machines_that_differ_are_named(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, {"adamw": NARROW}, seeds=(0, 1))
    (min((path / "runs").iterdir()) / "environment.json").write_text('{"python": "3.12"}')
    [notice] = lr_sentences.notices(read_results(read_study(path, SweepStudy)))
    assert (notice.level, notice.title) == ("note", "More than one environment")
    assert "python" in notice.lines[0]
    assert notice.lines[0].endswith("so may their losses.")


def test_runs_of_another_code_are_named_with_their_learning_rate(tmp_path: Path) -> None:
    study = read_study(write_sweep(tmp_path, {"adamw": NARROW}, seeds=(0,)), SweepStudy)
    other = replace(study.runs[0], config=replace(study.runs[0].config, code="9"))
    sweep = read_results(replace(study, found=study.found | {next(iter(study.found)): other}))
    notice = next(notice for notice in lr_sentences.notices(sweep) if "other conditions" in notice.title)
    assert notice.lines[0] == f"adamw, lr 0.001, seed 0: code 9 instead of {code_version()}"
