"""The report of a race: one HTML page and its figures, derived from the stored records and nothing else."""

from __future__ import annotations

from pathlib import Path

from steepest.lab.ledger import write_whole
from steepest.lab.records import read_study

__all__ = ["write_report"]


def write_report(study_dir: Path) -> Path:
    """Write `report.html` and `plots/*.png` into a study directory.

    May be called at any time, also while runs are still going on: the page then says which are missing. It opens
    without a network, and holds no link to any other place.

    Args:
        study_dir: The directory that holds `study.json`.

    Returns:
        Path of the page.

    Raises:
        RecordError: If `study.json` is missing, damaged, or not a race. Damaged runs are shown on the page instead.
        ModuleNotFoundError: If the libraries that draw are not installed.
    """
    try:
        from steepest.lab.report.figures import KEYS
        from steepest.lab.report.page import render
        from steepest.lab.report.results import read_race
    except ModuleNotFoundError as missing:
        remedy = "Install what the lab needs: pip install 'steepest[lab]'."
        raise ModuleNotFoundError(
            f"The report cannot be drawn without {missing.name}. {remedy}", name=missing.name
        ) from missing
    page, images = render(read_race(read_study(study_dir)), directory=str(study_dir))
    plots = study_dir / "plots"
    plots.mkdir(exist_ok=True)
    for stale in {f"{key}.png" for key in KEYS} - set(images):
        (plots / stale).unlink(missing_ok=True)
    for name, content in images.items():
        write_whole(plots / name, content)
    path = study_dir / "report.html"
    write_whole(path, page)
    return path
