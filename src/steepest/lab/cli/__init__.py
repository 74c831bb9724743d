"""The command line.

    steepest race | sweep | work | report | pack | unpack | train | data | plan | verify | translate | theory |
             critical-batch | bench

Exit codes: 0 done, 1 a run, a file or a database failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import steepest
from steepest.lab.cli import bench, critical_batch, data, plan, runs, studies, theory, translate, verify
from steepest.lab.cli.command import Command, add_commands, made
from steepest.lab.cli.outcome import INTERRUPTED, USAGE, failed
from steepest.lab.cli.parser import Parser
from steepest.lab.engine.stopping import SIGNALS
from steepest.lab.errors import Failure, UsageError

__all__ = ["main"]

COMMANDS = {
    **studies.COMMANDS,
    **runs.COMMANDS,
    "data": data.GROUP,
    "plan": plan.Plan,
    "verify": verify.COMMAND,
    "translate": translate.Translate,
    "theory": theory.GROUP,
    "critical-batch": critical_batch.GROUP,
    "bench": bench.GROUP,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command line without the program; None takes the process's own.

    Returns:
        Exit code.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    received = _noted_interrupts() if arguments is None else []
    options, unknown = _parser().parse_known_args(words)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    command: type[Command] = options.command
    try:
        return made(command, options).run()
    except KeyboardInterrupt:
        return _interrupted(options, ends=arguments is None)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("steepest"):
            raise
        remedy = "" if "pip install" in str(missing) else ". The commands need the lab: pip install 'steepest[lab]'."
        return failed(f"{missing}{remedy}", words)
    except UsageError as wrong:
        return failed(str(wrong), words, code=USAGE)
    except Failure as failure:
        return failed(str(failure))
    except OSError as failure:
        return failed(_with_remedy(failure), words)
    except Exception:
        if received:  # which some libraries turn into errors of their own while they are imported
            return _interrupted(options, ends=True)
        raise


def _noted_interrupts() -> list[int]:
    """Ctrl-C raises KeyboardInterrupt as always, and so do SIGTERM and SIGHUP; they are noted, too."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in SIGNALS:  # one that is ignored, as under nohup, stays so
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, note)
    return received


def _interrupted(options: argparse.Namespace, *, ends: bool) -> int:
    if ends:  # nobody needs a traceback of how this process ends
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        eval("0")  # Python forgets an interrupt inside a library's own exec, for which it would end itself by SIGINT
    saved = " Everything so far is saved; the same command goes on from there." if options.parser.saves else ""
    print(f"\nInterrupted.{saved}", file=sys.stderr)
    return INTERRUPTED


def _with_remedy(failure: OSError) -> str:
    """What the system says, the path, and what one does about it."""
    if failure.errno is None:
        return str(failure)
    where = "" if failure.filename is None else f"{failure.filename}: "
    what = f"{where}{failure.strerror}"
    if failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{what}. The disk is full: free some space and repeat the command; what was saved before is not lost."
    if failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}. Make it writable and readable for you, or choose another directory, as with --out."
    return f"{what}." if where else str(failure)


def _parser() -> Parser:
    parser = Parser(
        prog="steepest", description="Race optimizers that are steepest descent in a norm.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"steepest {steepest.__version__}")
    add_commands(parser, COMMANDS)
    return parser
