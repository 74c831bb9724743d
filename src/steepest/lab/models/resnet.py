"""ResNet for small images, in the form that is used on CIFAR: a stem of one 3x3 convolution, no pooling after it."""

import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab.models.whole_batch import BatchNorm


class ResNet(nn.Module):
    """Images (batch, in_channels, height, width) to logits (batch, classes); stages of two basic blocks each.

    The first stage keeps the size of the image, each further one halves it; mean over pixels, linear head. With the
    default channels it is ResNet-18, 11.2 million parameters. Weights are drawn as torch draws them.

    Args:
        classes: Number of classes.
        channels: Of each stage.
        in_channels: Of the images.

    Source:
        He et al., arXiv:1512.03385, section 4.2.
    """

    def __init__(self, *, classes: int, channels: tuple[int, ...] = (64, 128, 256, 512), in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.stem_norm = BatchNorm(channels[0])
        blocks: list[nn.Module] = []
        for stage, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            blocks += [BasicBlock(before, after, stride=1 if stage == 0 else 2), BasicBlock(after, after, stride=1)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (batch, classes) of images (batch, in_channels, height, width)."""
        x = F.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((-2, -1)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes.

    Args:
        before: Channels that come in.
        after: Channels that go out.
        stride: Of the first convolution.
    """

    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.first_norm = BatchNorm(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = BatchNorm(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), BatchNorm(after))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, rows, columns) to (batch, after, rows / stride, columns / stride)."""
        inside = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(inside + self.shortcut(x))
