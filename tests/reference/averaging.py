"""Averages of weights in float64, from their definitions: not recurrences, but sums with weights."""

import numpy as np


def mean_of_tail(weights, start):
    """Of w_0, w_1, ..., w_t: the mean of all after step `start`; before, the last."""
    tail = weights[start + 1 :]
    return np.mean(tail, axis=0) if tail else weights[-1]


def weighted_tail(weights, start, window):
    """Each step after `start` takes the part 1 / window(t - start) of what is left: written as one sum over the past.

    Args:
        weights: w_0, w_1, ..., w_t.
        start: Step whose weights come first.
        window: From steps since then to τ, at least 1.
    """
    if len(weights) - 1 <= start:
        return weights[-1]
    parts = [1 / window(age) for age in range(1, len(weights) - start)]
    shares = [part * np.prod([1 - later for later in parts[place + 1 :]]) for place, part in enumerate(parts)]
    first = np.prod([1 - part for part in parts])
    return first * weights[start] + sum(s * w for s, w in zip(shares, weights[start + 1 :], strict=True))
