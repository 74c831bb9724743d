"""The page of a race."""

from __future__ import annotations

from pathlib import Path

from steepest.lab.report.page import Content, Settings, Study
from steepest.lab.report.wording import plain
from steepest.lab.studies.race import sentences
from steepest.lab.studies.race.figures import KEYS, figures
from steepest.lab.studies.race.notices import notices, tuned
from steepest.lab.studies.race.records import RaceStudy
from steepest.lab.studies.race.results import MethodResult, Race, read_race
from steepest.lab.studies.race.table import columns
from steepest.lab.studies.records import read_study


def content(race: Race) -> Content:
    """What the page of a race says."""

    def settings(method: MethodResult) -> Settings:
        tuning = race.chosen.tuning[method.name]
        recorded = f", recorded in {plain(tuning.source)}" if tuning and tuning.source else ""
        runs = [(f"seed {run.config.seed}", run) for run in method.runs]
        return Settings(f"Chosen from {tuned(tuning)}{recorded}.", runs, folded=False)

    return Content(
        subject="Optimizer race",
        study=race.study,
        headline=sentences.headline(race),
        facts=sentences.facts(race),
        notices=notices(race),
        verdicts=sentences.pairs(race, first=True),
        others=sentences.pairs(race, first=False),
        summary=sentences.summary(race),
        figures=figures(race),
        columns=columns(race),
        results=race.methods,
        methodology=sentences.methodology(race),
        settings=settings,
        tables={},
        keys=KEYS,
    )


def _read(study_dir: Path) -> Race:
    return read_race(read_study(study_dir, RaceStudy))


STUDY = Study(_read, content)
