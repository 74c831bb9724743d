"""`text`: predict the next byte of source code with a small transformer."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from steepest.lab.models.gpt import GPTConfig
from steepest.lab.tasks.corpus import Corpus, read_corpus
from steepest.lab.tasks.held_out import Sizes
from steepest.lab.tasks.task import Budget, DataIdentity, PresetName
from steepest.lab.tasks.windows import WindowPreset, WindowTask

_SMALLEST = GPTConfig(vocabulary=256, layers=4, width=128, head_size=32)
PRESETS: dict[PresetName, WindowPreset] = {
    "demo": WindowPreset(_SMALLEST, 128, Budget(steps=150, batch_size=16, eval_every=10), Sizes(64, 512, 2048)),
    "tiny": WindowPreset(_SMALLEST, 128, Budget(steps=500, batch_size=32, eval_every=20), Sizes(128, 512, 2048)),
    "small": WindowPreset(
        GPTConfig(vocabulary=256, layers=6, width=256, head_size=64),
        256,
        Budget(steps=1000, batch_size=32, eval_every=50),
        Sizes(128, 512, 2048),
    ),
}


class TextTask(WindowTask):
    """Bytes in windows that do not overlap; an example is one window, its T + 1 bytes give T predictions.

    Args:
        preset: One of the sizes.
        data: A file or folder to train on; None for the source of Python's own standard library.

    Raises:
        ValueError: If a part does not fill one window.
    """

    name = "text"

    def __init__(self, preset: PresetName, *, data: Path | None = None) -> None:
        self.own_data = data is None
        size, corpus = PRESETS[preset], _read_corpus_once(data.resolve() if data else None)
        train = _windows(corpus.train, size.window, "training", corpus.identity)
        tuning = _windows(corpus.tuning, size.window, "tuning", corpus.identity)
        report = _windows(corpus.report, size.window, "report", corpus.identity)
        held_out = torch.cat([tuning, report])
        super().__init__(preset, size, train, held_out, tuning=len(tuning), identity=corpus.identity)


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
