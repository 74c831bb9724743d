"""The report of a study: one HTML page and its figures, derived from the stored records and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from steepest.lab.ledger import write_whole
from steepest.lab.records import read_kind, read_study
from steepest.lab.sweep_records import read_sweep

__all__ = ["write_report"]


def write_report(study_dir: Path) -> Path:
    """Write `report.html` and `plots/*.png` into a study directory; for a learning-rate sweep also tables as CSV.

    May be called at any time, also while runs are still going on: the page then says which are missing. It opens
    without a network, and holds no link to any other place.

    Args:
        study_dir: The directory that holds `study.json`.

    Returns:
        Path of the page.

    Raises:
        RecordError: If `study.json` is missing, damaged, or neither a race nor a sweep. Damaged runs are shown on the
            page instead.
        ModuleNotFoundError: If the libraries that draw are not installed.
    """
    kind = read_kind(study_dir)
    try:
        return _write_race(study_dir) if kind == "race" else _write_sweep(study_dir)
    except ModuleNotFoundError as missing:
        remedy = "Install what the lab needs: pip install 'steepest[lab]'."
        raise ModuleNotFoundError(
            f"The report cannot be drawn without {missing.name}. {remedy}", name=missing.name
        ) from missing


def _write_race(study_dir: Path) -> Path:
    from steepest.lab.report.figures import KEYS
    from steepest.lab.report.page import render
    from steepest.lab.report.results import read_race

    page, images = render(read_race(read_study(study_dir)), directory=str(study_dir))
    return _write(study_dir, page, images, keys=KEYS)


def _write_sweep(study_dir: Path) -> Path:
    from steepest.lab.report.lr_csv import tables
    from steepest.lab.report.lr_figures import KEYS
    from steepest.lab.report.lr_page import render
    from steepest.lab.report.lr_results import read_results

    sweep = read_results(read_sweep(study_dir))
    page, images = render(sweep, directory=str(study_dir))
    for name, content in tables(sweep).items():
        write_whole(study_dir / name, content)
    return _write(study_dir, page, images, keys=KEYS)


def _write(study_dir: Path, page: str, images: Mapping[str, bytes], *, keys: Collection[str]) -> Path:
    """Write page and figures; a figure of these keys that no longer holds is removed."""
    plots = study_dir / "plots"
    plots.mkdir(exist_ok=True)
    for stale in {f"{key}.png" for key in keys} - set(images):
        (plots / stale).unlink(missing_ok=True)
    for name, content in images.items():
        write_whole(plots / name, content)
    path = study_dir / "report.html"
    write_whole(path, page)
    return path
