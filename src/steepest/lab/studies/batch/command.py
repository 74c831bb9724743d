"""`steepest critical-batch measure`: train at many batch sizes until losses are reached."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, NamedTuple

from steepest.lab.cli.command import Arg
from steepest.lab.cli.options import Count, Few, Names, Value, by_method, number, parsed, written
from steepest.lab.cli.study import StudyCommand

if TYPE_CHECKING:
    from steepest.lab.studies.batch.plan import BatchSweep
    from steepest.lab.tasks.task import Task

DEFAULT_METHODS = ("muon", "adamw")
STEPS, SAMPLES = 10, 10  # of the preset's, at most


class Varied(NamedTuple):
    """Values of one option of a method, each in place of its default."""

    method: str
    option: str
    values: list[Value]

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.method}.{self.option}={','.join(map(written, self.values))}"


def varied(text: str) -> Varied:
    """METHOD.OPTION=VALUE,VALUE."""
    name, equals, values = text.partition("=")
    method, dot, option = name.rpartition(".")
    if not equals or not dot or not method or not option or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must look like muon.momentum=0.7,0.9,0.95")
    return Varied(method, option, list(map(parsed, values.split(","))))


def losses(text: str) -> list[float]:
    """Finite numbers with commas between them."""
    try:
        return list(map(number, text.split(",")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} must be losses with commas between them, like 2.5,2.2") from None


class MeasureCommand(StudyCommand):
    r"""Count the steps to a loss at many batch sizes.

    examples:
      steepest critical-batch measure --task digits --methods muon --batches 16:64:x2 --targets 0.2 --seeds 1
      steepest critical-batch measure --task digits --batches 2:512:x2 --targets 0.1,0.05
      steepest critical-batch measure --methods muon,adamw --batches 2:64:x2 --targets 2.5,2.2 --seeds 2
      steepest critical-batch measure --task digits --methods muon --vary muon.momentum=0.7,0.9,0.95 \
        --batches 4:256:x4 --targets 0.1 --out out/momentum

    The four variants of Muon are muon (with Nesterov), muon-plain, muon-wd and muon-plain-wd. Other machines help with:
    steepest work --help.
    """

    methods: Annotated[Names | None, Arg(f"of %(known)s; default: {','.join(DEFAULT_METHODS)}", "A,B,...")] = None
    batches: Annotated[str, Arg("LOW:HIGH:xF or a list with commas", "SIZES")]
    targets: Annotated[tuple[float, ...], losses, Arg("validation losses to reach", "L,...")]
    vary: Annotated[
        tuple[Annotated[Varied, varied], ...],
        Arg("run the method with each of these values in place of its default", "METHOD.OPTION=V,...", "repeated"),
    ] = ()
    tuning_seeds: Annotated[Few, Arg("per rate", "N")] = 1
    most_steps: Annotated[Count | None, Arg(f"of a run; default: {STEPS} times the preset's", "N")] = None
    most_samples: Annotated[Count | None, Arg(f"of a run; default: {SAMPLES} times the preset's", "N")] = None

    def plan(self, task: Task) -> tuple[BatchSweep, Mapping[str, object]]:
        """One of each arm, batch size, rate and seed."""
        from steepest.lab.studies.batch.plan import BatchSweep, make_arms, parse_batches

        methods = self.methods or DEFAULT_METHODS
        budget = task.budget
        plan = BatchSweep(
            task=task,
            methods=methods,
            arms=make_arms(methods, self.vary),
            seeds=tuple(range(self.seeds)),
            options=by_method(self.set),
            batches=parse_batches(self.batches),
            targets=tuple(sorted(self.targets, reverse=True)),
            tuning_seeds=self.tuning_seeds,
            most_steps=self.most_steps or STEPS * budget.steps,
            most_samples=self.most_samples or SAMPLES * budget.steps * budget.batch_size,
        )
        return plan, {name: getattr(plan, name) for name in ("targets", "most_steps", "most_samples")}


COMMAND = MeasureCommand
