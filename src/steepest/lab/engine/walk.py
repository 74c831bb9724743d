"""A search for options by hand's rules: walk downhill on ladders of values, one option after the other.

Every method gets as many tried settings, and all of them are known afterwards: what a comparison of methods must be
able to say of how their options were found.
"""

import itertools
import math
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from steepest.lab.methods import RATES
from steepest.names import unknown_name

STRIDES = (2, 1)  # rungs from one tried value of an option to the next: coarse first
RUNGS = 10  # of a learning rate, on each side of where the walk starts
LADDERS: Mapping[str, tuple[float, ...]] = {
    **dict.fromkeys(("momentum", "beta1"), (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)),
    "beta2": (0.7, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999),
    "weight_decay": (0.0, 0.01, 0.03, 0.1, 0.3, 1.0),
}


def ladder(name: str, start: float) -> tuple[float, ...]:
    """The values that an option of a method may have in a walk, rising.

    Args:
        name: Of the option: a learning rate, or one that `LADDERS` has.
        start: Where the walk begins; rates go by factors of the root of two around it.

    Raises:
        ValueError: If the option is none of these.
    """
    if name in RATES:
        return tuple(float(f"{start * 2 ** (rung / 2):.6g}") for rung in range(-RUNGS, RUNGS + 1))
    if name not in LADDERS:
        raise ValueError(unknown_name("option of a walk", name, [*RATES, *LADDERS]))
    return LADDERS[name]


@dataclass(frozen=True)
class Tried:
    """One setting of a search.

    Args:
        options: Value by name of the option.
        loss: What it came to; infinite for a run that diverged.
    """

    options: Mapping[str, float]
    loss: float


def search(
    ladders: Mapping[str, tuple[float, ...]], start: Mapping[str, float], *, budget: int
) -> Generator[dict[str, float], float, list[Tried]]:
    """Walk downhill, one option after the other, until as many settings were tried as may be.

    An option goes up its ladder as long as that helps, else down; after all of them, again, with smaller strides. If
    no neighbour is better before the budget is spent, settings beside the best in several options are tried, drawn at
    random, the same ones each time.

    Args:
        ladders: For each option the values that it may have, rising; options are tried in this order.
        start: A value of each ladder.
        budget: Number of settings, at least 1.

    Yields:
        A setting that was not tried before; send its loss.

    Returns:
        All settings in the order in which they were tried.

    Raises:
        ValueError: If a start is not on its ladder, a ladder does not rise, or there are fewer settings than `budget`.
    """
    places = _places(ladders, start, budget)
    losses: dict[tuple[int, ...], float] = {}

    def named(rungs: tuple[int, ...]) -> dict[str, float]:
        return {name: values[rung] for (name, values), rung in zip(ladders.items(), rungs, strict=True)}

    def inside(rungs: tuple[int, ...]) -> bool:
        return all(0 <= rung < len(values) for rung, values in zip(rungs, ladders.values(), strict=True))

    def ask(rungs: tuple[int, ...]) -> Generator[dict[str, float], float, bool]:
        """Whether there was room to try it, if it was not tried before."""
        if rungs not in losses:
            if len(losses) == budget:
                return False
            loss = yield named(rungs)
            losses[rungs] = loss if math.isfinite(loss) else math.inf
        return True

    best = places
    room = yield from ask(best)
    strides = itertools.chain(STRIDES, itertools.repeat(STRIDES[-1]))
    generator, reach, longest = random.Random(0), 1, max(map(len, ladders.values()))
    while room and len(losses) < budget:
        stride, before = next(strides), len(losses)
        for place in range(len(best)):
            for step in (stride, -stride):
                moved = False
                while inside(other := (*best[:place], best[place] + step, *best[place + 1 :])):
                    room = yield from ask(other)
                    if not room or losses[other] >= losses[best]:
                        break
                    best, moved = other, True
                if moved:
                    break
        if len(losses) == before and stride == STRIDES[-1]:
            beside = [rung + generator.choice(range(-reach, reach + 1)) for rung in best]
            if inside(other := tuple(beside)):
                room = yield from ask(other)
                best = min(losses, key=losses.__getitem__)
            # All that is near may have been tried; from the longest ladder on, every setting is within reach.
            reach = 1 if len(losses) > before else min(reach + 1, longest)
    return [Tried(named(rungs), loss) for rungs, loss in losses.items()]


def best_of(tried: Sequence[Tried]) -> Tried:
    """The setting with the lowest loss; the first on a tie."""
    return min(tried, key=lambda one: one.loss)


def at_edge(tried: Sequence[Tried]) -> tuple[str, ...]:
    """Options of which the best setting has the lowest or the highest value that was tried."""
    best = best_of(tried).options
    values = {name: {one.options[name] for one in tried} for name in best}
    return tuple(name for name, own in values.items() if best[name] in (min(own), max(own)))


def _places(ladders: Mapping[str, tuple[float, ...]], start: Mapping[str, float], budget: int) -> tuple[int, ...]:
    for name, values in ladders.items():
        if list(values) != sorted(set(values)):
            raise ValueError(f"The ladder of {name!r} must rise, got {values}.")
        if start.get(name) not in values:
            raise ValueError(f"The start of {name!r} must be one of {values}, got {start.get(name)}.")
    most = math.prod(map(len, ladders.values()))
    if not 1 <= budget <= most:
        raise ValueError(f"budget must be between 1 and the {most} settings that there are, got {budget}.")
    return tuple(values.index(start[name]) for name, values in ladders.items())
