"""`steepest bench COMMAND`: measured on this machine, against others where they are installed.

Every benchmark prints tables or JSON, and leaves JSON, CSV and, where there is something to see, a PNG in a directory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shlex
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from steepest.lab.cli.command import Arg, Command, Group, spelled_out
from steepest.lab.cli.options import (
    AsJson,
    Count,
    Device,
    File,
    Names,
    OnTask,
    OnThreads,
    Seed,
    checking_usage,
    count,
    found_device,
    positive,
    racers,
)
from steepest.lab.cli.outcome import Table, failed, print_json, print_tables
from steepest.lab.errors import UsageError
from steepest.lab.tasks import TASKS

if TYPE_CHECKING:
    from steepest.lab.bench import Case
    from steepest.lab.bench.gpu import Findings

Row = Mapping[str, Any]  # a line of the CSV: values by column
Columns = Sequence[tuple[str, str]]  # headings, each with the format of its cells, which names columns of the CSV

# spelled out, so that --help does not wait for torch; a test compares them with the library's
SHAPES = "gpt2, llama, conv, many-small, gpt2-124m, gpt2-350m, llama-1b"
CONTESTANTS = (
    "steepest, steepest-jordan, steepest-bf16, torch, torch-fp32, pytorch-optimizer, heavyball, heavyball-eager"
)
OTHERS = ("newton-muon", "muonadam-momo", "muonmax", "muonmax-momo")  # timed besides the methods that race
QUIET = 0.9  # processor time relative to the wall's
MIB = 2**20

Width = Annotated[tuple[Count, ...], Arg("one case each; default: the set's", "W")]
Layers = Annotated[Count | None, Arg("default: the set's", "L")]


@dataclass(frozen=True)
class Measured:
    """Of a benchmark.

    Args:
        content: All of it, for the JSON.
        rows: Of the CSV, at least one.
        tables: What people read.
        draw: Makes the PNG; None: there is none.
        chosen: What was taken for options that were not given.
        page: Makes the HTML of command and environment; None: there is none.
        wrong: What is not as it should be; None: nothing.
    """

    content: Mapping[str, object]
    rows: Sequence[Row]
    tables: Sequence[Table]
    draw: Callable[[], bytes] | None = None
    chosen: Mapping[str, object] = field(default_factory=dict[str, object])
    page: Callable[[str, Mapping[str, object]], str] | None = None
    wrong: str | None = None


class Bench(Command, AsJson):
    """Measures something."""

    name: ClassVar[str]
    files: ClassVar[str | None] = None  # their name, if it is another

    out: Annotated[File | None, Arg("where its JSON and CSV go, and its PNG or HTML if there is one", "DIR")] = None

    @abstractmethod
    def measure(self) -> Measured:
        """Do it.

        Raises:
            UsageError: If the options cannot be meant.
        """

    def run(self) -> int:
        """Measure, print and write; somebody else's files are refused before anything is measured."""
        from steepest.lab.disk.ours import refusal
        from steepest.lab.runs.environment import describe_environment

        if self.out is not None and (problem := refusal(self.out, "bench")) is not None:
            raise UsageError(problem)
        environment = describe_environment()
        if isinstance(self, OnThreads):
            import torch

            torch.set_num_threads(self.threads)
            environment["threads"] = self.threads
        measured = self.measure()
        words = spelled_out(dataclasses.replace(self, **measured.chosen), but=("out", "json"))
        command = shlex.join(["steepest", "bench", self.name, *words])
        origin = {"command": command, "commit": environment["git_commit"], "environment": environment}
        content = {**origin, **measured.content}
        code = print_json(content) if self.json else print_tables(measured.tables)
        if self.out is not None:
            page = None if measured.page is None else measured.page(command, environment)
            _write(self.out, self.files or self.name, content, measured, page)
        return code if measured.wrong is None else failed(measured.wrong)


def _write(directory: Path, name: str, content: Mapping[str, object], measured: Measured, page: str | None) -> None:
    from steepest.lab.disk.files import make_directory, write_whole
    from steepest.lab.report.sheet import sheet

    columns = list(dict.fromkeys(column for row in measured.rows for column in row))
    files: dict[str, str | bytes] = {
        "json": json.dumps(content, indent=2, allow_nan=False) + "\n",
        "csv": sheet(columns, ([row.get(column) for column in columns] for row in measured.rows)),
    }
    if measured.draw is not None:
        files["png"] = measured.draw()
    if page is not None:
        files["html"] = page
    make_directory(directory)
    for ending, text in files.items():
        write_whole(directory / f"{name}.{ending}", text)
        print(directory / f"{name}.{ending}", file=sys.stderr)


def _table(title: str, columns: Columns, rows: Iterable[Row], notes: Sequence[str] = (), *, missing: str = "") -> Table:
    """A table in which rows with a reason have no numbers."""
    cells = [
        [
            form.format_map(row) if not index or row.get("reason") is None else missing
            for index, (_, form) in enumerate(columns)
        ]
        for row in rows
    ]
    return Table(title, [heading for heading, _ in columns], cells, notes)


class Step(Bench, OnThreads):
    """Time steps of Muon in turns with others', and measure their memory and accuracy.

    examples:
      steepest bench step
      steepest bench step --shapes gpt2 --width 256 512 --pairs 30 --out out/step
      steepest bench step --shapes many-small --peers torch,torch-fp32 --json

    Peers come with: pip install 'steepest[bench]'. heavyball compiles itself first, which takes minutes.
    """

    name = "step"
    columns: ClassVar[Columns] = (
        ("contestant", "{contestant}"),
        ("products", "{products}"),
        ("ms", "{milliseconds_median:.4g} ({milliseconds_low:.4g} to {milliseconds_high:.4g})"),
        ("/ steepest", "{ratio_median:.3f} ({ratio_low:.3f} to {ratio_high:.3f})"),
        ("GFLOP/s", "{gflops_per_second:.1f}"),
        ("/ floor", "{of_floor:.2f}"),
        ("/ limit", "{of_limit:.2f}"),
        ("extra MiB", "{mib:.2f}"),
        ("/ bucket", "{of_bucket:.2f}"),
        ("orthogonality", "{gaussian_orthogonality_error:.3f} | {decaying_orthogonality_error:.3f}"),
        ("distance", "{gaussian_distance:.3f} | {decaying_distance:.3f}"),
        ("alignment", "{gaussian_alignment:.3f} | {decaying_alignment:.3f}"),
        (
            "singular values",
            "{gaussian_smallest:.2f} to {gaussian_largest:.2f} | {decaying_smallest:.2f} to {decaying_largest:.2f}",
        ),
    )

    shapes: Annotated[str, Arg(SHAPES)] = "gpt2"
    width: Width = ()
    layers: Layers = None
    peers: Annotated[Names, Arg(f"all, or of {CONTESTANTS}", "A,B,...")] = ("all",)
    pairs: Annotated[Count, Arg("rounds", "N")] = 20
    warm_up: Annotated[Count, Arg("rounds before", "N")] = 3
    dtype: Annotated[str, Arg("of the weights: float32 or bfloat16")] = "float32"
    device: Device = "cpu"
    seed: Annotated[Seed, Arg("of weights and gradients")] = 0

    def measure(self) -> Measured:
        """Every width."""
        from steepest.lab import bench
        from steepest.lab.bench.pictures import step_png

        names = {own.name for own in dataclasses.fields(bench.Bench)} - {"widths", "device", "exact"}
        with checking_usage():
            own = {name: getattr(self, name) for name in names}
            asked = bench.Bench(widths=self.width or None, device=found_device(self.device), **own)
        cases = bench.measure(asked, tell=lambda text: print(text, file=sys.stderr))
        rows = [
            {"shapes": case.shapes, "width": case.width, **flat(asdict(row))} for case in cases for row in case.rows
        ]
        tables = [self._table(case, [row for row in rows if row["width"] == case.width]) for case in cases]
        content = {"bench": asdict(asked), "cases": list(map(asdict, cases))}
        widths = tuple(width for width in asked.cases() if width is not None)
        return Measured(content, rows, tables, lambda: step_png(cases), {"width": widths, "device": asked.device})

    def _table(self, case: Case, rows: Sequence[Row]) -> Table:
        notes = [f"{row['contestant']} has no numbers. {row['reason']}" for row in rows if "reason" in row]
        for dtype, floor in case.floors.items():
            forms = "; ".join(dict.fromkeys(floor.forms.values()))
            took = f"{1e3 * floor.seconds:.4g} ms, {floor.flops / 1e9:.3g} GFLOP ({forms})"
            limit = f"{1e3 * case.limits[dtype].seconds:.4g} ms"
            notes += [f"floor of {dtype} products: {took}", f"limit, the same with the fastest product found: {limit}"]
        busy = "" if case.cpu_share > QUIET else "; the machine was busy with something else: repeat this"
        notes.append(f"CPU time / wall time of the rounds: {case.cpu_share:.2f}{busy}")
        notes.append("Accuracy: on normal gradients, then on gradients of condition 1000.\n")
        size = "" if case.width is None else f" {case.width}"
        title = f"{case.shapes}{size}: {case.matrices} matrices, {case.parameters / 1e6:.3g} M entries"
        shown = ({**row, "mib": row.get("peak_bytes", 0) / MIB} for row in rows)
        return _table(title, self.columns, shown, notes)


def flat(record: Row) -> dict[str, Any]:
    """Records within a record become columns of their own; what is None is left out.

    Examples:
        >>> flat({"ratio": {"low": 1, "high": 2}, "note": "", "reason": None})
        {'ratio_low': 1, 'ratio_high': 2, 'note': ''}
    """
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}_{part}": own for part, own in value.items()}
        elif value is not None:
            found[name] = value
    return found


class Train(Bench, OnThreads):
    """Time training steps of several methods in turns, and tell the optimizer's share.

    examples:
      steepest bench train
      steepest bench train --preset demo small --methods muon,newton-muon,muonadam-momo --threads 2 --out out/share

    Every round trains each method for one step on the same batch, in another order; ratios are taken within rounds. A
    method that refreshes something every N steps does it in one step of four here; medians of ordinary steps and of
    refreshes are weighed as (N - 1) : 1.
    """

    name = "train"
    columns: ClassVar[Columns] = (
        ("method", "{method}{refresh}"),
        ("fwd+bwd ms", "{forward_backward_ms:.2f}"),
        ("optimizer ms", "{optimizer_ms:.2f}"),
        ("quartiles", "{optimizer_ms_low:.2f} to {optimizer_ms_high:.2f}"),
        ("share", "{share:.1%}"),
        ("step / muon's", "{step_ratio:.3f}"),
        ("optimizer / muon's", "{optimizer_ratio:.3f}"),
    )

    task: Annotated[str, Arg(", ".join(TASKS))] = "text"
    preset: Annotated[tuple[str, ...], Arg("demo, tiny and small; default: demo")] = ("demo",)
    data: Annotated[File | None, Arg("a file or folder for text, cifar10, fineweb", "PATH")] = None
    methods: Annotated[
        Names | None, Arg(f"of %(known)s; default: {','.join(racers('text'))},{','.join(OTHERS)} on text")
    ] = None
    steps: Annotated[Count, Arg("of each method", "N")] = 32
    every: Annotated[Count, Arg("steps per refresh", "N")] = 32
    device: Device = "cpu"

    def measure(self) -> Measured:
        """Every preset."""
        from steepest.lab.bench.pictures import train_png
        from steepest.lab.bench.train_share import summarize, time_steps
        from steepest.lab.tasks import make_task

        methods = self.methods or (*racers(self.task), *OTHERS)
        device = found_device(self.device)
        with checking_usage():
            tasks = [make_task(self.task, preset, data=self.data) for preset in dict.fromkeys(self.preset)]
            seconds = {task.preset: time_steps(task, methods, steps=self.steps, device=device) for task in tasks}
            shares = {preset: summarize(own, every=self.every) for preset, own in seconds.items()}
        rows: list[Row] = [
            {"task": self.task, "preset": preset, **share.columns()} for preset, own in shares.items() for share in own
        ]
        raw = {
            preset: {method: list(map(asdict, own)) for method, own in by_method.items()}
            for preset, by_method in seconds.items()
        }
        shown = [{**row, "refresh": f" (a refresh in {row['every']})" if row["every"] else ""} for row in rows]
        title = f"{self.steps} training steps of each method, {self.threads} thread(s)"
        tables = [
            _table(f"{self.task} {preset}: {title}", self.columns, [row for row in shown if row["preset"] == preset])
            for preset in shares
        ]
        content = {"steps": self.steps, "rows": rows, "seconds": raw}
        return Measured(content, rows, tables, lambda: train_png(shares), {"methods": methods, "device": device})


class Ranks(Bench):
    """Time a step of Muon that several processes share, beside one process alone and every rank doing everything.

    examples:
      steepest bench ranks
      steepest bench ranks --ranks 2 --width 512 --layers 4 --rounds 15 --out out/ranks

    Each process has one thread. "alone" is one process while the others wait; "everything" gathers all gradients on
    every rank, as is done without owners.
    """

    name = "ranks"
    columns: ClassVar[Columns] = (
        ("way", "{way}"),
        ("ms", "{milliseconds_median:.4g} ({milliseconds_low:.4g} to {milliseconds_high:.4g})"),
        ("ratio", "{ratio_median:.3f} ({ratio_low:.3f} to {ratio_high:.3f}) of {beside}"),
        ("sent MiB", "{mib:.1f}"),
        ("imbalance", "{imbalance:.3f}"),
    )

    ranks: Annotated[Count, Arg("processes", "N")] = 2
    shapes: Annotated[str, Arg(SHAPES)] = "gpt2"
    width: Annotated[Count, Arg("of the model", "W")] = 512
    layers: Annotated[Count, Arg("of the model", "L")] = 4
    rounds: Annotated[Count, Arg("that count", "N")] = 15

    def measure(self) -> Measured:
        """All ways."""
        from steepest.lab.bench.shapes import make_shapes
        from steepest.lab.bench.shared import measure_shared

        with checking_usage():
            if self.rounds < 2:
                raise ValueError(f"bench ranks takes at least 2 rounds, got {self.rounds}.")
            sizes = make_shapes(self.shapes, width=self.width, layers=self.layers)
        found, seconds = measure_shared(sizes, ranks=self.ranks, rounds=self.rounds)
        rows: list[Row] = [flat(asdict(row)) for row in found]
        title = f"{self.shapes} {self.width}: {len(sizes)} matrices, {self.ranks} processes of one thread"
        table = _table(title, self.columns, [{**row, "mib": row["sent_bytes"] / MIB} for row in rows])
        return Measured({"rows": rows, "seconds": seconds}, rows, [table])


class Scaling(Bench, OnThreads):
    """Time steps of Muon against width, layers and aspect ratio, beside the prediction of the cost model.

    examples:
      steepest bench scaling --out out/scaling
      steepest bench scaling --widths 128 256 --layers 1 4 --aspects 1 4 --rounds 5 --threads 2

    The prediction knows how fast this machine computes polar factors of square matrices, passes over memory, transposes
    and calls, and the counts of a step; it has seen no step.
    """

    name = "scaling"
    columns: ClassVar[Columns] = (
        ("point", "{axis} {value}"),
        ("matrices", "{matrices}"),
        ("ms", "{ms:.2f}"),
        ("quartiles", "{ms_low:.2f} to {ms_high:.2f}"),
        ("predicted ms", "{predicted_ms:.2f}"),
        ("error", "{error:+.1%}"),
        ("extra MiB", "{extra:.1f}"),
        ("state MiB", "{state:.1f}"),
        ("steps", "{steps}"),
    )

    widths: Annotated[tuple[Count, ...], Arg("of one layer; default: 128 to 1536", "W")] = ()
    layers: Annotated[tuple[Count, ...], Arg("at width 256; default: 1 2 4 8 16", "L")] = ()
    aspects: Annotated[tuple[Count, ...], Arg("at short side 256; default: 1 2 4 8 16", "A")] = ()
    rounds: Annotated[Count, Arg("most steps of a point")] = 15

    def measure(self) -> Measured:
        """Every point."""
        from steepest.lab.bench.pictures import scaling_png
        from steepest.lab.bench.scaling import measure_scaling, points

        chosen = {"widths": self.widths, "layers": self.layers, "aspects": self.aspects}
        with checking_usage():
            at = points(**{name: values for name, values in chosen.items() if values})
            found, machine = measure_scaling(at, rounds=self.rounds)
        rows = [row.columns() for row in found]
        worst = max(found, key=lambda row: abs(row.error))
        within = f"{sum(abs(row.error) <= 0.25 for row in found)} of {len(found)}"
        note = f"Within 25 % of the prediction: {within}; the worst is {worst.point.name}: {worst.error:+.1%}."
        shown = [{**row, "extra": row["peak_extra_bytes"] / MIB, "state": row["state_bytes"] / MIB} for row in rows]
        table = _table(f"Steps of Muon, float32, {self.threads} thread(s)", self.columns, shown, [note])
        raw = {row.point.name: row.seconds for row in found}
        content = {"machine": asdict(machine), "rows": rows, "seconds": raw}
        return Measured(content, rows, [table], lambda: scaling_png(found))


def counts(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [count(part.strip()) for part in text.split(",")]


class Accuracy(Bench, OnTask, OnThreads):
    """Train with Muon, and compare what sets of coefficients make of its momenta with their polar factors.

    examples:
      steepest bench accuracy --out out/accuracy
      steepest bench accuracy --task digits --steps 60 --at 10,60 --dtype bfloat16

    Each set is compared with a singular value decomposition in float64, on the momenta of Muon with the lab's tuned
    options, and on normal matrices of the same shapes.
    """

    name = "accuracy"
    columns: ClassVar[Columns] = (
        ("coefficients", "{coefficients}"),
        ("MFLOP / matrix", "{mflop:.1f}"),
        ("singular values", "{smallest:.4f} to {largest:.4f}"),
        ("median", "{median:.4f}"),
        ("distance", "{distance:.4f}"),
        ("orthogonality", "{orthogonality_error:.4f}"),
        ("alignment", "{alignment:.4f}"),
    )
    spectra: ClassVar[Columns] = (
        ("matrices of", "{source}"),
        ("count", "{matrices}"),
        ("Frobenius / s1", "{frobenius:.4f}"),
        ("Schatten-8 / s1", "{schatten8:.4f}"),
        ("median s / s1", "{median:.4f}"),
        ("tenth percentile", "{tenth:.4f}"),
    )

    steps: Annotated[Count, Arg("of the run", "N")] = 150
    at: Annotated[tuple[int, ...], counts, Arg("steps; default: 20,80,150", "A,B")] = (20, 80, 150)
    dtype: Annotated[str, Arg("of products: float32 or bfloat16")] = "float32"
    seed: Annotated[Seed, Arg()] = 0

    def measure(self) -> Measured:
        """Train, and compare."""
        from steepest.lab.bench.momenta import collect_momenta, compare
        from steepest.lab.bench.pictures import momenta_png
        from steepest.lab.bench.step import DTYPES
        from steepest.names import unknown_name

        with checking_usage():
            if self.dtype not in DTYPES:
                raise ValueError(unknown_name("dtype", self.dtype, DTYPES))
            momenta = collect_momenta(self.load(), steps=self.steps, at=self.at, seed=self.seed)
        found, findings = compare(momenta, dtype=DTYPES[self.dtype], seed=self.seed)
        spectra = list(map(asdict, found))
        rows: list[Row] = [{"dtype": self.dtype, **asdict(one)} for one in findings]
        shown = [{**row, "mflop": (row["flops"] or 0) / 1e6} for row in rows]
        tables = [
            _table(
                f"{self.task} {self.preset}, {self.dtype} products: {own.source}, {own.matrices} matrices",
                self.columns,
                [row for row in shown if row["source"] == own.source],
                missing="refused",
            )
            for own in found
        ]
        refused = [f"Refused: {why}" for why in dict.fromkeys(one.reason for one in findings) if why is not None]
        last = _table("Singular values and norms of the matrices", self.spectra, spectra, refused)
        return Measured({"spectra": spectra, "rows": rows}, rows, [*tables, last], lambda: momenta_png(findings))


class Passes(Bench, OnThreads):
    """Time the momentum and decay passes of a step in turns with plain calls of torch.

    examples:
      steepest bench passes --width 256 512 --out out/passes
      steepest bench passes --shapes many-small --pairs 200

    Plain is one torch._foreach_lerp_ of all momenta and one torch._foreach_add_ of all weights. Ours are the library's
    own functions, called for one load after the other, as a step does. Directions are there before; nothing else is
    timed.
    """

    name = "passes"
    columns: ClassVar[Columns] = (
        ("passes", "{passes}"),
        ("ms", "{ms:.3f}"),
        ("quartiles", "{ms_low:.3f} to {ms_high:.3f}"),
        ("/ plain", "{ratio:.3f}"),
        ("quartiles", "{ratio_low:.3f} to {ratio_high:.3f}"),
    )

    shapes: Annotated[str, Arg(SHAPES)] = "gpt2"
    width: Width = ()
    layers: Layers = None
    pairs: Annotated[Count, Arg("rounds", "N")] = 100
    seed: Annotated[Seed, Arg("of the numbers")] = 0

    def measure(self) -> Measured:
        """Every width."""
        from steepest.lab import bench
        from steepest.lab.bench.passes import measure_passes
        from steepest.lab.bench.pictures import passes_png

        with checking_usage():
            asked = bench.Bench(self.shapes, self.width or None, self.layers, pairs=self.pairs, seed=self.seed)
        cases = {
            self.shapes if width is None else f"{self.shapes} {width}": measure_passes(
                asked.shapes_of(width), pairs=self.pairs, seed=self.seed
            )
            for width in asked.cases()
        }
        rows = [
            {"case": title, "passes": row.way, **row.ms.columns("ms"), **row.ratio.columns("ratio")}
            for title, case in cases.items()
            for row in case.rows
        ]
        tables = [
            _table(
                f"{title}: {case.matrices} matrices, {case.entries / 1e6:.3g} M entries, {case.loads} load(s), "
                f"float32, {self.threads} thread(s)",
                self.columns,
                [row for row in rows if row["case"] == title],
            )
            for title, case in cases.items()
        ]
        whole = {title: asdict(case) for title, case in cases.items()}
        content = {"threads": self.threads, "pairs": self.pairs, "rows": rows, "cases": whole}
        return Measured(content, rows, tables, lambda: passes_png(cases))


def _as_they_are(name: str, rows: Sequence[Row], chosen: Mapping[str, object] | None = None) -> Measured:
    table = Table(name, list(rows[0]), [list(map(str, row.values())) for row in rows])
    return Measured({"rows": rows}, rows, [table], chosen=chosen or {})


class Momo(Bench, OnTask, OnThreads):
    """Time training steps with Momo in turns with those without.

    examples:
      steepest bench momo --pairs 60 --out out/momo_cost

    Each pair is one training step of a method and one of its Momo version, on the same weights and batch, in
    alternating order; the ratio is the median over pairs.
    """

    name = "momo"

    pairs: Annotated[int, functools.partial(count, least=2), Arg("of steps", "N")] = 60
    device: Device = "cpu"

    def measure(self) -> Measured:
        """Every recipe, with both kinds of dual norms."""
        from steepest.lab.bench.cost import RECIPES, momo_cost

        with checking_usage():
            task = self.load()
        device = found_device(self.device)
        where = {"preset": self.preset, "threads": self.threads}
        duals = ("stale", "cached")
        rows = [
            {**where, **momo_cost(task, name, dual, pairs=self.pairs, device=device)}
            for name in RECIPES
            for dual in duals
        ]
        return _as_they_are(self.name, rows, {"device": device})


class NewtonMuon(Bench, OnThreads):
    """Time steps of Newton-Muon in turns with those of Muon.

    examples:
      steepest bench newton-muon --width 256 --tokens 2048 --pairs 24 --out out/newton_muon_cost

    Each pair is one training step of Muon and one of Newton-Muon. Steps that refresh are measured apart, one in four,
    and weighed as one in --every steps.
    """

    name = "newton-muon"
    files = "cost"

    width: Annotated[Count, Arg("", "W")] = 768
    layers: Annotated[Count, Arg("", "L")] = 1
    tokens: Annotated[tuple[Count, ...], Arg("of a step; default: 2048 8192", "N")] = (2048, 8192)
    every: Annotated[Count, Arg("steps per refresh", "N")] = 32
    pairs: Annotated[int, functools.partial(count, least=8), Arg("of steps", "N")] = 24  # two refreshes
    device: Device = "cpu"

    def measure(self) -> Measured:
        """Every case, at every number of tokens."""
        from steepest.lab.bench.cost import CASES, newton_muon_cost, random_tokens
        from steepest.lab.models.gpt import GPTConfig

        options: dict[str, Any] = {"every": self.every, "pairs": self.pairs, "device": found_device(self.device)}
        config = GPTConfig(vocabulary=256, layers=self.layers, width=self.width, head_size=64)
        rows = [
            {
                "threads": self.threads,
                **newton_muon_cost(name, config, random_tokens(tokens), **options),
            }
            for tokens in self.tokens
            for name in CASES
        ]
        return _as_they_are("cost", rows, {"device": options["device"]})


class Coverage(Bench):
    """How often intervals of the critical batch size hold the truth, on made-up runs.

    examples:
      steepest bench coverage --replications 20 --out out/coverage

    Runs with known answers are made up and fitted, many times: how often do 90% intervals of the critical batch size
    hold the truth? Where a range is answered instead of a number, it counts in the column "contained".
    """

    name = "coverage"

    replications: Annotated[Count, Arg("", "N")] = 500
    resamples: Annotated[int, functools.partial(count, least=100), Arg("", "N")] = 500  # for intervals of 90%

    def measure(self) -> Measured:
        """Every setting."""
        from steepest.lab.studies.batch.coverage import coverage_row, measure, settings

        many = {"replications": self.replications, "resamples": self.resamples}
        rows = [coverage_row(setting, measure(setting, **many), self.replications) for setting in settings()]
        return _as_they_are(self.name, rows)


class Gpu(Bench, OnThreads):
    """Check and measure everything on one GPU: numbers, steps, graphs, memory, a training. About eight minutes.

    examples:
      steepest bench gpu --out out/gpu
      steepest bench gpu --device cpu --rehearsal

    Coefficients in every type are held against their certificates, and steps of every method against float64 on the
    CPU; the exit code is 1 where something is off. Steps of GPT-2 124M, 350M and Llama 1B are timed as they come
    and in CUDA graphs, beside torch.optim.Muon, a plain loop and the peers that are installed. What additions to Muon
    take is measured in training steps; then come two minutes of training, and compiled steps last.
    """

    name = "gpu"
    polars: ClassVar[Columns] = (
        ("coefficients", "{coefficients}"),
        ("products", "{dtype}"),
        ("worst with", "{form}, {matrix}"),
        ("certified", "{low:.4f} to {high:.4f}"),
        ("found", "{smallest:.4f} to {largest:.4f}"),
        ("beyond", "{beyond:.1e} of {allowed:.1e}"),
    )
    steps: ClassVar[Columns] = (
        ("method", "{method}"),
        ("products", "{products}"),
        ("farthest off", "{parameter}"),
        ("deviation", "{deviation:.1e} of {allowed:.1e}"),
    )
    times: ClassVar[Columns] = (
        ("contestant", "{contestant}"),
        ("products", "{products}"),
        ("ms", "{milliseconds_median:.4g} ({milliseconds_low:.4g} to {milliseconds_high:.4g})"),
        ("/ steepest", "{ratio_median:.3f} ({ratio_low:.3f} to {ratio_high:.3f})"),
        ("GFLOP/s", "{gflops_per_second:.0f}"),
        ("/ floor", "{of_floor:.2f}"),
        ("extra MiB", "{mib:.1f}"),
    )
    added: ClassVar[Columns] = (
        ("addition", "{addition}"),
        ("step ms", "{step_ms:.2f}"),
        ("optimizer ms", "{optimizer_ms:.2f}"),
        ("step / Muon's", "{step_ratio:.3f}"),
        ("optimizer / Muon's", "{optimizer_ratio:.3f}"),
        ("extra MiB", "{extra_mib:.1f}"),
    )
    trained: ClassVar[Columns] = (
        ("preset", "{preset}"),
        ("steps", "{steps}"),
        ("seconds", "{seconds:.1f}"),
        ("tokens / s", "{tokens_per_second:,.0f}"),
        ("loss", "{first_loss:.3f} to {last_loss:.3f}"),
        ("optimizer's share", "{optimizer_share:.1%}"),
        ("most MiB", "{mib:,.0f}"),
    )

    device: Device = "auto"
    rehearsal: Annotated[bool, Arg("tiny shapes, in less than a minute, on any machine")] = False
    minutes: Annotated[float, positive, Arg("after which no other part is begun", "M")] = 12.0

    def measure(self) -> Measured:
        """Every part."""
        from steepest.lab.bench.gpu import measure_gpu

        device = found_device(self.device)
        if device != "cuda" and not self.rehearsal:
            raise UsageError(
                f"bench gpu measures a GPU, and --device {self.device} is the {device} here. Run it on a machine with "
                "CUDA, or add --rehearsal to go through it here with tiny shapes."
            )
        found = measure_gpu(
            device,
            rehearsal=self.rehearsal,
            minutes=self.minutes,
            tell=lambda text: print(text, file=sys.stderr),
        )
        tables, rows = self._tables(found)
        wrong = f"Not as it should be: {', '.join(found.wrong)}." if found.wrong else None
        chosen = {"device": device}
        page = functools.partial(_gpu_page, found, tables)
        return Measured(found.content(), rows, tables, chosen=chosen, page=page, wrong=wrong)

    def _tables(self, found: Findings) -> tuple[list[Table], list[Row]]:
        where = f"{found.card}{', a rehearsal' if found.rehearsal else ''}"
        polars: list[dict[str, Any]] = [{**asdict(one), "fine": one.fine} for one in found.polars]
        steps: list[dict[str, Any]] = [{**asdict(one), "fine": one.fine} for one in found.steps]
        refused = dict.fromkeys(f"{row['coefficients']} in {row['dtype']}" for row in polars if row["allowed"] is None)
        tried = [row for row in polars if row["allowed"] is not None]
        worst: dict[tuple[str, str], dict[str, Any]] = {}
        for row in sorted(tried, key=lambda row: -math.inf if row["beyond"] is None else -row["beyond"]):
            worst.setdefault((row["coefficients"], row["dtype"]), row)
        sets = [worst[key] for key in dict.fromkeys((row["coefficients"], row["dtype"]) for row in tried)]
        notes = [f"Refused, as products in a wider type are needed: {', '.join(refused)}."] if refused else []
        notes.append(f"Symmetric products in bfloat16 are those of {found.symmetric or 'torch.matmul'}.")
        for row in steps:
            row["reason"] = None if row["deviation"] is not None else "not finite"
        tables = [
            _table(f"Singular values of polar factors, {where}", self.polars, sets, notes, missing="not finite"),
            _table("Steps of each method against float64 on the CPU", self.steps, steps, missing="not finite"),
        ]
        rows: list[Row] = [{"part": "polar", **row} for row in polars]
        rows += [{"part": "method", **row} for row in steps]
        for model, way, case in found.cases:
            own: list[dict[str, Any]] = [{"model": model, "taken": way, **flat(asdict(row))} for row in case.rows]
            shown = [{**row, "mib": row.get("peak_bytes", 0) / MIB} for row in own]
            notes = [f"{row['contestant']} has no numbers. {row['reason']}" for row in own if "reason" in row]
            title = f"Steps of {model} {way}: {case.matrices} matrices, {case.parameters / 1e6:.3g} M entries"
            tables.append(_table(title, self.times, shown, notes))
            rows += [{"part": "step", **row} for row in own]
        if found.additions:
            tables.append(_table("Training steps with additions to Muon, in turns", self.added, found.additions))
            rows += [{"part": "addition", **row} for row in found.additions]
        if found.training is not None:
            training: dict[str, Any] = asdict(found.training)
            more = {
                "mib": found.training.most_bytes / MIB,
                "reason": "diverged" if found.training.last_loss is None else None,
            }
            tables.append(_table("A training of Muon on text", self.trained, [training | more], missing="diverged"))
            rows.append({"part": "training", **training})
        seconds = [[name, f"{took:.1f}"] for name, took in found.seconds.items()]
        left_out = [f"Left out: {one}" for one in found.left_out]
        tables.append(Table("Where the time went", ["part", "seconds"], seconds, left_out))
        return tables, rows


def _gpu_page(found: Findings, tables: Sequence[Table], command: str, environment: Mapping[str, object]) -> str:
    from steepest.lab.report.notices import Notice
    from steepest.lab.report.page import Fact
    from steepest.lab.report.tables import TablesPage

    checks = [one.fine for one in (*found.polars, *found.steps)]
    notices = [Notice("stop", "Not as it should be", tuple(found.wrong))] if found.wrong else []
    if found.rehearsal:
        told = "Shapes are tiny: this shows that everything runs, and tells nothing about speed."
        notices.append(Notice("warning", "A rehearsal", (told,)))
    if found.left_out:
        notices.append(Notice("note", "Left out", tuple(found.left_out)))
    facts = [Fact(f"{sum(checks)} of {len(checks)}", "checks of numbers passed")]
    for model, way, case in found.cases:
        ours = case.rows[0].milliseconds
        if ours is not None and way == "as they come":
            facts.append(Fact(f"{ours.median:.3g} ms", f"a step of {model}"))
    headline = f"Steps of Muon on {found.card}: {'all checks passed' if not found.wrong else 'not all checks passed'}"
    page = TablesPage("steepest bench gpu", headline, facts, notices, tables)
    return page.render(command=command, environment={**environment, "device": found.card})


_ALL: tuple[type[Bench], ...] = (Step, Train, Ranks, Scaling, Accuracy, Passes, Momo, NewtonMuon, Coverage, Gpu)
GROUP = Group("Measure time, memory and accuracy on this machine.", {one.name: one for one in _ALL})
