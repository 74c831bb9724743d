"""What a reader must know before believing the numbers of a race: unequal tuning, missing, diverged, foreign runs."""

from __future__ import annotations

from steepest.lab.disk.fields import HUGE
from steepest.lab.methods.tuned import Tuning
from steepest.lab.report import wording
from steepest.lab.report.notices import GO_ON, Notice, machines, notice, older, ordered, progress, set_aside
from steepest.lab.report.wording import plain
from steepest.lab.runs.records import Run
from steepest.lab.studies.race.results import Race

EVEN = 1.15  # ratio of the slowest to the fastest above which times are not compared


def notices(race: Race) -> tuple[Notice, ...]:
    """All notices, the most serious first."""
    runs = [run for method in race.methods for run in method.runs]
    return ordered(
        (
            _refused(race),
            set_aside(race.chosen.set_aside, who),
            _diverged(race),
            _missing(race),
            _edge(race),
            _few_seeds(race),
            _uncounted(race),
            _uneven_times(race),
            older(runs),
            machines(runs),
        )
    )


def who(run: Run) -> str:
    """A run as a reader of a race calls it."""
    return f"{plain(run.config.method)}, seed {run.config.seed}"


def tuned(tuning: Tuning | None) -> str:
    """How a method was tuned, in words."""
    if tuning is None or tuning.trials is None:
        return "an unknown number of tried settings"
    return wording.counted(tuning.trials, "tried setting")


def _refused(race: Race) -> Notice | None:
    if race.chosen.refusal is None:
        return None
    budgets = [f"{plain(name)} was tuned with {tuned(tuning)}" for name, tuning in race.chosen.tuning.items()]
    title = "Not ranked: unequal tuning" if race.chosen.refusal == "unequal" else "Not ranked: tuning unknown"
    remedy = "Whoever searches longer finds more. Tune all of them over the same number of settings, then race again."
    return Notice("stop", title, (f"{wording.listed(budgets)}.", remedy))


def _diverged(race: Race) -> Notice | None:
    runs = [run for method in race.methods for run in method.runs if run.status == "diverged"]
    lines = [
        f"{who(run)}: the loss was not finite, or above {HUGE:g}, after step {run.result.steps}"
        for run in runs
        if run.result
    ]
    return notice("warning", "Diverged", lines, "Such a method has no mean; a smaller learning rate may help.")


def _missing(race: Race) -> Notice | None:
    lines = [
        f"{plain(one.method)}, seed {one.seed}: {plain(problem or 'not started')}"
        for one, problem in race.records.absent.items()
    ]
    unfinished = [run for run in race.records.runs if run.status == "unfinished"]
    lines += [f"{who(run)}: {progress(run) or 'not started'}" for run in unfinished]
    title = f"{len(lines)} of {wording.counted(len(race.records.asked), 'run')} missing"
    return notice("warning", title, lines, f"{GO_ON} Read the verdict when all have ended.")


def _edge(race: Race) -> Notice | None:
    names = [plain(name) for name, tuning in race.chosen.tuning.items() if tuning is not None and tuning.edge]
    if not names:
        return None
    line = (
        f"The best setting of {wording.listed(names)} lay at the edge of what was tried: a better one may lie beyond."
    )
    return Notice("warning", "Tuned at the edge of the grid", (line, "Widen the grid and sweep again."))


def _few_seeds(race: Race) -> Notice | None:
    if len(race.study.seeds) > 1:
        return None
    line = "The spread between seeds is unknown: no intervals and no verdicts. Run at least 3."
    return Notice("warning", "One seed", (line,))


def _uncounted(race: Race) -> Notice | None:
    if not race.uncounted:
        return None
    lines = (
        "These runs did not record how far a loss may be off for the examples that it is a mean over.",
        "The p-values count the seeds only, so no winner is named, whatever the number of seeds. Repeat the study's "
        "command to train them anew.",
    )
    return Notice("warning", "Not all sources of error are counted", lines)


def _uneven_times(race: Race) -> Notice | None:
    """Forward and backward pass are the same work for every method, so their times say how even the machine was."""
    times = {plain(one.name): one.forward_backward_ms for one in race.methods if one.forward_backward_ms is not None}
    if not times or max(times.values()) <= EVEN * min(times.values()):
        return None
    slow, fast = max(times, key=times.__getitem__), min(times, key=times.__getitem__)
    line = (
        f"Forward and backward pass took {wording.milliseconds(times[slow])} with {slow} and "
        f"{wording.milliseconds(times[fast])} with {fast}, though they are the same work for every method: "
        "the machine was shared or uneven."
    )
    return Notice("warning", "Do not compare times", (line, "Losses and steps are not affected."))
