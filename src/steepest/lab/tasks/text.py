"""`text`: predict the next byte of source code, that of Python's standard library or any text of the user's."""

from __future__ import annotations

import functools
import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from steepest.lab.disk.files import read_data
from steepest.lab.models.gpt import GPTConfig
from steepest.lab.tasks.held_out import TUNING_SHARE, Sizes
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
    "deep": WindowPreset(
        GPTConfig(vocabulary=256, layers=12, width=96, head_size=32),
        128,
        Budget(steps=500, batch_size=16, eval_every=20),
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


HELD_OUT_SHARE = 0.05
MOST_BYTES = 2**34  # of a file; all of them are held in memory
ONE_FILE_IN = 20  # is held out
_REPEATED = "encodings"  # tables that are much alike: what is held out of them would also be trained on
_NOT_LIBRARY = {_REPEATED, "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The bytes to train on, to choose options by and to report on, and the identity of all of them together."""

    identity: DataIdentity
    train: bytes
    tuning: bytes
    report: bytes


def read_corpus(path: Path | None = None) -> Corpus:
    """Read the corpus and split it, always in the same way.

    Of a single file the last 5 % are held out. A folder is split by file: those whose relative path has a SHA-256
    divisible by 20 are held out (or the one with the smallest, if there is none), and each part is joined in the order
    of the paths. Hidden files and folders are left out. A quarter of what is held out is for tuning, by whole files
    where there are several, and the rest to report on.

    Args:
        path: A file or a folder; None for the `.py` files of the running Python's standard library, without tests and
            encodings.

    Raises:
        FileNotFoundError: If there is nothing there to read.
        ValueError: If a folder holds fewer than two files that are not empty.
    """
    if path is None:
        name = f"python-stdlib {platform.python_version()}"
        return _from_files(name, read_standard_library(Path(sysconfig.get_path("stdlib"))))
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_files(path.resolve().name, _read_folder(path))
    raise FileNotFoundError(
        f"--data {str(path)!r} is neither a file nor a folder. Give the path of a text to train on."
    )


def read_standard_library(root: Path) -> dict[str, bytes]:
    """The `.py` files below `root` by relative POSIX path, without tests, encodings and installed packages.

    Raises:
        FileNotFoundError: If there is none, as in a Python that keeps its library in an archive.
    """
    files = {_relative(p, root): p for p in root.rglob("*.py") if p.is_file()}
    kept = {name: read_data(path, most=MOST_BYTES) for name, path in sorted(files.items()) if not _is_excluded(name)}
    if not kept:
        remedy = "Use a regular Python installation, or give a file or folder with --data PATH."
        raise FileNotFoundError(f"No source of Python's standard library below {str(root)!r}. {remedy}")
    return kept


def split_names(sizes: dict[str, int]) -> tuple[list[str], list[str]]:
    """Divide files into those to train on and those held out, each sorted by name.

    Args:
        sizes: Bytes of each file.

    Raises:
        ValueError: If one of the two parts would hold nothing.
    """
    ranks = {n: _rank(n) for n, size in sizes.items() if size}
    held_out = {n for n, rank in ranks.items() if rank % ONE_FILE_IN == 0} or {
        *sorted(ranks, key=ranks.__getitem__)[:1]
    }
    train = ranks.keys() - held_out
    if not train:
        remedy = "Give one file itself instead of its folder: its last 5 % are then held out."
        raise ValueError(f"Of the files {sorted(sizes)}, none is left to train on beside the one held out. {remedy}")
    return sorted(train), sorted(held_out)


def tuning_names(sizes: dict[str, int]) -> list[str]:
    """Of several held-out files those for tuning, sorted: in the order of their hashes until a quarter of the bytes.

    Args:
        sizes: Bytes of each held-out file, at least two of them.
    """
    names: list[str] = []
    for name in sorted(sizes, key=_rank)[:-1]:
        if TUNING_SHARE * sum(sizes[n] for n in names) >= sum(sizes.values()):
            break
        names.append(name)
    return sorted(names)


@functools.lru_cache(maxsize=2)
def _read_corpus_once(path: Path | None) -> Corpus:
    return read_corpus(path)


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


def _from_files(name: str, files: dict[str, bytes]) -> Corpus:
    train, held_out = split_names({n: len(content) for n, content in files.items()})
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file}\0{len(files[file])}\0".encode())
        digest.update(files[file])
    size = sum(map(len, files.values()))
    identity = DataIdentity(name, digest.hexdigest(), size)
    content = b"".join(files[n] for n in train)
    if len(held_out) == 1:
        return Corpus(identity, content, *_cut(files[held_out[0]]))
    tuning = tuning_names({n: len(files[n]) for n in held_out})
    report = [n for n in held_out if n not in tuning]
    return Corpus(identity, content, b"".join(files[n] for n in tuning), b"".join(files[n] for n in report))


def _from_file(path: Path) -> Corpus:
    content = read_data(path, most=MOST_BYTES)
    cut = len(content) - int(HELD_OUT_SHARE * len(content))
    identity = DataIdentity(path.name, hashlib.sha256(content).hexdigest(), len(content))
    return Corpus(identity, content[:cut], *_cut(content[cut:]))


def _cut(held_out: bytes) -> tuple[bytes, bytes]:
    """The first quarter for tuning, and the rest."""
    cut = len(held_out) // TUNING_SHARE
    return held_out[:cut], held_out[cut:]


def _read_folder(root: Path) -> dict[str, bytes]:
    files = {_relative(p, root): p for p in root.rglob("*") if p.is_file()}
    return {name: read_data(path, most=MOST_BYTES) for name, path in sorted(files.items()) if not _is_hidden(name)}


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _is_excluded(name: str) -> bool:
    return not _NOT_LIBRARY.isdisjoint(PurePosixPath(name).parts)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
