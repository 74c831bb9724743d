"""What a reader must know before believing the numbers of a learning-rate sweep."""

from __future__ import annotations

from collections import Counter

from steepest.lab.report import wording
from steepest.lab.report.notices import GO_ON, Notice, cut, machines, notice, older, ordered, progress, set_aside
from steepest.lab.report.wording import plain
from steepest.lab.runs.records import Run
from steepest.lab.studies.sweep.plan import rate
from steepest.lab.studies.sweep.results import MethodSweep, Sweep


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
