"""`steepest bench COMMAND`: measured on this machine, against others where they are installed."""

from __future__ import annotations

from steepest.lab.cli.bench import accuracy, cost, passes, scaling, step, train
from steepest.lab.cli.options import Commands


def add_commands(commands: Commands) -> None:
    """Declare bench with what it can measure."""
    summary = "measure time, memory and accuracy on this machine"
    parser = commands.add_parser(
        "bench", help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    parts = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for part in (step, train, scaling, accuracy, passes):
        part.add_command(parts)
    cost.add_commands(parts)
