"""Who works on what: an assignment that burdens no rank much more than another."""

import heapq
import math
from collections.abc import Sequence


def assign(costs: Sequence[float], ranks: int, among: Sequence[Sequence[int] | None] | None = None) -> list[list[int]]:
    """Share out work: the costliest first, each to the rank that has least so far.

    Where every rank may take every piece, the one with most then has at most 4/3 - 1/(3 ranks) times what it would have
    in the best assignment.

    Args:
        costs: Of each piece, any unit.
        ranks: How many share.
        among: Of each piece, the ranks that may take it; None: all.

    Returns:
        Indices into `costs` for each rank, increasing; the same on every rank, ties going to the lower index and rank.

    Raises:
        ValueError: If there is no rank for a piece, or a cost is negative or not finite.

    Source:
        Graham, 1969, Bounds on multiprocessing timing anomalies, theorem 2.

    Examples:
        >>> assign([3, 1, 4, 1, 5], ranks=2)
        [[1, 3, 4], [0, 2]]
        >>> assign([3, 3, 3], ranks=3, among=[[0], [0, 1], None])
        [[0], [1], [2]]
    """
    if ranks < 1:
        raise ValueError(f"assign takes ranks of at least 1, got {ranks}.")
    for index, each in enumerate(costs):
        if not 0 <= each < math.inf:
            raise ValueError(f"assign takes finite costs of at least 0, got costs[{index}] = {each}.")
    allowed = [None] * len(costs) if among is None else among
    for index, own in enumerate(allowed):
        if own is not None and not (own and min(own) >= 0 and max(own) < ranks):
            raise ValueError(f"assign takes ranks below {ranks} that may take a piece, got among[{index}] = {own}.")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    heap = [(0.0, rank) for rank in range(ranks)]  # may hold loads that have grown since
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        own = allowed[index]
        if own is not None and len(own) < ranks:
            rank = min(own, key=lambda rank: (loads[rank], rank))
        else:
            while heap[0][0] != loads[heap[0][1]]:
                heapq.heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
            rank = heap[0][1]
        shares[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(share) for share in shares]
