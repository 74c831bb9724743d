"""One training run: from a config to a finished run directory, whatever happens in between.

The directory is the truth. A finished run is not run again; an interrupted one, even by `kill -9`, goes on from its
last checkpoint and ends with the numbers it would have had without the interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from steepest.lab.disk.fields import parse_object, read_text
from steepest.lab.disk.files import exists, make_directory, one_line, remove, write_whole
from steepest.lab.disk.ours import locked, refusal
from steepest.lab.errors import UsageError
from steepest.lab.methods import build_optimizer
from steepest.lab.runs.checkpoint import (
    CheckpointError,
    Counters,
    check_optimizer,
    check_weights,
    finite,
    gathered,
    load_checkpoint,
    parted,
    read_saved,
    save_checkpoint,
)
from steepest.lab.runs.config import RunConfig, names_of, read_config, run_hash
from steepest.lab.runs.crew import Crew
from steepest.lab.runs.device import Stopwatch, most_bytes
from steepest.lab.runs.environment import describe_environment
from steepest.lab.runs.recorder import Recorder
from steepest.lab.runs.records import Final, Result, read_result
from steepest.lab.runs.schedule import FAR_SPACING, NEAR, SMOOTHED, SPACING, evaluates, rate_factor, reached
from steepest.lab.runs.version import code_version
from steepest.lab.tasks import make_task
from steepest.lab.tasks.held_out import Evaluation, Part
from steepest.lab.tasks.images import ImageTask
from steepest.lab.tasks.order import ExampleOrder, derive_seed
from steepest.lab.tasks.task import Task
from steepest.lab.tasks.windows import WindowTask
from steepest.optim import OuterNesterov, SteepestDescent, TailAverage


class Training:
    """Model, optimizer, schedule and order of examples of one run, from step 0 or from a checkpoint.

    Args:
        config: The run.
        task: Its task, loaded.
        crew: Who trains it; None for this process alone.

    Raises:
        ValueError: If the config names an unknown method or option, or its batches cannot be divided in the crew.
    """

    def __init__(self, config: RunConfig, task: Task, crew: Crew | None = None) -> None:
        self.config = config
        self.task = task
        self.crew = Crew() if crew is None else crew
        self.crew.check(config.batch_size)
        self.counters = Counters()
        self.diverged = False
        self.last_evaluation: Evaluation | None = None
        self.final: Final | None = None
        self.losses: list[float] = []  # of the last evaluations
        self.module = task.build_model(config.seed)
        self.crew.check_model(self.module)
        self.model = self.crew.spread(self.module)  # what gradients come from
        torch.manual_seed(derive_seed("method", config.seed))  # for methods that draw random numbers
        self.optimizer = build_optimizer(config.method, self.model, config.options)
        self.scheduler = LambdaLR(self.optimizer, self._rate_factor)
        self.order = ExampleOrder(task.train_size, seed=config.seed)
        if (config.tail or config.outer) and self.crew.layout is not None:
            raise ValueError(
                f"tail is {config.tail} and outer {config.outer}, but what stands beside an optimizer is saved by one "
                "process only, not by ranks. Train the run on one process, or leave both out."
            )
        start = config.steps - round(config.tail * config.steps)
        self.average = (
            TailAverage(self.module, start=start, parts=config.tail_parts, mix=config.tail_mix) if config.tail else None
        )
        self.outer = OuterNesterov(self.optimizer, strength=config.outer) if config.outer else None

    @property
    def beside(self) -> dict[str, TailAverage | OuterNesterov]:
        """What stands beside the optimizer, by its name in checkpoints."""
        both = {"average": self.average, "outer": self.outer}
        return {name: own for name, own in both.items() if own is not None}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.counters.step

    @property
    def tokens(self) -> int:
        """Tokens (or images) seen."""
        return self.step * self.config.batch_size * self.task.tokens_per_example

    @property
    def train_s(self) -> float:
        """Seconds of training."""
        return self.counters.forward_backward_s + self.counters.optimizer_s

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to do: the last step is done, the target reached, or the run has diverged."""
        return self.diverged or self.step >= self.config.steps or reached(self.losses, self.config.target)

    @property
    def evaluates(self) -> bool:
        """Whether it is time for an evaluation."""
        if self.diverged or self.step == self.config.steps:
            return True
        spacing = None if self.config.target is None else SPACING if self.counters.near else FAR_SPACING
        return evaluates(self.step, every=self.config.eval_every, spacing=spacing)

    def train_step(self, recorder: Recorder) -> None:
        """Train on the next batch and record it; a loss that is not finite changes no weight."""
        lr = float(self.config.options["lr"]) * self._rate_factor(self.step)
        watch = Stopwatch(self.crew.device)
        watch.mark()
        loss = self._backward(self.order.take(self.config.batch_size))
        value = self.crew.mean(loss.item())
        watch.mark()
        self.diverged = not math.isfinite(value)
        self.counters.near |= self.config.watch_from is None or value < NEAR * self.config.watch_from
        if not self.diverged:
            if isinstance(self.optimizer, SteepestDescent):
                self.optimizer.step(loss=loss)
            else:
                self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.update()
        watch.mark()
        forward_backward_s, optimizer_s = watch.seconds()
        self.counters.step += 1
        self.counters.forward_backward_s += forward_backward_s
        self.counters.optimizer_s += optimizer_s
        recorder.train(
            step=self.step,
            tokens=self.tokens,
            loss=value,
            lr=lr,
            forward_backward_s=forward_backward_s,
            optimizer_s=optimizer_s,
            train_s=self.train_s,
        )

    def _backward(self, examples: Tensor) -> Tensor:
        """Gradients of the mean loss over a batch, and that mean, over this rank's part of it."""
        parts = self.crew.micro_batches(examples)
        losses: list[Tensor] = []
        for number, part in enumerate(parts, start=1):
            inputs, targets = self.task.batch(part)
            batch = inputs.to(self.crew.device), targets.to(self.crew.device)
            with self.crew.passing(self.model, last=number == len(parts)):
                with self._autocast():
                    loss = self.task.loss(self.model, batch)
                (loss if len(parts) == 1 else loss / len(parts)).backward()
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """Around a forward pass of training; evaluations are in float32."""
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.crew.device.type, torch.bfloat16)

    def evaluate(self, recorder: Recorder) -> None:
        """Evaluate and record it; the clocks of the run stand still."""
        if self.diverged:
            self.last_evaluation = Evaluation(math.nan)
        else:
            self.last_evaluation = self._evaluated(self.config.part, whole=False)
            self.diverged = not math.isfinite(self.last_evaluation.loss)
            self.losses = [*self.losses, self.last_evaluation.loss][-SMOOTHED:]
        recorder.evaluation(self.last_evaluation, step=self.step, tokens=self.tokens, train_s=self.train_s)

    def conclude(self, recorder: Recorder) -> None:
        """Evaluate the whole of its part after the last step, and record it; a run to a target has its curve only."""
        if self.diverged or self.config.target is not None:
            return
        own = self._evaluated(self.config.part, whole=True)
        tuning = own if self.config.part == "tuning" else self._evaluated("tuning", whole=True)
        self.diverged = not math.isfinite(own.loss) or not math.isfinite(tuning.loss)
        if not self.diverged:
            self.final = Final(own.loss, own.accuracy, own.blocks, tuning.loss)
            recorder.final(self.final, step=self.step)

    def _evaluated(self, part: Part, *, whole: bool) -> Evaluation:
        """Of the whole model, or of its shards; ranks share the examples."""
        self.model.eval()
        if self.crew.size == 1:
            with contextlib.ExitStack() as moved:
                if self.outer is not None:
                    moved.enter_context(self.outer.base())
                if self.average is not None:
                    moved.enter_context(self.average.averaged())
                found = self.task.evaluate(self.module, part, whole=whole)
        else:
            found = cast("WindowTask | ImageTask", self.task).evaluate(
                self.module, part, whole=whole, share=self.crew.share
            )
        self.model.train()
        return found

    def diagnose(self, recorder: Recorder) -> None:
        """Record what the optimizer says of its last step and of the weights, if it is one of this library."""
        if isinstance(self.optimizer, SteepestDescent):
            recorder.diagnostics(self.optimizer.diagnostics(weights=True), step=self.step)

    def result(self, *, finished: str) -> Result:
        """The result after the last step."""
        last = None if self.diverged else self.final or self.last_evaluation
        return Result(
            status="diverged" if self.diverged else "finished",
            steps=self.step,
            final_loss=last.loss if last else None,
            final_accuracy=last.accuracy if last else None,
            final_blocks=last.blocks if last else (),
            tuning_loss=last.tuning_loss if isinstance(last, Final) else None,
            train_s=self.train_s,
            optimizer_s=self.counters.optimizer_s,
            forward_backward_s=self.counters.forward_backward_s,
            peak_memory_bytes=self._peak_memory(),
            finished=finished,
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint of everything that the next step depends on.

        One whose weights are not finite is not written: the run diverges at its next loss, from the one before, too.
        """
        self.counters.peak_memory_bytes = self._peak_memory()
        state = self._state()
        if self.crew.leads and finite(state["model"]):
            save_checkpoint(path, state)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, with its number of CPU threads: sums depend on it.

        Raises:
            CheckpointError: If it is damaged or of another run.
        """
        fresh = self.optimizer.state_dict()
        heavy: dict[str, Any] = {}  # of the first rank, which alone reads the file

        def read() -> dict[str, Any]:
            state = load_checkpoint(path, keys={*_KEYS, *self.beside})
            if state["run"] not in names_of(self.config):
                raise CheckpointError(path, f"it is of the run {state['run']}, this is {run_hash(self.config)}")
            with _fitting(path):
                read_saved(state, self.order, steps=self.config.steps, batch_size=self.config.batch_size)
                check_weights(state["model"], self.module)
                check_optimizer(state, self.optimizer, self.scheduler, self._rate_factor, fresh=fresh)
            heavy.update({name: state.pop(name) for name in ("model", "optimizer")})
            return state

        state = self.crew.told(read)
        with _fitting(path):
            saved = read_saved(state, self.order, steps=self.config.steps, batch_size=self.config.batch_size)
            if self.crew.layout is None:
                self.module.load_state_dict(heavy["model"])
                self.optimizer.load_state_dict(heavy["optimizer"])
            else:
                parted(self.model, self.optimizer, heavy)
            self.scheduler.load_state_dict(state["scheduler"])
            self.order.load_state_dict(state["order"])
            for name, own in self.beside.items():
                own.load_state_dict(state[name])
            self.counters, self.losses = saved.counters, saved.losses
            self.diverged, self.last_evaluation, self.final = saved.diverged, saved.evaluation, saved.final
            torch.set_rng_state(state["random"])
            torch.set_num_threads(saved.threads)

    def _rate_factor(self, step: int) -> float:
        return rate_factor(step, steps=self.config.steps, schedule=self.config.schedule)

    def _peak_memory(self) -> int:
        return self.crew.most(max(self.counters.peak_memory_bytes, most_bytes(self.crew.device)))

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds; of other ranks than the first without weights and the optimizer's state."""
        if self.crew.layout is None:
            heavy = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        else:
            heavy = gathered(self.model, self.optimizer)
        heavy |= {name: own.state_dict() for name, own in self.beside.items()}
        evaluation, final = self.last_evaluation, self.final
        return {
            **heavy,
            "run": run_hash(self.config),
            "scheduler": self.scheduler.state_dict(),
            "order": self.order.state_dict(),
            "random": torch.get_rng_state(),
            "threads": torch.get_num_threads(),
            "counters": msgspec.structs.asdict(self.counters),
            "diverged": self.diverged,
            "losses": self.losses,
            "evaluation": None if evaluation is None else dataclasses.asdict(evaluation),
            "final": None if final is None else msgspec.structs.asdict(final),
        }


_KEYS = {
    "run",
    "model",
    "optimizer",
    "scheduler",
    "order",
    "random",
    "threads",
    "counters",
    "diverged",
    "losses",
    "evaluation",
    "final",
}


@contextlib.contextmanager
def _fitting(path: Path) -> Generator[None]:
    """Around what takes the content of a checkpoint for what it should be."""
    try:
        yield
    except (
        msgspec.ValidationError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as problem:
        raise CheckpointError(path, f"its content does not fit the run: {problem}") from problem


__all__ = ["Interrupted", "Result", "RunMismatchError", "train_run"]


class Interrupted(Exception):  # noqa: N818 - like KeyboardInterrupt, it reports no error
    """The run was asked to stop; it is saved and goes on when `train_run` is called again."""


class RunMismatchError(UsageError, ValueError):
    """The directory, the data or the code is not what the config says."""


def train_run(
    config: RunConfig,
    run_dir: Path,
    *,
    data: Path | None = None,
    checkpoint_every: int = 25,
    keep_checkpoint: bool = False,
    diagnostics: bool = False,
    threads: int | None = None,
    crew: Crew | None = None,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Bring a run to its end: return its stored result, or go on from its checkpoint, or start it.

    Args:
        config: The run.
        run_dir: Its directory; made if need be.
        data: Where the data of the user is, for a config that was made with it.
        checkpoint_every: Steps from one checkpoint to the next; at most so many are repeated after a crash.
        keep_checkpoint: Whether the last checkpoint, with the trained weights, outlives the run.
        diagnostics: Whether each evaluation also records what the optimizer says of itself and of the weights, see
            `SteepestDescent.diagnostics`; for methods of this library.
        threads: CPU threads; None for torch's present number. A run that goes on keeps the number it started with,
            because sums depend on it.
        crew: Who trains it, and in how many micro-batches; None for this process alone, in those of the preset. It is
            no part of what the run is, as its losses are the same but for rounding: another crew goes on with it. The
            first rank alone reads and writes the directory.
        stop: Asked after every step; True, on any rank, saves a checkpoint and raises `Interrupted` on all.

    Returns:
        The result, the same however often the run was interrupted, apart from times and memory.

    Raises:
        Interrupted: If `stop` returned True before the last step.
        RunBusyError: If another process is training this run.
        RunMismatchError: If the directory holds another run or is not ours, or data or code differ from the config.
        CheckpointError: If the checkpoint is damaged.
        RecordError: If another file of the run is damaged.
        ElsewhereError: If another rank failed before the first step.
        ValueError: If `checkpoint_every` or `threads` is below 1, a name in the config is unknown, the optimizer
            refuses an option, or the crew cannot divide a batch.
        ModuleNotFoundError: If a package of the `lab` extra is missing.
    """
    for name, value in (("checkpoint_every", checkpoint_every), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    alone, crew = crew is None, Crew() if crew is None else crew
    more = f", saved every {checkpoint_every} steps{', with diagnostics' if diagnostics else ''}"
    crew.check_alike(f"the run {run_hash(config)} in {crew.accumulate} micro-batches{more}")
    with contextlib.ExitStack() as held:
        if (result := crew.told(lambda: _claimed(config, run_dir, held))) is not None:
            return result
        task = crew.together(lambda: load_task(config, data))
        if alone:
            crew = crew.dividing(config.batch_size, most=task.budget.micro_batch)
        checkpoint = run_dir / "checkpoint.pt"
        crew.told(lambda: write_whole(run_dir / "config.json", config.to_json()))
        with using_threads(threads), torch.random.fork_rng(devices=[]):
            training = Training(config, task, crew)
            if resuming := crew.told(lambda: exists(checkpoint)):
                training.load(checkpoint)
            crew.told(lambda: _record_environment(run_dir, crew, resuming=resuming))
            result = _train(training, run_dir, checkpoint_every, stop, diagnostics=diagnostics)
        if crew.leads:
            write_whole(run_dir / "result.json", result.to_json())
            if not keep_checkpoint:
                remove(checkpoint)
        return result


def _claimed(config: RunConfig, run_dir: Path, held: contextlib.ExitStack) -> Result | None:
    """The result of a finished run, else None: the directory is then ours, and locked for as long as it is held."""
    if (problem := refusal(run_dir, "run")) is not None:
        raise RunMismatchError(problem)
    make_directory(run_dir)
    if (result := _stored_result(config, run_dir)) is not None:
        return result
    held.enter_context(locked(run_dir))
    if (result := _stored_result(config, run_dir)) is not None:  # finished while we came here
        return result
    if config.code != code_version():
        problem = f"The run was configured for the code {one_line(config.code)}, this is {code_version()}."
        raise RunMismatchError(f"{problem} Use that version, or make a new config in a new directory.")
    return None


def _train(
    training: Training, run_dir: Path, checkpoint_every: int, stop: Callable[[], bool] | None, *, diagnostics: bool
) -> Result:
    config, crew = training.config, training.crew
    with crew.together(lambda: Recorder(run_dir if crew.leads else None, step=training.step)) as recorder:

        def save() -> None:
            recorder.sync()  # rows first: a checkpoint without them could not be used
            training.save(run_dir / "checkpoint.pt")

        if training.step == 0:
            training.evaluate(recorder)
        while not training.ended:
            training.train_step(recorder)
            if training.evaluates:
                training.evaluate(recorder)
                if diagnostics:
                    training.diagnose(recorder)
            if training.ended:
                training.conclude(recorder)
                save()
            elif crew.any(stop is not None and stop()):
                save()
                message = f"Stopped after step {training.step} of {config.steps}, saved in {run_dir}."
                raise Interrupted(f"{message} Repeat the command to go on.")
            elif training.step % checkpoint_every == 0:
                save()
    return training.result(finished=datetime.now(UTC).isoformat(timespec="seconds"))


def _stored_result(config: RunConfig, run_dir: Path) -> Result | None:
    """The result of a finished run; refuses a directory that holds another run, finished or not."""
    if not exists(run_dir / "config.json"):
        return None
    stored = read_config(run_dir)
    if run_hash(stored) != run_hash(config):
        pairs = ((key, getattr(stored, key), getattr(config, key)) for key in RunConfig.__dataclass_fields__)
        changes = "; ".join(f"{key} is {old!r} there, {new!r} here" for key, old, new in pairs if old != new)
        raise RunMismatchError(f"{run_dir} holds another run: {changes}. Choose another directory, or delete it.")
    return read_result(run_dir / "result.json")


def load_task(config: RunConfig, data: Path | None) -> Task:
    """The task of a run, with the data it was configured for.

    Args:
        config: The run.
        data: Where the data of the user is; None for the task's own.

    Raises:
        RunMismatchError: If the data are others.
    """
    task = make_task(config.task, config.preset, data=data)
    identity = task.data_identity()
    if identity.sha256 != config.data.sha256:
        problem = f"The run reads {config.data.name!r} ({config.data.sha256[:12]}), here is {identity.name!r}"
        remedy = "Give the same --data, on the same Python version; runs on different data are never mixed."
        raise RunMismatchError(f"{problem} ({identity.sha256[:12]}). {remedy}")
    return task


@contextlib.contextmanager
def using_threads(threads: int | None) -> Generator[None]:
    """Set the number of threads for a while, and bring back the caller's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _record_environment(run_dir: Path, crew: Crew, *, resuming: bool) -> None:
    """Record the machine: the first one, and each that took over. If the file is gone, this is the first one known."""
    path = run_dir / "environment.json"
    content = {**describe_environment(), **crew.described()}
    if resuming and exists(path):
        remedy = "Delete this file and repeat the command: only the description of the machine is lost."
        content = _taken_over(parse_object(read_text(path, remedy=remedy), path, remedy=remedy), content)
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _taken_over(started: Mapping[str, object], here: Mapping[str, object]) -> dict[str, object]:
    """The first environment, with those that took over under "resumed", `here` being the last of them."""
    first = {key: value for key, value in started.items() if key != "resumed"}
    resumed = started.get("resumed")
    sessions = [first, *(cast(list[object], resumed) if isinstance(resumed, list) else []), here]
    later = [new for old, new in itertools.pairwise(sessions) if _machine(new) != _machine(old)]
    return {**first, "resumed": later} if later else first


def _machine(session: object) -> object:
    """An environment without what may differ from session to session on one machine."""
    if not isinstance(session, dict):
        return session
    return {key: value for key, value in cast(dict[str, object], session).items() if key != "workers"}
