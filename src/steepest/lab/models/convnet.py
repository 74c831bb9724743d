"""A small convolutional network for images of a few pixels."""

import torch
from torch import Tensor, nn

from steepest.lab.models.whole_batch import BatchNorm


class ConvNet(nn.Module):
    """Images (batch, in_channels, height, width) to logits (batch, classes).

    3x3 convolutions, mean over pixels, linear head.
    """

    def __init__(self, *, classes: int, channels: tuple[int, ...], in_channels: int = 1) -> None:
        """Build the layers with torch's default weights, drawn from the global generator; the head starts at zero.

        Args:
            classes: Number of classes.
            channels: Output channels of each convolution; each is followed by batch norm and ReLU, the first also by
                2x2 pooling.
            in_channels: Channels of the images.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((in_channels, *channels), channels, strict=False)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), BatchNorm(after), nn.ReLU()]
            if i == 0:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], classes)
        with torch.no_grad():
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (batch, classes) of images (batch, in_channels, height, width)."""
        return self.head(self.features(images).mean((-2, -1)))
