"""`steepest critical-batch bound | measure | fit | plot | branch`."""

from __future__ import annotations

from steepest.lab.cli.command import Group
from steepest.lab.cli.critical_batch.bound import BoundCommand
from steepest.lab.cli.critical_batch.branch import BranchCommand
from steepest.lab.cli.critical_batch.fit import Fit, Plot
from steepest.lab.studies import KINDS

GROUP = Group(
    "Critical batch size: bounds, measurement, recommendation.",
    {
        "bound": BoundCommand,
        "measure": KINDS["critical-batch"].load_command(),
        "fit": Fit,
        "plot": Plot,
        "branch": BranchCommand,
    },
)
