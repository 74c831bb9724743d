"""Packing a study: what is read from the packed file is what was read from the runs, and nothing else is ever lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from steepest.lab.cli import main
from steepest.lab.disk import files
from steepest.lab.disk.files import RecordError
from steepest.lab.disk.ours import RunBusyError, locked
from steepest.lab.disk.packed import PACKED
from steepest.lab.studies import pack
from steepest.lab.studies.batch.plan import BatchStudy
from steepest.lab.studies.pack import pack_study, unpack_study
from steepest.lab.studies.race.plan import RaceStudy
from steepest.lab.studies.records import read_study
from steepest.lab.studies.report import write_report
from steepest.lab.studies.sweep.plan import SweepStudy
from tests.lab.studies.batch.cases import written
from tests.lab.synthetic import Pace, Valley, run_dir, write_study, write_sweep

BESIDE = ("lock", "worker.log", "checkpoint.pt", "events.out.tfevents.17.machine.1.0")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study", {"adamw": Pace(), "muon": Pace(1.7, diverges={1: 64})}, seeds=(0, 1))


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("lock", PACKED)
    }


def test_unpacking_gives_the_very_files_back(study: Path) -> None:
    before = tree(study)
    for name in BESIDE:
        (run_dir(study, "muon", 0) / name).write_bytes(b"\xff")
    (study / "README.md").write_text("mine")
    assert pack_study(study, delete=True) == study / PACKED
    assert sorted(path.name for path in study.iterdir()) == ["README.md", "lock", PACKED]
    packed = (study / PACKED).read_bytes()
    assert unpack_study(study) == 4
    (study / "README.md").unlink()
    assert tree(study) == before
    assert pack_study(study).read_bytes() == packed


def test_without_delete_everything_stays(study: Path) -> None:
    before = tree(study)
    pack_study(study)
    assert tree(study) == before


@pytest.mark.parametrize("kind", ["race", "sweep", "troubled"])
def test_a_packed_study_is_read_like_its_runs(
    kind: str, study: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if kind == "race":
        path, listed = study, RaceStudy
    elif kind == "sweep":
        path = write_sweep(tmp_path / "sweep", {"adamw": Valley(0.01, [0.1, 0.01], limit=0.05)}, seeds=(0, 1))
        listed = SweepStudy
    else:
        path, listed = shutil.copytree(written(tmp_path_factory, "clear"), tmp_path / "batch"), BatchStudy
    before = read_study(path, listed)
    pack_study(path, delete=True)
    assert read_study(path, listed) == before


def test_the_report_of_a_packed_study_is_that_of_its_runs(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.lab.report.page.to_png", lambda _: b"")
    before = write_report(study).read_bytes()
    pack_study(study, delete=True)
    assert write_report(study).read_bytes() == before


def test_what_is_missing_unfinished_damaged_or_foreign_is_not_packed(tmp_path: Path, study: Path) -> None:
    def refused(paces: dict[str, Pace], message: str, *, name: str = "", content: str = "") -> None:
        shutil.rmtree(tmp_path / "it", ignore_errors=True)
        path = write_study(tmp_path / "it", paces, seeds=(0,))
        if name:
            at = path / name.replace("RUN", run_dir(path, "adamw", 0).name)
            at.parent.mkdir(exist_ok=True, parents=True)
            at.write_text(content)
        before = tree(path)
        with pytest.raises(RecordError, match=message):
            pack_study(path, delete=True)
        assert tree(path) == before
        assert not (path / PACKED).exists()

    refused({"adamw": Pace(stops={0: 3})}, "the run has not ended. Repeat the study's command first")
    refused({"adamw": Pace(), "muon": Pace(absent=(0,))}, "the run has not been started. Repeat the study's command")
    paces = {"adamw": Pace()}
    refused(paces, r"result\.json: not valid JSON", name="runs/RUN/result.json", content="{")
    refused(paces, r"notes\.txt: the lab has not written this", name="runs/RUN/notes.txt", content="mine")
    refused(paces, "runs/monday: the lab has not written this", name="runs/monday/log", content="mine")
    refused(paces, r"study\.json: kind must be one of", name="study.json", content='{"format": 1, "kind": "x"}')
    with pytest.raises(RecordError, match=r"study\.json: no study here. Give the directory"):
        pack_study(tmp_path)
    (config := run_dir(study, "muon", 0) / "config.json").write_text(
        config.read_text().replace('"seed": 0', '"seed": 1')
    )
    with pytest.raises(RecordError, match=r"config\.json: its content belongs to a run named"):
        pack_study(study)


def test_links_are_neither_packed_nor_followed(tmp_path: Path, study: Path) -> None:
    run = run_dir(study, "muon", 0)
    shutil.move(run, tmp_path / "elsewhere")
    run.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="is a link, not a directory"):
        pack_study(study, delete=True)
    run.unlink()
    shutil.move(tmp_path / "elsewhere", run)
    shutil.move(run / "environment.json", tmp_path / "outside")
    (run / "environment.json").symlink_to(tmp_path / "outside")
    with pytest.raises(RecordError, match=r"environment\.json: .*it is a link, not a regular file"):
        pack_study(study, delete=True)
    (run / "environment.json").unlink()
    (study / PACKED).symlink_to(tmp_path / "outside")
    with pytest.raises(RecordError, match=f"{PACKED}: it is a link, not a regular file"):
        pack_study(study, delete=True)
    assert (tmp_path / "outside").read_text().startswith("{")
    assert (study / "study.json").exists()


def test_nothing_is_deleted_before_it_was_read_back(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = tree(study), pack.unpack
    monkeypatch.setattr(pack, "unpack", lambda path: (real(path)[0], {}))
    with pytest.raises(RecordError, match="what is read back is not what was packed"):
        pack_study(study, delete=True)
    assert tree(study) == before
    assert not (study / PACKED).exists()
    assert not [path for path in study.iterdir() if path.name.endswith(".tmp")]


def test_a_deletion_that_was_cut_short_goes_on(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, last = read_study(study, RaceStudy), max((study / "runs").iterdir())

    def stop(path: Path) -> None:
        if path.parent == last:
            raise KeyboardInterrupt
        files.remove(path)

    monkeypatch.setattr(pack, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_study(study, delete=True)
    assert read_study(study, RaceStudy) == before
    monkeypatch.undo()
    pack_study(study, delete=True)
    assert not (study / "runs").exists()
    assert read_study(study, RaceStudy) == before


def test_what_differs_from_the_packed_file_is_never_lost(study: Path) -> None:
    packed = pack_study(study).read_bytes()
    pack_study(study, delete=True)
    unpack_study(study)
    result = run_dir(study, "muon", 0) / "result.json"
    (study / "study.json").unlink()
    result.write_text("mine")
    for refused in (lambda: pack_study(study, delete=True), lambda: unpack_study(study)):
        with pytest.raises(RecordError, match=r"result\.json: the file differs from the packed one"):
            refused()
    assert (result.read_text(), (study / PACKED).read_bytes()) == ("mine", packed)


def test_a_study_that_is_going_on_is_left_alone(study: Path) -> None:
    with locked(study), pytest.raises(RunBusyError):
        pack_study(study)
    pack_study(study, delete=True)
    with locked(study), pytest.raises(RunBusyError):
        unpack_study(study)


def test_a_packed_study_is_not_repeated_before_it_is_unpacked(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(study), "--delete"]) == 0
    remedy = f"To unpack its runs: steepest unpack {study} "
    assert main(["race", "--task", "digits", "--methods", "adamw", "--out", str(study)]) == 2
    assert f"{study} holds a packed study. {remedy}" in capsys.readouterr().err
    assert main(["work", str(study)]) == 1
    assert f"{study / PACKED}: the runs of this study are packed. {remedy}" in capsys.readouterr().err
    assert main(["unpack", str(study)]) == 0
    assert f"Unpacked: 4 runs in {study / 'runs'}" in capsys.readouterr().out
    assert main(["unpack", str(study)]) == 1
    assert re.search("the study is not packed, or unpacked already", capsys.readouterr().err)
