"""TRL's SFTTrainer, the real one: a Trainer with losses of its own, and with adapters that it makes itself."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import steepest
from steepest.integrations.transformers import MomoTrainer, from_model
from steepest.integrations.wrapped import unwrapped
from tests.cases import cases
from tests.integrations.plain import Watched, as_rank, assert_alike, train, true_losses, windows
from tests.integrations.tiny import BATCH, MOMO, WORDS, batches, by_tokens, llama, loss_of, texts

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.filterwarnings("ignore:Gradients were changed between backward and step"),
    pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
ROUNDED = {"loss": 1e-4, "rtol": 1e-3, "atol": 1e-4}  # TRL adds up logits in chunks, in an order of its own
MADE = (from_model(steepest.NewtonMuonMax), MOMO)
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


class Finetuning(MomoTrainer, SFTTrainer):
    """As a user writes it."""


def tokenizer():
    words = {f"w{number}": number for number in range(WORDS - 2)} | {"<pad>": WORDS - 2, "<eos>": WORDS - 1}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def host(folder, *, model=None, **options):
    own = {name: options.pop(name, None) for name in ("optimizer_cls_and_kwargs", "peft_config", "compute_loss_func")}
    own["optimizers"] = options.pop("optimizers", (None, None))
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    size = {"per_device_train_batch_size": BATCH, "num_train_epochs": 2, "max_length": None}
    order = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    plain = {"save_strategy": "no", "max_grad_norm": 0.0, "activation_checkpointing": False}
    return Finetuning(
        model or llama(),
        SFTConfig(output_dir=str(folder), **{**quiet, **size, **order, **plain, **options}),
        train_dataset=Dataset.from_list([{name: row.tolist() for name, row in text.items()} for text in texts()]),
        processing_class=tokenizer(),
        **own,
    )


def trained(folder, **options):
    with Watched() as watched:
        trainer = host(folder, **{"optimizer_cls_and_kwargs": MADE, **options})
        trainer.train()
    return watched.trained(trainer.model)


def expected(found, windows, **options):
    model = llama()
    torch.testing.assert_close(found.losses, true_losses(model, found, windows, loss_of), rtol=1e-6, atol=0)
    return train(model.train(), steepest.NewtonMuonMax(model, **MOMO), windows, loss_of, **options)


def two_epochs(accumulation):
    return 2 * by_tokens(windows(batches(texts()), accumulation))


@cases("clip", [0.0, 0.5], ids=["", "clipped"])
@cases("accumulation", [1, 3])
def test_the_loss_is_that_of_all_tokens_also_of_a_short_last_window(tmp_path, accumulation, clip):
    found = trained(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=clip)
    assert_alike(found, expected(found, two_epochs(accumulation), clip=clip or None), **ROUNDED)


def summed(outputs, labels, num_items_in_batch):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@cases(
    "options",
    [
        {"activation_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"compute_loss_func": summed},  # TRL then calls the model once more, without gradients
    ],
    ids=["checkpointing", "compiled", "a loss of one's own"],
)
def test_checkpointing_compilers_and_a_second_call_change_neither_losses_nor_moments(tmp_path, options):
    found = trained(tmp_path, gradient_accumulation_steps=3, **options)
    assert_alike(found, expected(found, two_epochs(3)), **ROUNDED)


def on_rank(folder, accumulation):
    as_rank()
    return trained(folder, gradient_accumulation_steps=accumulation, ddp_find_unused_parameters=False)


@pytest.mark.slow
@cases("accumulation", [1, 3])
def test_two_ranks_train_as_one_process(tmp_path, pair, accumulation):
    found, other = pair.run(on_rank, tmp_path, accumulation)
    assert_alike(found, expected(found, two_epochs(2 * accumulation)), **ROUNDED)
    assert found.losses == other.losses


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    options = {"optimizer_cls_and_kwargs": MADE, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 1.0}
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-2")):  # of three steps in each epoch
        trainer = host(tmp_path, gradient_accumulation_steps=3, **options)
        trainer.train(resume_from_checkpoint=resume)
        ends.append([trainer.model.state_dict(), unwrapped(trainer.optimizer).state_dict()["param_groups"]])
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
    assert ends[0][1] == ends[1][1]


def test_row_adapters_that_trl_makes_are_trained_and_told_of_where_they_come_after_the_optimizer(tmp_path):
    options = {"lr": 0.1, "step_size": steepest.Momo(2.0)}
    made = (from_model(steepest.MuonMax), options)
    trainer = host(tmp_path, peft_config=LORA, optimizer_cls_and_kwargs=made)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if "lora_" in name}
    unwrapped(trainer.optimizer).plan.assert_counts(matrix=22)
    model = llama()
    trainer = host(tmp_path, model=model, peft_config=LORA, optimizers=(steepest.MuonMax(model, **options), None))
    with pytest.warns(UserWarning, match=r"not in the optimizer will never be trained: 'model\.layers\.0\.self_attn"):
        trainer.train()


class Preferring(MomoTrainer, DPOTrainer):
    """Of a trainer that takes no optimizer_cls_and_kwargs."""


def test_a_trainer_without_the_argument_gets_it_afterwards_and_the_loss_is_the_one_that_it_logs(tmp_path):
    pairs = [{"prompt": f"w{n} w{n + 1}", "chosen": f" w{n + 2} w{n + 3}", "rejected": f" w{n + 5}"} for n in range(16)]
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    settings = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    trainer = Preferring(
        llama(),
        args=DPOConfig(str(tmp_path), logging_steps=1, activation_checkpointing=False, **quiet, **settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        peft_config=LORA,
    )
    options = {"lr": 0.1, "step_size": steepest.Momo(0.1)}
    trainer.optimizer_cls_and_kwargs = (from_model(steepest.MuonMax), options)
    with Watched() as watched:
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(watched.losses, logged, rtol=1e-6, atol=0)
    assert len(set(logged)) == 6
