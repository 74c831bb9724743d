"""What NoiseScale reads out, and keeps over a restart."""

import io
import json
import math

import pytest
import torch
from torch import nn

from steepest.batch_size.noise import NoiseScale
from steepest.geometry import Spectral
from tests.batch_size.noisy_loops import ALL, MICRO, PER, loss_of, measured, network, sgd, train_step, values
from tests.cases import cases

F64 = torch.float64


def test_resuming_continues():
    whole, model = measured(every=2), network()
    optimizer = sgd(model)
    first = NoiseScale(model, optimizer, every=2, samples=PER, kinds=ALL)
    train_step(model, optimizer, 0)
    train_step(model, optimizer, 1)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    first.close()
    second = NoiseScale(model, optimizer, every=2, samples=PER, kinds=ALL)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    train_step(model, optimizer, 2)
    train_step(model, optimizer, 3)
    assert torch.equal(values(second), values(whole))
    assert second.read().to_dict() == whole.read().to_dict()
    with pytest.raises(ValueError, match=r"has kinds=\['euclidean', 'l1', 'nuclear', 'alignment'\], but \['l1'\]"):
        NoiseScale(model, optimizer, kinds=("l1",)).load_state_dict(first.state_dict())


def test_the_report_reads_as_text_and_as_json():
    report = measured().read(last=3, kappa=0.5)
    text = str(report)
    assert text.startswith(
        "Noise scales in samples, 90% intervals; 3 measurements of steps 1 to 3, 12 samples per step"
    )
    assert "kind" in text.splitlines()[1]
    assert "b at 50%" in text
    assert "no gradient was seen" in text  # the frozen one
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["measurements"] == 3
    assert {scale["layer"] for scale in data["scales"]} >= {"total", "gain", "frozen"}
    assert data["alignment"][0]["batches"] == [3.0, 6.0, 9.0]
    with pytest.raises(ValueError, match="did you mean 'l1 of gain'"):
        report.scale("l1", "gian")
    with pytest.raises(ValueError, match="Unknown alignment of layer 'x'"):
        report.curve("x")


def test_curves_use_measurements_with_as_many_micro_batches_as_the_last():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER)
    for step, count in enumerate((2, 4, 8, 4, 8)):
        for index in range(count):
            (loss_of(model, step, index) / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = noise.read()
    assert (report.measurements, report.curve_measurements) == (5, 2)
    assert report.curve().batches == (3.0, 6.0, 12.0, 21.0)


def test_a_known_scale_is_found():
    """Linear loss <w, ξ>, ξ with mean 1 and unit variance in 40 dimensions: tr Σ / |G|² is 1, in any norm of these."""
    model = nn.Linear(40, 1, bias=False).double()
    optimizer = sgd(model, lr=0.0)
    noise = NoiseScale(model, optimizer, every=1, samples=2, kinds=("euclidean", "l1"))
    rng = torch.Generator().manual_seed(1)
    for _ in range(300):
        for _ in range(4):
            (model(1 + torch.randn(2, 40, generator=rng, dtype=F64)).mean() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = noise.read()
    one = report.scale("euclidean")
    assert one.ratio.low < 1 < one.ratio.high
    assert one.ratio.high / one.ratio.low < 1.1
    assert one.noise == pytest.approx(40, rel=0.02)
    l1_scale = report.scale("l1")
    assert l1_scale.plug_in.value < 1 < l1_scale.ratio.value * 1.02


def test_layers_add_up_to_the_total():
    report = measured().read()
    for kind in ("euclidean", "l1", "nuclear"):
        total, *layers = [scale for scale in report.scales if scale.kind == kind]
        assert total.noise == pytest.approx(sum(layer.noise for layer in layers))
        assert total.signal == pytest.approx(sum(layer.signal for layer in layers))
        assert total.layer == "total"
        ratio = total.noise / total.signal
        if total.signal > 0:
            assert total.ratio.value == pytest.approx(ratio if kind == "euclidean" else ratio**2)
    assert {scale.layer for scale in report.scales if scale.kind == "nuclear"} == {
        "total", "up.weight", "sometimes.weight", "down.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"samples": None}, "has samples=3, but None is needed"),
        ({"losses": "whole"}, "has losses='divided', but 'whole'"),
        ({"unit": "tokens"}, "has unit=None, but 'tokens'"),
        ({"norm": "sign"}, "has norms=.*but .*sign"),
    ],
)
def test_resuming_with_other_units_is_refused(other, message):
    saved, model = measured().state_dict(), network()
    with pytest.raises(ValueError, match=message):
        NoiseScale(model, sgd(model), **{"samples": PER, "kinds": ALL, **other}).load_state_dict(saved)


WRONG = [
    *(({"step": value}, "saved noise scale: step must be") for value in (-1, 1.5, "7", None, True)),
    *(({key: -1}, f"saved noise scale: {key} must be at least 0, got -1") for key in ("discarded", "skipped")),
    *(({key: 1}, f"saved noise scale: {key} must be True or False, got 1") for key in ("told", "owed")),
    ({"records": None}, "records must be a list, got None"),
    ({"records": [3]}, "Measurement 0 of the saved noise scale must be a dictionary, got 3"),
    ({"records": [{}]}, "Measurement 0 of the saved noise scale has no 'step'. The checkpoint is damaged"),
]
WRONG_RECORDS = [
    ({"step": -1}, "step must be at least 0"),
    ({"count": 1}, "count must be at least 2"),
    ({"count": 64}, r"values must be finite float64 of shape \(7, 17\), got torch.float64 of shape \(7, 13\)"),
    ({"samples": math.nan}, "samples must be"),
    ({"values": torch.zeros(2)}, "values must be finite float64 of shape"),
    ({"values": None}, "values must be a tensor, got None"),
    ({"weights": torch.full((7,), math.nan, dtype=F64)}, r"weights must be finite .* not all finite. The checkpoint"),
    ({"weights": torch.ones(3)}, "weights must be finite float64 of shape"),
]


@pytest.mark.slow
@cases("change, message", WRONG)
def test_a_damaged_state_is_refused_and_nothing_changes(change, message):
    refused({**measured().state_dict(), **change}, message)


@pytest.mark.slow
@cases("key", measured().state_dict())
def test_a_state_without_an_entry_is_refused(key):
    saved = measured().state_dict()
    del saved[key]
    refused(saved, f"{key}")


@cases("change, message", WRONG_RECORDS)
def test_a_damaged_measurement_is_refused_and_nothing_changes(change, message):
    saved = measured().state_dict()
    saved["records"][-1] = {**saved["records"][-1], **change}
    refused(saved, f"Measurement {len(saved['records']) - 1} of the saved noise scale: {message}")


def test_what_is_no_state_is_refused():
    refused(None, r"must be what state_dict\(\) returned, a dictionary, got None")


def refused(saved, message):
    live = measured(every=2)
    before = live.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        live.load_state_dict(saved)
    after = live.state_dict()
    assert str(after) == str(before)


def test_resuming_micro_batches_with_samples_told_is_refused():
    model = network()
    told = NoiseScale(model, sgd(model), kinds=ALL)
    told.micro_batch(PER)
    with pytest.raises(ValueError, match="counts in micro-batches, but micro_batch was called on this one"):
        told.load_state_dict(measured(samples=None).state_dict())


def test_a_measurement_that_is_owed_is_made_after_resuming():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=2, samples=PER)
    for step in range(4):
        for index in range(1 if step == 3 else MICRO):
            (loss_of(model, step, index) / MICRO).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = noise.state_dict()
    noise.close()
    again = NoiseScale(model, optimizer, every=2, samples=PER)
    assert not again.measuring
    again.load_state_dict(saved)
    assert again.measuring
    assert again.read().skipped == 1


def test_curves_use_measurements_of_batches_as_large_as_the_last():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1)
    for step, size in enumerate((1, 1, 1, 16, 16)):
        for index in range(4):
            noise.micro_batch(size)
            (loss_of(model, step, index) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = noise.read()
    assert (report.measurements, report.curve_measurements) == (5, 2)
    assert report.curve().batches == (16.0, 32.0, 48.0)


@pytest.mark.parametrize(("count", "status"), [(2, "rising"), (4, "rising"), (16, "bounded")])
def test_a_scale_whose_noise_still_rises_has_no_upper_end(count, status):
    """Linear loss <W, u vᵀ> + a mean, u and v of 8 and 12 entries, 4 products per micro-batch."""
    model = nn.Linear(12, 8, bias=False).double()
    optimizer = sgd(model, lr=0.0)
    noise = NoiseScale(model, optimizer, every=1, samples=4, kinds=("nuclear",), norm="frobenius")
    rng = torch.Generator().manual_seed(2)
    for _ in range(30):
        for _ in range(count):
            u, v = (torch.randn(4, size, generator=rng, dtype=F64) for size in (8, 12))
            (((model(v) * u).sum(1).mean() + 4 * model.weight.diagonal().sum()) / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    truth = (8 * 12**0.5 / 32) ** 2
    one = noise.read().scale("nuclear", "weight")
    assert one.ratio.status == one.plug_in.status == noise.read().scale("nuclear").ratio.status == status
    assert one.ratio.low < truth < 1.15 * one.ratio.high  # 5% of the noise may be missing
    assert one.ratio.low == one.plug_in.low if status == "rising" else math.isfinite(one.ratio.high)
    assert ("only a lower end" in str(noise.read())) == (status == "rising")


@pytest.mark.parametrize(("rule", "tall"), [(None, 10.0), ("original", 10.0), ("match_rms_adamw", 4.0)])
def test_torchs_muon_has_the_length_of_its_own_steps(rule, tall):
    """A 400 x 4 step is 10 times as long as a square one; A grows with the length."""
    model = nn.Sequential(nn.Linear(4, 400, bias=False), nn.Tanh(), nn.Linear(400, 400, bias=False)).double()
    optimizer = torch.optim.Muon([model[0].weight], lr=0.01, adjust_lr_fn=rule)
    noise = NoiseScale(model, optimizer, every=1, kinds=("alignment",))
    assert noise._layers[0].norm == Spectral(scale=rule or "original")
    before = model[0].weight.detach().clone()
    for _ in range(2):
        model(torch.randn(50, 4, dtype=F64)).square().mean().backward()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    step = torch.linalg.matrix_norm(model[0].weight.detach() - before, ord=2) / 0.01
    assert step == pytest.approx(tall, rel=0.3)  # torch's polynomial is off by that much
    assert noise._layers[0].norm.lmo(before).norm() == pytest.approx(2 * tall, rel=0.1)
