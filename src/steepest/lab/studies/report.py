"""The report of a study: one HTML page, its figures and tables, derived from the stored records and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from steepest.lab.disk.files import RecordError, make_directory, remove, write_whole
from steepest.lab.studies import KINDS
from steepest.lab.studies.records import read_kind


def write_report(study_dir: Path) -> Path:
    """Write `report.html`, `plots/*.png` and, where its kind has some, tables as CSV into a study directory.

    May be called at any time, also while runs are still going on: the page then says which are missing. It opens
    without a network, and holds no link to any other place.

    Args:
        study_dir: The directory that holds `study.json`, or a packed study.

    Returns:
        Path of the page.

    Raises:
        RecordError: If `study.json` is missing, damaged, or no study of a known kind. Damaged runs are shown on the
            page instead.
        ModuleNotFoundError: If the libraries that draw are not installed.
    """
    content = KINDS[read_kind(study_dir)].content(study_dir)
    from steepest.lab.report.page import render  # which takes what that has looked for

    page, images = render(content, directory=str(study_dir))
    _write_tables(study_dir, content.tables)
    _write_images(study_dir, images, keys=content.keys)
    path = study_dir / "report.html"
    write_whole(path, page)
    return path


def write_plots(study_dir: Path, kind: str) -> tuple[Path, ...]:
    """Write figures and tables of a study, without the page.

    Args:
        study_dir: The directory that holds `study.json`, or a packed study.
        kind: Of the study, a key of `KINDS`.

    Returns:
        What was written: `plots/*.png` and CSV files.

    Raises:
        RecordError: If `study.json` is missing, damaged, or of a study of another kind.
        ModuleNotFoundError: If the libraries that draw are not installed.
    """
    if (other := read_kind(study_dir)) != kind:
        remedy = f"Nothing is wrong with it: `steepest report {study_dir}` makes its page."
        raise RecordError(study_dir, f"this is the study of a {other}, and a {kind} was asked for", remedy)
    content = KINDS[kind].content(study_dir)
    from steepest.lab.report.page import pictures

    images = _write_images(study_dir, pictures(content.figures), keys=content.keys)
    return (*images, *_write_tables(study_dir, content.tables))


def _write_tables(study_dir: Path, tables: Mapping[str, str]) -> tuple[Path, ...]:
    for name, content in tables.items():
        write_whole(study_dir / name, content)
    return tuple(study_dir / name for name in tables)


def _write_images(study_dir: Path, images: Mapping[str, bytes], *, keys: Collection[str]) -> tuple[Path, ...]:
    """Write figures; one of these keys that no longer holds is removed."""
    plots = study_dir / "plots"
    make_directory(plots)
    for stale in {f"{key}.png" for key in keys} - set(images):
        remove(plots / stale)
    for name, content in images.items():
        write_whole(plots / name, content)
    return tuple(plots / name for name in images)
