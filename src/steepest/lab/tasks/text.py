"""`text`: predict the next byte of source code with a small transformer."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.tasks.corpus import Corpus, read_corpus
from steepest.lab.tasks.order import derive_seed
from steepest.lab.tasks.task import Batch, Budget, DataIdentity, Evaluation, PresetName

EVALUATION_BATCH = 32


@dataclass(frozen=True)
class TextPreset:
    """One size of the task: the model, the window of T tokens, the length of a run, and validation windows."""

    model: GPTConfig
    window: int
    budget: Budget
    validation_windows: int


_SMALLEST = GPTConfig(vocabulary=256, layers=4, width=128, head_size=32)
PRESETS: dict[PresetName, TextPreset] = {
    "demo": TextPreset(_SMALLEST, 128, Budget(steps=150, batch_size=16, eval_every=10), 64),
    "tiny": TextPreset(_SMALLEST, 128, Budget(steps=500, batch_size=32, eval_every=20), 128),
    "small": TextPreset(GPTConfig(vocabulary=256, layers=6, width=256, head_size=64), 256, Budget(1000, 32, 50), 128),
}


class TextTask:
    """Bytes in windows that do not overlap; an example is one window, its T + 1 bytes give T predictions.

    Args:
        preset: One of the sizes.
        data: A file or folder to train on; None for the source of Python's own standard library.

    Raises:
        ValueError: If training or validation does not fill one window.
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
        held_out = _windows(corpus.validation, self.size.window, "validation", corpus.identity)
        self.validation_windows = held_out[_spread(len(held_out), self.size.validation_windows)].long()

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
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Mean cross-entropy over the validation windows, the same for every run."""
        parts = self.validation_windows.split(EVALUATION_BATCH)
        losses = [self.loss(model, (part[:, :-1], part[:, 1:])) * len(part) for part in parts]
        return Evaluation(torch.stack(losses).sum().item() / len(self.validation_windows))


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


def _spread(available: int, wanted: int) -> Tensor:
    """At most `wanted` indices below `available`, evenly spread and distinct."""
    count = min(available, wanted)
    return torch.arange(count) * available // count
