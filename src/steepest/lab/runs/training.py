"""The live objects of a run, and one step of it."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.optim.lr_scheduler import LambdaLR

from steepest.lab.methods import build_optimizer
from steepest.lab.runs.checkpoint import (
    CheckpointError,
    Counters,
    check_optimizer,
    check_weights,
    finite,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from steepest.lab.runs.config import RunConfig, names_of, run_hash
from steepest.lab.runs.memory import peak_memory
from steepest.lab.runs.recorder import Recorder
from steepest.lab.runs.records import Final, Result
from steepest.lab.runs.schedule import FAR_SPACING, NEAR, SMOOTHED, SPACING, evaluates, rate_factor, reached
from steepest.lab.tasks.held_out import Evaluation
from steepest.lab.tasks.order import ExampleOrder, derive_seed
from steepest.lab.tasks.task import Task
from steepest.optim import SteepestDescent


class Training:
    """Model, optimizer, schedule and order of examples of one run, from step 0 or from a checkpoint.

    Args:
        config: The run.
        task: Its task, loaded.

    Raises:
        ValueError: If the config names an unknown method or option.
    """

    def __init__(self, config: RunConfig, task: Task) -> None:
        self.config = config
        self.task = task
        self.counters = Counters()
        self.diverged = False
        self.last_evaluation: Evaluation | None = None
        self.final: Final | None = None
        self.losses: list[float] = []  # of the last evaluations
        self.model = task.build_model(config.seed)
        torch.manual_seed(derive_seed("method", config.seed))  # for methods that draw random numbers
        self.optimizer = build_optimizer(config.method, self.model, config.options)
        self.scheduler = LambdaLR(self.optimizer, self._rate_factor)
        self.order = ExampleOrder(task.train_size, seed=config.seed)

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
        start = time.perf_counter()
        batch = self.task.batch(self.order.take(self.config.batch_size))
        loss = self.task.loss(self.model, batch)
        loss.backward()
        value = loss.item()
        middle = time.perf_counter()
        self.diverged = not math.isfinite(value)
        self.counters.near |= self.config.watch_from is None or value < NEAR * self.config.watch_from
        if not self.diverged:
            if isinstance(self.optimizer, SteepestDescent):
                self.optimizer.step(loss=loss)
            else:
                self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        end = time.perf_counter()
        self.counters.step += 1
        self.counters.forward_backward_s += middle - start
        self.counters.optimizer_s += end - middle
        recorder.train(
            step=self.step,
            tokens=self.tokens,
            loss=value,
            lr=lr,
            forward_backward_s=middle - start,
            optimizer_s=end - middle,
            train_s=self.train_s,
        )

    def evaluate(self, recorder: Recorder) -> None:
        """Evaluate and record it; the clocks of the run stand still."""
        if self.diverged:
            self.last_evaluation = Evaluation(math.nan)
        else:
            self.model.eval()
            self.last_evaluation = self.task.evaluate(self.model, self.config.part, whole=False)
            self.model.train()
            self.diverged = not math.isfinite(self.last_evaluation.loss)
            self.losses = [*self.losses, self.last_evaluation.loss][-SMOOTHED:]
        recorder.evaluation(self.last_evaluation, step=self.step, tokens=self.tokens, train_s=self.train_s)

    def conclude(self, recorder: Recorder) -> None:
        """Evaluate the whole of its part after the last step, and record it; a run to a target has its curve only."""
        if self.diverged or self.config.target is not None:
            return
        self.model.eval()
        own = self.task.evaluate(self.model, self.config.part, whole=True)
        tuning = own if self.config.part == "tuning" else self.task.evaluate(self.model, "tuning", whole=True)
        self.model.train()
        self.diverged = not math.isfinite(own.loss) or not math.isfinite(tuning.loss)
        if not self.diverged:
            self.final = Final(own.loss, own.accuracy, own.blocks, tuning.loss)
            recorder.final(self.final, step=self.step)

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
            peak_memory_bytes=max(self.counters.peak_memory_bytes, peak_memory()),
            finished=finished,
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint of everything that the next step depends on.

        One whose weights are not finite is not written: the run diverges at its next loss, from the one before, too.
        """
        if not finite(self.model.state_dict()):
            return
        self.counters.peak_memory_bytes = max(self.counters.peak_memory_bytes, peak_memory())
        save_checkpoint(path, self._state())

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, with its number of CPU threads: sums depend on it.

        Raises:
            CheckpointError: If it is damaged or of another run.
        """
        state = load_checkpoint(path, keys=set(self._state()))
        if state["run"] not in names_of(self.config):
            raise CheckpointError(path, f"it is of the run {state['run']}, this is {run_hash(self.config)}")
        try:
            progress = read_progress(state, self.order, steps=self.config.steps, batch_size=self.config.batch_size)
            check_weights(state["model"], self.model)
            check_optimizer(state, self.optimizer, self.scheduler, self._rate_factor)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.order.load_state_dict(state["order"])
            self.counters, self.losses = progress.counters, progress.losses
            self.diverged, self.last_evaluation, self.final = progress.diverged, progress.evaluation, progress.final
            torch.set_rng_state(state["random"])
            torch.set_num_threads(progress.threads)
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

    def _rate_factor(self, step: int) -> float:
        return rate_factor(step, steps=self.config.steps, schedule=self.config.schedule)

    def _state(self) -> dict[str, Any]:
        evaluation, final = self.last_evaluation, self.final
        return {
            "run": run_hash(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
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
