"""The page of a batch-size study."""

from __future__ import annotations

from steepest.lab.report import wording
from steepest.lab.report.page import Content, Page, fill
from steepest.lab.studies.batch import figures as cb_figures
from steepest.lab.studies.batch import notices as cb_notices
from steepest.lab.studies.batch import sentences as cb_sentences
from steepest.lab.studies.batch import table as cb_table
from steepest.lab.studies.batch.model import look
from steepest.lab.studies.batch.results import BatchReport


def render(report: BatchReport, *, directory: str) -> Page:
    """The page of a batch-size study and its figures as PNG files.

    Args:
        report: All numbers.
        directory: How the study directory is called in the command that writes the page anew.

    Returns:
        HTML text, and the content of each PNG by file name. The same records give the same bytes.
    """
    study = report.study
    content = Content(
        headline=cb_sentences.headline(report),
        facts=cb_sentences.facts(report),
        notices=cb_notices.notices(report, look(study.task, study.preset)),
        summary=cb_sentences.summary(report),
        figures=cb_figures.figures(report),
        columns=cb_table.columns(report),
        results=report.arms,
        whole=report,
        methodology=cb_sentences.methodology(report),
        hidden=("lr", "other_lr"),
        rows=report.results,
    )
    statements = cb_sentences.statements(report)
    return fill("cb.html.j2", study, content, directory=directory, statements=statements, rate=wording.rate)
