"""`steepest verify`: whether ranks take the steps of one process, on this machine and with one's own model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from steepest.lab.cli.command import Arg, Command
from steepest.lab.cli.options import AsJson, Assigned, Few, OnThreads, Seed, checking_usage, positive
from steepest.lab.cli.outcome import DONE, Table, failed, print_json, print_tables

if TYPE_CHECKING:
    from steepest.lab.runs.verify import Job, RankReport, Verified

Device = Literal["cpu", "cuda"]
Positive = Annotated[float, positive]


class Verify(Command, OnThreads, AsJson):
    """Train a few steps on many ranks and in one process, and compare the weights.

    The processes are started here: one alone, then one per rank of --mesh, which meet over gloo, or NCCL with --device
    cuda. Along ddp, fsdp, hsdp and ep a batch is shared out; along tp all see the same. fsdp and hsdp shard each module
    of a ModuleList, then the rest.

    --model names a function that takes nothing and returns a module, or (module, loss, batches). loss(module, batch) is
    the mean over a batch; tensors of a batch have its examples in the first dimension. For a module alone gradients are
    drawn, alike on all ranks. tp and ep need a fourth part, parallelize(module, mesh), called on every rank before
    the rest is sharded. The function is imported and run with all of your rights: name code that you trust. The current
    directory is searched last. Without --model: a transformer of two blocks of width 64.

    The exit code is 1 where a weight is farther off than --tolerance.

    examples:
      steepest verify --mesh fsdp=2
      steepest verify --mesh fsdp=2,tp=2 --method newton-muon
      steepest verify --mesh hsdp=2x2 --model mypackage.models:example --float64
    """

    mesh: Annotated[
        str, Arg("ranks: ddp=4, fsdp=4, or hsdp=2x2 (replicas x shards), with tp=2; fsdp=2 with ep=2", "AXIS=N")
    ] = "fsdp=2"
    model: Annotated[str | None, Arg("package.module:function; default: a small transformer", "WHERE")] = None
    method: Annotated[str, Arg("a method of this library")] = "muon"
    set: Annotated[tuple[Assigned, ...], Arg("change an option", "OPTION=VALUE", "repeated")] = ()
    steps: Annotated[Few, Arg("optimizer steps", "N")] = 10
    seed: Annotated[Seed, Arg("of weights and gradients")] = 0
    float64: Annotated[
        bool, Arg("compute in it: what rounding did becomes a billion times smaller, an error stays")
    ] = False
    tolerance: Annotated[
        Positive | None,
        Arg("largest distance of a weight, relative to its norm; default: 1e-5, or ten times what rounding does"),
    ] = None
    device: Annotated[Device, Arg("of the ranks; cuda needs a GPU for each")] = "cpu"
    timeout: Annotated[Positive, Arg("seconds, for the one process and for the ranks", "S")] = 300.0

    def run(self) -> int:
        """Do both and print how far apart they are."""
        from steepest.lab.runs.verify import verify

        verified = verify(self._job())
        worst = verified.worst
        allowed = verified.allowed if self.tolerance is None else self.tolerance
        within = worst.deviation is not None and worst.deviation <= allowed
        if self.json:
            print_json(self._content(verified, allowed))
        else:
            print_tables([self._table(verified, allowed)])
        if within:
            return DONE
        off = "not finite" if worst.deviation is None else f"{worst.deviation:.2g} of its norm off"
        rounding = "" if self.float64 else " See with --float64 whether that is rounding, which then all but vanishes."
        return failed(f"{worst.parameter} is {off} on rank {worst.rank}, and {allowed:.2g} is allowed.{rounding}")

    def _job(self) -> Job:
        from steepest.lab.runs.verify import Job, read_layout

        with checking_usage():
            return Job(
                model=self.model,
                method=self.method,
                options=dict(self.set),
                layout=read_layout(self.mesh),
                steps=self.steps,
                seed=self.seed,
                float64=self.float64,
                device=self.device,
                threads=self.threads,
                timeout_s=self.timeout,
            )

    def _content(self, verified: Verified, allowed: float) -> dict[str, object]:
        from msgspec.structs import asdict

        return {
            "mesh": self.mesh,
            "model": self.model,
            "method": self.method,
            "steps": self.steps,
            "allowed": allowed,
            "rounding": verified.alone.deviation,
            "deviation": verified.worst.deviation,
            "parameter": verified.worst.parameter,
            "imbalance": verified.worst.imbalance,
            "alone": asdict(verified.alone),
            "ranks": [asdict(one) for one in verified.ranks],
        }

    def _table(self, verified: Verified, allowed: float) -> Table:
        columns = ("", "deviation", "sent/step", "most", "agreed/step", "step ms", "matrices", "GFLOP/step")
        rows = [_row("one process", verified.alone), *(_row(f"rank {one.rank}", one) for one in verified.ranks)]
        worst = verified.worst
        off = math.inf if worst.deviation is None else worst.deviation
        notes = [
            f"Largest deviation {off:.2g} of a weight's norm, at {worst.parameter}; {allowed:.2g} is allowed.",
            "The deviation of one process is from itself, begun with weights that are off by their last bit: rounding.",
            f"Imbalance of the polar factors' work {worst.imbalance:.2f}: the largest of a rank over the mean.",
        ]
        if self.device == "cpu":
            notes.append("Times are of ranks that share this processor.")
        title = f"{self.method}, {self.mesh}: {self.steps} steps"
        return Table(title, columns, rows, notes)


def _row(name: str, one: RankReport) -> list[str]:
    return [
        name,
        "not finite" if one.deviation is None else f"{one.deviation:.1e}",
        f"{one.sent_bytes:,.0f} B",
        f"{one.most_bytes:,} B",
        f"{one.agreed_bytes:,.0f} B",
        f"{1e3 * one.step_s:.2f}",
        str(one.orthogonalised),
        f"{one.flops / 1e9:.3g}",
    ]


COMMAND = Verify
