"""An estimate as a sentence: which batch size is meant, how uncertain it is, and what was measured."""

from steepest.batch_size.curve_answers import Answer
from steepest.batch_size.curve_estimate import Estimate


def recommendation(estimate: Estimate, *, setting: str = "", unit: str = "") -> str:
    """What to say of the runs in one sentence.

    Args:
        estimate: Of the runs.
        setting: What was held or tuned: "Muon, target loss 0.2, lr tuned at each batch size".
        unit: What a batch size counts: "images", "sequences".

    Returns:
        b*, the batch size at the overhead, the knee, and where they are from; never one of them without its name.
    """
    share = f"{100 * estimate.overhead_share:g}%-overhead batch"
    parts = [
        _clause("SFO-minimising b*", estimate.b_star, unit),
        _clause(share, estimate.overhead, unit),
        _clause("knee B_crit", estimate.knee, unit),
    ]
    seeds = f"{len(estimate.seeds)} seed{'s' if len(estimate.seeds) != 1 else ''}"
    sizes = f"{len(estimate.batch_sizes)} batch sizes {estimate.batch_sizes[0]} to {estimate.batch_sizes[-1]}"
    chosen = estimate.chosen.family
    origin = f"K(b) {chosen.name}, knee hyperbola, {100 * estimate.level:g}% intervals, {seeds}, {sizes}"
    return f"{', '.join(parts)} ({origin}{', ' + setting if setting else ''})."


def _clause(name: str, answer: Answer, unit: str) -> str:
    counted = f" {unit}" if unit and answer.kind != "refused" else ""
    reason = f" ({answer.reason})" if answer.reason else ""
    return f"{name} {answer}{counted}{reason}"
