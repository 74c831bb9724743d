"""Small files in the formats of the public data sets, drawn at random."""

from pathlib import Path

import numpy as np

from steepest.lab.tasks import cifar10, cifar100
from steepest.lab.tasks.cifar import Kind


def write_cifar10(folder: Path, *, images: int = 20, seed: int = 0) -> Path:
    """The six files of CIFAR-10's binary version with a few images each."""
    return _write_cifar(folder, cifar10.KIND, images, seed)


def write_cifar100(folder: Path, *, images: int = 60, seed: int = 0) -> Path:
    """The two files of CIFAR-100's binary version with a few images each."""
    return _write_cifar(folder, cifar100.KIND, images, seed)


def _write_cifar(folder: Path, kind: Kind, images: int, seed: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for name in (*kind.train, *kind.test):
        groups = rng.integers(20, size=(images, kind.labels - 1), dtype=np.uint8)
        labels = rng.integers(kind.classes, size=(images, 1), dtype=np.uint8)
        pixels = rng.integers(256, size=(images, 3072), dtype=np.uint8)
        (folder / name).write_bytes(np.hstack([groups, labels, pixels]).tobytes())
    return folder


def shard(tokens: object, *, magic: int = 20240520, version: int = 1, promised: int | None = None) -> bytes:
    """A .bin shard of these tokens; its header may lie."""
    content = np.asarray(tokens, dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, content.size if promised is None else promised
    return header.tobytes() + content.tobytes()


def write_fineweb(folder: Path, *, seed: int = 0) -> Path:
    """Two training shards and one for validation, enough for every preset."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for name, count in (("train_000001", 3000), ("train_000002", 2000), ("val_000000", 1500)):
        (folder / f"fineweb_{name}.bin").write_bytes(shard(rng.integers(50257, size=count)))
    return folder
