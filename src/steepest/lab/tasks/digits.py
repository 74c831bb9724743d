"""`digits`: tell the ten digits apart on the 8x8 images that come with scikit-learn."""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab.models.convnet import ConvNet
from steepest.lab.tasks.held_out import TUNING_SHARE, Evaluation, HeldOut, Part, Sizes, evaluation
from steepest.lab.tasks.order import derive_seed
from steepest.lab.tasks.task import Batch, Budget, DataIdentity, PresetName

TRAIN_SHARE = 0.8
ALL = Sizes(1000, 1000, 1000)


@dataclass(frozen=True)
class DigitsPreset:
    """One size of the task: channels of each convolution, and the length of a run."""

    channels: tuple[int, ...]
    budget: Budget


PRESETS: dict[PresetName, DigitsPreset] = {
    "demo": DigitsPreset((32, 64, 128), Budget(steps=300, batch_size=64, eval_every=10)),
    "tiny": DigitsPreset((32, 64, 128), Budget(steps=1000, batch_size=64, eval_every=20)),
    "small": DigitsPreset((64, 128, 256, 256), Budget(steps=2000, batch_size=64, eval_every=50)),
}


class DigitsTask:
    """1,797 images in 16 grey levels: 1,437 to train on, 90 to tune by, 270 to report on, the same for every run.

    Args:
        preset: One of the sizes.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """

    name = "digits"
    tokens_per_example = 1  # "tokens" counts images here
    own_data = True

    def __init__(self, preset: PresetName) -> None:
        self.preset: PresetName = preset
        self.size = PRESETS[preset]
        self.budget = self.size.budget
        images, labels, self._identity = _load()
        shuffled = torch.randperm(
            len(images), generator=torch.Generator(device="cpu").manual_seed(derive_seed("digits split")), device="cpu"
        )
        train, held_out = shuffled.tensor_split([int(TRAIN_SHARE * len(images))])
        self.train_images, self.train_labels = images[train], labels[train]
        self.held_out_images, self.held_out_labels = images[held_out], labels[held_out]
        tuning = len(held_out) // TUNING_SHARE
        self.held_out = HeldOut(tuning, len(held_out) - tuning, ALL)

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.train_images)

    def data_identity(self) -> DataIdentity:
        """Name, SHA-256 and size of images and labels together."""
        return self._identity

    def build_model(self, seed: int) -> nn.Module:
        """A fresh network whose weights depend on `seed` only; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("model", seed))
            return ConvNet(classes=10, channels=self.size.channels)

    def batch(self, examples: Tensor) -> Batch:
        """Images (B, 1, 8, 8) and labels (B,) of the training images `examples` (B,)."""
        return self.train_images[examples], self.train_labels[examples]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per image, 0-d."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part, *, whole: bool) -> Evaluation:
        """Mean cross-entropy and share of right answers over all images of a part."""
        examples = self.held_out.examples(part, whole=whole)
        images, labels = self.held_out_images[examples], self.held_out_labels[examples]
        logits = model(images)
        return evaluation(F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels)


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
