"""From a model to matrices: what each parameter is, and how it is read as batches of fan-out by fan-in matrices."""

from steepest.anatomy.attention import Attention, Rows, attentions
from steepest.anatomy.batches import Bucket, Load
from steepest.anatomy.plan import ROLES, Plan, PlanRow, Role, aligned
from steepest.anatomy.routing import Override, Rule, route
from steepest.anatomy.views import CONV1D, EXPERTS, EXPERTS_TRANSPOSED, LINEAR, View, conv

__all__ = [
    "CONV1D",
    "EXPERTS",
    "EXPERTS_TRANSPOSED",
    "LINEAR",
    "ROLES",
    "Attention",
    "Bucket",
    "Load",
    "Override",
    "Plan",
    "PlanRow",
    "Role",
    "Rows",
    "Rule",
    "View",
    "aligned",
    "attentions",
    "conv",
    "route",
]
