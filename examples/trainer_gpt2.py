"""Fine-tune a small GPT-2 with transformers' Trainer: the optimizer is one argument.

The model is made from a config and the text is this library's own source, so that nothing is downloaded; put
`GPT2LMHeadModel.from_pretrained("gpt2")` and a text of yours in their places.

    pip install 'steepest[transformers]'
    python examples/trainer_gpt2.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import steepest
from steepest.integrations.transformers import from_model
from steepest.integrations.wrapped import unwrapped

LENGTH = 64


def windows() -> list[dict[str, torch.Tensor]]:
    """Bytes as tokens, cut into pieces of one length."""
    text = b"".join(path.read_bytes() for path in sorted(Path(steepest.__file__).parent.glob("optim/*.py")))
    pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[: len(text) // LENGTH * LENGTH]
    return [{"input_ids": row, "labels": row} for row in pieces.view(-1, LENGTH)]


def main() -> None:
    """Train for 60 steps and say what the loss was."""
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=60,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=windows(),
            # Options are those of steepest.Muon; learning_rate and weight_decay of TrainingArguments do not reach it.
            optimizer_cls_and_kwargs=(from_model(steepest.Muon), {"lr": 0.02, "weight_decay": 0.1}),
        )
        trainer.train()
    print(unwrapped(trainer.optimizer).plan)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
