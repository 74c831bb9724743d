"""Accelerate, the real one: the loss of micro-batches in its loop, and what a closure there comes to."""

from unittest import mock

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import steepest
from steepest.integrations.accelerate import record_loss, unwrapped
from tests.cases import cases
from tests.integrations.plain import Watched, as_rank, assert_alike, train, true_losses, windows
from tests.integrations.tiny import BATCH, MOMO, batches, by_tokens, llama, loss_of, texts, tokens
from tests.processes import RanksFailed

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.filterwarnings("ignore:Gradients were changed between backward and step"),
]


@pytest.fixture(autouse=True)
def _its_state_is_new():
    fresh()


def fresh():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared(accumulation, model=None, **options):
    """An accelerator, and what it makes of model, optimizer and data."""
    model = model or llama().train()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
    optimizer = steepest.NewtonMuonMax(model, **MOMO)
    loader = DataLoader(texts(), batch_size=BATCH)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def epoch(accelerator, model, optimizer, loader, *, clip=None, loss_of=loss_of):
    """Its loop, with one line of ours."""
    for batch in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            record_loss(optimizer, loss, accelerator)
            accelerator.backward(loss)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def trained(accumulation, *, model=None, options=None, **others):
    """What two epochs come to."""
    accelerator, *objects = prepared(accumulation, model, **(options or {}))
    with Watched() as watched:
        for _ in range(2):
            epoch(accelerator, *objects, **others)
    return watched.trained(accelerator.unwrap_model(objects[0]))


def expected(found, windows, loss_of=loss_of, **options):
    """What the plain loop comes to; the losses that were found must be those of the weights that were found."""
    model = llama()
    torch.testing.assert_close(found.losses, true_losses(model, found, windows, loss_of), rtol=1e-6, atol=0)
    return train(model.train(), steepest.NewtonMuonMax(model, **MOMO), windows, loss_of, **options)


def two_epochs(accumulation, ranks=1):
    """`backward` divides by the number that was asked for, also in a last window that is short."""
    return 2 * windows(batches(texts()), accumulation * ranks, divisor=accumulation * ranks)


@cases("clip", [None, 0.5], ids=["", "clipped"])
@cases("accumulation", [1, 3])
def test_row_accelerate_has_a_helper_that_is_right_in_a_short_last_window_and_clipped(accumulation, clip):
    found = trained(accumulation, clip=clip)
    assert_alike(found, expected(found, two_epochs(accumulation), clip=clip))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@cases("way", ["checkpointing", "compiled", "bf16"])
def test_checkpointing_compilers_and_bf16_change_neither_losses_nor_moments(way):
    fresh()
    model = llama().train()
    if way == "checkpointing":
        model.activation_checkpointing_enable()
    options = {"compiled": {"dynamo_backend": "aot_eager"}, "bf16": {"mixed_precision": "bf16"}}.get(way)
    found = trained(3, model=model, options=options)
    for each in (*found.weights, found.moments):
        for name in list(each):
            each[name.removeprefix("_orig_mod.")] = each.pop(name)

    def mixed(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
            outputs = model(input_ids=batch["input_ids"])
        outputs.logits = outputs.logits.float()
        return loss_of(lambda **_: outputs, batch)

    rounding = {"loss": 1e-3, "rtol": 1e-2, "atol": 1e-3} if way == "bf16" else {}  # of the gradients of parts
    assert_alike(found, expected(found, two_epochs(3), mixed), **rounding)


def on_rank(accumulation, clip):
    as_rank()
    fresh()
    return trained(accumulation, clip=clip)


@pytest.mark.slow
@cases("clip", [None, 0.5], ids=["", "clipped"])
@cases("accumulation", [1, 3])
def test_two_ranks_train_as_one_process(pair, accumulation, clip):
    both = pair.run(on_rank, accumulation, clip)
    assert_alike(both[0], expected(both[0], two_epochs(accumulation, ranks=2), clip=clip))
    assert both[0].losses == both[1].losses
    for one, other in zip(both[0].weights, both[1].weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_under_a_grad_scaler_the_loss_is_unscaled_and_that_of_a_step_passed_over_is_forgotten():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True  # as with fp16 on a GPU
    model = llama().train()
    loader = DataLoader(texts(), batch_size=BATCH)
    with mock.patch.object(Accelerator, "mixed_precision", "fp16"):
        optimizer = accelerator.prepare_optimizer(steepest.NewtonMuonMax(model, **MOMO))
        loader = accelerator.prepare_data_loader(loader)
        overflows = [True]

        def overflowing(model, batch):
            loss = loss_of(model, batch)
            if overflows:
                overflows.pop()
                loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss

        with Watched() as watched:
            for _ in range(2):
                epoch(accelerator, model, optimizer, loader, clip=0.5, loss_of=overflowing)
    found = watched.trained(model)
    assert_alike(found, expected(found, two_epochs(3)[1:], clip=0.5))


def test_losses_that_count_tokens_add_up():
    """As in accelerate's guide: scaled by the window, so that each of its tokens counts alike."""
    accelerator, model, optimizer, loader = prepared(3)
    with Watched() as watched:
        for _ in range(2):
            every = list(loader)
            for window in (every[:3], every[3:6], every[6:]):
                count = sum(map(tokens, window))
                for place, batch in enumerate(window):
                    accelerator.gradient_state._set_sync_gradients(place == len(window) - 1)
                    loss = loss_of(model, batch) * tokens(batch) * 3 / count
                    record_loss(optimizer, loss, accelerator, adds_up=True)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
    found = watched.trained(model)
    assert_alike(found, expected(found, by_tokens(two_epochs(3))))


def test_losses_that_add_up_are_forgotten_with_gradients_that_are_thrown_away():
    accelerator, model, optimizer, loader = prepared(2)
    batches = list(loader)[:3]
    with Watched() as watched:
        for batch in batches:
            loss = loss_of(model, batch)
            accelerator.gradient_state._set_sync_gradients(batch is batches[-1])
            record_loss(optimizer, loss, accelerator, adds_up=True)
            accelerator.backward(loss)
            if batch is batches[0]:
                optimizer.optimizer.zero_grad()
        optimizer.step()
    found = watched.trained(model)
    twin = llama().train()
    mean = sum(loss_of(twin, batch).item() for batch in batches[1:]) / 2
    assert found.losses == pytest.approx([mean], rel=1e-6)


def test_a_state_that_accelerate_saves_goes_on_bit_for_bit(tmp_path):
    accelerator, *objects = prepared(3)
    epoch(accelerator, *objects)
    accelerator.save_state(tmp_path / "state")
    epoch(accelerator, *objects)
    fresh()
    other, *others = prepared(3)
    other.load_state(tmp_path / "state")
    epoch(other, *others)
    for one, two in zip(objects[0].parameters(), others[0].parameters(), strict=True):
        assert torch.equal(one, two)
        states = [unwrapped(optimizer).state[p] for optimizer, p in ((objects[1], one), (others[1], two))]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert unwrapped(objects[1]).state_dict()["param_groups"] == unwrapped(others[1]).state_dict()["param_groups"]


def test_row_closure_under_accumulation_is_noticed():
    """It returns the loss of its own micro-batch, and gradients are of several."""
    accelerator, model, optimizer, loader = prepared(3)
    first, second, third, *_ = loader

    def closure():
        loss = loss_of(model, third)
        accelerator.backward(loss)
        return loss

    for batch in (first, second):
        accelerator.backward(loss_of(model, batch))
    with pytest.raises(ValueError, match="gradients of earlier backward passes were there before the closure ran"):
        optimizer.step(closure)
    optimizer.zero_grad()
    for batch in (first, second):
        accelerator.backward(loss_of(model, batch))
    with pytest.warns(UserWarning, match="the closure made no gradients; those present are of 2 backward passes"):
        optimizer.step(lambda: loss_of(model, second))


def test_row_wrapper_hides_step_with_a_loss_and_the_optimizer_in_it_has_it():
    accelerator, model, optimizer, loader = prepared(1)
    accelerator.backward(loss := loss_of(model, next(iter(loader))))
    with pytest.raises(TypeError, match="unexpected keyword argument 'loss'"):
        optimizer.step(loss=loss)
    assert not hasattr(optimizer, "plan")
    assert not hasattr(optimizer, "record_loss")
    unwrapped(optimizer).plan.assert_counts(matrix=14)
    record_loss(optimizer, loss.detach().requires_grad_(), accelerator)
    optimizer.step()
    assert 0 < unwrapped(optimizer).diagnostics()["t"] < 1


def test_what_record_loss_cannot_use_is_refused():
    accelerator, model, optimizer, loader = prepared(3)
    loss = loss_of(model, next(iter(loader)))
    with pytest.raises(
        TypeError, match=r"loss must be the tensor that accelerator\.backward\(\) is about to be called"
    ):
        record_loss(optimizer, loss.item(), accelerator)
    with pytest.raises(
        TypeError, match=r"loss must be the tensor that accelerator\.backward\(\) is about to be called"
    ):
        record_loss(optimizer, loss.detach(), accelerator)
    other = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="no optimizer of steepest inside of AcceleratedOptimizer around SGD"):
        record_loss(other, loss, accelerator)


def sharded_on_rank(recipe, options, after):
    """Accelerate's FSDP2, which puts sharded parameters into the groups of an optimizer that it is given.

    On processors accelerate offers none, so it is told here that this is a GPU's way to run.
    """
    as_rank()
    fresh()
    accelerator = Accelerator(cpu=True)
    wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **wrap)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = llama().train()
    first = torch.optim.SGD(model.parameters(), lr=1.0) if after else recipe(model, **options)
    model, optimizer = accelerator.prepare(model, first)
    if after:
        optimizer = accelerator.prepare_optimizer(recipe(model, **options))
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    loader = accelerator.prepare_data_loader(DataLoader(texts(), batch_size=BATCH))
    with Watched() as watched:
        epoch(accelerator, model, optimizer, loader)
    assert unwrapped(optimizer).sharing.ranks == 2
    return watched.trained(model)


@pytest.mark.slow
def test_row_parameters_that_accelerate_swaps_for_sharded_ones_are_right_or_refused(pair):
    cut = windows(batches(texts()), 2)
    options = {name: value for name, value in MOMO.items() if name != "precondition"}
    for recipe, chosen, after in ((steepest.MuonMax, options, False), (steepest.NewtonMuonMax, MOMO, True)):
        found, model = pair.run(sharded_on_rank, recipe, chosen, after)[0], llama().train()
        torch.testing.assert_close(found.losses, true_losses(model, found, cut, loss_of), rtol=1e-6, atol=0)
        assert_alike(found, train(model, recipe(model, **chosen), cut, loss_of))
    with pytest.raises(RanksFailed, match="what its layer reads, but in parameter group 0 a parameter of"):
        pair.run(sharded_on_rank, steepest.NewtonMuonMax, MOMO, False)
