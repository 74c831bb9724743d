"""Tokens that count less or not at all: masks, and samples of tokens."""

from contextlib import nullcontext

import pytest
import torch

from steepest import InputMoment
from tests.stages.inputs.watched import assert_kept, backward, data, kept, moments, net, newton

MASKS = {
    "tokens": (torch.rand(8, 3, generator=torch.Generator().manual_seed(3)) < 0.5).double(),
    "booleans": torch.rand(8, 3, generator=torch.Generator().manual_seed(3)) < 0.5,
    "sequences": torch.tensor([1.0, 0, 1, 1, 0, 0, 0.5, 2]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_masked_tokens_do_not_count(mask, reentrant):
    model, x, y = net(reentrant=reentrant), data(), data(seed=2)
    optimizer, mask = newton(model), MASKS[mask]
    expected = moments(model, [x, y], [mask, torch.ones(8, 3)])
    with optimizer.input_mask(mask):
        loss = model(x).square().mean()
        if reentrant:
            loss.backward()
    with optimizer.input_mask(torch.ones(8, 3)) if reentrant else nullcontext():
        if not reentrant:
            loss.backward()
        backward(model, y)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_padding_that_overflows_does_no_harm_if_masked_out():
    model, x = net(), data()
    mask = MASKS["tokens"]
    optimizer, expected = newton(model), moments(model, [x], [mask])
    x = torch.where(mask.bool().unsqueeze(-1), x, 1e200)  # its square is no number of float64
    with optimizer.input_mask(mask):
        model.first(x)[mask.bool()].square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(kept(model, optimizer)["first.weight"], expected["first.weight"])


TEXT = (
    r"^input_mask was used in a forward pass since the last step, but is not in force while the inputs of '{}' are "
    r"seen: .*Call backward\(\) within input_mask, with a mask for each micro-batch.$"
)


def test_a_mask_that_a_checkpointed_layer_would_not_see_is_refused():
    model = net(reentrant=True)
    optimizer = newton(model)
    with optimizer.input_mask(MASKS["tokens"]):
        loss = model(data()).square().mean()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=TEXT.format("third.weight")):
        loss.backward()
    optimizer.zero_grad()
    with optimizer.input_mask(MASKS["tokens"]):
        backward(model, data())
    optimizer.step()
    optimizer.zero_grad()
    backward(model, data())  # a step without any mask


@pytest.mark.parametrize("shape", [(3, 8), (8, 3, 1), (3,), (23,)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape):
    model = net()
    optimizer = newton(model)
    with optimizer.input_mask(torch.ones(shape)):
        loss = model(data()).square().mean()
    text = (
        r"^The mask of inputs has shape .*, which is not how the tokens \(8, 3\) that 'third.weight' reads begin\. Give"
    )
    with pytest.raises(ValueError, match=text):
        loss.backward()


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_of_tokens_is_evenly_spread_and_weighs_as_much_as_all(masked):
    model, x, y = net(), data(), data(size=1)
    options = InputMoment(every=1, first=0, decay=0.0, structure="full", tokens=7)
    optimizer, mask = newton(model, options), MASKS["tokens"]
    taken = torch.zeros(24).index_fill(0, torch.tensor([0, 5, 7, 13, 15, 17, 22]), 1.0).view(8, 3)
    weights = taken * (24 / 7) * (mask if masked else 1.0)
    expected = moments(model, [x, y], [weights, torch.ones(1, 3)])
    with optimizer.input_mask(mask) if masked else nullcontext():
        loss = model(x).square().mean()
    (loss + model(y).square().mean()).backward()
    optimizer.step()
    assert_kept(model, optimizer, expected, rtol=1e-6, atol=1e-7)  # the weights above are of float32
