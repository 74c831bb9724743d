"""QK-clip in float64, head by head: weights (heads, head_dim, in)."""

import numpy as np


def clipped(query, key, largest, threshold):
    """Weights after the clip.

    Args:
        query: (heads, head_dim, in).
        key: (key_heads, head_dim, in).
        largest: (heads,), largest logits.
        threshold: tau.
    """
    query, key = query.copy(), key.copy()
    shared = len(query) // len(key)
    for head, logit in enumerate(largest):
        if logit > threshold:
            query[head] *= np.sqrt(threshold / logit)
    for group in range(len(key)):
        logit = max(largest[group * shared : (group + 1) * shared])
        if logit > threshold:
            key[group] *= np.sqrt(threshold / logit)
    return query, key
