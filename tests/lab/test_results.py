"""Committed tables are what today's code reads from the packed records beside them."""

import csv
import io
import math
from pathlib import Path

import pytest

from steepest.lab.studies import KINDS
from steepest.lab.studies.records import read_kind

RESULTS = Path(__file__).parents[2] / "results"
STUDIES = sorted(path.parent for path in RESULTS.rglob("runs.jsonl.xz"))


def same(one, other):
    """Whether two cells say the same; another machine may round the logarithm of a number otherwise."""
    try:
        return math.isclose(float(one), float(other), rel_tol=1e-9)
    except ValueError:
        return one == other


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.relative_to(RESULTS).as_posix())
def test_tables_come_from_their_records(study):
    tables = KINDS[read_kind(study)].content(study).tables
    kept = {name for name in tables if (study / name).exists()}
    assert kept in (set(), set(tables))
    for name in kept:
        own, made = (list(csv.reader(io.StringIO(text))) for text in ((study / name).read_text(), tables[name]))
        differing = [pair for pair in zip(own, made, strict=True) if not all(map(same, *pair))]
        assert not differing, f"{name} is not what `steepest report` writes"
