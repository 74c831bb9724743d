"""Images to be told apart: what all such tasks have in common, from pixels and labels on."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab.models.convnet import ConvNet
from steepest.lab.tasks.held_out import TUNING_SHARE, Evaluation, HeldOut, Part, Sizes, evaluation
from steepest.lab.tasks.order import seeded
from steepest.lab.tasks.task import Batch, Budget, DataIdentity, PresetName

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class ImagePreset:
    """One size of a task: channels of each convolution, the length of a run, and what is evaluated."""

    channels: tuple[int, ...]
    budget: Budget
    held_out: Sizes


@dataclass(frozen=True)
class Images:
    """Pixels (n, channels, rows, columns) with labels (n,) int64, to train on and held out.

    Args:
        train: Pixels and labels.
        held_out: Likewise; the first quarter is for tuning.
        mean: Of each channel, (channels, 1, 1).
        std: Likewise, the standard deviation.
        identity: Of all of them together.
    """

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    mean: Tensor
    std: Tensor
    identity: DataIdentity


class ImageTask:
    """A task of ten classes; each channel is shifted and scaled, and there is no augmentation.

    Args:
        preset: One of the sizes.
        size: What it is.
        images: The data.
    """

    tokens_per_example = 1  # "tokens" counts images here

    def __init__(self, preset: PresetName, size: ImagePreset, images: Images) -> None:
        self.preset: PresetName = preset
        self.size = size
        self.budget = size.budget
        self._identity = images.identity
        self.mean, self.std = images.mean, images.std
        self.train_images, self.train_labels = images.train
        self.held_out_images, self.held_out_labels = images.held_out
        tuning = len(self.held_out_images) // TUNING_SHARE
        self.held_out = HeldOut(tuning, len(self.held_out_images) - tuning, size.held_out)

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.train_images)

    def data_identity(self) -> DataIdentity:
        """Name, SHA-256 and size of images and labels together."""
        return self._identity

    def build_model(self, seed: int) -> nn.Module:
        """A fresh network whose weights depend on `seed` only; torch's global generator is left as it was."""
        with seeded("model", seed):
            return ConvNet(classes=10, channels=self.size.channels, in_channels=self.train_images.shape[1])

    def batch(self, examples: Tensor) -> Batch:
        """Images (B, channels, rows, columns) and labels (B,) of the training images `examples` (B,)."""
        return self._normalized(self.train_images[examples]), self.train_labels[examples]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per image, 0-d."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part, *, whole: bool) -> Evaluation:
        """Mean cross-entropy and share of right answers over the images of a part."""
        examples = self.held_out.examples(part, whole=whole)
        images, labels = self.held_out_images[examples], self.held_out_labels[examples]
        logits = torch.cat([model(self._normalized(pixels)) for pixels in images.split(EVALUATION_BATCH)])
        return evaluation(F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels)

    def _normalized(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std
