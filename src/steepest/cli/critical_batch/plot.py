"""`steepest critical-batch plot`: the figures and tables of a batch-size study, without the page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from steepest.cli.options import Commands
from steepest.cli.options import add_command as declare
from steepest.cli.outcome import DONE, FAILED

EXAMPLES = """examples:
  steepest critical-batch plot out/batches
"""


def add_command(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare plot."""
    summary = "write the figures of a batch-size study as PNG and its numbers as CSV, also while it is running"
    parser = declare(commands, "plot", _plot, summary, EXAMPLES)
    parser.add_argument("directory", type=Path, metavar="DIR", help="what measure was given as --out")


def _plot(options: argparse.Namespace) -> int:
    from steepest.lab.fields import RecordError
    from steepest.lab.report import write_plots

    try:
        written = write_plots(options.directory)
    except RecordError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return FAILED
    for path in written:
        print(path)
    return DONE
