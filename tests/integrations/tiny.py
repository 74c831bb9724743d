"""Tiny models of transformers, and texts of uneven lengths for them."""

import torch
from torch.nn.functional import cross_entropy

import steepest

WORDS, BATCH = 32, 2
SEEN = steepest.InputMoment(every=1, first=0, structure="full")
# A bound close to the loss: Momo cuts the steps, and a loss that is off shows in the weights. The exact polar factor
# enlarges what two orders of summation differ by far less than a polynomial does.
MOMO = {"lr": 0.1, "step_size": steepest.Momo(2.0), "precondition": SEEN, "polar": "svd"}


def llama(**options):
    """Weights that are the same for the same options; without dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=32, **sizes, **options))


def texts(count=16):
    """Tokens with labels, of which the first few do not count; how many differs."""
    drawn = torch.randint(WORDS, (count, 8), generator=torch.Generator().manual_seed(1))
    every = [{"input_ids": row, "labels": row.clone()} for row in drawn]
    for place, text in enumerate(every):
        text["labels"][: place % 7] = -100
    return every


def batches(texts, size=BATCH):
    return [
        {name: torch.stack([text[name] for text in texts[start : start + size]]) for name in texts[0]}
        for start in range(0, len(texts), size)
    ]


def tokens(batch):
    """How many are predicted."""
    return int((batch["labels"][:, 1:] != -100).sum())


def by_tokens(windows):
    """The same windows, in which each token counts alike."""
    counts = [[tokens(batch) for batch, _ in window] for window in windows]
    return [
        [(batch, own / sum(numbers)) for (batch, _), own in zip(window, numbers, strict=True)]
        for window, numbers in zip(windows, counts, strict=True)
    ]


def loss_of(model, batch):
    """The mean over the tokens of a micro-batch."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
