"""Loops of one's own, which record losses where the reference passes them: with and without a GradScaler."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import steepest
from tests.cases import cases
from tests.integrations.plain import Watched, assert_alike, train, true_losses, windows
from tests.integrations.tiny import MOMO, batches, by_tokens, llama, loss_of, texts

pytestmark = [
    pytest.mark.hosts,  # for the model
    pytest.mark.filterwarnings("ignore:Gradients were changed between backward and step"),
]
RANKS = 2


def recorded(windows, *, clip=None, scaler=None, overflow=None, prepare=None, state=None):
    """What a user writes: a loss is recorded before its backward pass, and `step` gets none.

    Args:
        scaler: A GradScaler.
        overflow: The window whose gradients overflow.
        prepare: Of the model and its optimizer, what is called; None: the model.
        state: Of model and optimizer, to begin with.
    """
    model = llama().train()
    optimizer = steepest.NewtonMuonMax(model, **MOMO)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))
    called = model if prepare is None else prepare(model)
    with Watched() as watched:
        for place, window in enumerate(windows):
            optimizer.zero_grad()
            for batch, weight in window:
                loss = loss_of(called, batch)
                optimizer.record_loss(loss, weight=weight)
                if place == overflow:
                    loss.register_hook(lambda gradient: gradient * torch.inf)
                (loss * weight if scaler is None else scaler.scale(loss * weight)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    return watched.trained(model), (model.state_dict(), optimizer.state_dict())


def expected(found, windows, **options):
    model = llama()
    torch.testing.assert_close(found.losses, true_losses(model, found, windows, loss_of), rtol=1e-6, atol=0)
    return train(model.train(), steepest.NewtonMuonMax(model, **MOMO), windows, loss_of, **options)


# Micro-batches of a short last window count more than others, or as much, which leaves a part of its mean's gradient.
CUTS = {
    "by tokens": lambda accumulation: by_tokens(windows(batches(texts()), accumulation)),
    "divided by all": lambda accumulation: windows(batches(texts()), accumulation, divisor=accumulation),
}


@cases("scaled", [False, True], ids=["", "scaled"])
@cases("clip", [None, 0.5], ids=["", "clipped"])
@cases("accumulation", [1, 3])
@cases("cut", CUTS)
def test_recorded_losses_are_as_good_as_the_mean_that_is_passed(cut, accumulation, clip, scaled):
    chosen = CUTS[cut](accumulation)
    found, _ = recorded(chosen, clip=clip, scaler=torch.amp.GradScaler("cpu") if scaled else None)
    assert_alike(found, expected(found, chosen, clip=clip))


@cases("cut", CUTS)
def test_a_window_whose_gradients_overflow_is_as_if_it_had_not_been(cut):
    chosen = CUTS[cut](3)
    for overflow in (0, 2):
        found, _ = recorded(chosen + chosen, scaler=torch.amp.GradScaler("cpu"), overflow=overflow)
        assert_alike(found, expected(found, [w for place, w in enumerate(chosen + chosen) if place != overflow]))


def checkpointed(model):
    model.activation_checkpointing_enable()
    return model


def compiled(model):
    return torch.compile(model, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@cases(
    "prepare", [checkpointed, lambda model: torch.compile(model, backend="aot_eager")], ids=["checkpointed", "compiled"]
)
@cases("scaled", [False, True], ids=["", "scaled"])
def test_checkpointing_and_compilers_change_neither_losses_nor_moments(prepare, scaled):
    chosen = CUTS["divided by all"](3)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    found, _ = recorded(chosen, clip=0.5, scaler=scaler, prepare=prepare)
    assert_alike(found, expected(found, chosen, clip=0.5))


def on_rank(chosen, clip, scaled):
    rank = torch.distributed.get_rank()
    own = [[(batch, weight * RANKS) for batch, weight in window[rank::RANKS]] for window in chosen]
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    return recorded(own, clip=clip, scaler=scaler, prepare=DistributedDataParallel)[0]


@pytest.mark.slow
@cases("scaled", [False, True], ids=["", "scaled"])
@cases("clip", [None, 0.5], ids=["", "clipped"])
@cases("accumulation", [1, 3])
def test_two_ranks_train_as_one_process(pair, accumulation, clip, scaled):
    """Each takes every second micro-batch; DDP averages in every backward pass, as nobody told it not to."""
    chosen = CUTS["divided by all"](accumulation * RANKS)
    found, other = pair.run(on_rank, chosen, clip, scaled)
    assert_alike(found, expected(found, chosen, clip=clip))
    assert found.losses == other.losses


def test_going_on_from_a_checkpoint_is_exact_to_the_bit(tmp_path):
    chosen = CUTS["divided by all"](3)
    for scaled in (False, True):
        scalers = [torch.amp.GradScaler("cpu") if scaled else None for _ in range(3)]
        whole, _ = recorded(chosen, clip=0.5, scaler=scalers[0])
        _, saved = recorded(chosen[:1], clip=0.5, scaler=scalers[1])
        torch.save(saved, tmp_path / "state.pt")
        rest, _ = recorded(chosen[1:], clip=0.5, scaler=scalers[2], state=torch.load(tmp_path / "state.pt"))
        assert rest.losses == whole.losses[1:]
        for one, two in zip(rest.weights, whole.weights[1:], strict=True):
            assert all(torch.equal(one[name], two[name]) for name in two)
