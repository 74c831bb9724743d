"""`steepest critical-batch measure`: train at many batch sizes until losses are reached."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from steepest.lab.cli.options import (
    Commands,
    Value,
    add_task,
    by_method,
    checking_usage,
    count,
    few,
    names,
    naming_methods,
    number,
)
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.study import add_running, run_plan

EXAMPLES = """examples:
  steepest critical-batch measure --task digits --methods muon --batches 16:64:x2 --targets 0.2 --seeds 1
  steepest critical-batch measure --task digits --batches 2:512:x2 --targets 0.1,0.05
  steepest critical-batch measure --methods muon,adamw --batches 2:64:x2 --targets 2.5,2.2 --seeds 2
  steepest critical-batch measure --task digits --methods muon --vary muon.momentum=0.7,0.9,0.95 \\
    --batches 4:256:x4 --targets 0.1 --out out/momentum

The four variants of Muon are muon (with Nesterov), muon-plain, muon-wd and muon-plain-wd. Other machines help with:
steepest work --help.
"""
DEFAULT_METHODS = ("muon", "adamw")
STEPS, SAMPLES = 10, 10  # of the preset's, at most


def add_command(commands: Commands) -> None:
    """Declare measure."""
    parser = declare(
        commands, "measure", _measure, "count the steps to a loss at many batch sizes", EXAMPLES, saves=True
    )
    text = f"of %(known)s; default: {','.join(DEFAULT_METHODS)}"
    naming_methods(parser.add_argument("--methods", type=names, metavar="A,B,...", help=text))
    parser.add_argument("--batches", required=True, metavar="SIZES", help="LOW:HIGH:xF or a list with commas")
    parser.add_argument("--targets", type=_losses, required=True, metavar="L,...", help="validation losses to reach")
    parser.add_argument(
        "--vary",
        action="append",
        type=_varied,
        default=[],
        metavar="METHOD.OPTION=V,...",
        help="run the method with each of these values in place of its default",
    )
    parser.add_argument("--tuning-seeds", type=few, default=1, metavar="N", help="per rate; default: %(default)s")
    parser.add_argument("--most-steps", type=count, metavar="N", help=f"of a run; default: {STEPS} times the preset's")
    parser.add_argument(
        "--most-samples", type=count, metavar="N", help=f"of a run; default: {SAMPLES} times the preset's"
    )
    parser.add_argument("--seeds", type=few, default=3, metavar="N", help="runs of each; default: %(default)s")
    add_task(parser)
    add_running(parser, out="out/critical-batch-TASK-PRESET")


def _measure(options: argparse.Namespace) -> int:
    from steepest.lab.studies.batch.plan import BatchSweep, make_arms, parse_batches
    from steepest.lab.tasks import make_task

    with checking_usage():
        task = make_task(options.task, options.preset, data=options.data)
        methods = tuple(options.methods or DEFAULT_METHODS)
        batches = parse_batches(options.batches)
        budget = task.budget
        plan = BatchSweep(
            task=task,
            methods=methods,
            arms=make_arms(methods, options.vary),
            seeds=tuple(range(options.seeds)),
            options=by_method(options.set),
            batches=batches,
            targets=tuple(sorted(options.targets, reverse=True)),
            tuning_seeds=options.tuning_seeds,
            most_steps=options.most_steps or STEPS * budget.steps,
            most_samples=options.most_samples or SAMPLES * budget.steps * budget.batch_size,
        )
    own = ["--batches", options.batches, "--targets", ",".join(map(str, plan.targets))]
    for method, option, values in options.vary:
        own += ["--vary", f"{method}.{option}={','.join(map(_written, values))}"]
    own += ["--tuning-seeds", str(plan.tuning_seeds), "--most-steps", str(plan.most_steps)]
    own += ["--most-samples", str(plan.most_samples)]
    return run_plan(plan, options, own, options.out or Path("out") / f"critical-batch-{task.name}-{task.preset}")


def _losses(text: str) -> list[float]:
    try:
        return [number(item) for item in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} must be losses with commas between them, like 2.5,2.2") from None


def _varied(text: str) -> tuple[str, str, list[Value]]:
    name, equals, values = text.partition("=")
    method, dot, option = name.rpartition(".")
    if not equals or not dot or not method or not option or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must look like muon.momentum=0.7,0.9,0.95")
    return method, option, [_value(item) for item in values.split(",")]


def _value(text: str) -> Value:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _written(value: Value) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
