"""`steepest plan`: which parameter is optimised how, and what a step takes on each of many ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from steepest.lab.cli.command import Arg, Command
from steepest.lab.cli.options import AsJson, Assigned, OnTask, checking_usage, count, positive
from steepest.lab.cli.outcome import DONE, Table, print_json, print_tables
from steepest.lab.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from steepest.lab.bench.many_ranks import Machine, Planned
    from steepest.optim import SteepestDescent

# spelled out, so that --help does not wait for torch; a test compares them with the lab's
MODELS = "gpt2, llama-8b, llama-70b, qwen3-moe, qwen3-moe-235b"
UNITS = ("B", "kB", "MB", "GB", "TB")
COLUMNS = (
    "ranks",
    "layout",
    "weights",
    "gradients",
    "state",
    "temporaries",
    "TFLOP",
    "imbalance",
    "sent",
    "received",
    "loads",
    "step",
    "share",
)
OF_RANKS = ("world", "exchange_dtype", "experts_per_token", "tokens", "flops", "bandwidth", "memory_bandwidth")

Ranks = Annotated[int, functools.partial(count, most=2**20)]
Positive = Annotated[float, positive]
Wire = Literal["float32", "bfloat16"]


class _Model(NamedTuple):
    """What is planned for."""

    title: str
    module: nn.Module
    experts_per_token: int | None


class Plan(Command, OnTask, AsJson):
    """Print which parameter is optimised how, and why; or, with --layout, what a step takes on each rank.

    --layout arranges ranks: ddp=8, fsdp=8 or hsdp=2x8 (replicas x shards); beside the last two tp=2, or ep=2 for
    experts. N in place of a number is what the others leave of --world. Printed are then, for the rank with most: bytes
    of weights, gradients, state, and temporaries of the step; operations of the directions; bytes sent and received;
    time of the step and its share of a training step, as docs/planning.md predicts them. No process is started.

    A function that --model names takes nothing and returns a module, or a tuple that begins with one. It is imported,
    and run on torch's meta device, with all of your rights: name code that you trust. The current directory is searched
    last.

    examples:
      steepest plan --task text
      steepest plan --task digits --method adam --json
      steepest plan --model llama-8b --layout fsdp=8
      steepest plan --model llama-70b --layout fsdp=N,tp=8 --world 64 512 4096
      steepest plan --model mypackage.models:build --layout hsdp=Nx8 --world 64 --method newton-muon
    """

    model: Annotated[str | None, Arg(f"{MODELS}, or package.module:function; instead of a task's", "WHERE")] = None
    method: Annotated[str, Arg("a method of this library")] = "muon"
    set: Annotated[tuple[Assigned, ...], Arg("change an option", "OPTION=VALUE", "repeated")] = ()
    layout: Annotated[str | None, Arg("of the ranks, such as fsdp=8,tp=2", "AXIS=N")] = None
    world: Annotated[tuple[Ranks, ...], Arg("numbers of ranks, one row each; default: what the layout says", "N")] = ()
    exchange_dtype: Annotated[Wire | None, Arg("on the wire; default: that of the averages")] = None
    experts_per_token: Annotated[Ranks | None, Arg("of --model package.module:function; default: all", "N")] = None
    tokens: Annotated[Positive, Arg("per rank in a training step; default: 8192")] = 8192.0
    flops: Annotated[Positive, Arg("operations per second that a rank reaches; default: 4e14")] = 4e14
    bandwidth: Annotated[Positive, Arg("bytes per second from a rank, and as many to it; default: 5e10")] = 5e10
    memory_bandwidth: Annotated[Positive, Arg("bytes per second of a rank's memory; default: 3e12")] = 3e12
    json: Annotated[bool, Arg("print rows as JSON")] = False

    def run(self) -> int:
        """Print it."""
        from steepest.anatomy import route
        from steepest.lab.bench.many_ranks import DTYPES, Machine, active_parameters, plan_ranks, read_axes

        with checking_usage():
            self._check()
            layouts = [read_axes(self.layout, world) for world in self.world or (None,)] if self.layout else []
            model = self._model()
            optimizer = self._optimizer(model.module)
        if not layouts:
            print(optimizer.plan.to_json() if self.json else optimizer.plan)
            return DONE
        machine = Machine(self.flops, self.bandwidth, self.memory_bandwidth, self.tokens)
        active = active_parameters(route(model.module), model.experts_per_token)
        wire = None if self.exchange_dtype is None else DTYPES[self.exchange_dtype]
        with checking_usage():
            planned = [plan_ranks(optimizer, axes, wire=wire) for axes in layouts]
        rows = [_row(one, machine, active) for one in planned]
        if self.json:
            return print_json(self._content(model, active, rows))
        return print_tables([self._table(model, active, rows)])

    def _check(self) -> None:
        """Refuse what would not count."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if self.layout is None and (given := [name for name in OF_RANKS if getattr(self, name) != defaults[name]]):
            raise UsageError(f"--{given[0].replace('_', '-')} is about ranks: give --layout, such as fsdp=8, too.")
        if self.experts_per_token is not None and (self.model is None or ":" not in self.model):
            raise UsageError("--experts-per-token is for --model package.module:function; of others it is known.")

    def _model(self) -> _Model:
        from steepest.lab.models.published import published

        if self.model is None:
            return _Model(f"{self.task} {self.preset}", self.load().build_model(0), None)
        if ":" in self.model:
            return _Model(self.model, built(self.model), self.experts_per_token)
        one = published(self.model)
        return _Model(one.title, one.on_meta(), one.sizes.experts_per_token or None)

    def _optimizer(self, module: nn.Module) -> SteepestDescent:
        from steepest.lab.methods import build_optimizer, resolve
        from steepest.optim import SteepestDescent

        task, preset = (self.task, self.preset) if self.model is None else ("", "")
        resolved = resolve(self.method, task=task, preset=preset, options=dict(self.set))
        optimizer = build_optimizer(self.method, module, resolved.options)
        if not isinstance(optimizer, SteepestDescent):
            raise UsageError(f"{self.method!r} is not a method of this library and has no plan; try muon or adam.")
        return optimizer

    def _content(self, model: _Model, active: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
        return {
            "model": model.title,
            "method": self.method,
            "options": dict(self.set),
            "parameters": sum(one.numel() for one in model.module.parameters()),
            "active_parameters": active,
            "exchange_dtype": self.exchange_dtype,
            "tokens": self.tokens,
            "flops_per_second": self.flops,
            "bandwidth": self.bandwidth,
            "memory_bandwidth": self.memory_bandwidth,
            "rows": rows,
        }

    def _table(self, model: _Model, active: float, rows: Sequence[Mapping[str, Any]]) -> Table:
        total = sum(one.numel() for one in model.module.parameters())
        cells = [
            [
                f"{row['ranks']:,}",
                row["layout"],
                *(_bytes(row[name]["most"]) for name in ("parameters", "gradients", "state", "temporaries")),
                f"{row['flops']['most'] / 1e12:.3g}",
                f"{row['imbalance']:.2f}",
                *(_bytes(row[name]["most"]) for name in ("sent", "received")),
                f"{row['loads']}",
                _seconds(row["step_s"]),
                f"{row['share']:.1%}",
            ]
            for row in rows
        ]
        notes = [
            "Of the rank with most; state: averages, moments of layer inputs and what is made of these, and directions "
            "that diagnostics() looks at.",
            f"Time: {self.flops:.3g} operations per second, {_bytes(self.bandwidth)}/s from and to a rank, "
            f"{_bytes(self.memory_bandwidth)}/s of its memory; share: of a training step of {self.tokens:,.0f} tokens "
            "per rank.",
        ]
        title = f"{model.title}, {self.method}: {total / 1e9:.4g} B parameters, {active / 1e9:.4g} B active"
        return Table(title, COLUMNS, cells, notes)


def built(target: str) -> nn.Module:
    """What a function makes, without numbers.

    Args:
        target: "package.module:function".

    Raises:
        UsageError: If there is none, it cannot be called, or it returns something else.
    """
    import torch
    from torch import nn

    from steepest.lab.models.brought import found_function

    function = found_function(target)
    try:
        with torch.device("meta"), contextlib.redirect_stdout(sys.stderr):
            made = function()
    except Exception as wrong:
        raise UsageError(
            f"--model {target} cannot be called on torch's meta device, where no tensor has numbers: {wrong}. Name a "
            "function that makes the model alone."
        ) from wrong
    first: object = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(first, nn.Module):
        kind = type(first).__name__
        raise UsageError(f"--model {target} returned {kind}; it must return a module, or a tuple that begins with one.")
    return first


def _row(planned: Planned, machine: Machine, active: float) -> dict[str, Any]:
    """Numbers of a layout: of the rank with most, and the mean over ranks."""
    from steepest.lab.bench.many_ranks import seconds

    step, training = seconds(planned, machine, active=active)
    vectors = {
        "parameters": planned.parameters,
        "gradients": planned.gradients,
        "averages": planned.averages,
        "moments": planned.moments,
        "powers": planned.powers,
        "samples": planned.samples,
        "state": planned.averages + planned.moments + planned.powers + planned.samples,
        "sums": planned.sums,
        "temporaries": planned.memory - planned.kept - planned.samples,
        "memory": planned.memory,
        "flops": planned.flops,
        "sent": planned.sent,
        "received": planned.received,
    }
    return {
        "ranks": planned.axes.ranks,
        "layout": planned.axes.text,
        **{name: {"most": float(one.max()), "mean": float(one.mean())} for name, one in vectors.items()},
        "agreed": planned.agreed_bytes,
        "imbalance": planned.imbalance,
        "loads": len(planned.turns),
        "step_s": step,
        "forward_backward_s": training,
        "share": step / (step + training),
    }


def _bytes(number: float) -> str:
    """Three digits and a unit.

    Examples:
        >>> _bytes(1_234_567), _bytes(0), _bytes(999.6e9)
        ('1.23 MB', '0 B', '1 TB')
    """
    place = 0
    while float(f"{number:.3g}") >= 1000 and place < len(UNITS) - 1:
        number, place = number / 1000, place + 1
    return f"{number:.3g} {UNITS[place]}"


def _seconds(number: float) -> str:
    return f"{number:.3g} s" if number >= 1 else f"{1e3 * number:.3g} ms"
