"""What CIFAR-10 and CIFAR-100 share: sizes, and the binary files of the user, labels and 32x32 colour photographs."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steepest.lab.disk.files import exists, read_data
from steepest.lab.tasks.held_out import Sizes
from steepest.lab.tasks.images import ImagePreset, Images
from steepest.lab.tasks.task import Budget, DataIdentity, PresetName, folder_of

IMAGE = (3, 32, 32)  # red, green, blue; rows; columns
PIXELS = 3 * 32 * 32  # bytes of an image
MOST_BYTES = 2**30  # of a file; those of CIFAR-100 have 154 MB
ALL = Sizes(7500, 2500, 7500)
SIZES: dict[PresetName, ImagePreset] = {  # of a `ConvNet`
    "demo": ImagePreset((16, 32, 64), Budget(steps=300, batch_size=64, eval_every=20), Sizes(1000, 1000, 4000)),
    "tiny": ImagePreset((32, 64, 128), Budget(steps=1000, batch_size=64, eval_every=50), Sizes(2000, 2500, 7500)),
    "small": ImagePreset((64, 128, 256, 256), Budget(steps=2000, batch_size=64, eval_every=200), ALL),
}


@dataclass(frozen=True)
class Kind:
    """One of the data sets.

    Args:
        task: Of the lab.
        title: What it is called.
        classes: Number of classes.
        labels: Bytes before the pixels of an image; the last one is the label.
        train: Files to train on.
        test: Files of the test images.
        archive: What the files come in.
        folder: What that unpacks to.
        pickled: A file of the version for Python.
    """

    task: str
    title: str
    classes: int
    labels: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    archive: str
    folder: str
    pickled: str

    @property
    def row(self) -> int:
        """Bytes of one example."""
        return self.labels + PIXELS

    @property
    def remedy(self) -> str:
        """Where the files are had from; ends every error message."""
        place = "https://www.cs.toronto.edu/~kriz/cifar.html"
        return f"Download {self.archive} from {place}, unpack it, and give its folder: --data {self.folder}."


def read_images(kind: Kind, data: Path | None) -> Images:
    """All images; the files are read once in a process.

    Each channel is to be shifted and scaled to mean 0 and variance 1 over the training images.

    Args:
        kind: Of the data set.
        data: Its folder.

    Raises:
        FileNotFoundError: If there is no folder, or a file is missing in it.
        ValueError: If the folder holds the version for Python, which is pickled, or a file is damaged.
    """
    return _read_once(kind, _checked_folder(kind, data))


def _checked_folder(kind: Kind, data: Path | None) -> Path:
    """The folder, with every file in it."""
    folder = folder_of(kind.task, data, kind.remedy)
    missing = [name for name in (*kind.train, *kind.test) if not (folder / name).is_file()]
    if missing and exists(folder / kind.pickled):
        problem = f"is the version of {kind.title} for Python: pickles, which could run any code when they are read"
        raise ValueError(f"--data {str(data)!r} {problem}. {kind.remedy}")
    if missing:
        raise FileNotFoundError(f"--data {str(data)!r} has no {', '.join(missing)}. {kind.remedy}")
    return folder


@functools.lru_cache(maxsize=1)
def _read_once(kind: Kind, folder: Path) -> Images:
    digest = hashlib.sha256()
    parts = {name: _read_rows(kind, folder / name) for name in (*kind.train, *kind.test)}
    for rows in parts.values():
        digest.update(f"{len(rows)}\0".encode())
        digest.update(rows.numpy().data)
    size = sum(rows.numel() for rows in parts.values())
    train = _split(kind, torch.cat([parts[name] for name in kind.train]))
    test = _split(kind, torch.cat([parts[name] for name in kind.test]))
    mean, std = _moments(kind, train[0])
    return Images(train, test, mean, std, DataIdentity(folder.name, digest.hexdigest(), size))


def _read_rows(kind: Kind, path: Path) -> Tensor:
    """The examples (n, row) of a file, uint8."""
    content = read_data(path, most=MOST_BYTES)
    size = len(content)
    if size == 0 or size % kind.row:
        problem = f"{path} has {size} bytes, which is not a whole number of images of {kind.row} bytes"
        raise ValueError(f"{problem}: it is damaged. {kind.remedy}")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, kind.row)
    if (largest := int(rows[:, kind.labels - 1].max())) >= kind.classes:
        problem = f"{path} has the label {largest}, above {kind.classes - 1}: it is not {kind.title}, or damaged"
        raise ValueError(f"{problem}. {kind.remedy}")
    return rows


def _split(kind: Kind, rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[:, kind.labels :].reshape(-1, *IMAGE), rows[:, kind.labels - 1].long()


def _moments(kind: Kind, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (3, 1, 1) each, from its counts of the 256 levels: exact."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    shares, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64, device="cpu")
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
    if (std == 0).any():
        raise ValueError(f"A colour has one and the same level in all training images: they are damaged. {kind.remedy}")
    return mean.float()[:, None, None], std.float()[:, None, None]
