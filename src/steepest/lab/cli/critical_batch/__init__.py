"""`steepest critical-batch bound | measure | fit | plot | branch`."""

from __future__ import annotations

from steepest.lab.cli.critical_batch import bound, branch, fit, plot
from steepest.lab.cli.options import Commands
from steepest.lab.studies import KINDS


def add_commands(commands: Commands) -> None:
    """Declare critical-batch with what it can do."""
    summary = "critical batch size: bounds, measurement, recommendation"
    parser = commands.add_parser(
        "critical-batch", help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    parts = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    bound.add_command(parts)
    KINDS["critical-batch"].add_command(parts)
    for part in (fit, plot, branch):
        part.add_command(parts)
