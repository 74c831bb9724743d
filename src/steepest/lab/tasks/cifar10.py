"""`cifar10`: tell ten kinds of things apart on 32x32 colour photographs, from the original files of the user."""

from functools import partial
from pathlib import Path

from steepest.lab.models.resnet import ResNet
from steepest.lab.tasks.cifar import ALL, SIZES, Kind, read_images
from steepest.lab.tasks.held_out import Sizes
from steepest.lab.tasks.images import ImagePreset, ImageTask, epochs
from steepest.lab.tasks.task import PresetName

KIND = Kind(
    task="cifar10",
    title="CIFAR-10",
    classes=10,
    labels=1,
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test=("test_batch.bin",),
    archive="cifar-10-binary.tar.gz",
    folder="cifar-10-batches-bin",
    pickled="data_batch_1",
)
BATCHES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # of the track: docs/tracks.md


PRESETS: dict[PresetName, ImagePreset] = {
    **SIZES,
    "resnet18": ImagePreset((), epochs(100, batch_size=512, images=50_000), ALL, ResNet),
    "resnet18-rehearsal": ImagePreset(
        (8, 16, 32, 64),
        epochs(1, batch_size=64, images=384),
        Sizes(100, 100, 100),
        partial(ResNet, channels=(8, 16, 32, 64)),
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
    classes = KIND.classes

    def __init__(self, preset: PresetName, *, data: Path | None = None) -> None:
        super().__init__(preset, PRESETS[preset], read_images(KIND, data))
