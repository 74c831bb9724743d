"""A finished study in one file, and back: what a repository keeps of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from steepest.lab.disk.fields import NAME
from steepest.lab.disk.files import (
    RecordError,
    exists,
    make_directory,
    names_in,
    read_bytes,
    remove,
    remove_directory,
    write_whole,
)
from steepest.lab.disk.ours import locked
from steepest.lab.disk.packed import PACKED, RECORDS, RunFiles, StudyFiles, pack, unpack
from steepest.lab.runs.config import names_of, run_hash
from steepest.lab.runs.records import read_run
from steepest.lab.studies.records import Listed, open_study

# What a run leaves beside its records, and nobody needs once it has ended.
_LEFT = re.compile(r"lock|worker\.log|checkpoint\.pt|events\.out\.tfevents\.[\w.-]+")
_RESUME = "Repeat the study's command first: only what is missing is trained."
_FOREIGN = "Take it away first: only what the lab has written is packed."

Contents = Mapping[str, Mapping[str, bytes]]


def pack_study(study_dir: Path, *, delete: bool = False) -> Path:
    """Write the records of a study and of all of its runs into one file, and see that they can be read back from it.

    Args:
        study_dir: The directory that holds `study.json`. One that is packed already is left as it is.
        delete: Whether to delete afterwards what is packed: `study.json`, and the runs with what they left beside
            their records.

    Returns:
        The packed file.

    Raises:
        RecordError: If there is no study, a run is unfinished or damaged, or there is something in the way that the lab
            has not written. Nothing is deleted then.
        RunBusyError: If the study is going on.
        OSError: If the file cannot be written.
    """
    packed = study_dir / PACKED
    study = StudyFiles(study_dir)
    listed = open_study(study, Listed).runs.keys()
    with locked(study_dir):
        names = _run_names(study_dir)
        if not study.packed:
            if missing := sorted(listed - set(names)):
                raise RecordError(study_dir / "runs" / missing[0], "the run has not been started", _RESUME)
            runs = {name: _records(study.run(name)) for name in names}
            content = read_bytes(study_dir / "study.json"), runs
            write_whole(packed, pack(*content), durable=True, check=lambda path: _check_same(path, content))
        if delete:
            _delete(study_dir, names, *unpack(packed))
    return packed


def unpack_study(study_dir: Path) -> int:
    """Write the runs of a packed study back into their directories, to the byte, and `study.json` when all are there.

    Args:
        study_dir: The directory that holds the packed file, which stays.

    Returns:
        How many runs it has.

    Raises:
        RecordError: If there is no packed study, it is damaged, or a file is in the way that differs.
        RunBusyError: If somebody else works in the directory.
        OSError: If a file cannot be written.
    """
    packed = study_dir / PACKED
    if not (files := StudyFiles(study_dir)).packed:
        raise RecordError(study_dir, "the study is not packed, or unpacked already", "Nothing needs to be done.")
    open_study(files, Listed)
    with locked(study_dir):
        study, runs = unpack(packed)
        for name, run in runs.items():
            make_directory(study_dir / "runs" / name)
            for key, content in run.items():
                path = study_dir / "runs" / name / key
                if not exists(path):
                    write_whole(path, content)
                elif read_bytes(path) != content:
                    raise RecordError(path, "the file differs from the packed one", "Take one of the two away.")
        write_whole(study_dir / "study.json", study)
    return len(runs)


def _run_names(study_dir: Path) -> list[str]:
    """The directories of runs, after a look at whether everything there is ours."""
    if not exists(study_dir / "runs"):
        return []
    names = names_in(study_dir / "runs")
    for name in names:
        run_dir = study_dir / "runs" / name
        if not NAME.fullmatch(name):
            raise RecordError(run_dir, "the lab has not written this", _FOREIGN)
        for file in names_in(run_dir):
            if file not in RECORDS and not _LEFT.fullmatch(file):
                raise RecordError(run_dir / file, "the lab has not written this", _FOREIGN)
    return names


def _records(files: RunFiles) -> dict[str, bytes]:
    """The files of a run that has ended, after a look at whether they can be read."""
    if not files.has("result.json"):
        raise RecordError(files.path, "the run has not ended", _RESUME)
    config = read_run(files).config
    if files.path.name not in names_of(config):
        raise files.error("config.json", f"its content belongs to a run named {run_hash(config)}")
    return {name: read_bytes(files.path / name) for name in RECORDS if files.has(name)}


def _check_same(path: Path, content: tuple[bytes, Contents]) -> None:
    if unpack(path) != content:
        raise RecordError(path, "what is read back is not what was packed", "Look whether disk and memory are sound.")


def _delete(study_dir: Path, names: list[str], study: bytes, runs: Contents) -> None:
    """Delete what is packed, `study.json` first: from then on, the packed file counts."""
    for name in names:
        for file in names_in(study_dir / "runs" / name):
            path = study_dir / "runs" / name / file
            if file in RECORDS and read_bytes(path) != runs.get(name, {}).get(file):
                raise RecordError(path, "the file differs from the packed one", "Take one of the two away.")
    if exists(study_dir / "study.json"):
        remove(study_dir / "study.json")
    for name in names:
        for file in names_in(study_dir / "runs" / name):
            remove(study_dir / "runs" / name / file)
        remove_directory(study_dir / "runs" / name)
    if exists(study_dir / "runs"):
        remove_directory(study_dir / "runs")
