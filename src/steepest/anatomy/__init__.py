"""From a model to matrices: what each parameter is, and how it is read as batches of fan-out by fan-in matrices."""

from steepest.anatomy.feeds import Rows
from steepest.anatomy.inputs import PRESETS, InputMoment
from steepest.anatomy.moments import MomentLayout, given_rows
from steepest.anatomy.plan import ROLES, Plan, PlanRow, Role
from steepest.anatomy.readers import Reader, find_readers
from steepest.anatomy.routing import Override, Rule, route
from steepest.anatomy.views import CONV1D, EXPERTS, EXPERTS_TRANSPOSED, LINEAR, View, conv
from steepest.anatomy.watch import InputWatch

__all__ = [
    "CONV1D",
    "EXPERTS",
    "EXPERTS_TRANSPOSED",
    "LINEAR",
    "PRESETS",
    "ROLES",
    "InputMoment",
    "InputWatch",
    "MomentLayout",
    "Override",
    "Plan",
    "PlanRow",
    "Reader",
    "Role",
    "Rows",
    "Rule",
    "View",
    "conv",
    "find_readers",
    "given_rows",
    "route",
]
