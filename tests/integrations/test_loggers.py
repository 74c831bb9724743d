"""Diagnostics arrive in real loggers, under their names, at the step that they are of."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import steepest
from steepest.integrations.loggers import LogDiagnostics, to_mlflow, to_tensorboard, to_wandb
from steepest.integrations.wrapped import unwrapped
from tests.integrations.layers import METHODS, Network, batches, loss_of

pytestmark = pytest.mark.hosts
ROOT = Path(__file__).parents[2]


class Written(dict):
    """Numbers by step."""

    def __call__(self, numbers, step):
        assert step not in self
        self[step] = numbers


def train(net, optimizer, data=None, *, spoiled=()):
    """What diagnostics are after each step, with names as they are written."""
    after = []
    for index, batch in enumerate(data or batches()):
        optimizer.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        if index in spoiled:
            net.first.weight.grad[0, 0] = torch.nan
        optimizer.step(loss=loss)
        after.append({f"steepest/{name}": number for name, number in optimizer.diagnostics().items()})
    return after


def made(method="newton-momo"):
    net = Network()
    return net, METHODS[method](net)


@pytest.mark.filterwarnings("ignore:the gradient of 'first.weight' is not finite:RuntimeWarning")
def test_every_so_many_steps_are_written_and_none_that_was_passed_over():
    net, optimizer = made()
    every, third = Written(), Written()
    logs = [LogDiagnostics(optimizer, every, every=1), LogDiagnostics(optimizer, third, every=3)]
    after = train(net, optimizer, spoiled={2, 3})
    assert list(every.values()) == [after[index] for index in (0, 1, 4, 5, 6)]
    assert list(every) == [1, 2, 3, 4, 5]
    assert third == {3: after[4]}
    for log in logs:
        log.close()
    train(net, optimizer)
    assert len(every) == 5


@pytest.mark.filterwarnings("ignore:the gradient of 'first.weight' is not finite:RuntimeWarning")
def test_steps_go_on_from_a_checkpoint():
    net, optimizer = made()
    train(net, optimizer)
    other = METHODS["newton-momo"](net)
    other.load_state_dict(optimizer.state_dict())
    fourth, seventh = Written(), Written()
    LogDiagnostics(other, fourth, every=4)
    LogDiagnostics(other, seventh, every=7)
    train(net, other, batches(2), spoiled={0})  # which does not make the seventh step come again
    assert list(fourth) == [8]
    assert not seventh


def test_weights_are_looked_at_if_asked_for():
    net, optimizer = made("muon")
    written = Written()
    LogDiagnostics(optimizer, written, every=7, weights=True, prefix="opt")
    train(net, optimizer)
    assert written[7]["opt/weights/first.weight/spectral_norm"] == pytest.approx(
        torch.linalg.matrix_norm(net.first.weight, 2).item(), rel=1e-2
    )


def test_what_cannot_be_logged_is_refused():
    _, optimizer = made("muon")
    with pytest.raises(TypeError, match=r"write must be a function, such as to_tensorboard\(writer\)"):
        LogDiagnostics(optimizer, None)
    with pytest.raises(ValueError, match=r"every must be .*got 0"):
        LogDiagnostics(optimizer, print, every=0)
    with pytest.raises(TypeError, match="no optimizer of steepest"):
        LogDiagnostics(torch.optim.SGD(Network().parameters()), print)


def test_the_page_names_all_that_is_written_and_nothing_else():
    """The table of docs/hosts/logging.md against what methods write."""
    page = (ROOT / "docs" / "hosts" / "logging.md").read_text()
    table = set(re.findall(r"^\| `steepest/([^`]+)` \|", page, re.MULTILINE))
    found = set()
    for make in (*METHODS.values(), lambda net: steepest.Muon(net, weight_decay=0.1)):
        net = Network()
        optimizer = make(net)
        train(net, optimizer)
        found |= set(optimizer.diagnostics(weights=True))
    roles = "|".join(("matrix", "embedding", "head", "vector"))
    named = {re.sub(r"weights/.*/", "weights/NAME/", re.sub(rf"^({roles})/", "ROLE/", name)) for name in found}
    assert table == named


@pytest.mark.slow
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net, optimizer = made()
    with SummaryWriter(tmp_path) as writer:
        LogDiagnostics(optimizer, to_tensorboard(writer), every=2)
        after = train(net, optimizer)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(after[-1])
    for name in after[-1]:
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert read == [(step, pytest.approx(after[step - 1][name])) for step in (2, 4, 6)]


def leveldb_records(data):
    """The records of a log of LevelDB, in which W&B keeps a run: parts in blocks of 32 KiB, each after 7 bytes."""
    place, whole = 7, b""
    data = bytes(7) + data  # blocks are counted from the file's own header on
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if left < 7 or kind == 0:
            place += left
            continue
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_beside_numbers_of_ones_own(tmp_path):
    """The run's own count of steps is larger than the optimizer's, and nothing is dropped."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    net, optimizer = made()
    with wandb.init(mode="offline", dir=tmp_path, project="tests", settings=wandb.Settings(silent=True)) as run:
        LogDiagnostics(optimizer, to_wandb(run), every=2)
        run.log({"loss": 1.0}, step=100)
        after = train(net, optimizer)
    wandb.teardown()  # waits for what is still to be written
    rows, defined = [], {}
    (file,) = tmp_path.rglob("*.wandb")
    for data in leveldb_records(file.read_bytes()[7:]):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        if record.HasField("metric"):
            defined[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    found = {row["steepest/step"]: row for row in rows if "steepest/step" in row}
    assert list(found) == [2, 4, 6]
    for step, row in found.items():
        assert after[step - 1].items() <= row.items()
    assert defined["steepest/*"] == "steepest/step"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("active", [True, False])
def test_mlflow(tmp_path, active, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"file://{tmp_path}/runs")
    try:
        net, optimizer = made()
        client = mlflow.MlflowClient()
        run = mlflow.start_run() if active else client.create_run(client.create_experiment("tests"))
        LogDiagnostics(optimizer, to_mlflow(None if active else run.info.run_id), every=2)
        after = train(net, optimizer)
        if active:
            mlflow.end_run()
        assert set(client.get_run(run.info.run_id).data.metrics) == set(after[-1])
        for name in after[-1]:
            read = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
            assert read == {step: after[step - 1][name] for step in (2, 4, 6)}
    finally:
        mlflow.set_tracking_uri(before)


def test_a_missing_mlflow_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"to_mlflow needs MLflow: pip install 'steepest\[loggers\]'"):
        to_mlflow()


@pytest.mark.slow
def test_no_host_is_imported_for_it():
    hosts = ["tensorboard", "wandb", "mlflow", "lightning", "transformers"]
    code = f"import sys, steepest.integrations.loggers; assert not set(sys.modules) & set({hosts})"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_lightning_logs_at_the_step_of_its_own_numbers(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    from steepest.integrations.lightning import LogDiagnostics, RecordLoss

    class Logger(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            written.append((step, dict(metrics)))

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Network()
            self.after = []

        def training_step(self, batch, index):
            loss = loss_of(self.net, batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return METHODS["newton-momo"](self.net)

        def on_train_batch_end(self, outputs, batch, index):
            self.after.append(self.optimizers().diagnostics())

    written, module = [], Module()
    options = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options |= {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1}
    data = torch.utils.data.DataLoader(batches(), batch_size=None)
    callbacks = [RecordLoss(), LogDiagnostics(every=2)]
    trainer = pl.Trainer(logger=Logger(tmp_path), callbacks=callbacks, accumulate_grad_batches=2, **options)
    trainer.fit(module, data)
    losses = [step for step, row in written if "loss" in row]
    ours = {step: row for step, row in written if "steepest/t" in row}
    assert list(ours) == [1, 3]
    assert set(ours) < set(losses)
    for batch, row in zip((3, 6), ours.values(), strict=True):
        assert row == {f"steepest/{name}": number for name, number in module.after[batch].items()}
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    with pytest.raises(ValueError, match="LogDiagnostics writes to the trainer's loggers, and it has none"):
        pl.Trainer(logger=False, callbacks=callbacks, **options).fit(Module(), data)


@pytest.mark.slow
def test_trainer_logs_it_with_all_else(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from steepest.integrations.transformers import LogDiagnostics, MomoTrainer, from_model
    from tests.integrations.tiny import llama, texts

    after = []

    class Reads(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            after.append(unwrapped(kwargs["optimizer"]).diagnostics())

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=4,
        report_to=["tensorboard"],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    recipe = (from_model(steepest.MuonMax), {"lr": 0.1, "step_size": steepest.Momo(0.5)})
    trainer = MomoTrainer(
        llama(), arguments, train_dataset=texts(), optimizer_cls_and_kwargs=recipe, callbacks=[Reads()]
    )
    trainer.add_callback(LogDiagnostics(trainer, every=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    rows = {row["step"]: row for row in trainer.state.log_history if "steepest/t" in row}
    assert list(rows) == [2, 4]
    for step, row in rows.items():
        assert {f"steepest/{name}": number for name, number in after[step - 1].items()}.items() <= row.items()
    (events,) = tmp_path.rglob("events.out.*")
    read = EventAccumulator(str(events)).Reload().Scalars("train/steepest/t")
    assert {event.step: event.value for event in read} == {step: pytest.approx(after[step - 1]["t"]) for step in (2, 4)}


def logged_by_ranks(weights):
    """What a rank writes; with `weights`, of weights of which each rank keeps a part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = Network(dtype=torch.float32)
    fully_shard(net, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = METHODS["muonmax-momo"](net)
    written = Written()
    LogDiagnostics(optimizer, written, every=2, weights=weights)
    rank = torch.distributed.get_rank()
    after = train(net, optimizer, batches(8, dtype=torch.float32)[rank::2])
    return dict(written), after


@pytest.mark.slow
@pytest.mark.parametrize("weights", [False, True])
def test_of_two_ranks_the_first_writes(pair, weights):
    (first, after), (second, _) = pair.run(logged_by_ranks, weights)
    assert not second
    assert list(first) == [2, 4]
    for step, row in first.items():
        assert after[step - 1].items() <= row.items()
        assert ("steepest/weights/middle.weight/spectral_norm" in row) == weights
