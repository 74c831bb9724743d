"""Who keeps which part of a tensor, who works on what, and numbers that ranks agree on; nothing on one process."""

from steepest.ranks.agree import agree, decide, exchange_device, summed, unanimous, world_size
from steepest.ranks.assign import assign
from steepest.ranks.boxes import check_layout, is_sharded, laid_out, local, sharded

__all__ = [
    "agree",
    "assign",
    "check_layout",
    "decide",
    "exchange_device",
    "is_sharded",
    "laid_out",
    "local",
    "sharded",
    "summed",
    "unanimous",
    "world_size",
]
