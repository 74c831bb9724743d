"""The report of a study: one HTML page and its figures, derived from the stored records and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from steepest.lab.disk.files import make_directory, remove, write_whole
from steepest.lab.studies.batch.records import read_batch_study
from steepest.lab.studies.records import read_kind, read_study
from steepest.lab.studies.sweep.records import read_sweep

__all__ = ["write_plots", "write_report"]


def write_report(study_dir: Path) -> Path:
    """Write `report.html` and `plots/*.png` into a study directory; for all but a race also tables as CSV.

    May be called at any time, also while runs are still going on: the page then says which are missing. It opens
    without a network, and holds no link to any other place.

    Args:
        study_dir: The directory that holds `study.json`.

    Returns:
        Path of the page.

    Raises:
        RecordError: If `study.json` is missing, damaged, or no study of a known kind. Damaged runs are shown on the
            page instead.
        ModuleNotFoundError: If the libraries that draw are not installed.
    """
    kind = read_kind(study_dir)
    try:
        if kind == "race":
            return _write_race(study_dir)
        return _write_sweep(study_dir) if kind == "sweep" else _write_batches(study_dir)
    except ModuleNotFoundError as missing:
        raise _not_installed(missing) from missing


def write_plots(study_dir: Path) -> tuple[Path, ...]:
    """Write figures and tables of a batch-size study, without the page.

    Args:
        study_dir: The directory that holds `study.json`.

    Returns:
        What was written: `plots/*.png` and CSV files.

    Raises:
        RecordError: If `study.json` is missing, damaged, or not a batch-size study.
        ModuleNotFoundError: If the libraries that draw are not installed.
    """
    study = read_batch_study(study_dir)
    try:
        from steepest.lab.report.matplotlib_png import to_png
        from steepest.lab.studies.batch.figures import KEYS, figures
        from steepest.lab.studies.batch.results import read_report
        from steepest.lab.studies.batch.sheets import tables
    except ModuleNotFoundError as missing:
        raise _not_installed(missing) from missing
    report = read_report(study)
    images = {f"{figure.key}.png": to_png(figure) for figure in figures(report)}
    return (*_write_images(study_dir, images, keys=KEYS), *_write_tables(study_dir, tables(report)))


def _not_installed(missing: ModuleNotFoundError) -> ModuleNotFoundError:
    remedy = "Install what the lab needs: pip install 'steepest[lab]'."
    return ModuleNotFoundError(f"The report cannot be drawn without {missing.name}. {remedy}", name=missing.name)


def _write_race(study_dir: Path) -> Path:
    from steepest.lab.report.page import render
    from steepest.lab.studies.race.figures import KEYS
    from steepest.lab.studies.race.results import read_race

    page, images = render(read_race(read_study(study_dir)), directory=str(study_dir))
    return _write(study_dir, page, images, keys=KEYS)


def _write_sweep(study_dir: Path) -> Path:
    from steepest.lab.studies.sweep.figures import KEYS
    from steepest.lab.studies.sweep.page import render
    from steepest.lab.studies.sweep.results import read_results
    from steepest.lab.studies.sweep.sheets import tables

    sweep = read_results(read_sweep(study_dir))
    page, images = render(sweep, directory=str(study_dir))
    _write_tables(study_dir, tables(sweep))
    return _write(study_dir, page, images, keys=KEYS)


def _write_batches(study_dir: Path) -> Path:
    from steepest.lab.studies.batch.figures import KEYS
    from steepest.lab.studies.batch.page import render
    from steepest.lab.studies.batch.results import read_report
    from steepest.lab.studies.batch.sheets import tables

    report = read_report(read_batch_study(study_dir))
    page, images = render(report, directory=str(study_dir))
    _write_tables(study_dir, tables(report))
    return _write(study_dir, page, images, keys=KEYS)


def _write_tables(study_dir: Path, tables: Mapping[str, str]) -> tuple[Path, ...]:
    for name, content in tables.items():
        write_whole(study_dir / name, content)
    return tuple(study_dir / name for name in tables)


def _write(study_dir: Path, page: str, images: Mapping[str, bytes], *, keys: Collection[str]) -> Path:
    _write_images(study_dir, images, keys=keys)
    path = study_dir / "report.html"
    write_whole(path, page)
    return path


def _write_images(study_dir: Path, images: Mapping[str, bytes], *, keys: Collection[str]) -> tuple[Path, ...]:
    """Write figures; one of these keys that no longer holds is removed."""
    plots = study_dir / "plots"
    make_directory(plots)
    for stale in {f"{key}.png" for key in keys} - set(images):
        remove(plots / stale)
    for name, content in images.items():
        write_whole(plots / name, content)
    return tuple(plots / name for name in images)
