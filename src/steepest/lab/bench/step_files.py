"""What a benchmark of steps leaves: everything as JSON, the rows as CSV, and a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from steepest.lab.bench.step import Bench, Case
from steepest.lab.bench.step_png import cases_png
from steepest.lab.disk.files import make_directory, write_whole
from steepest.lab.report.sheet import neutral
from steepest.lab.runs.environment import describe_environment


def step_content(bench: Bench, cases: Sequence[Case], *, command: str) -> dict[str, object]:
    """All that was measured, the seconds of every round included, and what it was measured on; plain JSON values."""
    environment = {**describe_environment(), "threads": bench.threads}
    return {
        "command": command,
        "commit": environment["git_commit"],
        "environment": environment,
        "bench": dataclasses.asdict(bench),
        "cases": [dataclasses.asdict(case) for case in cases],
    }


def rows_csv(cases: Sequence[Case]) -> str:
    """A line per contestant and case; what was not measured is empty."""
    rows = [
        {"shapes": case.shapes, "width": case.width, **flat(dataclasses.asdict(row))}
        for case in cases
        for row in case.rows
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: neutral(v) if isinstance(v, str) else v for key, v in row.items()} for row in rows)
    return text.getvalue()


def flat(record: Mapping[str, object]) -> dict[str, object]:
    """Records within a record become columns of their own.

    Examples:
        >>> flat({"ratio": {"low": 1, "high": 2}, "note": "", "reason": None})
        {'ratio_low': 1, 'ratio_high': 2, 'note': ''}
    """
    found: dict[str, object] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}_{part}": own for part, own in value.items()}
        elif value is not None:
            found[name] = value
    return found


def write_step(directory: Path, bench: Bench, cases: Sequence[Case], *, command: str) -> tuple[Path, ...]:
    """Write step.json, step.csv and step.png.

    Args:
        directory: Made if need be.
        bench: What was asked for.
        cases: What was found.
        command: That led to it.

    Returns:
        The files.
    """
    make_directory(directory)
    content = step_content(bench, cases, command=command)
    files: dict[str, str | bytes] = {
        "step.json": json.dumps(content, indent=2, allow_nan=False) + "\n",
        "step.csv": rows_csv(cases),
        "step.png": cases_png(cases),
    }
    for name, text in files.items():
        write_whole(directory / name, text)
    return tuple(directory / name for name in files)
