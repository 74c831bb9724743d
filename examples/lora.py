"""Teach a frozen model something new through adapters of PEFT, with Muon on their A and B.

A small Llama first learns to count up; then it is frozen, and LoRA teaches it to count down.

    pip install 'steepest[transformers,peft]'
    python examples/lora.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import steepest

NUMBERS, LENGTH = 64, 16


def counting(step: int, count: int = 16) -> torch.Tensor:
    """Rows of numbers, each the one before plus the step, around the clock."""
    first = torch.randint(NUMBERS, (count, 1))
    return (first + step * torch.arange(LENGTH)) % NUMBERS


def train(model: torch.nn.Module, optimizer: steepest.SteepestDescent, step: int, steps: int) -> float:
    """The loss at the end."""
    loss = torch.zeros(())
    for _ in range(steps):
        rows = counting(step)
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Count up, freeze, count down."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS, max_position_embeddings=LENGTH, **sizes))
    print(f"counts up, loss {train(model, steepest.Muon(model, lr=0.02), step=1, steps=60):.2f}")
    adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapters)
    optimizer = steepest.Muon(model, lr=0.02)  # built when the adapters are there
    trained = [row for row in optimizer.plan if row.trainable]
    print(f"trains {sum(row.parameter.numel() for row in trained):,} numbers in {len(trained)} matrices")
    print(f"before: loss {train(model, optimizer, step=-1, steps=1):.2f}")
    print(f"after: loss {train(model, optimizer, step=-1, steps=80):.2f}")


if __name__ == "__main__":
    main()
