"""`text`: predict the next byte of source code with a small transformer."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.tasks.corpus import Corpus, read_corpus
from steepest.lab.tasks.held_out import Evaluation, HeldOut, Part, Sizes, evaluation
from steepest.lab.tasks.order import derive_seed
from steepest.lab.tasks.task import Batch, Budget, DataIdentity, PresetName

EVALUATION_BATCH = 16  # in the cache, larger ones are not


@dataclass(frozen=True)
class TextPreset:
    """One size of the task: the model, the window of T tokens, the length of a run, and what is evaluated."""

    model: GPTConfig
    window: int
    budget: Budget
    held_out: Sizes


_SMALLEST = GPTConfig(vocabulary=256, layers=4, width=128, head_size=32)
PRESETS: dict[PresetName, TextPreset] = {
    "demo": TextPreset(_SMALLEST, 128, Budget(steps=150, batch_size=16, eval_every=10), Sizes(64, 512, 2048)),
    "tiny": TextPreset(_SMALLEST, 128, Budget(steps=500, batch_size=32, eval_every=20), Sizes(128, 512, 2048)),
    "small": TextPreset(
        GPTConfig(vocabulary=256, layers=6, width=256, head_size=64),
        256,
        Budget(steps=1000, batch_size=32, eval_every=50),
        Sizes(128, 512, 2048),
    ),
}


class TextTask:
    """Bytes in windows that do not overlap; an example is one window, its T + 1 bytes give T predictions.

    Args:
        preset: One of the sizes.
        data: A file or folder to train on; None for the source of Python's own standard library.

    Raises:
        ValueError: If a part does not fill one window.
    """

    name = "text"

    def __init__(self, preset: PresetName, *, data: Path | None = None) -> None:
        self.preset: PresetName = preset
        self.size = PRESETS[preset]
        self.budget = self.size.budget
        self.tokens_per_example = self.size.window
        self.own_data = data is None
        corpus = _read_corpus_once(data.resolve() if data else None)
        self._identity = corpus.identity
        self.train_windows = _windows(corpus.train, self.size.window, "training", corpus.identity)
        tuning = _windows(corpus.tuning, self.size.window, "tuning", corpus.identity)
        report = _windows(corpus.report, self.size.window, "report", corpus.identity)
        self.held_out_windows = torch.cat([tuning, report])
        self.held_out = HeldOut(len(tuning), len(report), self.size.held_out)

    @property
    def train_size(self) -> int:
        """Number of training windows."""
        return len(self.train_windows)

    def data_identity(self) -> DataIdentity:
        """Name, SHA-256 and size of the whole corpus."""
        return self._identity

    def build_model(self, seed: int) -> nn.Module:
        """A fresh transformer whose weights depend on `seed` only; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("model", seed))
            return GPT(self.size.model)

    def batch(self, examples: Tensor) -> Batch:
        """Inputs and targets, each (B, T) int64, of the windows `examples` (B,)."""
        windows = self.train_windows[examples].long()
        return windows[:, :-1], windows[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per byte, 0-d."""
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part, *, whole: bool) -> Evaluation:
        """Mean cross-entropy over the windows of a part, the same for every run."""
        batches = self.held_out_windows[self.held_out.examples(part, whole=whole)].long().split(EVALUATION_BATCH)
        return evaluation(torch.cat([window_losses(model, windows) for windows in batches]))


def window_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each window.

    Args:
        model: Gives logits (B, T, vocabulary) for tokens (B, T).
        windows: (B, T + 1) int64.

    Returns:
        (B,), nats per token.
    """
    losses = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).mean(1)


@functools.lru_cache(maxsize=2)
def _read_corpus_once(path: Path | None) -> Corpus:
    return read_corpus(path)


def _windows(content: bytes, window: int, part: str, data: DataIdentity) -> Tensor:
    """All whole windows (count, window + 1), uint8."""
    count = len(content) // (window + 1)
    if count == 0:
        remedy = "Give more text with --data PATH, or leave it out to train on Python's standard library."
        raise ValueError(
            f"The {part} part of {data.name!r} has {len(content)} bytes; one window takes {window + 1}. {remedy}"
        )
    size = count * (window + 1)
    return torch.frombuffer(bytearray(content[:size]), dtype=torch.uint8).view(count, window + 1)
