"""`steepest critical-batch branch`: the local critical batch size of a run in its checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, cast

from steepest.lab.cli.command import Arg, Command
from steepest.lab.cli.options import AsJson, Count, Few, File, checking_usage, not_negative
from steepest.lab.cli.outcome import DONE, print_json

if TYPE_CHECKING:
    from steepest.lab.runs.branch import Branch, RateRule


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
