import hashlib

import pytest
import torch

from steepest.lab.tasks import make_task
from steepest.lab.tasks.cifar10 import KIND, Cifar10Task
from tests.lab.tasks.fake_data import write_cifar10, write_cifar100


@pytest.fixture
def folder(tmp_path):
    return write_cifar10(tmp_path / "cifar-10-batches-bin")


def test_rows_become_labels_and_planes_of_pixels_in_the_order_of_the_files(folder):
    task = Cifar10Task("demo", data=folder)
    content = b"".join((folder / name).read_bytes() for name in KIND.train)
    assert task.train_size == 100
    for i in (0, 37, 99):
        row = content[i * KIND.row : (i + 1) * KIND.row]
        assert task.train_labels[i] == row[0]
        assert task.train_images[i, 2, 5, 7] == row[1 + 2 * 1024 + 5 * 32 + 7]
    last = (folder / "test_batch.bin").read_bytes()
    assert task.held_out_images[0].flatten().tolist() == list(last[1 : KIND.row])
    assert task.held_out.examples("tuning", whole=True).tolist() == list(range(5))
    assert task.held_out.examples("report", whole=True).tolist() == list(range(5, 20))


def test_the_training_images_have_mean_zero_and_variance_one(folder):
    task = Cifar10Task("demo", data=folder)
    images, labels = task.batch(torch.arange(100))
    channels = images.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)  # float32
    torch.testing.assert_close(channels.var(1, correction=0), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)
    assert torch.equal(labels, task.train_labels)


def test_evaluation_is_over_all_images_of_a_part(folder):
    task = Cifar10Task("demo", data=folder)
    model = task.build_model(0).eval()
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        scores = model((task.held_out_images[5:].float() - task.mean) / task.std).log_softmax(-1)
    labels = task.held_out_labels[5:]
    expected = -scores[torch.arange(15), labels].double().mean().item()
    result = task.evaluate(model, "report", whole=True)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.accuracy == (scores.argmax(-1) == labels).double().mean().item()
    assert len(result.blocks) == 15


def test_a_curve_is_over_fewer_images(tmp_path):
    task = Cifar10Task("demo", data=write_cifar10(tmp_path / "data", images=1500))
    assert len(task.held_out.examples("report", whole=False)) == 1000
    assert len(task.held_out.examples("report", whole=True)) == 1125


def test_the_identity_is_of_the_content_not_of_the_name(tmp_path, folder):
    same = make_task("cifar10", data=write_cifar10(tmp_path / "moved")).data_identity()
    here = make_task("cifar10", data=folder).data_identity()
    assert (same.sha256, same.bytes) == (here.sha256, here.bytes)
    assert here.name == "cifar-10-batches-bin"
    assert here.bytes == 6 * 20 * KIND.row
    other = make_task("cifar10", data=write_cifar10(tmp_path / "other", seed=1)).data_identity()
    assert other.sha256 != here.sha256


def test_no_data_says_what_to_download_and_where(tmp_path, folder):
    remedy = r"Download cifar-10-binary\.tar\.gz from https://www\.cs\.toronto\.edu.*--data cifar-10-batches-bin"
    with pytest.raises(FileNotFoundError, match=rf"'cifar10' has no data of its own\. {remedy}"):
        make_task("cifar10")
    with pytest.raises(FileNotFoundError, match=rf"nowhere' is not a folder\. {remedy}"):
        make_task("cifar10", data=tmp_path / "nowhere")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no data_batch_3\.bin\. {remedy}"):
        make_task("cifar10", data=folder)


class Bomb:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise AssertionError('this pickle was read')",)


def test_the_pickled_version_is_refused_unread(tmp_path):
    import pickle

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"version of CIFAR-10 for Python: pickles.*cifar-10-binary\.tar\.gz"):
        make_task("cifar10", data=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], r"data_batch_2\.bin has 61459 bytes, .* not a whole number of images"),
        (lambda _: b"", r"data_batch_2\.bin has 0 bytes"),
        (lambda content: b"\x0a" + content[1:], r"data_batch_2\.bin has the label 10, above 9"),
    ],
    ids=["short", "empty", "label"],
)
def test_a_damaged_file_is_refused(folder, change, message):
    path = folder / "data_batch_2.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        make_task("cifar10", data=folder)


def test_images_of_one_colour_are_refused(folder):
    for name in KIND.train:
        (folder / name).write_bytes(bytes(KIND.row))
    with pytest.raises(ValueError, match="A colour has one and the same level in all training images"):
        make_task("cifar10", data=folder)


def test_the_hash_is_that_of_sizes_and_files(folder):
    digest = hashlib.sha256()
    for name in (*KIND.train, "test_batch.bin"):
        digest.update(b"20\0" + (folder / name).read_bytes())
    assert make_task("cifar10", data=folder).data_identity().sha256 == digest.hexdigest()


def test_the_second_label_of_cifar100_is_the_class(tmp_path):
    folder = write_cifar100(tmp_path / "cifar-100-binary")
    task = make_task("cifar100", data=folder)
    content = (folder / "train.bin").read_bytes()
    for i in (0, 31, 59):
        row = content[i * 3074 : (i + 1) * 3074]
        assert task.train_labels[i] == row[1]
        assert task.train_images[i, 2, 5, 7] == row[2 + 2 * 1024 + 5 * 32 + 7]
    assert task.train_size == len(task.held_out_labels) == 60
    assert task.build_model(0).head.out_features == 100


def test_files_that_are_not_cifar100_are_refused(tmp_path):
    folder = write_cifar100(tmp_path / "cifar-100-binary")
    content = bytearray((folder / "test.bin").read_bytes())
    content[1] = 100
    (folder / "test.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"test\.bin has the label 100, above 99: it is not CIFAR-100.*100-binary"):
        make_task("cifar100", data=folder)
    (folder / "test.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="not a whole number of images of 3074 bytes"):
        make_task("cifar100", data=folder)
    (folder / "test.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no test\.bin\. Download cifar-100-binary\.tar\.gz"):
        make_task("cifar100", data=folder)
    (folder / "train").write_bytes(b"")
    with pytest.raises(ValueError, match="is the version of CIFAR-100 for Python: pickles"):
        make_task("cifar100", data=folder)
