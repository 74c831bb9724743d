"""`cifar10`: tell ten kinds of things apart on 32x32 colour photographs, from the original files of the user."""

import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from steepest.lab.disk.files import exists, read_data
from steepest.lab.tasks.held_out import Sizes
from steepest.lab.tasks.images import ImagePreset, Images, ImageTask
from steepest.lab.tasks.task import Budget, DataIdentity, PresetName, folder_of

CLASSES = 10
IMAGE = (3, 32, 32)  # red, green, blue; rows; columns
ROW = 1 + 3 * 32 * 32  # bytes of one example: label, then pixels
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
MOST_BYTES = 2**30  # of a file; those of CIFAR-10 have 31 MB
_REMEDY = (
    "Download cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and give its folder: "
    "--data cifar-10-batches-bin."
)


PRESETS: dict[PresetName, ImagePreset] = {
    "demo": ImagePreset((16, 32, 64), Budget(steps=300, batch_size=64, eval_every=20), Sizes(1000, 1000, 4000)),
    "tiny": ImagePreset((32, 64, 128), Budget(steps=1000, batch_size=64, eval_every=50), Sizes(2000, 2500, 7500)),
    "small": ImagePreset(
        (64, 128, 256, 256), Budget(steps=2000, batch_size=64, eval_every=200), Sizes(7500, 2500, 7500)
    ),
}


class Cifar10Task(ImageTask):
    """50,000 images to train on; of the 10,000 test images a quarter to tune by, the rest to report on.

    Each channel is shifted and scaled to mean 0 and variance 1 over the training images; there is no augmentation. The
    first quarter of the test images, which come in no order, is for tuning.

    Args:
        preset: One of the sizes.
        data: Folder with `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.

    Raises:
        FileNotFoundError: If there is no folder, or a file is missing in it.
        ValueError: If the folder holds the version for Python, which is pickled, or a file is damaged.
    """

    name = "cifar10"
    own_data = False

    def __init__(self, preset: PresetName, *, data: Path | None = None) -> None:
        super().__init__(preset, PRESETS[preset], _read_once(_checked_folder(data)))


def _checked_folder(data: Path | None) -> Path:
    """The folder, with every file in it."""
    folder = folder_of("cifar10", data, _REMEDY)
    missing = [name for name in (*TRAIN_FILES, *TEST_FILES) if not (folder / name).is_file()]
    if missing and exists(folder / "data_batch_1"):
        problem = "is the version of CIFAR-10 for Python: pickles, which could run any code when they are read"
        raise ValueError(f"--data {str(data)!r} {problem}. {_REMEDY}")
    if missing:
        raise FileNotFoundError(f"--data {str(data)!r} has no {', '.join(missing)}. {_REMEDY}")
    return folder


@functools.lru_cache(maxsize=1)
def _read_once(folder: Path) -> Images:
    digest = hashlib.sha256()
    parts = {name: _read_rows(folder / name) for name in (*TRAIN_FILES, *TEST_FILES)}
    for rows in parts.values():
        digest.update(f"{len(rows)}\0".encode())
        digest.update(rows.numpy().data)
    size = sum(rows.numel() for rows in parts.values())
    train = _split(torch.cat([parts[name] for name in TRAIN_FILES]))
    test = _split(torch.cat([parts[name] for name in TEST_FILES]))
    mean, std = _moments(train[0])
    return Images(train, test, mean, std, DataIdentity(folder.name, digest.hexdigest(), size))


def _read_rows(path: Path) -> Tensor:
    """The examples (n, 3073) of a file, uint8."""
    content = read_data(path, most=MOST_BYTES)
    size = len(content)
    if size == 0 or size % ROW:
        problem = f"{path} has {size} bytes, which is not a whole number of images of {ROW} bytes"
        raise ValueError(f"{problem}: it is damaged. {_REMEDY}")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, ROW)
    if (largest := int(rows[:, 0].max())) >= CLASSES:
        raise ValueError(
            f"{path} has the label {largest}, above {CLASSES - 1}: it is not CIFAR-10, or damaged. {_REMEDY}"
        )
    return rows


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[:, 1:].reshape(-1, *IMAGE), rows[:, 0].long()


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (3, 1, 1) each, from its counts of the 256 levels: exact."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    shares, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64, device="cpu")
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
    if (std == 0).any():
        raise ValueError(f"A colour has one and the same level in all training images: they are damaged. {_REMEDY}")
    return mean.float()[:, None, None], std.float()[:, None, None]
