"""What the numbers mean, in plain sentences, and what to know before believing them; b* is never called B_crit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from steepest.anatomy import route
from steepest.batch_size.curve import Answer, recommendation, size_text
from steepest.lab.report import wording
from steepest.lab.report.notices import GO_ON, Notice, cut, machines, notice, older, ordered, set_aside
from steepest.lab.report.page import Fact
from steepest.lab.report.wording import plain
from steepest.lab.report.wording import shortened as short
from steepest.lab.runs.records import Run
from steepest.lab.studies.batch.results import Arrival, BatchReport, TargetResult
from steepest.lab.tasks import make_task

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


@dataclass(frozen=True)
class ModelFacts:
    """What a look at the model found.

    Args:
        normalised: Names of its batch normalisations.
        others: Part of its parameters that are in no matrix, and so under Adam with a Muon.
        problem: Why it could not be built; None if it could.
    """

    normalised: tuple[str, ...]
    others: float
    problem: str | None = None


def look(task: str, preset: str) -> ModelFacts:
    """Build the model of a task once.

    Args:
        task: As `study.json` says, which may be anything.
        preset: Likewise.
    """
    try:
        model = make_task(task, preset).build_model(0)
    except (ValueError, OSError) as problem:  # unknown names, or data that are elsewhere
        return ModelFacts((), 0.0, str(problem))
    plan = route(model)
    sizes = {row.name: row.parameter.numel() for row in plan if row.trainable}
    others = sum(sizes[row.name] for row in plan if row.trainable and row.role != "matrix")
    kinds = (nn.modules.batchnorm._BatchNorm,)
    names = tuple(name for name, module in model.named_modules() if isinstance(module, kinds))
    return ModelFacts(names, others / sum(sizes.values()))


_MOMENTA = ("momentum", "beta1")


def notices(report: BatchReport, model: ModelFacts) -> tuple[Notice, ...]:
    """All notices, the most serious first."""
    runs = [run for arm in report.arms for run in arm.runs]
    arms = {run.name: one.name for one, run in report.records.found.items()}
    return ordered(
        (
            set_aside(report.set_aside, partial(_who, arms)),
            _missing(report),
            _from_the_start(report),
            _stopped(report),
            _diverged(runs, arms),
            _edge(report),
            _normalised(model),
            _doubts(report),
            _coarse(report),
            _shrinking(runs, arms),
            _few(report),
            _managed(report, model),
            _horizon(report, runs),
            older(runs),
            machines(runs, advice="do not compare their times"),
        )
    )


def _missing(report: BatchReport) -> Notice | None:
    records = report.records
    broken = [
        f"{plain(one.name)}, b = {one.batch_size}, lr {wording.rate(one.lr)}, seed {one.seed}: {plain(problem)}"
        for one, problem in records.absent.items()
        if problem is not None
    ]
    waiting = [one for one, problem in records.absent.items() if problem is None]
    waiting += [one for one, run in records.found.items() if run.result is None]
    idle = Counter((one.name, one.batch_size) for one in waiting)
    lines = [f"{plain(arm)}, b = {size}: {wording.counted(n, 'run')} not ended" for (arm, size), n in idle.items()]
    tuning = wording.counted(len(searching := untuned(report)), "learning rate")
    search = [f"{tuning} still to be found, after which more runs follow"] * bool(searching)
    title = f"{len(broken) + len(waiting)} of {wording.counted(len(records.asked), 'listed run')} missing"
    return notice("warning", title, (*search, *cut([*broken, *lines])), GO_ON)


def _from_the_start(report: BatchReport) -> Notice | None:
    lines = [
        f"{short(one.name)}, target {one.target:g}: {wording.counted(len(hit), 'run')}"
        for one in report.results
        if (hit := [arrival for arrival in one.arrivals if arrival.crossing.status == "at the start"])
    ]
    remedy = "These runs say nothing of K(b) and are left out. Choose lower targets."
    return notice("warning", "Below a target at the first evaluation", cut(lines), remedy)


def _coarse(report: BatchReport) -> Notice | None:
    lines: list[str] = []
    for one in report.results:
        coarse = [arrival for arrival in one.arrivals if arrival.reached and arrival.crossing.coarse]
        if coarse:
            worst = max(coarse, key=lambda arrival: arrival.crossing.resolution)
            size = f"b = {worst.batch_size}, {100 * worst.crossing.resolution:.0f}% of K = {worst.crossing.steps:.0f}"
            counted = f"{len(coarse)} of {wording.counted(len(one.arrivals), 'run')}"
            lines.append(f"{short(one.name)}, target {one.target:g}: {counted}, at worst {size}")
    remedy = "K is read off a straight line between the evaluations there. Few steps cannot be told more finely."
    title = "Evaluations more than 2% of K apart"
    return notice("note", title, cut(lines), remedy)


def _stopped(report: BatchReport) -> Notice | None:
    lines = [line for one in report.results for line in _stops(one)]
    remedy = (
        "Below the batch sizes that arrived, the noise of a small batch at a constant rate may keep the loss above the "
        "target for ever: physics, unless K of the fit is beyond the steps that were given. "
        "Above them, the budget ended runs too soon: raise --most-steps and --most-samples."
    )
    return notice("warning", "Runs that did not reach a target", cut(lines), remedy)


def _stops(result: TargetResult) -> Iterator[str]:
    stopped = [one for one in result.arrivals if one.crossing.status in ("stopped", "diverged")]
    for size in sorted({one.batch_size for one in stopped}):
        here = [one for one in stopped if one.batch_size == size]
        kind = (
            "none arrived at any batch size"
            if not result.reached
            else "below those that arrived, noise floor"
            if size < result.reached[0]
            else "above those that arrived, budget"
            if size > result.reached[-1]
            else "between those that arrived"
        )
        seeds = f"{len(here)} of {wording.counted(len(result.at(size)), 'seed')}"
        yield f"{short(result.name)}, target {result.target:g}, b = {size}: {seeds}; {kind}{_expected(result, here)}"


def _expected(result: TargetResult, here: Sequence[Arrival]) -> str:
    steps = f"; stopped after {max(one.crossing.steps for one in here):,.0f} steps"
    if result.estimate is None:
        return steps
    fitted = result.estimate.chosen.steps(here[0].batch_size)
    return f"{steps}, the fit says {f'{fitted:,.0f}' if fitted < 1e9 else 'never'}"


def _diverged(runs: Sequence[Run], arms: Mapping[str, str]) -> Notice | None:
    lines = [
        f"{_who(arms, run)}: after step {run.result.steps}" for run in runs if run.result and run.status == "diverged"
    ]
    remedy = "They count as stopped there, although their learning rate was the best for the seeds that tuned it."
    return notice("warning", "Diverged", cut(lines), remedy)


def _edge(report: BatchReport) -> Notice | None:
    lines = [
        f"{short(arm.name)}, b = {rate.batch_size}: lr {wording.rate(rate.lr)}, the "
        f"{'highest' if rate.lr == rate.tried[-1] else 'lowest'} of {len(rate.tried)}"
        for arm in report.arms
        for rate in arm.rates
        if rate.at_edge
    ]
    remedy = "A better one may lie beyond, so K may be too large there."
    return notice("warning", "Learning rate at the edge of those tried", cut(lines), remedy)


def _normalised(model: ModelFacts) -> Notice | None:
    if model.problem is not None:
        line = f"Whether the model has batch normalisation was not checked: {plain(model.problem)}"
        return Notice("note", "Model not looked at", (line,))
    if not model.normalised:
        return None
    line = (
        f"The model has {wording.counted(len(model.normalised), 'batch normalisation')}: what it computes depends on "
        "the batch size itself, and K(b) with it. Critical batch sizes then are not those of gradient noise alone."
    )
    return Notice("warning", "Batch normalisation", (line,))


def _doubts(report: BatchReport) -> Notice | None:
    lines = [
        f"{short(one.name)}, target {one.target:g}: {text}"
        for one in report.results
        if one.estimate is not None
        for text in one.estimate.warnings
        if not text.endswith("enter the likelihood as such.")  # told elsewhere
    ]
    return notice("note", "About the fits", cut(lines))


def _shrinking(runs: Sequence[Run], arms: Mapping[str, str]) -> Notice | None:
    found: dict[str, float] = {}
    for run in runs:
        lr, decay = (float(run.config.options.get(name, 0.0)) for name in ("lr", "weight_decay"))
        if lr * decay > 1:
            where = f"{_arm(arms, run)}, b = {run.config.batch_size}"
            found[where] = max(lr * decay, found.get(where, 0.0))
    lines = [f"{where}: lr \N{MULTIPLICATION SIGN} weight_decay = {value:.3g}" for where, value in found.items()]
    remedy = "Above 1 a step turns weights around, and no bound on their size holds."
    return notice("warning", "Decay of more than the whole weight", cut(lines), remedy)


def _few(report: BatchReport) -> Notice | None:
    if len(report.study.seeds) >= 3:
        return None
    seeds = wording.counted(len(report.study.seeds), "seed")
    line = f"{seeds[:1].upper()}{seeds[1:]} at each batch size: intervals rest on the scatter around the curve. Run 3."
    return Notice("note", "Few seeds", (line,))


def _managed(report: BatchReport, model: ModelFacts) -> Notice | None:
    if model.problem is not None or not any("muon" in arm.method for arm in report.study.arms) or not model.others:
        return None
    line = (
        f"{100 * model.others:.2g}% of the parameters (embeddings, norms, biases, heads) are under Adam with Muon; "
        "critical batch sizes are those of both together, with one ratio between their learning rates."
    )
    return Notice("note", "Parameters managed by Adam", (line,))


def _horizon(report: BatchReport, runs: Sequence[Run]) -> Notice | None:
    kept = {
        (name, value)
        for run in runs
        for name in _MOMENTA
        if isinstance(value := run.config.options.get(name), float) and 0 < value < 1
    }
    batches = report.study.batches
    lines = [
        f"{name} {value:g}: an average over about {1 / (1 - value):,.0f} steps, which are "
        f"{batches[0] / (1 - value):,.0f} {report.unit} at b = {batches[0]} and {batches[-1] / (1 - value):,.0f} at "
        f"b = {batches[-1]}"
        for name, value in sorted(kept)
    ]
    held = "It was held at all batch sizes in steps, not in samples: part of what K(b) shows is due to that."
    return notice("note", "Momentum is counted in steps", lines, held)


def _arm(arms: Mapping[str, str], run: Run) -> str:
    return short(arms[run.name]) if run.name in arms else plain(run.config.method)


def _who(arms: Mapping[str, str], run: Run) -> str:
    config = run.config
    rate = wording.rate(float(config.options.get("lr", 0.0)))
    return f"{_arm(arms, run)}, b = {config.batch_size}, lr {rate}, seed {config.seed}"
