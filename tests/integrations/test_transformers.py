"""Trainer, the real one: what its optimizer is made of, and that Momo's loss is that of the gradient.

Every training is compared with a plain loop over the same micro-batches: the loss that each step used with the mean
that the weights of that moment give, then the weights, then the moments of layers' inputs.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, log_softmax
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import steepest
from steepest.integrations.transformers import MomoTrainer, from_model
from steepest.integrations.wrapped import unwrapped
from tests.cases import cases
from tests.integrations.plain import Watched, as_rank, assert_alike, train, true_losses, windows
from tests.integrations.tiny import BATCH, MOMO, WORDS, batches, by_tokens, llama, loss_of, texts

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
def test_row_trainer_with_momo_takes_the_mean_loss_of_a_window_also_a_short_one_and_clipped(
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
    fixed = {"gradient_accumulation_steps": accumulation, "ddp_find_unused_parameters": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trained(folder, **fixed, **options)
    return found, [str(entry.message) for entry in caught if "as by clipping" in str(entry.message)]


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
def test_row_momo_and_clipping_on_two_ranks_that_train_as_one_process(tmp_path, pair, accumulation, options, weigh):
    """Each takes every second micro-batch; the last window is short."""
    (found, told), (other, also_told) = pair.run(on_rank, tmp_path, accumulation, options)
    assert len(told) == len(also_told) == ("max_grad_norm" in options), "of clipping each rank warns, once"
    cut = two_epochs(2 * accumulation, weigh)
    assert_alike(found, expected(found, cut, clip=options.get("max_grad_norm")))
    assert other.losses == found.losses
    for one, two in zip(found.weights, other.weights, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def shared_on_rank(folder):
    as_rank()
    made = (from_model(steepest.Muon), {"lr": 0.02, "polar": "svd", "process_group": dist.group.WORLD})
    with Watched() as watched:
        Trainer(llama(), arguments(folder), train_dataset=texts(), optimizer_cls_and_kwargs=made).train()
    return watched.optimizer.sharing.ranks, watched.weights


@pytest.mark.slow
def test_two_ranks_share_the_work_where_they_are_told_that_they_have_copies(tmp_path, pair):
    (ranks, weights), _ = pair.run(shared_on_rank, tmp_path)
    assert ranks == 2
    model = llama().train()
    found = train(model, steepest.Muon(model, lr=0.02, polar="svd"), two_epochs(2), loss_of)
    for one, other in zip(weights, found.weights, strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


class Interrupted(Exception):  # noqa: N818 - no error of ours
    """A run that is killed."""


def shuffled(folder, made, accumulation, *, kill=None, resume=False):
    """Weights and state at the end of two epochs, with a checkpoint after each step."""
    kind = Trainer if made[1].get("step_size") is None else MomoTrainer
    saving = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "random", "max_grad_norm": 1.0}
    options = arguments(folder, gradient_accumulation_steps=accumulation, **{**saving, "lr_scheduler_type": "linear"})
    host = kind(llama(), options, train_dataset=texts(), optimizer_cls_and_kwargs=made)
    if kill is not None:
        host.add_callback(Killer(kill))
        with pytest.raises(Interrupted):
            host.train()
        return None
    host.train(resume_from_checkpoint=resume)
    optimizer = unwrapped(host.optimizer)
    states = [optimizer.state[p] for p in host.model.parameters()]
    return [dict(host.model.named_parameters()), *states], optimizer.state_dict()["param_groups"]


class Killer(TrainerCallback):
    """Ends a run in the middle of a window."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Interrupted


def resumed(folder, made, accumulation, kill):
    """What a run comes to that nobody stops, and one that is killed in an epoch and goes on from its checkpoint."""
    whole = shuffled(folder / "whole", made, accumulation)
    shuffled(folder / "killed", made, accumulation, kill=kill)
    return whole, shuffled(folder / "killed", made, accumulation, resume=True)


def assert_equal(whole, found):
    (tensors, groups), (others, their_groups) = whole, found
    for one, other in zip(tensors, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert groups == their_groups


@pytest.mark.slow
@cases("made", [(from_model(steepest.Muon), {"lr": 0.02, "weight_decay": 0.1}), MADE], ids=["Muon", "all there is"])
def test_a_killed_run_goes_on_from_a_checkpoint_within_an_epoch_bit_for_bit(tmp_path, made):
    assert_equal(*resumed(tmp_path, made, 3, kill=4))


def resumed_on_rank(folder):
    as_rank()
    return resumed(folder, MADE, 2, kill=3)


@pytest.mark.slow
def test_two_ranks_go_on_from_a_checkpoint_bit_for_bit(tmp_path, pair):
    for whole, found in pair.run(resumed_on_rank, tmp_path):
        assert_equal(whole, found)


def test_the_best_model_is_loaded_into_the_weights_that_the_optimizer_has(tmp_path):
    model = llama()
    saving = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    options = arguments(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", **saving)
    host = MomoTrainer(
        model,
        options,
        train_dataset=texts(),
        eval_dataset=texts()[:4],
        optimizer_cls_and_kwargs=MADE,
    )
    host.train()
    best = min((entry["eval_loss"], entry["step"]) for entry in host.state.log_history if "eval_loss" in entry)
    assert host.state.best_model_checkpoint.endswith(f"-{best[1]}")
    assert host.evaluate()["eval_loss"] == pytest.approx(best[0], rel=1e-6)
    members = {id(p) for group in unwrapped(host.optimizer).param_groups for p in group["params"]}
    assert members == set(map(id, model.parameters()))


class Stopped(MomoTrainer):
    """Ends with an error in the second micro-batch of its life, or, after that was told the optimizer, in the third."""

    calls, last = 0, 2

    def training_step(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.last == 2:
            raise KeyboardInterrupt
        loss = super().training_step(*args, **kwargs)
        if self.calls == self.last:
            raise KeyboardInterrupt
        return loss


@cases("last", [2, 3], ids=["within a window", "between a window and its step"])
def test_losses_of_an_interrupted_training_are_not_those_of_the_next_one(tmp_path, last):
    model = llama()
    options = arguments(tmp_path, gradient_accumulation_steps=3)
    host = Stopped(model, options, train_dataset=texts(), optimizer_cls_and_kwargs=MADE)
    host.last = last
    with pytest.raises(KeyboardInterrupt):
        host.train()
    with Watched() as watched:
        host.train()
    found = watched.trained(model)
    expected(found, two_epochs(3))


class Scaled(MomoTrainer):
    """As on a GPU with fp16; the gradient of the first micro-batch overflows."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu")
        self.overflows = [True]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.overflows:
            self.overflows.pop()
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss


def test_under_a_grad_scaler_the_loss_is_unscaled_and_that_of_a_step_passed_over_is_forgotten(tmp_path):
    found = trained(tmp_path, kind=Scaled, gradient_accumulation_steps=3)
    assert_alike(found, expected(found, two_epochs(3)[1:]))


def roles(optimizer):
    return {row.name: (row.role, row.view, row.norm) for row in optimizer.plan}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def test_row_trainer_with_from_model_has_roles_names_and_views_as_from_the_model(tmp_path):
    model = gpt2()
    made = (from_model(steepest.Muon), {"lr": 0.03, "weight_decay": 0.2})
    host = Trainer(model, arguments(tmp_path, weight_decay=0.7, learning_rate=7.0), optimizer_cls_and_kwargs=made)
    optimizer = host.create_optimizer()
    assert roles(optimizer) == roles(steepest.Muon(model, lr=0.03, weight_decay=0.2))
    optimizer.plan.assert_counts(matrix=8, embedding=2, vector=18)
    assert optimizer.plan.row("transformer.h.0.attn.c_attn.weight").blocks() != ()
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"matrix": 0.03, "embedding": 0.003, "vector": 0.003}, "options of TrainingArguments are not ours"


def test_schedules_scale_the_rate_of_each_role(tmp_path):
    made = (from_model(steepest.Muon), {"lr": 0.02})
    rates = []

    class Noting(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **_):
            rates.append([group["lr"] for group in optimizer.param_groups])

    options = arguments(tmp_path, lr_scheduler_type="linear", num_train_epochs=1)
    Trainer(llama(), options, train_dataset=texts(), optimizer_cls_and_kwargs=made, callbacks=[Noting()]).train()
    for step, found in enumerate(rates, 1):
        left = 1 - step / len(rates)
        assert found == pytest.approx([0.02 * left] + [0.002 * left] * (len(found) - 1))


def test_row_bare_recipe_in_trainer_warns_and_names_the_one_line_remedy(tmp_path):
    host = Trainer(gpt2(), arguments(tmp_path), optimizer_cls_and_kwargs=(steepest.Muon, {"lr": 0.02}))
    with pytest.warns(UserWarning, match=r"groups with and without weight decay.*") as caught:
        host.create_optimizer()
    assert 'optimizer_cls_and_kwargs=(from_model(steepest.Muon), {"lr": ...})' in str(caught[0].message)


def test_row_momo_in_a_bare_trainer_is_refused_and_the_remedy_is_named(tmp_path):
    host = Trainer(llama(), arguments(tmp_path), train_dataset=texts(), optimizer_cls_and_kwargs=MADE)
    with pytest.raises(ValueError, match="MomoTrainer for transformers' Trainer"):
        host.train()


def test_a_finished_optimizer_may_be_handed_to_a_momo_trainer(tmp_path):
    model = llama()
    optimizer = steepest.NewtonMuonMax(model, **MOMO)
    with Watched() as watched:
        MomoTrainer(model, arguments(tmp_path), train_dataset=texts(), optimizers=(optimizer, None)).train()
    found = watched.trained(model)
    assert_alike(found, expected(found, two_epochs(1)))


def test_what_from_model_and_momo_trainer_cannot_use_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"recipe must be a class such as steepest\.Muon, got <class 'torch"):
        from_model(torch.optim.AdamW)
    with pytest.raises(TypeError, match=r"recipe must be a class such as steepest\.Muon, got 'muon'"):
        from_model("muon")
    with pytest.raises(ValueError, match=r"Muon was given no lr, and TrainingArguments\(learning_rate=\.\.\.\) does"):
        from_model(steepest.Muon)()(llama())
    host = MomoTrainer(llama(), arguments(tmp_path), train_dataset=texts())
    with pytest.raises(TypeError, match="no optimizer of steepest inside of AcceleratedOptimizer around AdamW"):
        host.train()
