"""Trainer, the real one: what its optimizer is made of, and that Momo's loss is that of the gradient.

Every training is compared with a plain loop over the same micro-batches: the loss that each step used with the mean
that the weights of that moment give, then the weights, then the moments of layers' inputs.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import TrainingArguments

import steepest
from steepest.integrations.transformers import MomoTrainer, from_model
from tests.cases import cases
from tests.integrations.plain import Watched, as_rank, assert_alike, train, true_losses, windows
from tests.integrations.tiny import BATCH, MOMO, batches, by_tokens, llama, loss_of, texts

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.filterwarnings("ignore:Gradients were changed between backward and step"),
]
MADE = (from_model(steepest.NewtonMuonMax), MOMO)


def arguments(folder, **options):
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    size = {"per_device_train_batch_size": BATCH, "num_train_epochs": 2}
    order = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    return TrainingArguments(
        output_dir=str(folder), **{"save_strategy": "no", "max_grad_norm": 0.0, **quiet, **size, **order, **options}
    )


def trained(folder, *, kind=MomoTrainer, model=None, made=MADE, loss=None, **options):
    """What a Trainer comes to."""
    model = model or llama()
    with Watched() as watched:
        host = kind(
            model,
            arguments(folder, **options),
            train_dataset=texts(),
            optimizer_cls_and_kwargs=made,
            compute_loss_func=loss,
        )
        host.train()
    return watched.trained(model)


def expected(found, windows, loss_of=loss_of, **options):
    """What the plain loop comes to; the losses that were found must be those of the weights that were found."""
    model = llama()
    torch.testing.assert_close(found.losses, true_losses(model, found, windows, loss_of), rtol=1e-6, atol=0)
    return train(model.train(), steepest.NewtonMuonMax(model, **MOMO), windows, loss_of, **options)


def two_epochs(accumulation, weigh=by_tokens):
    return 2 * weigh(windows(batches(texts()), accumulation))


@cases("clip", [0.0, 0.5], ids=["", "clipped"])
@cases("accumulation", [1, 3])
def test_the_loss_is_that_of_all_tokens_also_of_a_short_last_window_and_of_clipped_gradients(
    tmp_path, accumulation, clip
):
    found = trained(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=clip)
    assert_alike(found, expected(found, two_epochs(accumulation), clip=clip or None))


def smoothed(model, batch, epsilon=0.1):
    """Label smoothing, written out."""
    labels = batch["labels"][:, 1:].flatten()
    logs = log_softmax(model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1), -1)[labels != -100]
    return -((1 - epsilon) * logs.gather(1, labels[labels != -100, None]) + epsilon * logs.mean(1, keepdim=True)).mean()


def summed(outputs, labels, num_items_in_batch):
    """A loss function as Trainer wants it: over all tokens of the window."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def unaware(outputs, labels, num_items_in_batch):
    """One that has not heard of windows: gradients are of the sum of its means, and so is the loss."""
    return summed(outputs, labels, (labels[:, 1:] != -100).sum())


class Deaf(torch.nn.Module):
    """A model that takes no number of tokens: Trainer divides its loss by the micro-batches of the window."""

    def __init__(self):
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids, labels):
        return {"loss": loss_of(self.inner, {"input_ids": input_ids, "labels": labels})}


def test_label_smoothing_and_loss_functions_of_ones_own(tmp_path):
    found = trained(tmp_path, gradient_accumulation_steps=3, label_smoothing_factor=0.1)
    assert_alike(found, expected(found, two_epochs(3), smoothed))
    found = trained(tmp_path, gradient_accumulation_steps=3, loss=summed)
    assert_alike(found, expected(found, two_epochs(3)))
    found = trained(tmp_path, gradient_accumulation_steps=3, loss=unaware)
    means = true_losses(llama(), found, cut := two_epochs(3, weigh=list), loss_of)
    sums = [mean * len(window) for mean, window in zip(means, cut, strict=True)]
    torch.testing.assert_close(found.losses, sums, rtol=1e-6, atol=0)


def test_models_whose_loss_trainer_divides_by_the_number_of_micro_batches(tmp_path):
    found = trained(tmp_path, model=Deaf(), gradient_accumulation_steps=3)
    for each in (*found.weights, found.moments):
        for name in list(each):
            each[name.removeprefix("inner.")] = each.pop(name)
    assert_alike(found, expected(found, two_epochs(3, weigh=list)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@cases(
    "options",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"bf16": True},
    ],
    ids=["checkpointing", "reentrant checkpointing", "compiled", "bf16"],
)
def test_checkpointing_compilers_and_bf16_change_neither_losses_nor_moments(tmp_path, options):
    found = trained(tmp_path, gradient_accumulation_steps=3, max_grad_norm=0.5, **options)

    def mixed(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, 1:].flatten())

    assert_alike(found, expected(found, two_epochs(3), mixed, clip=0.5))


def on_rank(folder, accumulation, options):
    as_rank()
    return trained(folder, gradient_accumulation_steps=accumulation, ddp_find_unused_parameters=False, **options)


def by_ranks(windows):
    """Tokens of one rank count alike, and so do ranks: what is left of the mean if each rank counts its own."""
    own = [by_tokens([window[rank::2] for window in windows]) for rank in (0, 1)]
    return [[(batch, weight / 2) for batch, weight in first + second] for first, second in zip(*own, strict=True)]


@pytest.mark.slow
@cases("accumulation", [1, 3])
@cases(
    "options, weigh",
    [({}, by_tokens), ({"average_tokens_across_devices": False}, by_ranks), ({"max_grad_norm": 0.5}, by_tokens)],
    ids=["tokens of all ranks", "tokens of each rank", "clipped"],
)
def test_two_ranks_train_as_one_process(tmp_path, pair, accumulation, options, weigh):
    """Each takes every second micro-batch; the last window is short."""
    both = pair.run(on_rank, tmp_path, accumulation, options)
    cut = two_epochs(2 * accumulation, weigh)
    found = both[0]
    assert_alike(found, expected(found, cut, clip=options.get("max_grad_norm")))
    assert both[1].losses == found.losses
    for one, other in zip(found.weights, both[1].weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
