"""`cifar100`: tell a hundred kinds of things apart on 32x32 colour photographs, from the original files of the user."""

from functools import partial
from pathlib import Path

from steepest.lab.models.vgg import VGG
from steepest.lab.tasks.cifar import ALL, SIZES, Kind, read_images
from steepest.lab.tasks.held_out import Sizes
from steepest.lab.tasks.images import ImagePreset, ImageTask, epochs
from steepest.lab.tasks.task import PresetName

KIND = Kind(
    task="cifar100",
    title="CIFAR-100",
    classes=100,
    labels=2,  # one of 20 groups of classes, then the class
    train=("train.bin",),
    test=("test.bin",),
    archive="cifar-100-binary.tar.gz",
    folder="cifar-100-binary",
    pickled="train",
)
BATCHES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # of the track: docs/tracks.md
_REHEARSED = partial(VGG, stages=((16, 16), (16,), (32,), (32,), (32,)), hidden=64)


PRESETS: dict[PresetName, ImagePreset] = {
    **SIZES,
    "vgg16": ImagePreset((), epochs(100, batch_size=512, images=50_000), ALL, VGG),
    "vgg16-rehearsal": ImagePreset((), epochs(1, batch_size=64, images=384), Sizes(100, 100, 100), _REHEARSED),
}


class Cifar100Task(ImageTask):
    """50,000 images of 100 classes to train on; of the 10,000 test images a quarter to tune by, the rest to report on.

    Each channel is shifted and scaled to mean 0 and variance 1 over the training images; there is no augmentation. The
    first quarter of the test images, which come in no order, is for tuning.

    Args:
        preset: One of the sizes.
        data: Folder with `train.bin` and `test.bin`.

    Raises:
        FileNotFoundError: If there is no folder, or a file is missing in it.
        ValueError: If the folder holds the version for Python, which is pickled, or a file is damaged.
    """

    name = "cifar100"
    own_data = False
    classes = KIND.classes

    def __init__(self, preset: PresetName, *, data: Path | None = None) -> None:
        super().__init__(preset, PRESETS[preset], read_images(KIND, data))
