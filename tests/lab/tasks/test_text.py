import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.tasks.text import read_corpus, read_standard_library, split_names, tuning_names


def write(root, files: dict[str, bytes]):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def test_only_the_library_itself_is_read(tmp_path):
    kept = {"os.py": b"a", "json/decoder.py": b"b", "testing.py": b"c"}
    left_out = {
        "test/x.py": b"",
        "json/tests/x.py": b"",
        "idlelib/idle_test/x.py": b"",
        "site-packages/x.py": b"",
        "dist-packages/x.py": b"",
        "__pycache__/x.py": b"",
        "os.txt": b"",
    }
    assert read_standard_library(write(tmp_path, {**kept, **left_out})) == kept


def test_the_standard_library_of_this_python_is_large_enough_to_train_on():
    corpus = read_corpus()
    assert corpus.identity.name.startswith("python-stdlib 3.")
    held_out = len(corpus.tuning) + len(corpus.report)
    assert corpus.identity.bytes == len(corpus.train) + held_out > 5_000_000
    assert 0.02 < held_out / corpus.identity.bytes < 0.1
    assert 0.2 < len(corpus.tuning) / held_out < 0.45


@given(st.dictionaries(st.text("abc/", min_size=1, max_size=6), st.integers(0, 9), max_size=60))
def test_the_split_is_disjoint_complete_and_stable(sizes):
    filled = {name for name, size in sizes.items() if size}
    try:
        train, validation = split_names(sizes)
    except ValueError:
        ranks = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 for name in filled]
        assert len(filled) < 2 or not any(ranks)
        return
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert {*train, *validation} == filled
    more = {**sizes, "a new file": 1}
    if any(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0 for name in filled):
        assert set(validation) <= set(split_names(more)[1])  # a new file moves no old one


@given(st.dictionaries(st.text("abc/", min_size=1, max_size=6), st.integers(1, 9), min_size=2, max_size=30))
def test_a_quarter_of_several_held_out_files_is_for_tuning_and_some_are_left_to_report_on(sizes):
    tuning = tuning_names(sizes)
    assert 1 <= len(tuning) < len(sizes)
    share = sum(sizes[name] for name in tuning) / sum(sizes.values())
    last = max(tuning, key=lambda name: int(hashlib.sha256(name.encode()).hexdigest(), 16))
    assert share >= 0.25 or len(tuning) == len(sizes) - 1
    assert share - sizes[last] / sum(sizes.values()) < 0.25  # without the last it is less


def test_a_folder_is_split_by_file_without_hidden_ones(tmp_path):
    files = {f"part{i}.txt": bytes([i]) * 50 for i in range(40)}
    write(tmp_path, {**files, ".git/config": b"hidden", ".hidden": b"hidden", "empty": b""})
    corpus = read_corpus(tmp_path)
    parts = (corpus.train, corpus.tuning, corpus.report)
    assert all(parts)
    seen = [part[i : i + 50] for part in parts for i in range(0, len(part), 50)]
    assert sorted(seen) == sorted(files.values())
    assert corpus.identity.name == tmp_path.name
    assert corpus.identity.bytes == 2000


def test_a_file_holds_out_its_end(tmp_path):
    content = bytes(range(200))
    path = write(tmp_path, {"a.txt": content}) / "a.txt"
    corpus = read_corpus(path)
    assert (corpus.train, corpus.tuning, corpus.report) == (content[:190], content[190:192], content[192:])
    assert corpus.identity.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("change", [{"a": b"xy"}, {"b": b"x"}, {"c": b""}], ids=["content", "name", "file"])
def test_the_identity_sees_every_change(tmp_path, change):
    files = {"a": b"x", "z": b"y"}
    before = read_corpus(write(tmp_path / "one", files)).identity.sha256
    if "b" in change:
        del files["a"]
    assert read_corpus(write(tmp_path / "two", {**files, **change})).identity.sha256 != before


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data '.*nowhere' is neither a file nor a folder"):
        read_corpus(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"No source of Python's standard library below .*--data PATH"):
        read_standard_library(tmp_path)


def test_a_folder_with_one_file_asks_for_the_file(tmp_path):
    write(tmp_path, {"only.txt": b"text", "empty.txt": b""})
    with pytest.raises(ValueError, match=r"\['empty.txt', 'only.txt'\], none is left to train on.*Give one file"):
        read_corpus(tmp_path)
