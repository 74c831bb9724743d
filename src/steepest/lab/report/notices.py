"""What a reader must know before believing the numbers: unequal tuning, missing, diverged and foreign runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from steepest.lab.methods.tuned import Tuning
from steepest.lab.report import wording
from steepest.lab.report.comparable import SetAside
from steepest.lab.report.wording import plain
from steepest.lab.runs.version import code_version
from steepest.lab.studies.race.results import Race
from steepest.lab.studies.records import HUGE, Run

EVEN = 1.15  # ratio of the slowest to the fastest above which times are not compared


@dataclass(frozen=True)
class Notice:
    """A box on the page. A "stop" takes a conclusion away, a "warning" weakens one, a "note" informs."""

    level: Literal["stop", "warning", "note"]
    title: str
    lines: tuple[str, ...]


def notices(race: Race) -> tuple[Notice, ...]:
    """All notices, the most serious first."""
    found = (
        _refused(race),
        set_aside(race.chosen.set_aside),
        _diverged(race),
        _missing(race),
        _edge(race),
        _few_seeds(race),
        _uncounted(race),
        _uneven_times(race),
        older([run for method in race.methods for run in method.runs]),
        machines([run for method in race.methods for run in method.runs]),
    )
    return tuple(notice for notice in found if notice is not None)


def who(run: Run) -> str:
    """A run as a reader of a race calls it."""
    return f"{plain(run.config.method)}, seed {run.config.seed}"


def set_aside(aside: Sequence[SetAside], *, called: Callable[[Run], str] = who) -> Notice | None:
    """Runs that count nowhere, and why."""
    if not aside:
        return None
    lines = [
        f"{called(one.run)}: "
        + wording.listed([f"{key} {plain(own)} instead of {plain(other)}" for key, own, other in one.differences])
        for one in aside
    ]
    remedy = "They count nowhere below. To compare them, repeat the study's command: it trains what does not match."
    return Notice("stop", "Runs made under other conditions are left out", (*lines, remedy))


def machines(runs: Sequence[Run], *, advice: str = "read times and memory with care") -> Notice | None:
    """Whether the runs come from different machines or libraries, as far as they have begun to say."""
    runs = [run for run in runs if run.environment]
    keys = sorted({key for run in runs for key in run.environment})
    differing = [plain(key) for key in keys if len({repr(run.environment.get(key)) for run in runs}) > 1]
    if not differing:
        return None
    line = f"The runs differ in {wording.listed(differing)}: {advice}."
    return Notice("note", "More than one environment", (line,))


def older(runs: Sequence[Run]) -> Notice | None:
    """Whether the runs are of another version of the training code than this one."""
    versions = sorted({plain(run.config.code) for run in runs} - {code_version()})
    if not versions:
        return None
    line = (
        f"Trained by the version {wording.listed(versions)} of the training code, this is {code_version()}: the same "
        "options may end elsewhere today. Versions before training 2 chose options by the examples they reported on."
    )
    return Notice("note", "Results of another version", (line, "Repeat the study's command to train them anew."))


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
    if not runs:
        return None
    lines = [
        f"{who(run)}: the loss was not finite, or above {HUGE:g}, after step {run.result.steps}"
        for run in runs
        if run.result
    ]
    return Notice("warning", "Diverged", (*lines, "Such a method has no mean; a smaller learning rate may help."))


def _missing(race: Race) -> Notice | None:
    lines = [
        f"{plain(absent.method)}, seed {absent.seed}: {plain(absent.problem or 'not started')}"
        for absent in race.study.absent
    ]
    for run in race.study.runs:
        if run.status == "unfinished":
            done = max((row.step for row in (*run.train, *run.evals)), default=0)
            lines.append(f"{who(run)}: {f'at step {done:,} of {run.config.steps:,}' if done else 'not started'}")
    if not lines:
        return None
    asked = len(race.study.methods) * len(race.study.seeds)
    title = f"{len(lines)} of {wording.counted(asked, 'run')} missing"
    remedy = "Repeat the study's command to go on; finished runs are kept. Read the verdict when all have ended."
    return Notice("warning", title, (*lines, remedy))


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
