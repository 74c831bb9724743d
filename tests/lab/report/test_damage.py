"""One value of one record of a study is wrong: every report says which file, or reads it, and never breaks."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steepest.lab.cli import main
from steepest.lab.disk.files import RecordError
from steepest.lab.runs.config import RunConfig, run_hash
from tests.cases import cases
from tests.lab.studies.batch.cases import written
from tests.lab.synthetic import Pace, Valley, write_study, write_sweep

DAMAGES = 16  # of each kind of study: what breaks one report in ten is missed with a probability below 1 in 4,000
LINES = 4  # of a file of rows that are looked at
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "muon", "=1+1", "\x1b[2J\nssh-ed25519 AAAA", "\ud800", "9" * 5000),
    *(0, 1, -1, 2, 10**9, 2**63, 10**400, -9.2e18, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, math.nan, math.inf),
    *([], {}, [None], [[]], {"": 0}, [10**400], {"name": "x"}),
)
Place = tuple[str | int, ...]


def write_race(out: Path) -> Path:
    return write_study(out, {"adamw": Pace(accuracy=0.5), "muon": Pace(speed=1.7, diverges={1: 64})}, seeds=(0, 1, 2))


def write_rates(out: Path) -> Path:
    valleys = {"adamw": Valley(0.01, [0.1, 0.01, 0.001]), "muon": Valley(0.1, [1.0, 0.1, 0.01], absent=[(1.0, 1)])}
    return write_sweep(out, valleys, seeds=(0, 1))


@pytest.fixture(params=["race", "sweep", "clear", "troubled", "varied"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    writers = {"race": write_race, "sweep": write_rates}
    if request.param in writers:
        return writers[request.param](tmp_path_factory.mktemp("whole") / "study")
    return written(tmp_path_factory, request.param)


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Where a value stands in a document."""
    if here:
        yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*here, key))


def changed(document: Any, place: Place, value: Any) -> Any:
    """The document with another value, or without the entry if the value is ..., at a place."""
    copy = json.loads(json.dumps(document))
    at = copy
    for key in place[:-1]:
        at = at[key]
    if value is ...:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return copy


def damage(study: Path, draw: random.Random) -> str:
    """Change one value of one file; what it was."""
    run = draw.choice(sorted((study / "runs").iterdir()))
    names = ["config.json", "result.json", "metrics.jsonl", "environment.json"]
    paths = [study / "study.json", *(run / name for name in names if (run / name).exists())]
    path = draw.choice(paths)
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = draw.choice([*range(min(LINES, len(lines))), len(lines) - 1])
    document = json.loads(lines[number])
    place, value = draw.choice(list(places(document))), draw.choice([*VALUES, ...])
    lines[number] = json.dumps(changed(document, place, value))
    path.write_text("\n".join(lines) + "\n")
    if path.name == "config.json":
        rename(study, run, path)
    return f"{path.relative_to(study)}, line {number + 1}, {place} = {str(value)[:60]!r}"


def rename(study: Path, run: Path, path: Path) -> None:
    """Whoever made up a config gave the run the name that belongs to it."""
    try:
        name = run_hash(RunConfig.from_json(path.read_text(), path=path))
    except RecordError:
        return
    run.rename(run.with_name(name))
    (study / "study.json").write_text((study / "study.json").read_text().replace(run.name, name))


@pytest.mark.slow
@cases("number", range(DAMAGES))
def test_a_wrong_value_is_told_or_read(
    whole: Path,
    number: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("steepest.lab.report.page.to_png", lambda _: b"")
    study = shutil.copytree(whole, tmp_path / "study")
    what = damage(study, random.Random(f"{request.node.name}, {number}"))
    code = main(["report", str(study)])
    out, err = capsys.readouterr()
    assert code in (0, 1), what
    if code == 1:
        assert any(line.startswith("error: ") and ".json" in line for line in err.splitlines()), what
    else:
        assert (study / "report.html").exists(), what
    assert not any(line.startswith("ssh-ed25519") for line in (out + err).splitlines()), what
