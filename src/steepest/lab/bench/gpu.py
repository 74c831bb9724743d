"""All that a GPU must show, in one go: whether it computes what it should, and what steps and training take there."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steepest.lab.bench.captured import captured, compiled
from steepest.lab.bench.certified import Polar, Steps, check_polars, check_steps, own_methods
from steepest.lab.bench.contestants import Contestant, choose
from steepest.lab.bench.cost import additions_cost, random_tokens
from steepest.lab.bench.shapes import Shape
from steepest.lab.bench.step import Bench, Case, measure
from steepest.lab.disk.files import read_lines
from steepest.lab.models.gpt import GPTConfig
from steepest.lab.runs.config import configure
from steepest.lab.runs.crew import Crew
from steepest.lab.runs.device import forget_most_bytes, most_bytes
from steepest.lab.runs.train import Interrupted, train_run
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import PresetName
from steepest.linalg.mirrored import kernel_for

Tell = Callable[[str], None]
ENDLESS = 10**6  # steps of a training that time ends
SIDE = 1024  # of matrices, for the question by what they are multiplied
LAST = 20  # losses of which the mean is shown


@dataclass(frozen=True)
class Model:
    """What is stepped on.

    Args:
        title: What it is called.
        shapes: A set of shapes.
        width: If the set takes one.
        layers: Likewise.
        compiled: Contestants that are compiled as well, each with `steepest` as it comes, and after everything else: it
            takes minutes for many matrices.
    """

    title: str
    shapes: str
    width: int | None = None
    layers: int | None = None
    compiled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        matrices: On which coefficients are checked.
        checked: Model on which the steps of every method are checked.
        methods: Which of them; None: all of this library.
        models: What is stepped on, in turns.
        peers: Contestants.
        pairs: Rounds.
        backend: Of `torch.compile`.
        added: Model that is trained with each addition to Muon.
        tokens: Of a batch of it.
        added_pairs: Rounds of these.
        preset: Of the task `text`, on which Muon trains.
        seconds: After which that training ends.
        steps: Likewise.
    """

    matrices: tuple[Shape, ...]
    checked: GPTConfig
    methods: tuple[str, ...] | None
    models: tuple[Model, ...]
    peers: tuple[str, ...]
    pairs: int
    backend: str
    added: GPTConfig
    tokens: int
    added_pairs: int
    preset: PresetName
    seconds: float
    steps: int


FULL = Plan(
    matrices=((256, 256), (256, 1024), (1024, 768)),
    checked=GPTConfig(vocabulary=256, layers=1, width=256, head_size=64),
    methods=None,
    models=(
        Model("GPT-2 124M", "gpt2-124m", compiled=("steepest", "torch")),
        Model("GPT-2 350M", "gpt2-350m"),
        Model("Llama 1B", "llama-1b"),
    ),
    peers=("steepest", "torch", "torch-fp32", "pytorch-optimizer", "heavyball-eager"),
    pairs=10,
    backend="inductor",
    added=GPTConfig(vocabulary=50_304, layers=12, width=768, head_size=64),
    tokens=8192,
    added_pairs=16,
    preset="small",
    seconds=120.0,
    steps=ENDLESS,
)
REHEARSAL = Plan(
    matrices=((16, 16), (24, 16)),
    checked=GPTConfig(vocabulary=16, layers=1, width=8, head_size=4),
    methods=("muon", "newton-muon", "muonmax-momo"),
    models=(Model("a layer", "gpt2", width=8, layers=1, compiled=("torch-fp32",)),),
    peers=("steepest", "torch", "torch-fp32"),
    pairs=2,
    backend="eager",
    added=GPTConfig(vocabulary=256, layers=1, width=16, head_size=8),
    tokens=64,
    added_pairs=8,
    preset="demo",
    seconds=10.0,
    steps=3,
)


@dataclass(frozen=True)
class Trained:
    """A training that time, or its last step, has ended.

    Args:
        preset: Of the task `text`.
        steps: Done.
        seconds: Of training, evaluations left out.
        tokens_per_second: In these.
        first_loss: Of the first step.
        last_loss: Mean of the last steps; None if it diverged.
        optimizer_share: Of the seconds.
        most_bytes: The most memory that was held at once.
    """

    preset: str
    steps: int
    seconds: float
    tokens_per_second: float
    first_loss: float
    last_loss: float | None
    optimizer_share: float
    most_bytes: int


@dataclass
class Findings:
    """All that was found.

    Args:
        device: Kind of it.
        card: Its name.
        rehearsal: Whether sizes are tiny.
        symmetric: What computes symmetric products in bfloat16 by half; None: nothing, they are torch.matmul's.
        polars: Coefficients against certificates.
        steps: Methods against float64.
        cases: Times of steps: a model, the way in which its steps are taken, and the case.
        additions: What each addition to Muon takes.
        training: None if it was left out.
        left_out: What was not measured, and why.
        failed: What was not measured to its end, and why.
        seconds: Of each part.
    """

    device: str
    card: str
    rehearsal: bool
    symmetric: str | None = None
    polars: list[Polar] = field(default_factory=list[Polar])
    steps: list[Steps] = field(default_factory=list[Steps])
    cases: list[tuple[str, str, Case]] = field(default_factory=list[tuple[str, str, Case]])
    additions: list[dict[str, object]] = field(default_factory=list[dict[str, object]])
    training: Trained | None = None
    left_out: list[str] = field(default_factory=list[str])
    failed: list[str] = field(default_factory=list[str])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def wrong(self) -> list[str]:
        """What is not as it should be, in words."""
        polars = [f"{one.coefficients} in {one.dtype}, {one.form}, {one.matrix}" for one in self.polars if not one.fine]
        diverged = ["a training, which diverged"] if self.training and self.training.last_loss is None else []
        return [*polars, *(f"steps of {one.method}" for one in self.steps if not one.fine), *diverged, *self.failed]

    def content(self) -> dict[str, object]:
        """Plain values."""
        cases = [{"model": model, "taken": way, **asdict(case)} for model, way, case in self.cases]
        return {**asdict(replace(self, cases=[])), "cases": cases, "wrong": self.wrong}


def measure_gpu(
    device: str, *, rehearsal: bool, minutes: float, tell: Tell, clock: Callable[[], float] = time.monotonic
) -> Findings:
    """Check numbers, then measure for as long as there is time: a part that would begin later is left out, and named.

    Args:
        device: "cpu" or "cuda".
        rehearsal: Whether to go through it with tiny shapes.
        minutes: After which nothing else is measured.
        tell: Is told what is being done.
        clock: Tells seconds.
    """
    plan = REHEARSAL if rehearsal else FULL
    cuda = device.startswith("cuda")
    card = torch.cuda.get_device_name(device) if cuda else "the processor"
    kernel = kernel_for(SIDE, torch.bfloat16, torch.device(device))
    found = Findings(device, card, rehearsal, None if kernel is None else f"{kernel.__module__}.{kernel.__name__}")
    start = clock()

    def part(name: str, work: Callable[[], None], *, needed: bool = False) -> None:
        """One part, which may not end the others."""
        begun = clock()
        if begun - start > 60 * minutes and not needed:
            found.left_out.append(f"{name}: the {minutes:g} minutes were over. Give more --minutes.")
            return
        tell(name)
        try:
            work()
        except torch.OutOfMemoryError as full:
            found.left_out.append(f"{name}: it does not fit into the memory, {_first_line(full)}")
        except Exception as failure:  # noqa: BLE001 - what was found before, and after, is worth keeping
            found.failed.append(f"{name}: {type(failure).__name__}, {_first_line(failure)}")
        found.seconds[name] = clock() - begun
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()

    def polars() -> None:
        found.polars += check_polars(device, shapes=plan.matrices)

    def steps() -> None:
        tokens = torch.randint(plan.checked.vocabulary, (4, 33), device="cpu")
        found.steps += check_steps(plan.methods or own_methods(), plan.checked, tokens=tokens, device=device)

    def stepping(model: Model, way: str, contestants: Sequence[Contestant]) -> None:
        found.cases.append((model.title, way, _case(model, contestants, plan, device)))

    def additions() -> None:
        tokens, pairs = random_tokens(plan.tokens), plan.added_pairs
        found.additions += additions_cost(plan.added, tokens, every=32, pairs=pairs, device=device, narrow=cuda)

    def training() -> None:
        found.training = train_for(plan.preset, device=device, seconds=plan.seconds, steps=plan.steps)

    part("coefficients against their certificates", polars, needed=True)
    part("steps of every method against float64", steps, needed=True)
    for model in plan.models:
        for way, contestants, why in _ways(plan, cuda=cuda):
            name = f"steps of {model.title}, {way}"
            if why is not None:
                found.left_out.append(f"{name}: {why}")
                continue
            part(name, partial(stepping, model, way, contestants))
    part("additions to Muon", additions)
    part("a training", training)
    for model in plan.models:
        for one in choose(plan.peers):
            if one.name in model.compiled:
                together = [*choose(()), compiled(one, backend=plan.backend)]
                part(f"steps of {model.title}, {one.name} compiled", partial(stepping, model, "compiled", together))
    return found


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), "without a word")


def _ways(plan: Plan, *, cuda: bool) -> list[tuple[str, list[Contestant], str | None]]:
    """How steps are taken, by whom, and why they are not; `steepest` as it comes is in both."""
    plain = choose(plan.peers)
    why = None if cuda else "the processor has no CUDA graphs"
    return [("as they come", plain, None), ("in CUDA graphs", [*choose(()), *map(captured, plain)], why)]


def _case(model: Model, contestants: Sequence[Contestant], plan: Plan, device: str) -> Case:
    widths = None if model.width is None else (model.width,)
    bench = Bench(
        model.shapes,
        widths,
        model.layers,
        pairs=plan.pairs,
        threads=torch.get_num_threads(),
        device=device,
        exact=False,
    )
    (case,) = measure(bench, tell=lambda _: None, contestants=contestants)
    return case


def train_for(preset: PresetName, *, device: str, seconds: float, steps: int) -> Trained:
    """Train Muon on the text that Python brings along, at a constant learning rate.

    Args:
        preset: Its size.
        device: Where.
        seconds: After which it ends, evaluations included.
        steps: Likewise.
    """
    task = make_task("text", preset)
    config = configure(task, method="muon", seed=0, steps=ENDLESS, schedule="constant")
    crew = Crew(device=torch.device(device))
    forget_most_bytes(crew.device)
    until, counted = time.monotonic() + seconds, itertools.count(1)

    def over() -> bool:
        return next(counted) >= steps or time.monotonic() > until

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with contextlib.suppress(Interrupted):  # as planned
            train_run(config, run, crew=crew, checkpoint_every=ENDLESS, stop=over)
        rows = [json.loads(line) for line in read_lines(run / "metrics.jsonl")]
    trained: list[Mapping[str, Any]] = [row for row in rows if row["kind"] == "train"]
    optimizer = sum(row["optimizer_s"] for row in trained)
    last = trained[-1]
    return Trained(
        preset,
        steps=len(trained),
        seconds=last["train_s"],
        tokens_per_second=last["tokens"] / last["train_s"],
        first_loss=trained[0]["loss"],
        last_loss=None if last["loss"] is None else statistics.fmean(row["loss"] for row in trained[-LAST:]),
        optimizer_share=optimizer / last["train_s"],
        most_bytes=most_bytes(crew.device),
    )
