"""`digits`: tell the ten digits apart on the 8x8 images that come with scikit-learn."""

import hashlib

import torch
from torch import Tensor

from steepest.lab.tasks.held_out import Sizes
from steepest.lab.tasks.images import ImagePreset, Images, ImageTask
from steepest.lab.tasks.order import derive_seed
from steepest.lab.tasks.task import Budget, DataIdentity, PresetName

TRAIN_SHARE = 0.8
ALL = Sizes(1000, 1000, 1000)


PRESETS: dict[PresetName, ImagePreset] = {
    "demo": ImagePreset((32, 64, 128), Budget(steps=300, batch_size=64, eval_every=10), ALL),
    "tiny": ImagePreset((32, 64, 128), Budget(steps=1000, batch_size=64, eval_every=20), ALL),
    "small": ImagePreset((64, 128, 256, 256), Budget(steps=2000, batch_size=64, eval_every=50), ALL),
}


class DigitsTask(ImageTask):
    """1,797 images in 16 grey levels: 1,437 to train on, 90 to tune by, 270 to report on, the same for every run.

    Args:
        preset: One of the sizes.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """

    name = "digits"
    own_data = True

    def __init__(self, preset: PresetName) -> None:
        images, labels, identity = _load()
        generator = torch.Generator(device="cpu").manual_seed(derive_seed("digits split"))
        shuffled = torch.randperm(len(images), generator=generator, device="cpu")
        train, held_out = (
            (images[own], labels[own]) for own in shuffled.tensor_split([int(TRAIN_SHARE * len(images))])
        )
        as_they_are = torch.zeros(1, 1, 1, device="cpu"), torch.ones(1, 1, 1, device="cpu")
        super().__init__(preset, PRESETS[preset], Images(train, held_out, *as_they_are, identity))


def _load() -> tuple[Tensor, Tensor, DataIdentity]:
    """Images (n, 1, 8, 8) in [-1, 1], labels (n,) int64, and what they are."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The task 'digits' needs scikit-learn, which is not installed: pip install 'steepest[lab]'."
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    levels = torch.tensor(pixels, device="cpu").to(torch.uint8)  # whole numbers from 0 to 16
    labels = torch.tensor(classes, dtype=torch.int64, device="cpu")
    content = levels.numpy().tobytes() + labels.to(torch.uint8).numpy().tobytes()
    identity = DataIdentity("scikit-learn digits", hashlib.sha256(content).hexdigest(), len(content))
    return levels.float().view(-1, 1, 8, 8) / 8 - 1, labels, identity
