"""What the numbers of a batch-size study mean, in plain sentences; b* and the knee B_crit are never mixed up."""

from __future__ import annotations

from steepest.batch_size.curve import Answer, recommendation, size_text
from steepest.lab.report import wording
from steepest.lab.report.page import Fact
from steepest.lab.report.wording import plain
from steepest.lab.report.wording import shortened as short
from steepest.lab.studies.batch.results import BatchReport, TargetResult

BEST, KNEE = "SFO-minimising b*", "knee B_crit"


def headline(report: BatchReport) -> str:
    """b* of the leading arm at the hardest target, or the knee where it has none, or why it has neither."""
    if not any(one.arrivals for one in report.results):
        return "No run with a tuned learning rate has ended yet"
    own = report.leading.targets[-1]
    at = f"{short(own.name)}, loss {own.target:g}"
    if own.estimate is None:
        return f"{at}: no critical batch size. {plain(own.refusal)}"
    so_far = "So far: " if waiting(report) else ""
    best, knee = own.estimate.b_star, own.estimate.knee
    name, answer = (KNEE, knee) if best.kind == "refused" and knee.kind != "refused" else (BEST, best)
    if answer.kind == "refused":
        return f"{so_far}{at}: {name} not known, {answer.reason}"
    return f"{so_far}{at}: {name} {_reach(answer, report.unit, own.estimate.level)}"


def waiting(report: BatchReport) -> int:
    """Listed runs that have not ended, and arms at batch sizes whose learning rate is still being searched."""
    return report.records.waiting + len(untuned(report))


def untuned(report: BatchReport) -> tuple[tuple[str, int], ...]:
    """Arms and batch sizes without a learning rate yet."""
    found = {(arm.name, rate.batch_size) for arm in report.arms for rate in arm.rates}
    return tuple((name, b) for name in report.study.methods for b in report.study.batches if (name, b) not in found)


def facts(report: BatchReport) -> tuple[Fact, ...]:
    """The three batch sizes of the leading arm at the hardest target, each with what it is."""
    found = report.leading.targets[-1].estimate
    if found is None:
        return ()
    level = f"{100 * found.level:g}% interval"
    share = f"{100 * found.overhead_share:g}%"
    told = (
        (found.b_star, f"{BEST}: the batch size that takes the fewest {report.unit} in all"),
        (found.overhead, f"batch size that takes {share} more {report.unit} than the fewest"),
        (found.knee, f"{KNEE} of the hyperbola: beyond it larger batches save few steps"),
    )
    shown: list[Fact] = []
    for answer, meaning in told:
        if answer.kind != "refused":
            around = f"{level} {interval(answer)}" if answer.kind == "point" else ""
            shown.append(Fact(number(answer), "; ".join(filter(None, (meaning, around, answer.reason)))))
    return tuple(shown)


def number(answer: Answer) -> str:
    """An answer without its interval: "130", "≤ 64", "32 to 128"."""
    low, high = (wording.DASH if end is None else size_text(end) for end in (answer.low, answer.high))
    forms = {
        "point": size_text(answer.value or 0),
        "at most": f"\N{LESS-THAN OR EQUAL TO} {high}",
        "at least": f"{wording.GREATER} {low}",
        "between": f"{low} to {high}",
        "refused": "not known",
    }
    return forms[answer.kind]


def statements(report: BatchReport) -> tuple[str, ...]:
    """What to say of each arm at the hardest target, in full; arms of which no run has ended are told together."""
    told = [one for one in report.at(report.targets[-1]) if one.arrivals]
    idle = [plain(one.name) for one in report.at(report.targets[-1]) if not one.arrivals]
    rest = (f"No run that counts has ended yet: {wording.listed(idle)}.",) if idle else ()
    return (*(statement(one, report.unit) for one in told), *rest)


def statement(result: TargetResult, unit: str) -> str:
    """The recommendation, or the refusal and why."""
    setting = f"{plain(result.name)}, target loss {result.target:g}"
    if result.estimate is None:
        return f"Refused ({setting}): {plain(result.refusal)}"
    return recommendation(result.estimate, setting=f"{setting}, lr tuned at each batch size", unit=unit)


def summary(report: BatchReport) -> str:
    """Task, sizes, seeds, units and data in one paragraph."""
    study, unit = report.study, report.unit
    opening = f"{wording.listed([plain(name) for name in study.methods])} on the task {plain(study.task)}"
    sizes = ", ".join(f"{size:,}" for size in study.batches)
    aims = ", ".join(f"{target:g}" for target in report.targets)
    asked = f"{opening}, preset {plain(study.preset)}: batch sizes {sizes} in {unit}, targets {aims}"
    asked = f"{asked}, {wording.seeds(study.seeds)}"
    one = next((run for run in report.records.runs if run.train), None)
    if one is None:
        return f"{asked}. No run has been started."
    each = one.train[0].tokens / one.train[0].step / one.config.batch_size
    tokens = f" One counts {each:,.0f} tokens: multiply for batch sizes in tokens." if each > 1 else ""
    return (
        f"{asked}.{tokens} Learning rates are constant, and runs end at the lowest target. "
        f"{wording.data(one.config.data)}"
    )


def methodology(report: BatchReport) -> tuple[str, ...]:
    """How the numbers were computed, a sentence or two each."""
    return (
        "K(b): steps until the running median of five evaluations of the validation loss first comes down to the "
        "target, on a straight line in log loss between evaluations. Runs stopped before enter the likelihood as "
        "such; unfinished ones count nowhere.",
        f"{BEST}: the batch size with the least b K(b), by the family of curves with the lowest AICc. It is given as "
        "a number only if the measured b K(b) is least inside the grid, with two batch sizes on each side; else as "
        f"a range. {KNEE}: of the hyperbola K_min (1 + B_crit / b), whichever family was chosen (McCandlish et al., "
        "2018, arXiv:1812.06162); on it b K(b) only grows. The two are different numbers.",
        "Intervals: bootstrap over runs; that of b* also over the families, by Akaike's weights.",
        "Learning rates: tuned anew at each batch size for the lowest target, on seeds that are not reported, among "
        "powers of two times the arm's own, until both neighbours of the best are worse. For higher targets another "
        "rate may be better, so K of these may be too large.",
    )


def _reach(answer: Answer, unit: str, level: float) -> str:
    if answer.kind == "point":
        return f"= {number(answer)} {unit}, {100 * level:g}% interval {interval(answer)}"
    edge = ", no minimum inside what was measured" if answer.kind in ("at most", "at least") else ""
    return f"{number(answer)} {unit}{edge}"


def interval(answer: Answer) -> str:
    """Its ends: "[95, 180]", "[open, 180]"."""
    ends = ["open" if end is None else size_text(end) for end in (answer.low, answer.high)]
    return f"[{', '.join(ends)}]"
