"""Images to be told apart: what all such tasks have in common, from pixels and labels on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab.models.convnet import ConvNet
from steepest.lab.tasks.held_out import TUNING_SHARE, Evaluation, HeldOut, Part, Share, Sizes, evaluation, one_by_one
from steepest.lab.tasks.order import seeded
from steepest.lab.tasks.task import Batch, Budget, DataIdentity, PresetName

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class ImagePreset:
    """One size of a task.

    Args:
        channels: Of each convolution of a `ConvNet`.
        budget: The length of a run.
        held_out: What is evaluated.
        network: Takes `classes` and `in_channels`, and makes another network instead.
    """

    channels: tuple[int, ...]
    budget: Budget
    held_out: Sizes
    network: Callable[..., nn.Module] | None = None


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


def epochs(count: int, *, batch_size: int, images: int) -> Budget:
    """A run of some epochs at a constant rate, evaluated after each; with batch size b it has another length.

    Such a run has floor(count * batch_size / b) epochs of floor(images / b) steps each, and rates times
    sqrt(b / batch_size).

    Args:
        count: Epochs at the batch size of the preset.
        batch_size: Of the preset.
        images: To train on.

    Source:
        Scripts of Sato, Naganuma and Iiduka, arXiv:2507.01598: https://github.com/Hiroki11x/critical_batchsize_muon.
    """

    def lengths(b: int) -> tuple[int, int]:
        epoch = max(1, images // b)
        return max(1, count * batch_size // b) * epoch, epoch

    steps, epoch = lengths(batch_size)
    return Budget(steps, batch_size, epoch, schedule="constant", at_batch_size=lengths, root_rates=True)


class ImageTask:
    """A task of some classes; each channel is shifted and scaled, and there is no augmentation.

    Args:
        preset: One of the sizes.
        size: What it is.
        images: The data.
    """

    tokens_per_example = 1  # "tokens" counts images here
    classes = 10

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
        colours = self.train_images.shape[1]
        with seeded("model", seed):
            if self.size.network is not None:
                return self.size.network(classes=self.classes, in_channels=colours)
            return ConvNet(classes=self.classes, channels=self.size.channels, in_channels=colours)

    def batch(self, examples: Tensor) -> Batch:
        """Images (B, channels, rows, columns) and labels (B,) of the training images `examples` (B,)."""
        return self._normalized(self.train_images[examples]), self.train_labels[examples]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per image, 0-d."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part, *, whole: bool, share: Share = one_by_one) -> Evaluation:
        """Mean cross-entropy and share of right answers over the images of a part.

        Args:
            model: Takes the images to where its parameters are.
            part: Which.
            whole: False: those of a curve only.
            share: Who does which batches of them.
        """
        batches = self.held_out.examples(part, whole=whole).split(EVALUATION_BATCH)
        losses, right = torch.cat(share(lambda batch: self._judged(model, batch), batches)).unbind(1)
        return evaluation(losses, right)

    def _judged(self, model: nn.Module, examples: Tensor) -> Tensor:
        """Cross-entropy of each held-out image, and whether it is told right: (B, 2), on the CPU."""
        device = next(model.parameters()).device
        labels = self.held_out_labels[examples].to(device)
        logits = model(self._normalized(self.held_out_images[examples]).to(device))
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([losses, (logits.argmax(-1) == labels).to(losses.dtype)], 1).cpu()

    def _normalized(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std
