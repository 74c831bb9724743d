"""The command line: `steepest race | train | plan | report`.

Exit codes: 0 done, 1 a run or a file failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import steepest

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
# torch's Muon takes no convolutions, so it is not in the race on images
RACERS = {"text": ("adamw", "muon", "torch-muon", "muonadam"), "digits": ("adamw", "muon", "muonadam")}

# spelled out, so that --help does not wait for torch; a test compares it with the registry
METHODS = "adam, adamw, muon, muon-plain, muon-plain-wd, muon-wd, muonadam, sgd, torch-muon"

RACE_EXAMPLES = """examples:
  steepest race --preset demo
  steepest race --methods adamw,muon --seeds 5 --out out/five
  steepest race --methods adamw,muon --set muon.lr=0.03 --set adamw.lr=0.005
  steepest race --task text --data my_corpus/ --preset tiny
"""
TRAIN_EXAMPLES = """examples:
  steepest train --method muon --out out/muon
  steepest train --method adamw --set lr=0.003 --task digits --seed 1 --out out/digits
"""
PLAN_EXAMPLES = """examples:
  steepest plan --task text
  steepest plan --task digits --method adam --json
"""
REPORT_EXAMPLES = """examples:
  steepest report out/demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command line without the program; None takes the process's own.

    Returns:
        Exit code.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except KeyboardInterrupt:
        print("\nInterrupted. Everything so far is saved; the same command goes on from there.", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("steepest"):
            raise
        remedy = "" if "steepest[lab]" in str(missing) else ". The commands need the lab: pip install 'steepest[lab]'."
        print(f"error: {missing}{remedy}", file=sys.stderr)
        return FAILED
    except UsageError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return USAGE
    except OSError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return FAILED


class UsageError(Exception):
    """What was asked for cannot be meant."""


@contextlib.contextmanager
def _checking_usage() -> Generator[None]:
    """Around what only reads options: there, a value that is refused was a wrong option, not a fault of the program."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as wrong:
        raise UsageError(str(wrong)) from wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steepest", description="Race optimizers that are steepest descent in a norm.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"steepest {steepest.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    race = _command(commands, "race", _race, "train several methods alike and report who wins", RACE_EXAMPLES)
    race.add_argument(
        "--methods",
        type=_names,
        metavar="A,B,...",
        help=f"of {METHODS}; default: {','.join(RACERS['text'])}, without torch-muon on digits",
    )
    race.add_argument("--baseline", metavar="METHOD", help="what others are compared with; default: the first method")
    race.add_argument("--seeds", type=_count, default=3, metavar="N", help="runs per method; default: %(default)s")
    _add_task(race)
    race.add_argument(
        "--set", action="append", type=_assignment, default=[], metavar="METHOD.OPTION=VALUE", help="change an option"
    )
    race.add_argument("--out", type=Path, metavar="DIR", help="where runs and report go; default: out/TASK-PRESET")
    race.add_argument(
        "--steps", type=_count, metavar="N", help="of a run; default: the preset's, for which it is tuned"
    )
    race.add_argument("--workers", type=_count, metavar="N", help="runs at once; default: one per core")
    race.add_argument("--json", action="store_true", help="print where the report is as JSON")

    train = _command(commands, "train", _train, "train one run", TRAIN_EXAMPLES)
    train.add_argument("--method", required=True, help=f"one of {METHODS}")
    train.add_argument("--seed", type=int, default=0, help="of weights and data order; default: %(default)s")
    _add_task(train)
    train.add_argument("--set", action="append", type=_assignment, default=[], metavar="OPTION=VALUE")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's directory")
    train.add_argument("--steps", type=_count, metavar="N", help="instead of the preset's number")
    train.add_argument("--threads", type=_count, default=1, metavar="N", help="CPU threads; default: %(default)s")
    train.add_argument("--keep-checkpoint", action="store_true", help="keep the trained weights")
    train.add_argument("--json", action="store_true", help="print the result as JSON")

    plan = _command(commands, "plan", _plan, "print which parameter is optimised how, and why", PLAN_EXAMPLES)
    plan.add_argument("--method", default="muon", help="a method of this library; default: %(default)s")
    _add_task(plan)
    plan.add_argument("--json", action="store_true", help="print rows as JSON")

    report = _command(commands, "report", _report, "write the report of a race anew from its records", REPORT_EXAMPLES)
    report.add_argument("directory", type=Path, metavar="DIR", help="what race was given as --out")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=run)
    return parser


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", default="text", help="text or digits; default: %(default)s")
    parser.add_argument("--preset", default="demo", help="demo, tiny or small; default: %(default)s")
    parser.add_argument("--data", type=Path, metavar="PATH", help="train the text model on this file or folder")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; write them as adamw,muon")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _assignment(text: str) -> tuple[str, bool | int | float | str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must look like lr=0.02")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    return name, parsed if isinstance(parsed, bool | int | float) else value


def _race(options: argparse.Namespace) -> int:
    from rich.console import Console

    from steepest.lab.fields import RecordError
    from steepest.lab.ledger import RunBusyError
    from steepest.lab.race import FailedRunsError, default_workers, run_race
    from steepest.lab.study import Race, StudyMismatchError
    from steepest.lab.tasks import make_task

    with _checking_usage():
        task = make_task(options.task, options.preset, data=options.data)
        methods = tuple(options.methods or RACERS[task.name])
        race = Race(
            task=task,
            methods=methods,
            seeds=tuple(range(options.seeds)),
            baseline=options.baseline or methods[0],
            options=_by_method(options.set),
            steps=options.steps,
        )
        race.configs()
    out: Path = options.out or Path("out") / f"{task.name}-{task.preset}"
    command = _repeat(race.methods, race.baseline, options, out)
    workers = options.workers or default_workers()
    try:
        report = run_race(race, out, command=command, workers=workers, data=options.data, console=Console(stderr=True))
    except StudyMismatchError as wrong:
        raise UsageError(str(wrong)) from wrong
    except (FailedRunsError, RecordError, RunBusyError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return FAILED
    print(json.dumps({"report": str(report)}) if options.json else f"Report: {report}")
    return DONE


def _by_method(
    assignments: Sequence[tuple[str, bool | int | float | str]],
) -> Mapping[str, dict[str, bool | int | float | str]]:
    by_method: dict[str, dict[str, bool | int | float | str]] = {}
    for name, value in assignments:
        method, dot, option = name.rpartition(".")
        if not dot or not method or not option:
            raise ValueError(f"--set {name}={value}: write METHOD.OPTION=VALUE, for example muon.lr=0.02.")
        by_method.setdefault(method, {})[option] = value
    return by_method


def _repeat(methods: Sequence[str], baseline: str, options: argparse.Namespace, out: Path) -> str:
    """The command that repeats a race, every choice spelled out."""
    words = ["steepest", "race", "--methods", ",".join(methods), "--baseline", baseline, "--seeds", str(options.seeds)]
    words += ["--task", options.task, "--preset", options.preset]
    if options.steps is not None:
        words += ["--steps", str(options.steps)]
    if options.data is not None:
        words += ["--data", str(options.data)]
    for name, value in options.set:
        words += ["--set", f"{name}={json.dumps(value) if isinstance(value, bool) else value}"]
    return shlex.join([*words, "--out", str(out)])


def _train(options: argparse.Namespace) -> int:
    from rich.console import Console

    from steepest.lab.checkpoint import CheckpointError
    from steepest.lab.config import configure
    from steepest.lab.display import RaceDisplay
    from steepest.lab.fields import RecordError
    from steepest.lab.ledger import RunBusyError
    from steepest.lab.methods import check_buildable
    from steepest.lab.tasks import make_task
    from steepest.lab.train import Interrupted, RunMismatchError, train_run

    with _checking_usage():
        task = make_task(options.task, options.preset, data=options.data)
        changes = dict(options.set)
        config = configure(task, method=options.method, seed=options.seed, options=changes, steps=options.steps)
        check_buildable(config.method, task, config.options)
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopped.append(received))
    display = RaceDisplay({config.method: [options.out]}, steps=config.steps, console=Console(stderr=True))
    try:
        with display:
            result = train_run(
                config,
                options.out,
                data=options.data,
                threads=options.threads,
                keep_checkpoint=options.keep_checkpoint,
                stop=lambda: display.glance() or bool(stopped),
            )
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except RunMismatchError as wrong:
        raise UsageError(str(wrong)) from wrong
    except (CheckpointError, RecordError, RunBusyError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return FAILED
    if options.json:
        print(result.to_json(), end="")
    elif result.final_loss is None:
        print(f"Diverged after {result.steps} steps; the rows are in {options.out}.")
    else:
        print(f"Final loss {result.final_loss:.4f} after {result.steps} steps in {result.train_s:.1f} s: {options.out}")
    return DONE


def _plan(options: argparse.Namespace) -> int:
    from steepest.lab.methods import build_optimizer, resolve
    from steepest.lab.tasks import make_task
    from steepest.optim import SteepestDescent

    with _checking_usage():
        task = make_task(options.task, options.preset, data=options.data)
        resolved = resolve(options.method, task=task.name, preset=task.preset, options={})
        optimizer = build_optimizer(options.method, task.build_model(0), resolved.options)
    if not isinstance(optimizer, SteepestDescent):
        raise UsageError(f"{options.method!r} is not a method of this library and has no plan; try muon or adam.")
    print(optimizer.plan.to_json() if options.json else optimizer.plan)
    return DONE


def _report(options: argparse.Namespace) -> int:
    from steepest.lab.fields import RecordError
    from steepest.lab.report import write_report

    try:
        print(f"Report: {write_report(options.directory)}")
    except RecordError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
