import dataclasses
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F

from steepest.lab.models.gpt import GPT, GPTConfig, rotate, rotate_all

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


@pytest.mark.parametrize(
    ("config", "weights", "loss", "slope"),
    [
        (GPTConfig(vocabulary=97, layers=3, width=32, head_size=8), "566f4b3f5a0dcc94", 4.880134105682373, 6.151862),
        (
            GPTConfig(vocabulary=97, layers=2, width=32, head_size=16, softcap=5.0),
            "1607563386d657a8",
            4.703445911407471,
            -2.063114,
        ),
    ],
    ids=["plain", "capped"],
)
def test_the_model_without_options_is_what_it_was_before_there_were_any(config, weights, loss, slope):
    torch.manual_seed(3)
    model = GPT(config)
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    assert digest.hexdigest()[:16] == weights
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.arange(60).view(3, 20) ** 2 % 97
    found = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-6)  # processors round differently
    assert sum(p.grad.double().sum().item() for p in model.parameters()) == pytest.approx(slope, rel=1e-4)


GPT2 = GPTConfig(
    vocabulary=11,
    layers=2,
    width=16,
    head_size=8,
    tied=True,
    norm="layer",
    embedding_norm=False,
    query_norm=False,
    activation="gelu-tanh",
    positions="learned",
    context=12,
    initial="gpt2",
)
RECORD_4 = GPTConfig(
    vocabulary=11,
    layers=2,
    width=16,
    head_size=8,
    tied=True,
    biases=False,
    norm="rms-plain",
    embedding_norm=False,
    query_norm=False,
    activation="gelu",
    positions="rotary",
    attention_gain=0.5,
    initial="torch",
)
RECORD_28 = GPTConfig(
    vocabulary=11,
    layers=4,
    width=16,
    head_size=8,
    biases=False,
    norm="rms-plain",
    attention_scale=0.12,
    value_tables=1,
    without_attention=(2,),
)
PUBLISHED = {"gpt2": GPT2, "record 4": RECORD_4, "record 28": RECORD_28}


def plain(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def attend(x, part, config, *, values=None, turn=None):
    """Attention of one sequence (time, width), head by head."""
    heads = []
    q, k, v = (f(x) for f in (part.query, part.key, part.value))
    for i in range(config.width // config.head_size):
        own = slice(i * config.head_size, (i + 1) * config.head_size)
        a, b, c = q[:, own], k[:, own], v[:, own]
        if values is not None:
            c = part.mixture[0] * c + part.mixture[1] * values[:, own]
        if config.query_norm:
            a, b = plain(a, torch.finfo(x.dtype).eps), plain(b, torch.finfo(x.dtype).eps)
        if turn is not None:
            a, b = turn(a), turn(b)
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        scores = (a @ b.T * scale).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ c)
    return part.proj(torch.cat(heads, -1))


def test_gpt2_is_gpt2(rng):
    model, tokens = drawn(GPT2, rng), torch.randint(11, (12,), generator=rng)
    x = model.embedding.weight[tokens] + model.positions.weight
    for block in model.blocks:
        x = x + attend(block.attention_norm(x), block.attention, GPT2)
        inside = block.mlp.up(block.mlp_norm(x))
        curved = 0.5 * inside * (1 + torch.tanh((2 / math.pi) ** 0.5 * (inside + 0.044715 * inside**3)))
        x = x + block.mlp.proj(curved)
    expected = model.norm(x) @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens[None])[0], expected, rtol=1e-4, atol=1e-4)


def test_record_4_is_record_4(rng):
    model, tokens = drawn(RECORD_4, rng), torch.randint(11, (12,), generator=rng)
    frequencies = 10_000 ** (-torch.arange(0, 8, 2) / 8)

    def turn(x):
        z = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * torch.arange(12)[:, None] * frequencies)
        return torch.cat([z.real, z.imag], -1)

    x = model.embedding.weight[tokens]
    for block in model.blocks:
        x = x + 0.5 * attend(plain(x), block.attention, RECORD_4, turn=turn)
        inside = block.mlp.up(plain(x))
        x = x + block.mlp.proj(0.5 * inside * (1 + torch.erf(inside / 2**0.5)))
    expected = plain(x) @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens[None])[0], expected, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in model.named_parameters() if not name.endswith("weight")} == set()


def test_record_28_has_values_by_token_at_both_ends_and_a_block_without_attention(rng):
    model, tokens = drawn(RECORD_28, rng), torch.randint(11, (12,), generator=rng)
    values = model.value_tables[0].weight[tokens]
    x = plain(model.embedding.weight[tokens])
    for number, block in enumerate(model.blocks):
        if number != 2:
            own = values if number in (0, 3) else None
            x = x + attend(plain(x), block.attention, RECORD_28, values=own, turn=rotate)
        x = x + block.mlp.proj(F.relu(block.mlp.up(plain(x))).square())
    torch.testing.assert_close(model(tokens[None])[0], model.head(plain(x)), rtol=1e-4, atol=1e-4)
    assert not hasattr(model.blocks[2], "attention")


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_of_published_models_too_a_later_token_does_not_change_an_earlier_logit(config, rng):
    model, tokens = drawn(config, rng), torch.randint(11, (2, 12), generator=rng)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_initial_weights_of_published_models_have_the_stated_spread():
    wide = {"width": 128, "vocabulary": 256}
    for name, parameter in GPT(dataclasses.replace(GPT2, **wide)).named_parameters():
        if parameter.ndim == 2 and parameter.numel() > 10_000:
            spread = 0.01 if "proj" in name else 0.02  # 0.02 / sqrt(2 * 2 layers)
            assert parameter.std().item() == pytest.approx(spread, rel=0.03), name
    for name, parameter in GPT(dataclasses.replace(RECORD_4, **wide)).named_parameters():
        bound = parameter.size(1) ** -0.5
        assert parameter.abs().max().item() == pytest.approx(bound, rel=0.01), name
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name


@pytest.mark.parametrize("turn", [rotate, rotate_all])
def test_rotation_is_computed_in_float32_and_rounded_once(turn, rng):
    x = torch.randn(300, 16, generator=rng).bfloat16()
    assert torch.equal(turn(x), turn(x.float()).bfloat16())


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "learned"}, "context=0 goes with positions='learned' only"),
        ({"context": 8}, "context=8 goes with positions='learned' only, got 'half-rotary'"),
        ({"value_tables": 2}, "value_tables must be at most half of the 2 layers, got 2"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
