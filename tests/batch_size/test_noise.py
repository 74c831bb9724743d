"""NoiseScale in loops of one process: what it records is what torch.autograd.grad says, whatever the loop does."""

import io
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import steepest
from steepest.batch_size.estimators import alignment, euclidean, l1, nested_sizes, nuclear
from steepest.batch_size.noise import NoiseScale
from tests.batch_size.noisy_loops import MICRO, PER, STEPS, loss_of, mean_gradients, network

ALL = ("euclidean", "l1", "nuclear", "alignment")
F64 = torch.float64


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(model, optimizer, *, steps=STEPS, divide=MICRO, after=lambda: None, to_none=True, factor=1.0):
    for step in range(steps):
        for index in range(MICRO):
            (loss_of(model, step, index) * factor / divide).backward()
        after()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)


def values(noise):
    return torch.stack([record.values for record in noise._records])


def measured(**options):
    model = network()
    optimizer = sgd(model)
    loop = {key: options.pop(key) for key in ("divide", "after", "to_none", "factor") if key in options}
    noise = NoiseScale(model, optimizer, **{"every": 1, "samples": PER, "kinds": ALL, **options})
    train(model, optimizer, **loop)
    return noise


def test_every_number_is_the_estimators_of_the_micro_batches():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    samples = torch.full((MICRO,), float(PER), dtype=F64)
    expected = []
    for step in range(3):
        gradients = mean_gradients(model, step)
        train_step(model, optimizer, step)
        rows = []
        for name, p in model.named_parameters():
            g = gradients.get(name, torch.zeros(MICRO, *p.shape, dtype=F64))
            matrix = name.endswith("weight") and "table" not in name
            parts = nuclear(g, samples) if matrix else [torch.zeros((), dtype=F64)] * 3
            aligned = alignment(g, samples, lambda x: x / norm(x), nested_sizes(MICRO))
            rows.append(torch.stack([*euclidean(g, samples), *l1(g, samples), *parts, *aligned]))
        expected.append(torch.stack(rows))
    order = [layer.name for layer in noise._layers]
    places = [order.index(name) for name, _ in model.named_parameters()]
    torch.testing.assert_close(values(noise)[:, places], torch.stack(expected), rtol=1e-9, atol=1e-15)


def norm(x):
    length = x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    return torch.where(length == 0, 1.0, length)


def train_step(model, optimizer, step):
    for index in range(MICRO):
        (loss_of(model, step, index) / MICRO).backward()
    optimizer.step()
    optimizer.zero_grad()


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"divide": 1, "losses": "whole", "factor": 1.0},
        {"losses": "weighted"},
        {"factor": 1024.0, "scale": 1024.0},
        {"factor": 1024.0, "scale": lambda: 1024.0},
        {"to_none": False},
        {"store": "cpu"},
        {"samples": None, "told": True},
    ],
    ids=str,
)
def test_how_losses_are_scaled_and_gradients_kept_changes_nothing(options):
    if options.pop("losses", "") == "whole":
        model = network()  # the step is the same if the learning rate is a quarter
        optimizer = sgd(model, 0.05 / MICRO)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL, losses="whole")
        train(model, optimizer, divide=1)
    elif "told" in options:
        model = network()
        optimizer = sgd(model)
        noise = NoiseScale(model, optimizer, every=1, kinds=ALL)
        for step in range(STEPS):
            for index in range(MICRO):
                noise.micro_batch(PER)
                (loss_of(model, step, index) / MICRO).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert noise.read().unit == "samples"
    elif "factor" in options:
        model = network()
        optimizer = sgd(model, 0.05 / 1024)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL, scale=options["scale"])
        train(model, optimizer, factor=1024.0)
    else:
        noise = measured(**options)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_clipping_is_not_seen():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER)
    train(model, optimizer, steps=1, after=lambda: clip(model))
    torch.testing.assert_close(values(noise), values(measured(kinds=("euclidean", "alignment")))[:1])


def test_a_common_factor_changes_no_scale():
    plain, unscaled = measured(), measured(scale=1 / 7.0)
    for one, other in zip(plain.read().scales, unscaled.read().scales, strict=True):
        assert other.ratio.value == pytest.approx(one.ratio.value, rel=1e-9, nan_ok=True)
    for one, other in zip(plain.read().curves, unscaled.read().curves, strict=True):
        assert other.ratio.value == pytest.approx(one.ratio.value, rel=1e-9, nan_ok=True)
        assert other.values == pytest.approx([7 * value for value in one.values])


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


def test_measuring_changes_no_weight_and_leaves_no_hook():
    plain, watched = network(), network()
    optimizer = sgd(watched)
    with NoiseScale(watched, optimizer, every=2, kinds=ALL):
        train(watched, optimizer)
    train(plain, sgd(plain))
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not q._backward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_steps_in_between_have_no_hooks():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=3)
    seen = []
    for step in range(6):
        seen.append((noise.measuring, sum(bool(p._backward_hooks) for p in model.parameters())))
        train_step(model, optimizer, step)
    assert seen == [(False, 0), (False, 0), (True, 6)] * 2
    assert [record.step for record in noise._records] == [2, 5]


def test_batches_may_be_split_on_measured_steps_only():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=2, samples=PER)
    for step in range(4):
        pieces = MICRO if noise.measuring else 1
        for index in range(pieces):
            (loss_of(model, step, index) / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = noise.read()
    assert (report.measurements, report.batch) == (2, MICRO * PER)


@pytest.mark.parametrize("before", [0, 2])
def test_closures_are_measured_like_loops(before):
    """The last micro-batches, or all, run inside of step()."""
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(before):
            (loss_of(model, step, index) / MICRO).backward()

        def closure(step=step):
            losses = [loss_of(model, step, index) / MICRO for index in range(before, MICRO)]
            for loss in losses:
                loss.backward()
            return sum(losses)

        optimizer.step(closure)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_adaptive_norms_use_the_second_moments_of_before_the_step():
    found = []
    for closure in (False, True):
        model = network()
        optimizer = steepest.Adam(model, lr=0.01)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=("alignment",))
        for step in range(3):

            def backward(step=step, model=model):
                for index in range(MICRO):
                    (loss_of(model, step, index) / MICRO).backward()
                return 0.0

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            optimizer.zero_grad()
        found.append(values(noise))
    torch.testing.assert_close(found[0], found[1])
    first = found[0][0, [layer.name for layer in noise._layers].index("down.weight")]
    gradients = mean_gradients(network(), 0)["down.weight"]
    samples = torch.full((MICRO,), float(PER), dtype=F64)
    torch.testing.assert_close(
        first, alignment(gradients, samples, torch.sign, nested_sizes(MICRO)), rtol=1e-4, atol=1e-9
    )  # without a past, Adam's step is the sign but for eps
    later = found[0][2, 0]
    torch.testing.assert_close(later, later[:1].expand(3), rtol=0.2, atol=float(later.abs().max()))


def test_muon_is_measured_in_its_groups_norms():
    model = network()
    optimizer = steepest.Muon(model, lr=0.02, polar="svd", scale="none")
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=("nuclear", "alignment"))
    gradients = mean_gradients(model, 0)["up.weight"]
    train_step(model, optimizer, 0)
    names = [layer.name for layer in noise._layers]
    row = values(noise)[0, names.index("up.weight")]
    samples = torch.full((MICRO,), float(PER), dtype=F64)
    torch.testing.assert_close(row[:3], torch.stack(list(nuclear(gradients, samples))), rtol=1e-9, atol=0)
    expected = alignment(gradients, samples, lambda g: steepest.polar(g, method="svd"), nested_sizes(MICRO))
    torch.testing.assert_close(row[3:], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(row[2], row[-1])  # leave one out is the crossed signal
    weights = dict(zip(names, noise._records[0].weights.tolist(), strict=True))
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert weights == pytest.approx({name: rate / max(rates.values()) for name, rate in rates.items()})


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_torchs_adam_is_sign_descent(name):
    model = network()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=("l1", "alignment"))
    train_step(model, optimizer, 0)
    torch.testing.assert_close(values(noise)[0, :, 2], values(noise)[0, :, -1])


def test_an_unknown_optimizer_takes_a_norm():
    model = network()
    optimizer = torch.optim.Rprop(model.parameters())
    with pytest.raises(ValueError, match="in which norm Rprop descends is not known"):
        NoiseScale(model, optimizer)
    noise = NoiseScale(model, optimizer, norm="sign", every=1)
    train_step(model, optimizer, 0)
    assert noise.read().curve().batches == (1.0, 2.0, 3.0)


def test_convolutions_and_fused_weights_are_seen_as_matrices():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Flatten(), nn.Linear(8 * 4, 5)).double()
    optimizer = steepest.Muon(model, lr=0.01)
    noise = NoiseScale(model, optimizer, every=1, kinds=("nuclear",))
    xs = torch.randn(3, 2, 3, 4, 4, dtype=F64)
    stacked = torch.stack([torch.autograd.grad(model(x).square().mean(), model[0].weight)[0] for x in xs])
    for x in xs:
        (model(x).square().mean() / 3).backward()
    optimizer.step()
    expected = nuclear(stacked.flatten(2), torch.ones(3, dtype=F64))
    names = [layer.name for layer in noise._layers]
    torch.testing.assert_close(values(noise)[0, names.index("0.weight")], torch.stack(list(expected)))


def test_gradients_that_are_not_finite_are_counted_and_the_next_step_is_measured():
    model = network()
    optimizer = sgd(model, lr=0.0)
    noise = NoiseScale(model, optimizer, every=2, kinds=ALL)
    for step in range(5):
        for index in range(MICRO):
            (loss_of(model, step, index) * (math.nan if (step, index) == (1, 2) else 1.0)).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.nan_to_num_()  # so that weights survive; what is recorded came before
        optimizer.step()
        optimizer.zero_grad()
    assert [record.step for record in noise._records] == [2, 3]
    assert noise.read().discarded == 1
    assert "1 not finite" in str(noise.read())


def test_thrown_away_gradients_are_not_counted():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for index in range(3):
        loss_of(model, 9, index).backward()  # and then no step, as a GradScaler decides
    optimizer.zero_grad()
    train(model, optimizer)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_gradients_set_to_zero_are_forgotten_by_hand():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for index in range(3):
        loss_of(model, 9, index).backward()
    optimizer.zero_grad(set_to_none=False)
    noise.forget()
    train(model, optimizer)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_what_was_frozen_when_hooks_were_set_is_measured_one_step_later():
    model = network()
    optimizer = sgd(model)
    model.up.weight.requires_grad_(False)
    noise = NoiseScale(model, optimizer, every=1)
    model.up.weight.requires_grad_(True)
    train(model, optimizer, steps=2)
    assert [record.step for record in noise._records] == [1]
    assert noise.read().scale("euclidean", "up.weight").noise > 0


def test_unequal_micro_batches_are_weighed():
    model, sizes = nn.Linear(3, 1, bias=False).double(), (1, 2, 5)
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, losses="weighted", unit="sequences")
    data = [torch.randn(size, 3, dtype=F64) for size in sizes]
    stacked = torch.stack([torch.autograd.grad(model(x).square().mean(), model.weight)[0] for x in data])
    for x in data:
        (model(x).square().sum() / sum(sizes)).backward()
        noise.micro_batch(len(x))
    optimizer.step()
    expected = euclidean(stacked, torch.tensor(sizes, dtype=F64))
    torch.testing.assert_close(values(noise)[0, 0, :2], torch.stack(list(expected)))
    assert noise.read().batch == 8
    assert noise.read().unit == "sequences"


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


def test_activation_checkpoints_are_fine_without_reentry_and_refused_with_it():
    for reentrant in (False, True):
        inner = [nn.Linear(3, 3).double() for _ in range(2)]
        model = nn.ModuleList([nn.Linear(3, 3).double(), *inner, nn.Linear(3, 1).double()])
        optimizer = sgd(model)
        noise = NoiseScale(model, optimizer, every=1)

        def run(model=model, inner=inner, reentrant=reentrant, optimizer=optimizer):
            for seed in range(2):
                x = model[0](torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=F64))
                for layer in inner:
                    x = checkpoint(layer, x, use_reentrant=reentrant)
                model[3](x).square().mean().backward()
            optimizer.step()

        if reentrant:
            with pytest.raises(ValueError, match="use_reentrant=False"):
                run()
        else:
            run()
            assert noise.read().measurements == 1


def test_backward_of_parts_of_the_model_is_no_micro_batch():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1)
    for part in model:
        part(torch.ones(3, 2)).sum().backward()
    with pytest.raises(ValueError, match="have no parameter in common"):
        optimizer.step()
    noise.close()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every >= 1, got 0"),
        ({"level": 1.0}, r"level in \(0, 1\), got 1.0"),
        ({"samples": 0}, "samples=0"),
        ({"losses": "hole"}, "did you mean 'whole'"),
        ({"store": "gpu"}, "Unknown store of NoiseScale 'gpu'"),
        ({"polar": "svdd"}, "did you mean 'svd'"),
        ({"kinds": ("euclidian",)}, "did you mean 'euclidean'"),
        ({"kinds": ()}, "kinds is empty"),
        ({"norm": "spectral"}, "is one of matrices, but 'gain' of shape"),
    ],
)
def test_options_are_checked(options, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        NoiseScale(model, sgd(model), **options)


def test_what_cannot_be_measured_says_so():
    model, other, table = network(), nn.Linear(2, 2, bias=False), nn.Embedding(3, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) that is not in the model"):
        NoiseScale(model, sgd(other))
    with pytest.raises(ValueError, match="has none: embeddings, heads and vectors do not count"):
        NoiseScale(table, sgd(table), kinds=("nuclear",))
    optimizer = sgd(other)
    noise = NoiseScale(other, optimizer, every=1)
    with pytest.raises(ValueError, match="Nothing was measured in 0 steps"):
        noise.read()
    with pytest.raises(ValueError, match="last >= 1"):
        noise.read(last=0)
    with pytest.raises(ValueError, match="positive number of samples, got -1"):
        noise.micro_batch(-1)
    other(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"one micro-batch on one rank.*split the batch"):
        optimizer.step()
    noise.micro_batch(3)
    other(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="micro_batch was called 1 times in a step with 2 calls of backward"):
        optimizer.step()
    noise.close()
    sparse = nn.Embedding(4, 2, sparse=True)
    with NoiseScale(sparse, sgd(sparse), every=1), pytest.raises(ValueError, match=r"has layout torch\.sparse_coo"):
        sparse(torch.tensor([1])).sum().backward()


def test_parameters_added_later_are_not_passed_over():
    model, more = network(), nn.Parameter(torch.ones(3, dtype=F64))
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1)
    optimizer.add_param_group({"params": [more]})
    with pytest.raises(ValueError, match="had 7 parameters when NoiseScale was built, and has 8 now"):
        train(model, optimizer, steps=1)
    noise.close()
