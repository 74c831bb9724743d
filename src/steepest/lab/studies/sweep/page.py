"""The page of a learning-rate sweep."""

from __future__ import annotations

from pathlib import Path

from steepest.lab.report import wording
from steepest.lab.report.page import Content, Settings, Study
from steepest.lab.runs.records import Run
from steepest.lab.studies.records import read_study
from steepest.lab.studies.sweep import sentences
from steepest.lab.studies.sweep.figures import KEYS, figures
from steepest.lab.studies.sweep.notices import notices
from steepest.lab.studies.sweep.records import SweepStudy, rate
from steepest.lab.studies.sweep.results import MethodSweep, Sweep, read_results
from steepest.lab.studies.sweep.sheets import tables
from steepest.lab.studies.sweep.table import columns


def content(sweep: Sweep) -> Content:
    """What the page of a sweep says."""
    return Content(
        subject="Learning-rate sweep",
        study=sweep.study,
        headline=sentences.headline(sweep),
        facts=sentences.facts(sweep),
        notices=notices(sweep),
        verdicts=(),
        summary=sentences.summary(sweep),
        figures=figures(sweep),
        columns=columns(sweep),
        results=sweep.methods,
        methodology=sentences.methodology(sweep),
        settings=_settings,
        tables=tables(sweep),
        keys=KEYS,
        hidden=("lr", "other_lr"),
    )


def _settings(method: MethodSweep) -> Settings:
    return Settings(f"{len(method.runs)} runs", [(_told(run), run) for run in method.runs])


def _told(run: Run) -> str:
    other = run.config.options.get("other_lr")
    also = "" if other is None else f", other_lr {other}"
    return f"lr {wording.rate(rate(run))}{also}, seed {run.config.seed}"


def _read(study_dir: Path) -> Sweep:
    return read_results(read_study(study_dir, SweepStudy))


STUDY = Study(_read, content)
