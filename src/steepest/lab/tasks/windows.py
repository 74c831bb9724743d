"""Sequences of which the next token is predicted: what all such tasks have in common, from windows of tokens on."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.tasks.held_out import Evaluation, HeldOut, Part, Share, Sizes, evaluation, one_by_one
from steepest.lab.tasks.order import seeded
from steepest.lab.tasks.task import Batch, Budget, DataIdentity, PresetName


@dataclass(frozen=True)
class WindowPreset:
    """One size of a task: the model, the window of T tokens, the length of a run, and what is evaluated."""

    model: GPTConfig
    window: int
    budget: Budget
    held_out: Sizes


class Windows(Protocol):
    """Windows of T + 1 tokens, such as a tensor (n, T + 1)."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: Tensor, /) -> Tensor: ...


class WindowTask:
    """A task whose examples are windows that do not overlap; the T + 1 tokens of one give T predictions.

    Args:
        preset: One of the sizes.
        size: What it is.
        train: Windows to train on.
        held_out: Those that are held out.
        tuning: How many of these are for tuning, which come first.
        identity: Of all data together.
    """

    evaluation_batch = 16  # windows at once: with a small vocabulary they are in the cache, larger ones are not

    def __init__(
        self,
        preset: PresetName,
        size: WindowPreset,
        train: Windows,
        held_out: Windows,
        *,
        tuning: int,
        identity: DataIdentity,
    ) -> None:
        self.preset: PresetName = preset
        self.size = size
        self.budget = size.budget
        self.tokens_per_example = size.window
        self._identity = identity
        self.train_windows, self.held_out_windows = train, held_out
        self.held_out = HeldOut(tuning, len(held_out) - tuning, size.held_out)

    @property
    def train_size(self) -> int:
        """Number of training windows."""
        return len(self.train_windows)

    def data_identity(self) -> DataIdentity:
        """Name, SHA-256 and size of all data."""
        return self._identity

    def build_model(self, seed: int) -> nn.Module:
        """A fresh transformer whose weights depend on `seed` only; torch's global generator is left as it was."""
        with seeded("model", seed):
            return GPT(self.size.model)

    def batch(self, examples: Tensor) -> Batch:
        """Inputs and targets, each (B, T) int64, of the windows `examples` (B,)."""
        windows = self.train_windows[examples].long()
        return windows[:, :-1], windows[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per token, 0-d."""
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part, *, whole: bool, share: Share = one_by_one) -> Evaluation:
        """Mean cross-entropy over the windows of a part, the same for every run.

        Args:
            model: Takes the inputs to where its parameters are.
            part: Which.
            whole: False: those of a curve only.
            share: Who does which batches of them.
        """
        batches = self.held_out.examples(part, whole=whole).split(self.evaluation_batch)
        return evaluation(torch.cat(share(lambda batch: _losses(model, self.held_out_windows[batch].long()), batches)))


def _losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each window (B, T + 1): (B,), nats per token, on the CPU; computed where the model is."""
    windows = windows.to(next(model.parameters()).device)
    losses = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).mean(1).cpu()
