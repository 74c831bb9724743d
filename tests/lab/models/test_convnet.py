import math

import pytest
import torch
import torch.nn.functional as F

from steepest.lab.models.convnet import ConvNet


def test_logits_have_one_column_per_class_and_start_uniform(rng):
    model = ConvNet(classes=10, channels=(4, 8))
    images, labels = torch.randn(6, 1, 8, 8, generator=rng), torch.arange(6)
    logits = model(images)
    assert logits.shape == (6, 10)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(math.log(10), abs=1e-6)


def test_the_features_do_not_depend_on_where_the_image_is(rng):
    model = ConvNet(classes=10, channels=(4, 8)).eval()
    torch.nn.init.normal_(model.head.weight)
    image = torch.zeros(1, 1, 16, 16)
    image[..., 6:8, 6:8] = torch.rand(2, 2, generator=rng)
    moved = image.roll((2, 2), dims=(-2, -1))  # by the pooling's stride, and far from the border
    torch.testing.assert_close(model(image), model(moved))
    assert (model(image) != model(2 * image)).any()


def test_colour_images_are_read_channel_by_channel(rng):
    model = ConvNet(classes=10, channels=(4, 8), in_channels=3).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 8, 8, generator=rng)
    logits = model(images)
    assert logits.shape == (2, 10)
    for channel in range(3):
        changed = images.clone()
        changed[:, channel] += 1
        assert (model(changed) != logits).any(-1).all()
