"""The command about one run: train."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from typing import TYPE_CHECKING, Annotated, Literal, cast

from steepest.lab.cli.command import Arg, Command, Tree
from steepest.lab.cli.options import AsJson, Assigned, Count, File, OnTask, OnThreads, Seed, checking_usage, number
from steepest.lab.cli.outcome import DONE, FAILED, INTERRUPTED
from steepest.lab.errors import UsageError
from steepest.lab.tasks import TASKS, entry

if TYPE_CHECKING:
    from steepest.lab.runs.config import RunConfig
    from steepest.lab.runs.crew import Crew
    from steepest.lab.runs.records import Result
    from steepest.lab.tasks.task import Schedule


def grid(text: str) -> tuple[int, int]:
    """Rows and columns, with an x between them."""
    if (found := re.fullmatch("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text, re.ASCII)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} must look like 2x4")
    return int(found[1]), int(found[2])


def part(text: str) -> float:
    """Of a whole."""
    value = number(text, least=0.0)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most 1")
    return value


AUTO = "auto"
Tail = Annotated[float, part]
Grid = Annotated[tuple[int, int], grid]


class Train(Command, OnTask, OnThreads, AsJson):
    """Train one run.

    examples:
      steepest train --task digits --method muon --out out/muon-digits
      steepest train --method muon --out out/muon
      steepest train --method adamw --set lr=0.003 --task digits --seed 1 --out out/digits
      torchrun --nproc-per-node 2 -m steepest train --method muon --parallel ddp --out out/two
    """

    saves = True

    method: Annotated[str, Arg("one of %(known)s")]
    seed: Annotated[Seed, Arg("of weights and data order")] = 0
    set: Annotated[tuple[Assigned, ...], Arg("change an option", "OPTION=VALUE", "repeated")] = ()
    out: Annotated[File, Arg("the run's directory", "DIR")]
    steps: Annotated[Count | None, Arg("instead of the preset's number", "N")] = None
    batch_size: Annotated[Count | None, Arg("examples of a step, on all ranks together, likewise", "N")] = None
    schedule: Annotated[str | None, Arg("of the learning rate, such as constant; default: the preset's")] = None
    tail: Annotated[Tail, Arg("part of the run, at its end, whose weights are averaged for evaluations; 0: none")] = 0.0
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        Arg("bf16: training's forward passes under autocast, weights in float32; default: the preset's"),
    ] = None
    checkpoint_every: Annotated[Count, Arg("steps between checkpoints", "N")] = 25
    keep_checkpoint: Annotated[bool, Arg("keep the trained weights")] = False
    diagnostics: Annotated[bool, Arg("record the optimizer's numbers and the weights' norms, too")] = False

    parallel: Annotated[
        Literal["ddp", "fsdp", "hsdp"] | None,
        Arg("on ranks that torchrun starts: each keeps the model, a shard, or a shard of one of several replicas"),
    ] = None
    mesh: Annotated[Grid | None, Arg("replicas x shards, for hsdp; else machines x their ranks", "RxS")] = None
    accumulate: Annotated[
        Count | None,
        Arg("micro-batches of a batch, or of a rank's part of it; default: as the preset has it", "N"),
    ] = None
    micro_batch: Annotated[
        Count | None, Arg("instead, examples that a rank takes at once; default: the preset's, at most", "N")
    ] = None
    compile: Annotated[bool, Arg("compile the model; under fsdp and hsdp its blocks alone, if it has any")] = False
    device: Annotated[str, Arg("cpu, cuda, or auto: cuda if it is here")] = "cpu"
    deterministic: Annotated[bool, Arg("same bits again on the same device, slower on cuda")] = False

    def run(self) -> int:
        """Train it, and print how it ended."""
        from steepest.lab.runs.crew import ElsewhereError, assembled

        with checking_usage():
            self._check_shared()
        try:
            with assembled(self.parallel, mesh=self.mesh, device=self._device, compiled=self.compile) as crew:
                return self._run(crew)
        except ElsewhereError:
            return FAILED  # which rank, and why, it says itself

    def _run(self, crew: Crew) -> int:
        from steepest.lab.disk.files import exists
        from steepest.lab.runs.train import Interrupted

        config, crew = crew.together(lambda: self._config(crew))
        finished = crew.leads and exists(self.out / "result.json")
        try:
            result = self._trained(config, crew)
        except Interrupted as interrupted:
            if crew.leads:
                print(interrupted, file=sys.stderr)
            return INTERRUPTED
        crew.together(lambda: self._check_kept() if finished else None)
        if not crew.leads:
            return DONE
        if self.json:
            print(result.to_json(), end="")
        elif result.final_loss is None:
            print(f"Diverged after {result.steps} steps; the rows are in {self.out}.")
        else:
            told = f"Final loss {result.final_loss:.4f} after {result.steps} steps in {result.train_s:.1f} s"
            print(f"{told}: {self.out}")
        return DONE

    def _trained(self, config: RunConfig, crew: Crew) -> Result:
        """Train, shown by the first rank; a signal to any rank stops all."""
        from rich.console import Console

        from steepest.lab.engine.display import StudyDisplay
        from steepest.lab.engine.stopping import counting_signals
        from steepest.lab.runs.device import deterministic
        from steepest.lab.runs.train import train_run

        with contextlib.ExitStack() as around:
            stopped = around.enter_context(counting_signals())
            display = None
            if crew.leads:
                display = StudyDisplay({config.method: [self.out]}, steps=config.steps, console=Console(stderr=True))
                around.enter_context(display)
            around.enter_context(deterministic(self.deterministic))
            return train_run(
                config,
                self.out,
                data=self.data,
                threads=self.threads,
                checkpoint_every=self.checkpoint_every,
                keep_checkpoint=self.keep_checkpoint,
                diagnostics=self.diagnostics,
                crew=crew,
                stop=lambda: (display is not None and display.glance()) or bool(stopped),
            )

    def _check_kept(self) -> None:
        """Of a run that was finished before, refuse what only training can give."""
        from steepest.lab.disk.files import exists, read_lines

        rows = read_lines(self.out / "metrics.jsonl")
        for option, asked, there in (
            ("keep-checkpoint", self.keep_checkpoint, lambda: exists(self.out / "checkpoint.pt")),
            ("diagnostics", self.diagnostics, lambda: any('"kind": "diagnostics"' in row for row in rows)),
        ):
            if asked and not there():
                raise UsageError(
                    f"--{option}: the run in {self.out} is finished, and was trained without it. Train it into another "
                    f"directory with --{option}, or leave the option out."
                )

    def _config(self, crew: Crew) -> tuple[RunConfig, Crew]:
        """The run, and the crew with its micro-batches."""
        from steepest.lab.methods import check_buildable
        from steepest.lab.runs.config import configure
        from steepest.optim import SteepestDescent

        with checking_usage():
            task = self.load()
            config = configure(
                task,
                method=self.method,
                seed=self.seed,
                options=dict(self.set),
                steps=self.steps,
                batch_size=self.batch_size,
                schedule=cast("Schedule | None", self.schedule),
                precision=self.precision,
                tail=self.tail,
            )
            crew = crew.dividing(
                config.batch_size,
                accumulate=self.accumulate,
                micro_batch=self.micro_batch,
                most=task.budget.micro_batch,
            )
            crew.check(config.batch_size)
            if crew.accumulate > 1:
                crew.check_model(task.build_model(0), shared=self._shared)
            optimizer = check_buildable(config.method, task, config.options)
            if self.diagnostics and not isinstance(optimizer, SteepestDescent):
                raise ValueError(f"--diagnostics: {config.method!r} is not a method of this library; try muon or adam.")
        return config, crew

    @property
    def _shared(self) -> bool:
        """Whether many ranks, or an accelerator, can train the task; an unknown one is refused elsewhere."""
        return self.task not in TASKS or entry(self.task).shared

    @property
    def _device(self) -> str:
        """Where it is trained: what one leaves to this machine is the CPU for tasks that know nothing else."""
        return "cpu" if self.device == AUTO and not self._shared else self.device

    def _check_shared(self) -> None:
        """Refuse what is trained by one process on its CPU only."""
        for option, given in (("parallel", self.parallel), ("device", None if self._device == "cpu" else self.device)):
            if given is not None and not self._shared:
                known = " or ".join(name for name, one in TASKS.items() if one.shared)
                raise ValueError(
                    f"--{option} {given}: the task {self.task!r} is trained by one process, on the CPU. Choose --task "
                    f"{known}, or leave --{option} out."
                )
        if self.method == "torch-muon" and self.parallel in ("fsdp", "hsdp"):
            raise ValueError(
                f"--method torch-muon: torch.optim.Muon takes each shard for a matrix of its own, or fails, with "
                f"--parallel {self.parallel}. Choose --method muon, or --parallel ddp."
            )


COMMANDS: Tree = {"train": Train}
