"""GPT-2's tokenizer, from files that the user has: nothing is downloaded.

It is a byte-level BPE (Radford et al., 2019, section 2.2) behind the pattern of its published code. The words come from
the files, and the pattern and the library that applies them from `tokenizers`. <|endoftext|> in a text is text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from steepest.lab.data.shards import END_OF_TEXT, VOCABULARY
from steepest.lab.disk.fields import decode
from steepest.lab.disk.files import RecordError, exists, read_data
from steepest.lab.errors import UsageError

if TYPE_CHECKING:
    import tokenizers

Merges = Sequence[tuple[str, str]]

# Of encoder.json and vocab.bpe as OpenAI published them, whose own hashes tiktoken's openai_public.py has.
GPT2 = "c2a8034745d6e84748432c01761ac81e8e22c20173237276ebb1404fb3e71949"
NAMES = ("tokenizer.json", "vocab.json or encoder.json with merges.txt or vocab.bpe")
_MOST_BYTES = 2**25
_REMEDY = (
    "Give GPT-2's own: a folder with encoder.json and vocab.bpe, or vocab.json and merges.txt, or tokenizer.json, from "
    "where you have its model."
)


class Tokenizer:
    """From text to tokens.

    Args:
        vocabulary: Ids by token, in GPT-2's letters for bytes.
        merges: Pairs of tokens that become one, in order.
        path: Where they are from, for error messages.

    Raises:
        RecordError: If the ids are not GPT-2's 50257, a byte has no token, or a merge makes none.
        ModuleNotFoundError: If `tokenizers` is not installed.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Merges, path: Path) -> None:
        ordered = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[token] for token in ordered] != [*range(VOCABULARY)]:
            problem = f"it has {len(ordered)} ids, up to {max(vocabulary.values(), default=0)}; GPT-2's are 0 to 50256"
            raise RecordError(path, problem, _REMEDY)
        if ordered[END_OF_TEXT] != "<|endoftext|>":
            problem = f"the id {END_OF_TEXT} is that of {ordered[END_OF_TEXT]!r}, not of <|endoftext|>"
            raise RecordError(path, problem, _REMEDY)
        self._library = _built(vocabulary, merges, path)
        self.sha256 = hashlib.sha256(msgspec.json.encode([ordered, merges])).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint16]]:
        """Tokens of each text, without <|endoftext|>."""
        found = self._library.encode_batch_fast([*texts], add_special_tokens=False)
        return [np.array(one.ids, dtype="<u2") for one in found]


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from its files.

    Args:
        path: A tokenizer.json, or a folder with it; or with vocab.json or encoder.json and merges.txt or vocab.bpe.

    Raises:
        UsageError: If these are not there.
        RecordError: If they cannot be read, or are not of GPT-2's kind.
        ModuleNotFoundError: If `tokenizers` is not installed.
    """
    if not path.is_dir():
        if not exists(path):
            raise UsageError(f"--tokenizer {str(path)!r} is not there. {_REMEDY}")
        return _of_one(path)
    if exists(path / "tokenizer.json"):
        return _of_one(path / "tokenizer.json")
    words = [path / name for name in ("vocab.json", "encoder.json") if exists(path / name)]
    pairs = [path / name for name in ("merges.txt", "vocab.bpe") if exists(path / name)]
    if not words or not pairs:
        raise UsageError(f"--tokenizer {str(path)!r} has no {NAMES[0]}, and not {NAMES[1]}. {_REMEDY}")
    vocabulary = decode(dict[str, int], _text(words[0]), words[0], remedy=_REMEDY)
    lines = [line for line in _text(pairs[0]).split("\n") if line and not line.startswith("#version")]
    return Tokenizer(vocabulary, _merges(lines, pairs[0]), path)


class _Splitting(msgspec.Struct):
    type: Literal["ByteLevel"]
    add_prefix_space: bool
    use_regex: bool = True


class _Model(msgspec.Struct):
    vocab: dict[str, int]
    merges: list[str | list[str]]
    type: Literal["BPE"] = "BPE"
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False


class _Added(msgspec.Struct):
    id: int
    content: str


class _One(msgspec.Struct):
    """What counts of a tokenizer.json."""

    model: _Model
    pre_tokenizer: _Splitting
    normalizer: None = None
    added_tokens: list[_Added] = []


def _of_one(path: Path) -> Tokenizer:
    """From a tokenizer.json."""
    one = decode(_One, _text(path), path, remedy=_REMEDY)
    model, splitting = one.model, one.pre_tokenizer
    wrong = {
        "pre_tokenizer.add_prefix_space is true": splitting.add_prefix_space,
        "pre_tokenizer.use_regex is false": not splitting.use_regex,
        "model.continuing_subword_prefix is given": model.continuing_subword_prefix,
        "model.end_of_word_suffix is given": model.end_of_word_suffix,
        "model.byte_fallback is true": model.byte_fallback,
        "model.ignore_merges is true": model.ignore_merges,
    }
    if found := [text for text, holds in wrong.items() if holds]:
        raise RecordError(path, f"{found[0]}, unlike GPT-2's", _REMEDY)
    added = {token.content: token.id for token in one.added_tokens}
    return Tokenizer(model.vocab | added, _merges(model.merges, path), path)


def _merges(merges: Sequence[str | list[str]], path: Path) -> Merges:
    found: list[tuple[str, str]] = []
    for number, pair in enumerate(merges, start=1):
        words = pair.split(" ") if isinstance(pair, str) else pair
        if len(words) != 2:
            raise RecordError(path, f"merge {number} is {pair!r}, not two tokens", _REMEDY)
        found.append((words[0], words[1]))
    return found


def _built(vocabulary: Mapping[str, int], merges: Merges, path: Path) -> tokenizers.Tokenizer:
    try:
        from tokenizers import Tokenizer, pre_tokenizers
        from tokenizers.models import BPE
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{missing}. Tokens are made by the library tokenizers: pip install 'steepest[data]'", name=missing.name
        ) from None
    if lacking := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys()):
        raise RecordError(path, f"{lacking[0]!r} and so some byte has no token", _REMEDY)
    for number, (left, right) in enumerate(merges, start=1):
        if not {left, right, left + right} <= vocabulary.keys():
            raise RecordError(path, f"merge {number}, {left!r} with {right!r}, has no token", _REMEDY)
    library = Tokenizer(BPE(vocab=dict(vocabulary), merges=[*merges]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return library


def _text(path: Path) -> str:
    try:
        return read_data(path, most=_MOST_BYTES).decode()
    except UnicodeDecodeError as problem:
        raise RecordError(path, f"the file cannot be read ({problem})", _REMEDY) from None
