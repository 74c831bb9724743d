import math

import pytest
import torch
import torch.nn.functional as F

from steepest.lab.models.gpt import GPT, GPTConfig, rotate

SMALL = GPTConfig(vocabulary=11, layers=2, width=16, head_size=8)


def drawn(config: GPTConfig, rng: torch.Generator) -> GPT:
    """A model in which nothing is zero, so that every path carries signal."""
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model


def test_the_first_loss_is_that_of_the_uniform_distribution():
    config = GPTConfig(vocabulary=256, layers=2, width=32)
    tokens = torch.randint(256, (3, 9))
    logits = GPT(config)(tokens)
    assert logits.shape == (3, 9, 256)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=1e-6)


def test_weights_have_the_stated_spread():
    model = GPT(GPTConfig(vocabulary=256, layers=2, width=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "proj" in name or name.startswith("head"):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            spread = 1.0 if name.startswith("embedding") else (0.33 / parameter.size(1)) ** 0.5
            # at least 16384 draws: the standard deviation of this estimate is below 0.6 %
            assert parameter.std().item() == pytest.approx(spread, rel=0.03), name


def test_a_later_token_does_not_change_an_earlier_logit(rng):
    model = drawn(SMALL, rng)
    tokens = torch.randint(11, (2, 12), generator=rng)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()  # and everything from there on does see it


def test_rotated_dot_products_depend_on_the_distance_only(rng):
    q, k = torch.randn(2, 1, 16, generator=rng, dtype=torch.float64).expand(2, 10, 16)
    scores = rotate(q) @ rotate(k).T
    for distance in range(-9, 10):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)  # float32 angles
    assert scores[0].std() > 0.1  # and on the distance they do depend


def test_rotation_keeps_lengths_and_half_of_the_pairs(rng):
    x = torch.randn(3, 7, 16, generator=rng)
    y = rotate(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., 4:8], x[..., 4:8])
    assert torch.equal(y[..., 12:], x[..., 12:])


def test_the_soft_cap_bounds_the_logits(rng):
    free = drawn(SMALL, rng)
    capped = GPT(GPTConfig(vocabulary=11, layers=2, width=16, head_size=8, softcap=0.5))
    capped.load_state_dict(free.state_dict())
    tokens = torch.randint(11, (2, 12), generator=rng)
    logits = free(tokens)
    assert logits.abs().max() > 0.5
    torch.testing.assert_close(capped(tokens), 0.5 * logits / (logits**2 + 0.25).sqrt())


@pytest.mark.parametrize(
    ("width", "head_size", "message"),
    [
        (12, 6, "head_size must be a multiple of 4 .* 6"),
        (12, 8, "width must be a multiple of head_size 8, .* 12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(width, head_size, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(vocabulary=11, layers=1, width=width, head_size=head_size)
