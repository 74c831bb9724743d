"""`steepest critical-batch bound | measure | fit | plot | branch`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, cast

from steepest.lab.cli.bound import BoundCommand
from steepest.lab.cli.command import Arg, Command, Group
from steepest.lab.cli.options import AsJson, Count, Few, File, Names, checking_usage, not_negative, number, positive
from steepest.lab.cli.outcome import DONE, print_json
from steepest.lab.studies import KINDS

if TYPE_CHECKING:
    from steepest.batch_size.curve import Estimate
    from steepest.lab.runs.branch import Branch, RateRule
    from steepest.lab.studies.batch.results import BatchReport, TargetResult

FAMILIES = "H,S,I,P,U,W"  # spelled out, so that --help does not wait for scipy; a test compares it with the library's
NOTE = "b* (least b K(b)) and the knee B_crit (of the hyperbola) are different numbers."


def loss(text: str) -> float:
    """A number above 0."""
    try:
        return positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a loss above 0") from None


def confidence(text: str) -> float:
    """A number between 0 and 1."""
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 1, such as 0.9")
    return value


class Fit(Command, AsJson):
    """Fit K(b) to the runs of a batch-size study and say which batch sizes are critical, also while it is running.

    examples:
      steepest critical-batch measure --task digits --batches 16:64:x2 --targets 0.2 --seeds 1 --out out/batches
      steepest critical-batch fit out/batches
      steepest critical-batch fit out/batches --target 0.07 --families H,S --level 0.95 --json
    """

    directory: Annotated[File, Arg("what measure was given as --out", "DIR", "place")]
    target: Annotated[
        tuple[Annotated[float, loss], ...], Arg("repeatable; default: the study's", "LOSS", "repeated")
    ] = ()
    families: Annotated[Names, Arg(f"shapes of K(b) to choose from; default: {FAMILIES}")] = tuple(FAMILIES.split(","))
    level: Annotated[float, confidence, Arg("of the intervals")] = 0.9

    def run(self) -> int:
        """Fit and print."""
        from steepest.batch_size.curve import family
        from steepest.lab.studies.batch.plan import BatchStudy
        from steepest.lab.studies.batch.results import read_report
        from steepest.lab.studies.records import read_study

        records = read_study(self.directory, BatchStudy)
        with checking_usage():
            for key in self.families:
                family(key)
            targets = sorted(set(self.target), reverse=True)
            report = read_report(records, targets=targets, families=self.families, level=self.level)
        if self.json:
            return print_json(_content(report))
        for result in report.results:
            print("\n".join(_lines(result, report)), end="\n\n")
        print(NOTE)
        return DONE


class Plot(Command):
    """Write the figures of a batch-size study as PNG and its numbers as CSV, also while it is running.

    examples:
      steepest critical-batch measure --task digits --batches 16:64:x2 --targets 0.2 --seeds 1 --out out/batches
      steepest critical-batch plot out/batches
    """

    directory: Annotated[File, Arg("what measure was given as --out", "DIR", "place")]

    def run(self) -> int:
        """Write them, and print their names."""
        from steepest.lab.studies.report import write_plots

        print(*write_plots(self.directory, "critical-batch"), sep="\n")
        return DONE


def _lines(result: TargetResult, report: BatchReport) -> list[str]:
    from steepest.lab.report.wording import plain
    from steepest.lab.studies.batch.sentences import statement

    arrived = sum(one.reached for one in result.arrivals)
    head = f"{plain(result.name)}, target {result.target:g}: {arrived} of {len(result.arrivals)} runs arrived"
    found = result.estimate
    if found is None:
        return [head, f"  {statement(result, report.unit)}"]
    share = f"b at {100 * found.overhead_share:g}% more data"
    told = (("b*, least b K(b)", found.b_star), (share, found.overhead), ("B_crit, knee", found.knee))
    return [
        head,
        *(f"  {name:<20} {answer}{f' ({answer.reason})' if answer.reason else ''}" for name, answer in told),
        f"  {'family':<20} {found.chosen.family.key}, {found.chosen.family.formula}",
        *(f"    {line}" for line in str(found.choice).splitlines()),
        *(f"  Note: {text}" for text in found.warnings),
        f"  {statement(result, report.unit)}",
    ]


def _content(report: BatchReport) -> dict[str, object]:
    return {
        "unit": report.unit,
        "listed": len(report.records.asked),
        "ended": sum(run.result is not None for run in report.records.runs),
        "results": [_result(one, report.unit) for one in report.results],
        "learning_rates": [
            {"arm": arm.name, "batch_size": one.batch_size, "lr": one.lr, "tried": one.tried, "at_edge": one.at_edge}
            for arm in report.arms
            for one in arm.rates
        ],
        "note": NOTE,
    }


def _result(result: TargetResult, unit: str) -> dict[str, object]:
    from steepest.lab.studies.batch.sentences import statement

    time = None if result.time is None else dataclasses.asdict(result.time)
    fits = {} if result.estimate is None else _estimate(result.estimate)
    runs = [
        {"batch_size": one.batch_size, "seed": one.seed, "steps": one.crossing.steps, "status": one.crossing.status}
        for one in result.arrivals
    ]
    own = {"arm": result.name, "target": result.target, "refusal": result.refusal or None}
    return {**own, **fits, "time": time, "runs": runs, "recommendation": statement(result, unit)}


def _estimate(found: Estimate) -> dict[str, object]:
    weights = found.choice.weights
    return {
        "b_star": dataclasses.asdict(found.b_star),
        "knee": dataclasses.asdict(found.knee),
        "overhead": {"share": found.overhead_share, **dataclasses.asdict(found.overhead)},
        "level": found.level,
        "chosen": found.chosen.family.key,
        "families": [
            {
                "key": one.family.key,
                "formula": one.family.formula,
                "aicc_above": one.aicc - found.chosen.aicc,
                "weight": weights[one.family.key],
                "sigma": one.sigma,
                "parameters": one.parameters,
            }
            for one in found.choice.fits
        ],
        "not_fitted": found.choice.skipped,
        "warnings": found.warnings,
    }


class BranchCommand(Command, AsJson):
    """Fork a checkpoint at several batch sizes: its local critical batch size.

    examples:
      steepest train --task digits --method muon --schedule constant --steps 100 --keep-checkpoint --out out/parent
      steepest critical-batch branch out/parent --batches 16:256:x2 --samples 4096
    """

    saves = True

    run_dir: Annotated[File, Arg("directory of a run with a checkpoint", "RUN", "place")]
    batches: Annotated[str, Arg("LOW:HIGH:xF or a list with commas", "SIZES")]
    samples: Annotated[Count, Arg("examples that each fork sees", "N")]
    lr_rule: Annotated[str, Arg("sqrt, linear or constant")] = "sqrt"
    repeats: Annotated[Few, Arg("stretches of data", "N")] = 3
    tolerance: Annotated[float, not_negative, Arg("in nats")] = 0.01
    data: Annotated[File | None, Arg("what the run was trained on, if it was given", "PATH")] = None
    out: Annotated[File | None, Arg("where forks are kept; default: RUN/branches", "DIR")] = None

    def run(self) -> int:
        """Train the forks and print what they say."""
        from steepest.lab.disk.files import exists
        from steepest.lab.runs.branch import Window, local_answer, read_parent, train_branches
        from steepest.lab.runs.train import load_task
        from steepest.lab.studies.batch.plan import parse_batches

        def tell(branch: Branch) -> None:
            loss = "diverged" if branch.final_loss is None else f"loss {branch.final_loss:.4f}"
            print(f"batch {branch.batch_size}, repetition {branch.repeat + 1}: {loss}", file=sys.stderr)

        with checking_usage():
            batches = parse_batches(self.batches)
            window = Window(self.samples, cast("RateRule", self.lr_rule), self.repeats)
            if len(batches) < 2:
                raise ValueError(f"--batches {self.batches}: give two sizes at least, to compare.")
            if exists(self.run_dir / "config.json"):
                load_task(read_parent(self.run_dir), self.data)
        out = self.out or self.run_dir / "branches"
        branches = train_branches(self.run_dir, out, batches=batches, window=window, data=self.data, tell=tell)
        answer = local_answer(branches, tolerance=self.tolerance)
        if self.json:
            return print_json({**dataclasses.asdict(answer), "branches": list(map(dataclasses.asdict, branches))})
        for batch, loss in answer.losses.items():
            print(f"{batch:>8}  {'diverged' if loss is None else f'{loss:.4f}'}")
        print(answer.sentence)
        return DONE


GROUP = Group(
    "Critical batch size: bounds, measurement, recommendation.",
    {
        "bound": BoundCommand,
        "measure": KINDS["critical-batch"].load_command(),
        "fit": Fit,
        "plot": Plot,
        "branch": BranchCommand,
    },
)
