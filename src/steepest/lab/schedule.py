"""The learning rate over a run."""

COOLDOWN = 0.7


def cooldown(step: int, *, steps: int) -> float:
    """Constant, then linear to 0 over the last 70 % of the steps; each of `steps` steps has a rate above 0.

    Args:
        step: Steps done so far, from 0.
        steps: Length of the run.

    Returns:
        A factor in [0, 1] on every learning rate.
    """
    return min(1.0, (steps - step) / (COOLDOWN * steps))
