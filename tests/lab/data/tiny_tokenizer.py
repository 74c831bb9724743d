"""A tokenizer of GPT-2's kind that was trained on a few sentences; unused words fill it up to GPT-2's 50257 ids."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from steepest.lab.data.shards import HEADER

SENTENCES = (
    "It's the first line of the text, and they're 12 of them; we'll see 1234.",
    "def the_other(line):\n    return line.strip()  # and the rest\n\n\n",
    "Größe, naïve, 東京 and 東京 again; the other's text is the first text.\n\tthe tab",
)


@cache
def trained():
    """Ids by token, and merges."""
    one = Tokenizer(BPE())
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    one.train_from_iterator(SENTENCES, BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(one.to_str())["model"]
    words = [*model["vocab"], *(f"<unused {number}>" for number in range(len(model["vocab"]), 50256)), "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, [tuple(pair) for pair in model["merges"]]


def write_tokenizer(folder: Path, *, words: str = "vocab.json", pairs: str = "merges.txt") -> Path:
    """In GPT-2's two files."""
    vocabulary, merges = trained()
    folder.mkdir(parents=True)
    (folder / words).write_text(json.dumps(vocabulary))
    (folder / pairs).write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return folder


@cache
def letters():
    """Bytes by the letters that stand for them: those that print for themselves, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


def decoded(tokens) -> list[str]:
    """Documents, each of which follows <|endoftext|>."""
    vocabulary, _ = trained()
    words, documents = [*vocabulary], []
    for token in tokens:
        if token == 50256:
            documents.append(bytearray())
        else:
            documents[-1] += bytes(letters()[letter] for letter in words[token])
    return [document.decode() for document in documents]


def tokens_in(folder: Path, split: str):
    """Of all shards of a split, one after the other."""
    read = [np.frombuffer(path.read_bytes()[HEADER:], "<u2") for path in sorted(folder.glob(f"*_{split}_*.bin"))]
    return np.concatenate(read) if read else np.zeros(0, "<u2")
