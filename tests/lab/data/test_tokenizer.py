import itertools
import json

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.lab.data.tokenizer import GPT2, read_tokenizer
from steepest.lab.disk.files import RecordError
from steepest.lab.errors import UsageError
from tests.cases import cases
from tests.lab.data.tiny_tokenizer import SENTENCES, letters, trained, write_tokenizer

# Radford et al., 2019, as in the encoder.py that they published.
PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return read_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "gpt2"))


def whole(**other):
    """The content of a tokenizer.json."""
    vocabulary, merges = trained()
    model = {"type": "BPE", "vocab": vocabulary, "merges": [" ".join(pair) for pair in merges], "dropout": None}
    splitting = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"version": "1.0", "normalizer": None, "pre_tokenizer": splitting, "model": model, **other}


def by_definition(text):
    """Words by the pattern; in each, the earliest merge is applied until there is none."""
    vocabulary, merges = trained()
    rank = {pair: number for number, pair in enumerate(merges)}
    symbols = {byte: letter for letter, byte in letters().items()}
    found = []
    for word in PATTERN.findall(text):
        parts = [symbols[byte] for byte in word.encode()]
        while known := [rank[pair] for pair in itertools.pairwise(parts) if pair in rank]:
            pair, at, joined = merges[min(known)], 0, []
            while at < len(parts):
                both = tuple(parts[at : at + 2]) == pair
                joined.append("".join(pair) if both else parts[at])
                at += 1 + both
            parts = joined
        found += [vocabulary[part] for part in parts]
    return found


@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from([*SENTENCES, *"aetx'<|> \n\t1\u3000\x1c\u00e9"]) | st.text(max_size=5)).map("".join)
)
def test_tokens_are_those_of_the_definition(tokenizer, text):
    assert tokenizer.encode([text])[0].tolist() == by_definition(text)


def test_some_merges_were_learnt(tokenizer):
    assert len(tokenizer.encode([SENTENCES[0]])[0]) < len(SENTENCES[0]) / 1.5


def test_a_mark_of_the_end_inside_a_text_is_text(tokenizer):
    [tokens] = tokenizer.encode(["a<|endoftext|>b"])
    assert len(tokens) > 3
    assert tokens.max() < 50256


def test_the_same_words_from_other_files_are_the_same_tokenizer(tokenizer, tmp_path):
    write_tokenizer(tmp_path / "openai", words="encoder.json", pairs="vocab.bpe")
    vocabulary, merges = trained()
    contents = {
        "texts": whole(),
        "pairs": whole(model=whole()["model"] | {"merges": merges}),
        "added": whole(
            model=whole()["model"] | {"vocab": {word: number for word, number in vocabulary.items() if number < 50256}},
            added_tokens=[{"id": 50256, "content": "<|endoftext|>", "special": True}],
        ),
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    for path in (tmp_path / "openai", *(tmp_path / name for name in contents), tmp_path / "pairs" / "tokenizer.json"):
        other = read_tokenizer(path)
        assert other.sha256 == tokenizer.sha256 != GPT2
        assert other.encode(["the first<|endoftext|>"])[0].tolist() == by_definition("the first<|endoftext|>")


def without(word):
    return {key: number for key, number in trained()[0].items() if key != word}


@cases(
    "content, message",
    [
        ("{", r"tokenizer\.json: not valid JSON"),
        (whole(model={"type": "WordPiece", "vocab": {}}), r"model\.type must be 'BPE', got 'WordPiece'"),
        (whole(model={"vocab": {}, "merges": []}), "it has 0 ids, up to 0; GPT-2's are 0 to 50256"),
        (whole(model=whole()["model"] | {"vocab": without("A")}), "it has 50256 ids, up to 50256"),
        (whole(added_tokens=[{"id": 50257, "content": "<pad>"}]), "it has 50258 ids, up to 50257"),
        (
            whole(model=whole()["model"] | {"vocab": {**without("<|endoftext|>"), "<eos>": 50256}}),
            "the id 50256 is that of '<eos>', not of <|endoftext|>",
        ),
        (whole(model=whole()["model"] | {"vocab": {**without("A"), "AAA": trained()[0]["A"]}}), "'A' .* has no token"),
        (whole(model=whole()["model"] | {"merges": ["A B"]}), "merge 1, 'A' with 'B', has no token"),
        (whole(model=whole()["model"] | {"merges": ["t h e"]}), "merge 1 is 't h e', not two tokens"),
        (whole(model=whole()["model"] | {"end_of_word_suffix": "</w>"}), "end_of_word_suffix is given, unlike GPT-2's"),
        (whole(model=whole()["model"] | {"byte_fallback": True}), "byte_fallback is true, unlike GPT-2's"),
        (whole(pre_tokenizer={"type": "Whitespace"}), r"pre_tokenizer\.type must be 'ByteLevel'"),
        (whole(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "add_prefix_space is true, unlike"),
        (
            whole(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
            "use_regex is fals",
        ),
        (whole(normalizer={"type": "NFC"}), "normalizer must be null"),
    ],
)
def test_what_is_not_of_gpt2_s_kind_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RecordError, match=rf"{message}.*Give GPT-2's own"):
        read_tokenizer(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere' is not there\. Give GPT-2's own: a folder"):
        read_tokenizer(tmp_path / "nowhere")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UsageError, match=r"has no tokenizer\.json, and not vocab\.json or encoder\.json with merges"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff")
    with pytest.raises(RecordError, match=r"merges\.txt: the file cannot be read"):
        read_tokenizer(tmp_path)


def test_the_library_that_is_needed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'steepest\[data\]'"):
        read_tokenizer(write_tokenizer(tmp_path / "gpt2"))
