"""What the numbers mean, in plain sentences, and what to know before believing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from steepest.lab.disk.fields import HUGE
from steepest.lab.methods.tuned import Tuning
from steepest.lab.report import wording
from steepest.lab.report.notices import GO_ON, Notice, machines, notice, older, ordered, progress, set_aside
from steepest.lab.report.page import Comparison, Fact
from steepest.lab.report.statistics import MOST_SEEDS, Interval, Ratio, Verdict
from steepest.lab.report.wording import FIXED, plain
from steepest.lab.report.wording import shortened as short
from steepest.lab.runs.records import Run
from steepest.lab.studies.race.results import Race, Refusal
from steepest.lab.tasks import entry

REFUSALS: Mapping[Refusal, str] = {
    "unequal": "the methods were not tuned alike",
    "unknown": "how the options were found is not recorded",
}


def headline(race: Race) -> str:
    """Who won, in one line; or that nobody did."""
    names = [short(method.name) for method in race.methods]
    if race.chosen.refusal is not None:
        return f"Not ranked: {REFUSALS[race.chosen.refusal]}"
    if len(names) == 1:
        return f"{names[0]}: one method, nothing to compare"
    if not any(method.finals for method in race.methods):
        return "No run has ended yet"
    contenders = _contenders(race)
    if len(contenders) < 2:
        return f"Only {short(contenders[0])} did not diverge" if contenders else "Every method diverged"
    won, lost = winner(race), [short(method.name) for method in race.methods if method.diverged]
    diverged = f"; {wording.listed(lost)} diverged" if lost else ""
    if won is None and race.uncounted and _leader_by_seeds(race):
        return f"Undecided: how far the losses themselves may be off is not recorded{diverged}"
    if won is None:
        return ("So far undecided" if race.records.waiting else "Undecided") + f" between {_standing(race)}{diverged}"
    return ("So far: " if race.records.waiting else "") + _victory(race, won) + diverged


def winner(race: Race) -> str | None:
    """The method that is better than each of the others that did not diverge, if there is one.

    There is none where the test could not count all sources of error.
    """
    return None if race.uncounted else _leader_by_seeds(race)


def deciding(race: Race) -> Verdict | None:
    """The pair that the headline hangs on: the winner, or else the best by its mean, against the next one."""
    contenders = [method for name in _contenders(race) if (method := race.method(name)).final is not None]
    ordered = sorted(contenders, key=lambda method: method.final.mean if method.final else 0.0)
    names = [method.name for method in ordered]
    best = winner(race) or next(iter(names), None)
    if best is None:
        return None
    own = [verdict for verdict in race.verdicts if best in (verdict.first, verdict.second) and verdict.p is not None]
    return max(own, key=lambda verdict: verdict.p or 0.0, default=None)


def _leader_by_seeds(race: Race) -> str | None:
    """The method whose verdict against each of the others is "better"."""
    beaten = _beaten_by(race)
    for name in beaten:
        others = [victors for other, victors in beaten.items() if other != name]
        if others and all(name in victors for victors in others):
            return name
    return None


def summary(race: Race) -> str:
    """Task, sizes, seeds and data in one paragraph."""
    study = race.study
    methods = wording.listed([plain(name) for name in study.methods])
    task = f"the task {plain(study.task)}, preset {plain(study.preset)}"
    opening = f"{methods} trained the same model on {task}"
    seeds = f"{wording.counted(len(study.seeds), 'seed')} each ({', '.join(map(str, study.seeds))})"
    run = next((method.runs[0] for method in race.methods if method.runs), None)
    if run is None:
        return f"{opening}, {seeds}. No run has been started."
    last = run.evals[-1] if run.evals else None
    ended = [one.result for method in race.methods for one in method.runs if one.result is not None]
    fresh = all(result.tuning_loss is not None for result in ended)
    examples = "that served for nothing else" if fresh else "by which options may have been chosen, too"
    per_step = f" of {last.tokens // last.step:,} {entry(study.task).counted}" if last is not None and last.step else ""
    return (
        f"{opening}: {wording.counted(run.config.steps, 'step')}{per_step}, {seeds}. "
        "Runs with the same seed start from the same weights and see the data in the same order. "
        f"{wording.data(run.config.data)} "
        f"Lower loss is better; it is measured after the last step, on held-out data {examples}."
    )


def facts(race: Race) -> tuple[Fact, ...]:
    """By how much the winner beats the next best, and how sure that is; empty if there is no winner."""
    won, base, verdict = winner(race), race.study.baseline, deciding(race)
    if verdict is not None and verdict.second == won:
        verdict = _turned(verdict)
    if won is None or verdict is None or verdict.difference is None or verdict.interval is None or verdict.p is None:
        return ()
    own, other, ratio = race.method(won), race.method(verdict.second), race.method(won).ratio
    steps = (
        Fact(
            wording.share(ratio),
            f"of {wording.possessive(base)} steps {_goal(race)}{_steps_interval(ratio)}",
        )
        if ratio
        else None
    )
    second = plain(verdict.second)
    losses = f"in final loss, {wording.spread(own.final)} against {wording.spread(other.final)} of {second}, the next"
    difference = wording.signed(verdict.difference, like=wording.scale(verdict.interval))
    change = Fact(difference, f"{losses}; 95% interval {wording.between(verdict.interval)}")
    pairs = len(race.verdicts)
    corrected = f", corrected for {pairs} comparisons" if pairs > 1 else ""
    tested = f"paired t-test over {wording.counted(verdict.n, 'seed')} and the evaluated examples"
    sure = Fact(wording.p_value(verdict.p), f"{tested}{corrected}")
    return tuple(fact for fact in (steps, change, sure) if fact is not None)


def pairs(race: Race, *, first: bool) -> list[Comparison]:
    """The pair that decides and those that the baseline is part of, or the others.

    Args:
        race: All numbers.
        first: Whether those that are shown first are wanted.
    """
    base, head = race.study.baseline, deciding(race)
    ordered = sorted(race.verdicts, key=lambda verdict: verdict is not head)
    shown = [base in (verdict.first, verdict.second) or verdict is head for verdict in ordered]
    return [_comparison(verdict, race) for verdict, early in zip(ordered, shown, strict=True) if early == first]


def _turned(verdict: Verdict) -> Verdict:
    """The same verdict, from the other method's side."""
    interval, difference = verdict.interval, verdict.difference
    return replace(
        verdict,
        first=verdict.second,
        second=verdict.first,
        outcome={"better": "worse", "worse": "better"}.get(verdict.outcome, verdict.outcome),
        difference=None if difference is None else -difference,
        interval=None if interval is None else Interval(-interval.high, -interval.low),
    )


def _comparison(verdict: Verdict, race: Race) -> Comparison:
    """One pair of methods in a sentence."""
    first, second = plain(verdict.first), plain(verdict.second)
    undecided = f"{first} against {second} is undecided:"
    if verdict.diverged:
        return Comparison(f"{first} and {second} are not compared:", f"{_divergences(verdict, race)}.")
    if verdict.difference is None:
        return Comparison(f"{first} and {second} are not compared yet:", "no seed has ended for both.")
    if verdict.interval is None or verdict.p is None:
        change = f"final loss {_change(verdict.difference)} with seed {_shared_seed(verdict, race)}"
        return Comparison(undecided, f"one seed cannot tell; run at least 3 ({change}).")
    sure = f"{wording.p_value(verdict.p)}{_correction(race)}, {wording.counted(verdict.n, 'seed')}"
    numbers = f"(95% interval {_range(verdict)}; {sure}{_sampled(verdict)})"
    change = f"final loss {_change(verdict.difference, like=wording.scale(verdict.interval))}"
    if verdict.outcome == "undecided":
        change = f"{change} on average {numbers}"
        return Comparison(undecided, f"{change}. {'' if verdict.sampling is None else _more_seeds(verdict)}".rstrip())
    constant = " The difference is the same with every seed." if verdict.interval.low == verdict.interval.high else ""
    alone = " by the seeds alone" if verdict.sampling is None else ""
    return Comparison(f"{first} is {verdict.outcome} than {second}{alone}:", f"{change} {numbers}.{constant}")


def methodology(race: Race) -> tuple[str, ...]:
    """How the numbers were computed, a sentence or two each."""
    base = plain(race.study.baseline)
    if race.study.target is None:
        target = (
            f"The target is where {wording.possessive(base)} curves end in the mean; for {base} itself, its own end."
        )
        ratio = f"to the end of the curve of {base} with the same seed"
    else:
        target = "The target was set by the study."
        ratio = "to the target"
    steps = (
        "Steps are counted to the first crossing, on straight lines between evaluations; the loss may rise again "
        "later, but a run that diverges does not count as having reached anything."
    )
    share = (
        f"Steps against {base}: steps {ratio}, over those {base} took; geometric mean over seeds, "
        "with a 95% Student interval on the logarithms."
    )
    verdicts = (
        "Verdicts: paired t-tests on the final loss, Holm-corrected over all pairs at 5%. The variance is that over "
        "seeds plus that over 32 blocks of the evaluated examples, which are the same for all methods and seeds; for "
        "these alone the standard error is given with each pair. Steps to a target are measured on fewer examples, "
        "and their intervals count the seeds only. Seeds still needed: "
        "for 80% power at the observed effect, at the strictest corrected level. Intervals are for one pair alone, so "
        "that one may leave out 0 where the corrected p is above 5%."
    )
    times = (
        "\N{PLUS-MINUS SIGN} is the standard deviation over seeds. Time per step: medians over all steps, and from the "
        "fastest to the slowest seed. "
        "Training: mean over seeds, evaluation not counted. Peak memory: the largest of the process."
    )
    return (f"{target} {steps}", *((share, verdicts) if race.ranked and len(race.methods) > 1 else ()), times)


def _victory(race: Race, won: str) -> str:
    base = race.study.baseline
    if won == base:
        return f"{short(won)}, the baseline, wins"
    ratio, own = race.method(won).ratio, race.method(won).final
    if ratio is not None and not ratio.censored:
        goal = "the target" if race.study.target is not None else "the same loss"
        return f"{short(won)} wins: {goal} in {wording.percent(ratio.value)} of {wording.possessive(short(base))} steps"
    return f"{short(won)} wins with a final loss of {wording.spread(own)}"


def _standing(race: Race) -> str:
    """The methods that no other is better than, and who is behind."""
    beaten = _beaten_by(race)
    ahead = [short(name) for name, victors in beaten.items() if not victors]
    behind = [short(name) for name, victors in beaten.items() if victors]
    few = len(beaten) <= 4
    contenders = wording.listed(ahead) if few else wording.counted(len(ahead), "method")
    if not behind:
        return contenders
    losers = wording.listed(behind) if few else f"the other {len(behind)}"
    return f"{contenders}; {losers} {'is' if len(behind) == 1 else 'are'} behind"


def _contenders(race: Race) -> list[str]:
    """The methods that did not diverge; the others have no final loss to compare."""
    return [method.name for method in race.methods if not method.diverged]


def _beaten_by(race: Race) -> dict[str, set[str]]:
    """For each contender those that are better than it."""
    beaten: dict[str, set[str]] = {name: set() for name in _contenders(race)}
    for verdict in race.verdicts:
        if verdict.outcome == "better":
            beaten[verdict.second].add(verdict.first)
        elif verdict.outcome == "worse":
            beaten[verdict.first].add(verdict.second)
    return beaten


def _goal(race: Race) -> str:
    return "to the target" if race.study.target is not None else "to the same loss"


def _steps_interval(ratio: Ratio) -> str:
    if ratio.interval is None:
        return ""
    return f"; 95% interval {wording.percent(ratio.interval.low)} to {wording.percent(ratio.interval.high)}"


def _change(difference: float, *, like: float | None = None) -> str:
    if difference == 0:
        return "the same"
    return f"{'lower' if difference < 0 else 'higher'} by {wording.loss(abs(difference), like=like)}"


def _sampled(verdict: Verdict) -> str:
    """How far the evaluated examples alone leave the difference open."""
    if verdict.sampling is None:
        return ", what the examples leave open not counted"
    return f", of which the examples leave ±{FIXED}{wording.loss(verdict.sampling)} open" if verdict.sampling else ""


def _correction(race: Race) -> str:
    return f" after correction for {len(race.verdicts)} comparisons" if len(race.verdicts) > 1 else ""


def _range(verdict: Verdict) -> str:
    """The interval in the words of the sentence: of the size of the change when decided, signed when not."""
    interval = verdict.interval or Interval(0.0, 0.0)
    if verdict.outcome == "better":
        interval = Interval(-interval.high, -interval.low)
    return wording.between(interval)


def _more_seeds(verdict: Verdict) -> str:
    if verdict.more_seeds is not None:
        more = wording.counted(verdict.more_seeds, "more seed")
        return f"About {more} would tell, if the difference is what it looks like."
    if verdict.difference == 0:
        return "There is no difference for more seeds to find."
    return f"At a difference as small as it looks, even {MOST_SEEDS:,} seeds would not tell."


def _divergences(verdict: Verdict, race: Race) -> str:
    each: list[str] = []
    for name in verdict.diverged:
        method = race.method(name)
        seeds = (
            f"seed{'s' if len(method.diverged) > 1 else ''} {wording.listed([str(seed) for seed in method.diverged])}"
        )
        each.append(f"{plain(name)} diverged with {seeds}")
    return f"{wording.listed(each)}, and a mean over the seeds that survived would flatter"


def _shared_seed(verdict: Verdict, race: Race) -> int:
    first, second = race.method(verdict.first).finals, race.method(verdict.second).finals
    return next(seed for seed in first if seed in second)


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
