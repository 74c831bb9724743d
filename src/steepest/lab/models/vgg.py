"""VGG with batch norm, in the form that is used on CIFAR: five poolings bring an image of 32x32 down to one pixel."""

from torch import Tensor, nn

from steepest.lab.models.whole_batch import BatchNorm, Dropout

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Images (batch, in_channels, 32, 32) to logits (batch, classes).

    Stages of 3x3 convolutions with batch norm and ReLU, each followed by 2x2 pooling; then two hidden layers with
    dropout, and a linear head. With the default sizes and 100 classes it is VGG16-bn, 34.0 million parameters. Weights
    are drawn as torch draws them.

    Args:
        classes: Number of classes.
        stages: Output channels of the convolutions of each stage; five of them.
        hidden: Width of the two hidden layers.
        in_channels: Of the images.

    Source:
        Simonyan and Zisserman, arXiv:1409.1556, table 1, column D.
    """

    def __init__(
        self,
        *,
        classes: int,
        stages: tuple[tuple[int, ...], ...] = STAGES,
        hidden: int = 4096,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        first = stages[0][0]
        self.stem = nn.Conv2d(in_channels, first, 3, padding=1)
        layers: list[nn.Module] = [BatchNorm(first), nn.ReLU()]
        before = first
        for number, stage in enumerate(stages):
            for after in stage[1:] if number == 0 else stage:
                layers += [nn.Conv2d(before, after, 3, padding=1), BatchNorm(after), nn.ReLU()]
                before = after
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(
            nn.Linear(before, hidden), nn.ReLU(), Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), Dropout()
        )
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (batch, classes) of images (batch, in_channels, 32, 32)."""
        return self.head(self.hidden(self.features(self.stem(images)).flatten(1)))
