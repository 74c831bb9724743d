import importlib

import pytest
import torch

from steepest.lab.cli.options import racers
from steepest.lab.methods import check_buildable
from steepest.lab.tasks import PRESETS, TASKS, make_task, presets_of
from steepest.lab.tasks.text import TextTask
from tests.cases import cases
from tests.lab.tasks.fake_data import write_cifar10, write_cifar100, write_fineweb


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Where each task finds its data, None for those that bring their own."""
    root = tmp_path_factory.mktemp("data")
    given = {"cifar10": write_cifar10(root / "cifar"), "fineweb": write_fineweb(root / "fineweb")}
    given["cifar100"] = write_cifar100(root / "cifar100")
    return dict.fromkeys(TASKS) | given


def test_the_sizes_and_tracks_of_a_task_are_its_presets():
    for name, one in TASKS.items():
        module = importlib.import_module(one.place.partition(":")[0])
        assert set(presets_of(name)) == set(module.PRESETS)


@pytest.mark.slow
@cases("preset", PRESETS)
@cases("name", TASKS)
def test_every_preset_trains(name, preset, data):  # conformance of every task
    task = make_task(name, preset, data=data[name])
    assert (task.name, task.preset, task.own_data) == (name, preset, data[name] is None)
    model = task.build_model(0)
    examples = torch.tensor([0, task.train_size - 1])
    batch = task.batch(examples)
    assert len(batch[0]) == len(batch[1]) == 2
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.shape == ()
    assert all(p.grad is not None for p in model.parameters())
    assert len(task.data_identity().sha256) == 64


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"quadratic"}))  # which starts at zero
def test_weights_depend_on_the_seed_only(name, data):
    task = make_task(name, data=data[name])
    state = torch.get_rng_state()
    first = torch.nn.utils.parameters_to_vector(task.build_model(1).parameters())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = (torch.nn.utils.parameters_to_vector(task.build_model(s).parameters()) for s in (1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@cases("name", TASKS)
def test_the_loss_of_a_batch_is_the_mean_over_its_examples(name, data):
    task = make_task(name, data=data[name])
    model = task.build_model(0).eval()
    torch.nn.init.normal_(model.weight if name == "quadratic" else model.head.weight)
    single = [task.loss(model, task.batch(torch.tensor([i]))) for i in (3, 5)]
    torch.testing.assert_close(task.loss(model, task.batch(torch.tensor([3, 5]))), sum(single) / 2)


@cases("name", TASKS)
def test_the_methods_that_race_by_default_take_the_model(name, data):
    task = make_task(name, data=data[name])
    for method in racers(name):
        check_buildable(method, task, {})


def test_text_predicts_the_next_byte_of_its_own_windows(tmp_path):
    text = bytes(i % 251 for i in range(129 * 100))
    (tmp_path / "a").write_bytes(text)
    task = TextTask("demo", data=tmp_path / "a")
    inputs, targets = task.batch(torch.tensor([2, 0]))
    assert bytes(inputs[0].tolist()) == text[258 : 258 + 128]
    assert bytes(targets[0].tolist()) == text[259 : 259 + 128]
    assert bytes(inputs[1].tolist()) == text[:128]
    assert task.train_size == 95
    assert not task.own_data
    assert task.held_out.examples("tuning", whole=True).tolist() == [0]
    assert task.held_out.examples("report", whole=True).tolist() == [1, 2, 3]
    assert bytes(task.held_out_windows[1].tolist())[:3] == text[129 * 95 + 161 :][:3]  # after a quarter of 645 bytes


def test_text_evaluates_on_distinct_windows_that_it_never_trains_on():
    task = TextTask("demo")
    train = {bytes(window) for window in task.train_windows.numpy()}
    parts = {}
    for part, whole, count in (("tuning", True, 512), ("report", True, 2048), ("tuning", False, 64)):
        windows = task.held_out_windows[task.held_out.examples(part, whole=whole)]
        parts[part, whole] = {bytes(window) for window in windows.numpy()}
        assert len(windows) == count
        assert len(parts[part, whole] & train) <= count / 500
    assert not parts["tuning", True] & parts["report", True]


def test_text_evaluation_is_the_mean_over_all_bytes_of_its_windows(rng):
    task = TextTask("demo")
    model = task.build_model(0)
    torch.nn.init.normal_(model.head.weight, generator=rng)
    windows = task.held_out_windows[task.held_out.examples("report", whole=False)].long()
    with torch.no_grad():
        scores = model(windows[:, :-1]).log_softmax(-1)
    expected = -scores.gather(-1, windows[:, 1:, None]).double().mean()
    result = task.evaluate(model, "report", whole=False)
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.accuracy is None
    assert sum(result.blocks) / len(result.blocks) == pytest.approx(result.loss)  # 32 blocks of two windows each
    assert len(result.blocks) == 32


def test_digits_splits_all_images_once():
    task = make_task("digits")
    images = torch.cat([task.train_images, task.held_out_images]).flatten(1)
    assert images.shape == (1797, 64)
    assert (images.min(), images.max()) == (-1, 1)
    assert len(images.unique(dim=0)) == 1797  # no image is in both parts
    tuning, report = (task.held_out.examples(part, whole=True).tolist() for part in ("tuning", "report"))
    assert sorted([*tuning, *report]) == list(range(360))
    assert (len(tuning), len(report)) == (90, 270)
    accuracy = task.evaluate(task.build_model(0), "report", whole=True).accuracy
    assert accuracy == pytest.approx(0.1, abs=0.05)  # zero logits: always "0"


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10_000))
    with pytest.raises(ValueError, match=r"The tuning part of 'a' has 125 bytes; one window takes 129.*--data"):
        TextTask("demo", data=tmp_path / "a")


def test_unknown_names_are_answered_with_the_valid_ones(tmp_path):
    with pytest.raises(
        ValueError, match=rf"Unknown task 'txet': did you mean 'text'\? Valid: {', '.join(sorted(TASKS))}"
    ):
        make_task("txet")
    with pytest.raises(ValueError, match=r"Unknown preset 'tny': did you mean 'tiny'\? Valid: deep, demo, small, tiny"):
        make_task("text", "tny")
    with pytest.raises(ValueError, match="'digits' has its own images, got --data"):
        make_task("digits", data=tmp_path)
    with pytest.raises(ValueError, match="'quadratic' has its own examples, got --data"):
        make_task("quadratic", data=tmp_path)


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs scikit-learn.*pip install 'steepest\[lab\]'"):
        make_task("digits")
