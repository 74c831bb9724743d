"""Who keeps which part of a tensor, who works on what, and numbers that ranks agree on; nothing on one process."""

from steepest.ranks.agree import decide, exchange_device, listeners, scalar_type, summed, unanimous, world_size
from steepest.ranks.assign import assign
from steepest.ranks.boxes import (
    Box,
    Layout,
    boxes,
    is_sharded,
    kept_like,
    laid_out,
    local,
    own_box,
    sharded,
    volume,
    whole,
)
from steepest.ranks.duties import Duties
from steepest.ranks.exchange import Exchange, Pending, Route
from steepest.ranks.team import Team

__all__ = [
    "Box",
    "Duties",
    "Exchange",
    "Layout",
    "Pending",
    "Route",
    "Team",
    "assign",
    "boxes",
    "decide",
    "exchange_device",
    "is_sharded",
    "kept_like",
    "laid_out",
    "listeners",
    "local",
    "own_box",
    "scalar_type",
    "sharded",
    "summed",
    "unanimous",
    "volume",
    "whole",
    "world_size",
]
