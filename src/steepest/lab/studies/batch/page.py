"""The page of a batch-size study."""

from __future__ import annotations

from pathlib import Path

from steepest.lab.report import wording
from steepest.lab.report.page import Comparison, Content, Settings, Study
from steepest.lab.studies.batch import sentences
from steepest.lab.studies.batch.figures import KEYS, figures
from steepest.lab.studies.batch.model import look
from steepest.lab.studies.batch.notices import notices
from steepest.lab.studies.batch.records import BatchStudy
from steepest.lab.studies.batch.results import ArmResult, BatchReport, Rate, read_report
from steepest.lab.studies.batch.sheets import tables
from steepest.lab.studies.batch.table import columns
from steepest.lab.studies.records import read_study


def content(report: BatchReport) -> Content:
    """What the page of a batch-size study says."""
    return Content(
        subject="Critical batch size",
        study=report.study,
        headline=sentences.headline(report),
        facts=sentences.facts(report),
        notices=notices(report, look(report.study.task, report.study.preset)),
        verdicts=[Comparison("", statement) for statement in sentences.statements(report)],
        summary=sentences.summary(report),
        figures=figures(report),
        columns=columns(report),
        results=report.arms,
        methodology=sentences.methodology(report),
        settings=_settings,
        tables=tables(report),
        keys=KEYS,
        hidden=("lr", "other_lr"),
        rows=report.results,
    )


def _settings(arm: ArmResult) -> Settings:
    runs = [(f"b = {run.config.batch_size}, seed {run.config.seed}", run) for run in arm.runs]
    title = f"{len(arm.runs)} runs, {len(arm.rates)} learning rates"
    return Settings(title, runs, notes=[_told(one) for one in arm.rates])


def _told(one: Rate) -> str:
    edge = ", at the edge" if one.at_edge else ""
    low, high = (wording.rate(end) for end in (one.tried[0], one.tried[-1])) if one.tried else ("", "")
    tried = f", of {len(one.tried)} from {low} to {high}{edge}" if one.tried else ""
    return f"b = {one.batch_size}: lr {wording.rate(one.lr)}{tried}"


def _read(study_dir: Path) -> BatchReport:
    return read_report(read_study(study_dir, BatchStudy))


STUDY = Study(_read, content)
