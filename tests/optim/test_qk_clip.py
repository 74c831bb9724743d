"""Weights of queries and keys are scaled down where logits were too large, and nowhere else."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from steepest import Decoupled, Momo, Muon, QKClip, Sphere
from steepest.anatomy import Attention
from tests.cases import cases
from tests.reference.qk_clip import clipped

HEADS, KEYS, DIM, WIDTH = 4, 2, 3, 8


class Layer(nn.Module):
    """Causal attention with shared heads of keys, that shows its logits."""

    def __init__(self, grown=1.0):
        super().__init__()
        self.num_heads, self.num_key_value_heads = HEADS, KEYS
        self.q_proj, self.k_proj = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(WIDTH, KEYS * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.largest = None
        with torch.no_grad():
            self.q_proj.weight.mul_(grown)

    def forward(self, x):
        query = self.q_proj(x).view(-1, HEADS, DIM).transpose(0, 1)
        key = self.k_proj(x).view(-1, KEYS, DIM).transpose(0, 1).repeat_interleave(HEADS // KEYS, 0)
        logits = query @ key.mT / DIM**0.5
        hidden = torch.ones_like(logits[0], dtype=torch.bool).triu(1)
        self.largest = logits.masked_fill(hidden, -torch.inf).amax((1, 2)).detach()
        return self.out((logits.softmax(-1) @ query).transpose(0, 1).flatten(1))


class Net(nn.Module):
    def __init__(self, grown=1.0):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.attn = nn.Linear(WIDTH, WIDTH), Layer(grown)

    def forward(self, x):
        return self.attn(self.first(x))


def inputs(step):
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(step))


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def parts(model):
    """Weights and biases (heads, head_dim, in + 1) of queries and keys, in float64."""
    return [
        np.concatenate([p.weight.detach().double().numpy(), p.bias.detach().double().numpy()[:, None]], 1).reshape(
            -1, DIM, WIDTH + 1
        )
        for p in (model.attn.q_proj, model.attn.k_proj)
    ]


@cases("momo", [False, True])
def test_fifty_steps_are_those_of_the_reference(momo):
    """Clips, and nothing else, change weights between a step and the next; Momo takes no notice."""
    model = Net(grown=6.0).double()
    optimizer = Muon(model, lr=0.05, step_size=Momo(0.0) if momo else None)
    clip = QKClip(model, threshold=1.0)
    clip.follow(optimizer)
    clips = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Weights were changed")
        for step in range(50):
            optimizer.zero_grad()
            loss = (model(inputs(step).double()) - inputs(step).double()).square().mean()
            loss.backward()
            largest = model.attn.largest.clone()
            clip.record("attn", largest)
            captured = {}
            original = optimizer.displace

            def spy(moves, captured=captured, original=original):
                captured["before"] = parts(model)
                original(moves)

            optimizer.displace = spy
            optimizer.step(loss=loss.detach())
            optimizer.displace = original
            if (largest > 1).any():
                clips += 1
                expected = clipped(*captured["before"], largest.numpy(), 1.0)
                for ours, theirs in zip(parts(model), expected, strict=True):
                    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
            else:
                assert "before" not in captured
            assert clip.diagnostics()["clipped_heads"] == int((largest > 1).sum())
            assert clip.diagnostics()["max_logit"] == pytest.approx(float(largest.max()), rel=1e-6)
    assert 0 < clips < 50


def test_logits_that_were_seen_are_at_the_threshold_afterwards():
    model = Net(grown=30.0)
    clip = QKClip(model, threshold=2.0)
    model(inputs(0))
    assert model.attn.largest.max() > 2
    clip.record("attn", model.attn.largest)
    clip.clip()
    model(inputs(0))
    assert model.attn.largest.max() <= 2 * (1 + 1e-5)
    before = weights(model)
    clip.clip()  # nothing was recorded since
    assert same(before, weights(model))


def test_the_bound_that_watching_takes_is_above_every_logit_and_that_of_the_tokens():
    model = Net(grown=5.0)
    clip = QKClip(model, threshold=1e9)
    watching = clip.watch()
    for step in range(3):
        model(inputs(step))
    found = clip._maxima["attn"]
    expected = torch.zeros(HEADS)
    for step in range(3):
        h = model.first(inputs(step))
        query = model.attn.q_proj(h).view(-1, HEADS, DIM).norm(dim=-1).amax(0)
        key = model.attn.k_proj(h).view(-1, KEYS, DIM).norm(dim=-1).amax(0).repeat_interleave(HEADS // KEYS)
        model(inputs(step))
        assert (model.attn.largest <= found + 1e-5).all()
        expected = torch.maximum(expected, query * key / DIM**0.5)
    torch.testing.assert_close(found, expected.detach())
    clip.clip()
    model.eval()
    model(inputs(0))
    assert clip._maxima == {}
    model.train()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # logits of other weights
        other(inputs(0))
    assert clip._maxima == {}
    watching.remove()
    model(inputs(0))
    assert clip._maxima == {}


def test_momo_goes_along_on_a_linear_loss():
    """Where the model of the loss is exact, its value after a clip is the loss at the new weights."""
    torch.manual_seed(2)
    query, key = nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()
    slopes = [torch.randn(4, 4, dtype=torch.float64) for _ in range(2)]
    optimizer = Muon([query.weight, key.weight], lr=0.1, step_size=Momo(-100.0), polar="svd")
    clip = QKClip([Attention.of("x", query, key, heads=2)], threshold=1.0)
    clip.follow(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        loss = sum((slope * layer.weight).sum() for slope, layer in zip(slopes, (query, key), strict=True))
        loss.backward()
        clip.record("x", torch.tensor([3.0, 0.5]))
        optimizer.step(loss=loss.detach())
        now = sum(float((s * layer.weight.detach()).sum()) for s, layer in zip(slopes, (query, key), strict=True))
        assert optimizer.state_dict()["param_groups"][0]["momo_value"] == pytest.approx(now, rel=1e-9)


def test_steps_that_are_passed_over_clip_nothing_and_numbers_that_are_none_count_as_nothing():
    model = Net()
    optimizer = Muon(model, lr=0.0)
    clip = QKClip(model)
    clip.follow(optimizer)
    before = weights(model)
    for maxima in (torch.full((HEADS,), math.nan), torch.full((HEADS,), math.inf), torch.full((HEADS,), -1e9)):
        model(inputs(0)).sum().backward()
        clip.record("attn", maxima)
        optimizer.step()
        assert same(before, weights(model))
    clip.record("attn", torch.full((HEADS,), 1e3))
    model.first.weight.grad[0] = math.nan
    with pytest.warns(RuntimeWarning, match="is not finite"):
        optimizer.step()
    assert same(before, weights(model))
    model.first.weight.grad[0] = 0.0
    optimizer.step()  # what was recorded before is forgotten
    assert same(before, weights(model))


def test_kept_bits_and_other_optimizers():
    for make in (lambda p: torch.optim.SGD(p, lr=0.0), lambda p: Muon(p, lr=0.0, rounding="kept")):
        model = Net().bfloat16()
        optimizer = make(model.parameters())
        clip = QKClip(model)
        clip.follow(optimizer)
        before = model.attn.q_proj.weight.detach().float()
        for _ in range(2):
            model(inputs(0).bfloat16()).sum().backward()
            clip.record("attn", torch.tensor([101.0, 0.0, 0.0, 0.0]))
            optimizer.step()
        expected = before.clone()
        expected[:DIM] *= 100 / 101
        exact = optimizer.exact(model.attn.q_proj.weight) if isinstance(optimizer, Muon) else None
        if exact is not None:
            torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(model.attn.q_proj.weight.detach().float(), expected, rtol=1e-2, atol=1e-4)
        assert torch.equal(model.attn.q_proj.weight[DIM:].float(), before[DIM:])


def test_what_makes_no_sense_is_refused():
    model = Net()
    clip = QKClip(model)
    with pytest.raises(ValueError, match="Unknown attention 'atn': did you mean 'attn'"):
        clip.record("atn", torch.ones(HEADS))
    with pytest.raises(ValueError, match=r"maxima of 'attn' must have shape \(4,\), one for each head, got \(2,\)"):
        clip.record("attn", torch.ones(2))
    with pytest.raises(TypeError, match="must be a tensor of real numbers"):
        clip.record("attn", 3.0)
    with pytest.raises(ValueError, match="there is no attention whose queries and keys are known"):
        QKClip(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="must be a model, or a list of"):
        QKClip([nn.Linear(3, 3)])
    with pytest.raises(TypeError, match="must be a model, or a list of"):
        QKClip(3)
    one = clip.attentions["attn"]
    with pytest.raises(ValueError, match="names of attentions must be distinct"):
        QKClip([one, one])
    with pytest.raises(ValueError, match="has no modules whose outputs are queries and keys"):
        QKClip(nn.MultiheadAttention(4, 2)).watch()


def test_weights_that_are_kept_on_spheres_are_told_of():
    model = Net()
    with pytest.warns(UserWarning, match=r"'attn\.q_proj\.weight', 'attn\.k_proj\.weight' are kept at their norm by"):
        QKClip(model).follow(Muon(model, weight_decay=Sphere()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free = {"attn.?_proj.*": {"weight_decay": Decoupled(0.1)}}
        QKClip(model).follow(Muon(model, weight_decay=Sphere(), families=free))
