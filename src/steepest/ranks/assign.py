"""Who works on what: an assignment that burdens no rank much more than another."""

import heapq
import math
from collections.abc import Sequence


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Share out work: the costliest first, each to the rank that has least so far.

    The rank with most then has at most 4/3 - 1/(3 ranks) times what it would have in the best assignment.

    Args:
        costs: Of each piece, any unit.
        ranks: How many share.

    Returns:
        Indices into `costs` for each rank, increasing; the same on every rank, ties going to the lower index and rank.

    Raises:
        ValueError: If there is no rank, or a cost is negative or not finite.

    Source:
        Graham, 1969, Bounds on multiprocessing timing anomalies, theorem 2.

    Examples:
        >>> assign([3, 1, 4, 1, 5], ranks=2)
        [[1, 3, 4], [0, 2]]
    """
    if ranks < 1:
        raise ValueError(f"assign takes ranks of at least 1, got {ranks}.")
    for index, each in enumerate(costs):
        if not 0 <= each < math.inf:
            raise ValueError(f"assign takes finite costs of at least 0, got costs[{index}] = {each}.")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(share) for share in shares]
