"""What a reader must know before believing the numbers of a study: what all kinds of study have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from steepest.lab.report import wording
from steepest.lab.report.wording import plain
from steepest.lab.runs.comparable import SetAside
from steepest.lab.runs.records import Run
from steepest.lab.runs.version import code_version

Level = Literal["stop", "warning", "note"]
GO_ON = "Repeat the study's command to go on; finished runs are kept."
SHOWN = 12  # lines of one notice, where there may be very many
_ORDER: tuple[Level, ...] = ("stop", "warning", "note")


@dataclass(frozen=True)
class Notice:
    """A box on the page. A "stop" takes a conclusion away, a "warning" weakens one, a "note" informs."""

    level: Level
    title: str
    lines: tuple[str, ...]


def notice(level: Level, title: str, lines: Sequence[str], *remedies: str) -> Notice | None:
    """A notice about what `lines` say, then what to do; None if they say nothing."""
    return Notice(level, title, (*lines, *remedies)) if lines else None


def ordered(found: Iterable[Notice | None]) -> tuple[Notice, ...]:
    """Those that there are, the most serious first."""
    return tuple(sorted((one for one in found if one is not None), key=lambda one: _ORDER.index(one.level)))


def cut(lines: Sequence[str], *, noun: str = "") -> tuple[str, ...]:
    """The first lines, and how many more there are."""
    rest = len(lines) - SHOWN
    more = wording.counted(rest, f"more {noun}") if noun else f"{rest} more"
    return (*lines[:SHOWN], *((f"and {more}",) if rest > 0 else ()))


def progress(run: Run) -> str:
    """How far a run is that has not ended; empty if it has not made a step."""
    done = max((row.step for row in (*run.train, *run.evals)), default=0)
    return f"at step {done:,} of {run.config.steps:,}" if done else ""


def set_aside(aside: Sequence[SetAside], called: Callable[[Run], str]) -> Notice | None:
    """Runs that count nowhere, and why.

    Args:
        aside: What was left out.
        called: What a reader of the study calls a run.
    """
    lines = [
        f"{called(one.run)}: "
        + wording.listed([f"{key} {plain(own)} instead of {plain(other)}" for key, own, other in one.differences])
        for one in aside
    ]
    remedy = "They count nowhere below. To compare them, repeat the study's command: it trains what does not match."
    return notice("stop", "Runs made under other conditions are left out", lines, remedy)


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
