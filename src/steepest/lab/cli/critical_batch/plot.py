"""`steepest critical-batch plot`: the figures and tables of a batch-size study, without the page."""

from __future__ import annotations

import argparse

from steepest.lab.cli.options import Commands, path
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.outcome import DONE, failed

EXAMPLES = """examples:
  steepest critical-batch measure --task digits --batches 16:64:x2 --targets 0.2 --seeds 1 --out out/batches
  steepest critical-batch plot out/batches
"""


def add_command(commands: Commands) -> None:
    """Declare plot."""
    summary = "write the figures of a batch-size study as PNG and its numbers as CSV, also while it is running"
    parser = declare(commands, "plot", _plot, summary, EXAMPLES)
    parser.add_argument("directory", type=path, metavar="DIR", help="what measure was given as --out")


def _plot(options: argparse.Namespace) -> int:
    from steepest.lab.disk.fields import RecordError
    from steepest.lab.studies.report import write_plots

    try:
        written = write_plots(options.directory, "critical-batch")
    except RecordError as failure:
        return failed(failure)
    for file in written:
        print(file)
    return DONE
