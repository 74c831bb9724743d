import pytest
import torch
from torch import nn

from steepest.lab.models import whole_batch
from steepest.lab.models.resnet import ResNet
from steepest.lab.models.vgg import VGG
from steepest.lab.models.whole_batch import BatchNorm, Dropout, whole_batch_modules


def test_alone_a_batch_norm_is_torchs(rng):
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(4, 3, 5, 5, generator=rng)
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(own, other) for own, other in zip(ours.buffers(), theirs.buffers(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_norm_of_ranks_is_as_wide_as_torchs(rng, monkeypatch, dtype):
    monkeypatch.setattr(whole_batch, "_over_ranks", lambda numbers: 2 * numbers)  # another rank has the same images
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    ours.ranks = 2
    x = (2 + 0.1 * torch.randn(8, 3, 5, 5, generator=rng)).to(dtype)
    found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler, of itself
def test_a_compiled_network_drops_the_same_entries(rng):
    module, x = nn.Sequential(nn.Linear(5, 5), Dropout(0.5)), torch.randn(4, 5, generator=rng)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.compile(module)(x), expected)


def test_ranks_drop_the_entries_that_one_process_drops(rng):
    x = torch.randn(12, 50, generator=rng)
    torch.manual_seed(3)
    whole = Dropout(0.25)(x)
    parts = []
    for rank in range(3):
        module = Dropout(0.25)
        module.rank, module.ranks = rank, 3
        torch.manual_seed(3)
        parts.append(module(x.chunk(3)[rank]))
    assert torch.equal(torch.cat(parts), whole)
    kept = whole != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.07)  # four standard deviations
    torch.testing.assert_close(whole[kept], x[kept] / 0.75)
    assert torch.equal(Dropout(0.25).eval()(x), x)


def test_networks_halve_their_images_as_often_as_published():
    images = torch.zeros(2, 3, 32, 32)
    resnet, vgg = ResNet(classes=10, channels=(4, 8, 8, 8)), VGG(classes=7, hidden=16)
    sizes = []
    for network, kind in ((resnet, nn.Conv2d), (vgg, nn.MaxPool2d)):
        for module in network.modules():
            if isinstance(module, kind):
                module.register_forward_hook(lambda _, __, out: sizes.append(out.size(-1)))
    assert resnet(images).shape == (2, 10)
    assert sorted(set(sizes), reverse=True) == [32, 16, 8, 4]
    sizes.clear()
    assert vgg(images).shape == (2, 7)
    assert sizes == [16, 8, 4, 2, 1]
    assert len([m for m in vgg.modules() if isinstance(m, nn.Conv2d)]) == 13
    assert len(whole_batch_modules(vgg)) == 13 + 2
    assert len(whole_batch_modules(resnet)) == 1 + 16 + 3
