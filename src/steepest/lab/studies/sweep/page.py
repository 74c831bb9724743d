"""The page of a learning-rate sweep."""

from __future__ import annotations

from steepest.lab.report import wording
from steepest.lab.report.page import Content, Page, fill
from steepest.lab.studies.sweep import figures as lr_figures
from steepest.lab.studies.sweep import notices as lr_notices
from steepest.lab.studies.sweep import sentences as lr_sentences
from steepest.lab.studies.sweep import table as lr_table
from steepest.lab.studies.sweep.records import rate
from steepest.lab.studies.sweep.results import Sweep


def render(sweep: Sweep, *, directory: str) -> Page:
    """The page of a sweep and its figures as PNG files.

    Args:
        sweep: All numbers.
        directory: How the study directory is called in the command that writes the page anew.

    Returns:
        HTML text, and the content of each PNG by file name. The same records give the same bytes.
    """
    content = Content(
        headline=lr_sentences.headline(sweep),
        facts=lr_sentences.facts(sweep),
        notices=lr_notices.notices(sweep),
        summary=lr_sentences.summary(sweep),
        figures=lr_figures.figures(sweep),
        columns=lr_table.columns(sweep),
        results=sweep.methods,
        whole=sweep,
        methodology=lr_sentences.methodology(sweep),
        hidden=("lr", "other_lr"),
    )
    return fill("lr.html.j2", sweep.study, content, directory=directory, rate=lambda run: wording.rate(rate(run)))
