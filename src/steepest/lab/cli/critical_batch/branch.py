"""`steepest critical-batch branch`: the local critical batch size of a run in its checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from steepest.lab.cli.options import Commands, UsageError, checking_usage, count, few, not_negative, path
from steepest.lab.cli.options import add_command as declare
from steepest.lab.cli.outcome import DONE, failed

if TYPE_CHECKING:
    from steepest.lab.runs.branch import Branch

EXAMPLES = """examples:
  steepest train --task digits --method muon --schedule constant --steps 100 --keep-checkpoint --out out/parent
  steepest critical-batch branch out/parent --batches 16:256:x2 --samples 4096
"""


def add_command(commands: Commands) -> None:
    """Declare branch."""
    summary = "fork a checkpoint at several batch sizes: its local critical batch size"
    parser = declare(commands, "branch", _branch, summary, EXAMPLES, saves=True)
    parser.add_argument("run", type=path, metavar="RUN", help="directory of a run with a checkpoint")
    parser.add_argument("--batches", required=True, metavar="SIZES", help="LOW:HIGH:xF or a list with commas")
    parser.add_argument("--samples", type=count, required=True, metavar="N", help="examples that each fork sees")
    parser.add_argument("--lr-rule", default="sqrt", help="sqrt, linear or constant; default: %(default)s")
    parser.add_argument("--repeats", type=few, default=3, metavar="N", help="stretches of data; default: %(default)s")
    parser.add_argument("--tolerance", type=not_negative, default=0.01, help="in nats; default: %(default)s")
    parser.add_argument("--data", type=path, metavar="PATH", help="what the run was trained on, if it was given")
    parser.add_argument("--out", type=path, metavar="DIR", help="where forks are kept; default: RUN/branches")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _branch(options: argparse.Namespace) -> int:
    from steepest.lab.disk.fields import RecordError
    from steepest.lab.disk.ledger import RunBusyError
    from steepest.lab.runs.branch import NoBranchError
    from steepest.lab.runs.checkpoint import CheckpointError
    from steepest.lab.runs.train import RunMismatchError

    def tell(branch: Branch) -> None:
        loss = "diverged" if branch.final_loss is None else f"loss {branch.final_loss:.4f}"
        print(f"batch {branch.batch_size}, repetition {branch.repeat + 1}: {loss}", file=sys.stderr)

    try:
        return _answer(options, tell)
    except (NoBranchError, RunMismatchError) as wrong:
        raise UsageError(str(wrong)) from wrong
    except (CheckpointError, RecordError, RunBusyError) as failure:
        return failed(failure)


def _answer(options: argparse.Namespace, tell: Callable[[Branch], None]) -> int:
    from steepest.lab.disk.files import exists
    from steepest.lab.runs.branch import Window, local_answer, read_parent, train_branches
    from steepest.lab.runs.train import load_task
    from steepest.lab.studies.batch.plan import parse_batches

    with checking_usage():
        batches = parse_batches(options.batches)
        window = Window(options.samples, options.lr_rule, options.repeats)
        if len(batches) < 2:
            raise ValueError(f"--batches {options.batches}: give two sizes at least, to compare.")
        if exists(options.run / "config.json"):
            load_task(read_parent(options.run), options.data)
    out = options.out or options.run / "branches"
    branches = train_branches(options.run, out, batches=batches, window=window, data=options.data, tell=tell)
    answer = local_answer(branches, tolerance=options.tolerance)
    if options.json:
        print(
            json.dumps({**dataclasses.asdict(answer), "branches": [dataclasses.asdict(b) for b in branches]}, indent=2)
        )
        return DONE
    for batch, loss in answer.losses.items():
        print(f"{batch:>8}  {'diverged' if loss is None else f'{loss:.4f}'}")
    print(answer.sentence)
    return DONE
