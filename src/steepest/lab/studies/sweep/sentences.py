"""What the numbers of a learning-rate sweep mean, in plain sentences, and what to know before believing them."""

from __future__ import annotations

from collections import Counter

from steepest.lab.report import wording
from steepest.lab.report.notices import GO_ON, Notice, cut, machines, notice, older, ordered, progress, set_aside
from steepest.lab.report.page import Fact
from steepest.lab.report.wording import plain
from steepest.lab.report.wording import shortened as short
from steepest.lab.runs.records import Run
from steepest.lab.studies.sweep.basin import Basin
from steepest.lab.studies.sweep.plan import rate
from steepest.lab.studies.sweep.results import WIDE, MethodSweep, Sweep

_FEW = 3  # methods that a headline lists by name


def headline(sweep: Sweep) -> str:
    """Which basin is the widest, in one line; or that this cannot be said."""
    if not any(method.ended for method in sweep.methods):
        return "No run has ended yet"
    if sweep.best is None:
        return "Every learning rate diverged"
    if not sweep.measurable:
        return "No basin to measure: some losses are not above 0"
    so_far = "So far: " if sweep.records.waiting else ""
    if len(sweep.methods) == 1:
        [method] = sweep.methods
        return f"{so_far}{short(method.name)}: {_decades(method)} of learning rate within 5% of its best loss"
    if sweep.pending:
        return f"Not ranked yet: {sweep.records.waiting} of {wording.counted(len(sweep.records.asked), 'run')} missing"
    if not sweep.ranked:
        return "Not ranked: the methods were not tried alike"
    if any(method.unchanged and not method.name.endswith("-momo") for method in sweep.methods):
        return "Not ranked: a learning rate changed nothing"
    widest = leader(sweep)
    if not _width(widest):
        return f"{so_far}No basin is wider than a single learning rate"
    if len(sweep.study.seeds) == 1:
        return f"{so_far}With one seed, {short(widest.name)} has the widest basin: {_decades(widest)}"
    behind = rivals(sweep)
    if behind:
        names = [f"{short(method.name)} ({width(method.of_all[WIDE])})" for method in (widest, *behind)]
        listed = wording.listed(names) if len(names) <= _FEW else f"{names[0]} and {len(behind)} others"
        return f"{so_far or 'Undecided which basin is the widest: '}{listed}{', undecided' if so_far else ''}"
    return f"{so_far}{short(widest.name)} has the widest basin: {_decades(widest)}{_against_baseline(sweep, widest)}"


def leader(sweep: Sweep) -> MethodSweep:
    """The method of the widest basin within 5% of the best of all; there must be one."""
    return max((method for method in sweep.methods if method.of_all), key=_width)


def rivals(sweep: Sweep) -> tuple[MethodSweep, ...]:
    """Methods whose basin may be as wide as the widest: wider with some seed, or reaching the end of the grid."""
    widest = leader(sweep)
    others = [method for method in sweep.methods if method is not widest and method.of_all]
    return tuple(method for method in others if method.of_all[WIDE].open_ended or not _narrower(method, widest))


def facts(sweep: Sweep) -> tuple[Fact, ...]:
    """The widest basin, the lowest loss, and what one random try is worth; empty if no basin is clearly the widest."""
    tops = [(method, method.best) for method in sweep.methods if method.best is not None]
    several = len(sweep.methods) > 1 and len(sweep.study.seeds) > 1
    if not (sweep.ranked and several and sweep.measurable and tops) or rivals(sweep) or not _width(leader(sweep)):
        return ()
    widest = leader(sweep)
    lowest, top = min(tops, key=lambda pair: pair[1].loss.mean)
    found = [
        Fact(
            width(widest.of_all[WIDE]),
            f"decades of learning rate within 5% of the best, {plain(widest.name)}{_against_baseline(sweep, widest)}",
        ),
        Fact(
            wording.loss(top.loss.mean),
            f"lowest final loss, {plain(lowest.name)} at lr {wording.rate(top.lr)}",
        ),
    ]
    if sweep.untrained is not None:
        surest = min((method for method in sweep.methods if method.expected), key=lambda method: method.expected[0])
        meaning = f"expected after one random learning rate of the grid, {plain(surest.name)}"
        found.append(Fact(wording.loss(surest.expected[0]), meaning))
    return tuple(found)


def summary(sweep: Sweep) -> str:
    """Task, sizes, seeds and data in one paragraph."""
    study = sweep.study
    opening = f"{wording.listed([plain(name) for name in study.methods])} on the task {plain(study.task)}"
    numbers = {len(lrs) for lrs in study.lrs.values()}
    rates = f"{min(numbers)} to {max(numbers)} learning rates" if len(numbers) > 1 else _rates(*numbers)
    asked = f"{opening}, preset {plain(study.preset)}: {rates} each, {wording.seeds(study.seeds)}"
    run = next((method.runs[0] for method in sweep.methods if method.runs), None)
    if run is None:
        return f"{asked}. No run has been started."
    return (
        f"{asked}, {wording.counted(run.config.steps, 'step')}. "
        "Runs with the same seed start from the same weights and see the data in the same order. "
        f"{wording.data(run.config.data)} "
        "Lower loss is better; it is measured on held-out data after the last step."
    )


def methodology(sweep: Sweep) -> tuple[str, ...]:
    """How the numbers were computed, a sentence or two each."""
    basins = (
        "Basin: the decades of learning rate whose mean final loss is at most 1, 2 or 5% above the best mean of all "
        "methods, or of the method itself. Between neighbouring learning rates the mean is taken to run on a straight "
        "line in log10(lr); no line leads to or from a learning rate at which a run diverged or none has ended. "
        f"{wording.GREATER}: the basin reaches the lowest or highest rate tried, or one beside which runs are missing."
    )
    ranking = (
        "A basin counts as the widest if it is so with every seed taken for itself, too, and no other one reaches the "
        "end of its grid. With few seeds that may still be chance."
    )
    trials = (
        "Expected best: exact, over all sets of so many learning rates of the grid, drawn without replacement (with "
        "replacement: Dodge et al., 2019, arXiv:1909.03004). A learning rate that diverged with any seed, or ended "
        "above the untrained model, counts as the untrained model"
    )
    untrained = f" ({wording.loss(sweep.untrained)})." if sweep.untrained is not None else "."
    spread = "\N{PLUS-MINUS SIGN} is the standard deviation over seeds."
    return (basins, *((ranking,) if sweep.ranked and len(sweep.methods) > 1 else ()), trials + untrained, spread)


def _width(method: MethodSweep) -> float:
    return method.of_all[WIDE].width


def width(basin: Basin) -> str:
    """In decades, such as "1.62"; "≥ 1.62" where the basin goes on beyond what was tried."""
    return wording.decades(basin.width, more=basin.open_ended)


def _decades(method: MethodSweep) -> str:
    return f"{width(method.of_all[WIDE])} decades"


def _rates(number: int) -> str:
    return wording.counted(number, "learning rate")


def _narrower(method: MethodSweep, widest: MethodSweep) -> bool:
    shared = method.by_seed.keys() & widest.by_seed.keys()
    return all(method.by_seed[seed] < widest.by_seed[seed] for seed in shared)


def _against_baseline(sweep: Sweep, widest: MethodSweep) -> str:
    base = sweep.method(sweep.study.baseline)
    if base is widest or not base.of_all:
        return ""
    return f"; {short(base.name)} {width(base.of_all[WIDE])}"


def notices(sweep: Sweep) -> tuple[Notice, ...]:
    """All notices, the most serious first."""
    runs = [run for method in sweep.methods for run in method.runs]
    return ordered(
        (
            _unequal(sweep),
            _not_positive(sweep),
            _unchanged(sweep),
            set_aside(sweep.set_aside, _who),
            _missing(sweep),
            _edge(sweep),
            _all_diverged(sweep),
            _few(sweep),
            older(runs),
            machines(runs, advice="so may their losses"),
        )
    )


def _unequal(sweep: Sweep) -> Notice | None:
    if sweep.ranked or sweep.pending:
        return None
    tried = [
        f"{plain(method.name)}: {wording.counted(len(method.budget), 'learning rate')} of "
        f"{len(sweep.study.lrs[method.name])}, {wording.counted(method.ended, 'run')}"
        for method in sweep.methods
    ]
    remedy = "Whoever is tried more often finds more. Give every method as many learning rates, and let all runs end."
    return Notice("stop", "Not ranked: the methods were not tried alike", (f"{'; '.join(tried)}.", remedy))


def _not_positive(sweep: Sweep) -> Notice | None:
    if sweep.measurable:
        return None
    line = "Some final losses are 0 or below: 'within 5% of the best' then means nothing, and no basin is measured."
    return Notice("stop", "No basins", (line, "Sweep on a task whose loss stays above 0."))


def _unchanged(sweep: Sweep) -> Notice | None:
    lines = [
        f"{plain(method.name)}: lr {wording.listed([wording.rate(lr) for lr in group])} gave exactly the same losses"
        for method in sweep.methods
        for group in method.unchanged
    ]
    expected = "Where Momo cuts every single step, a larger learning rate takes the same steps: that is what it is for."
    remedy = "Such a learning rate was not in effect; read nothing from its basin before the cause is found."
    momo = [method.name.endswith("-momo") for method in sweep.methods if method.unchanged]
    remedies = [expected] * any(momo) + [remedy] * (not all(momo))
    return notice("warning" if all(momo) else "stop", "A learning rate that changed nothing", lines, *remedies)


def _missing(sweep: Sweep) -> Notice | None:
    lines: list[str] = []
    waiting = [one.method for one, problem in sweep.records.absent.items() if problem is None]
    for one, problem in sweep.records.absent.items():
        if problem is not None:
            lines.append(f"{plain(one.method)}, lr {wording.rate(one.lr or 0.0)}, seed {one.seed}: {plain(problem)}")
    for run in sweep.records.runs:
        if run.status == "unfinished":
            if at := progress(run):
                lines.append(f"{_who(run)}: {at}")
            else:
                waiting.append(run.config.method)
    idle = [f"{plain(name)}: {wording.counted(count, 'run')} not started" for name, count in Counter(waiting).items()]
    title = f"{len(lines) + len(waiting)} of {wording.counted(len(sweep.records.asked), 'run')} missing"
    missing = (*idle, *cut(lines, noun="run"))
    return notice("warning", title, missing, f"{GO_ON} Read the verdict when all have ended.")


def _edge(sweep: Sweep) -> Notice | None:
    lines = [
        f"{plain(method.name)} is best at lr {wording.rate(method.best.lr)}, the {_end(method)} that was tried"
        for method in sweep.methods
        if method.best is not None and method.best.at_edge and len(method.points) > 1
    ]
    remedy = "A better one may lie beyond: widen the grid there and repeat; finished runs are kept."
    return notice("warning", "Best at the edge of the grid", lines, remedy)


def _end(method: MethodSweep) -> str:
    return "lowest" if method.best is not None and method.best.lr == method.points[0].lr else "highest"


def _all_diverged(sweep: Sweep) -> Notice | None:
    names = [plain(method.name) for method in sweep.methods if method.ended and method.best is None]
    if not names:
        return None
    line = f"{wording.listed(names)} diverged at every learning rate that has ended; try lower ones."
    return Notice("warning", "Nothing but divergence", (line,))


def _few(sweep: Sweep) -> Notice | None:
    lines: list[str] = []
    if len(sweep.study.seeds) == 1:
        lines.append("One seed: how much of a difference is chance is not known. Run at least 3.")
    single = [plain(name) for name, lrs in sweep.study.lrs.items() if len(lrs) == 1]
    if single:
        lines.append(f"One learning rate: {wording.listed(single)} cannot have a basin. Try at least 5 over 2 decades.")
    return notice("warning", "Few runs", lines)


def _who(run: Run) -> str:
    return f"{plain(run.config.method)}, lr {wording.rate(rate(run))}, seed {run.config.seed}"
