"""Lightning trains as a plain loop does, and Momo hears the loss of each step."""

import contextlib
import itertools
import math
import os
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import steepest
from tests.integrations.layers import METHODS, Network, batches, loss_of
from tests.integrations.plain import Watched, assert_alike, train, windows

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import (  # noqa: E402 - needs the host
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.plugins.environments import TorchElasticEnvironment  # noqa: E402

from steepest.integrations.lightning import RecordLoss  # noqa: E402

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning"),
]
CLIPPED = pytest.mark.filterwarnings("ignore:Gradients were changed between backward and step:UserWarning")


class Module(pl.LightningModule):
    """A network in automatic optimization; `seen` are its losses.

    Args:
        method: By name, or a function from a module to an optimizer.
        way: How the network is run.
        returns: What `training_step` makes of a loss and its batch's number.
    """

    def __init__(self, method="newton-momo", way="plain", *, dtype=torch.float64, returns=lambda loss, index: loss):
        super().__init__()
        self.net, self.make, self.returns = Network(way, dtype), METHODS.get(method, method), returns
        self.seen = []

    def training_step(self, batch, index):
        loss = loss_of(self.net, batch)
        self.seen.append(loss.item())
        return self.returns(loss, index)

    def configure_optimizers(self):
        return self.make(self.net)


def trainer_of(folder, *callbacks, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **options})


def fit(module, folder, *callbacks, data=None, **options):
    """What a training comes to; one that is told losses, if no callbacks are given."""
    trainer = trainer_of(folder, *(callbacks or [RecordLoss()]), **options)
    with Watched() as watched:
        trainer.fit(module, DataLoader(data or batches(), batch_size=None))
    return watched.trained(module.net)


def reference(method="newton-momo", accumulation=1, *, data=None, cut=None, clip=None):
    """The plain loop; every loss is divided by the number of micro-batches that a whole window has."""
    net = Network()
    cut = cut or windows(data or batches(), accumulation, divisor=accumulation)
    return train(net, METHODS[method](net), cut, loss_of, clip=clip)


def means(losses, accumulation):
    return [math.fsum(part) / len(part) for part in (losses[i : i + accumulation] for i in range(0, 7, accumulation))]


@CLIPPED
@pytest.mark.parametrize("way", ["plain", "checkpointed", "reentrant", "compiled"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_momo_uses_the_mean_loss_of_each_window_and_trains_as_a_plain_loop(tmp_path, accumulation, clip, way):
    """Seven micro-batches: of three to a window the last has one, whose loss is divided by three all the same."""
    module = Module(way=way)
    found = fit(module, tmp_path, accumulate_grad_batches=accumulation, gradient_clip_val=clip)
    assert found.losses == pytest.approx(means(module.seen, accumulation), rel=1e-6)
    assert_alike(found, reference(accumulation=accumulation, clip=clip))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("accumulation", "left_out"), [(1, {2}), (3, {1}), (3, {3, 4, 5}), (3, {5}), (3, {6})])
def test_batches_that_are_left_out_leave_a_smaller_window(tmp_path, accumulation, left_out, scaled):
    """With a GradScaler, Lightning passes over a step whose last micro-batch is left out, and clears its gradients."""
    module = Module(returns=lambda loss, index: None if index in left_out else loss)
    options = {"plugins": [Scaled()]} if scaled else {}
    found = fit(module, tmp_path, accumulate_grad_batches=accumulation, **options)
    kept = []
    for start in range(0, 7, accumulation):
        inside = range(start, min(start + accumulation, 7))
        if not (set(inside) <= left_out or (scaled and inside[-1] in left_out)):
            kept.append([(batches()[i], 1 / accumulation) for i in inside if i not in left_out])
    pairs = itertools.pairwise([{}, *found.weights])  # a step without gradients leaves the weights
    found.weights = [new for old, new in pairs if not old or any(not torch.equal(old[name], new[name]) for name in new)]
    assert_alike(found, reference(cut=kept))


def test_the_older_packages_trainer_takes_the_callback(tmp_path):
    older = pytest.importorskip("pytorch_lightning")

    class Older(older.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = Network(), []

        training_step, configure_optimizers = Module.training_step, Module.configure_optimizers
        make, returns = staticmethod(METHODS["newton-momo"]), staticmethod(lambda loss, index: loss)

    with mock.patch.object(pl, "Trainer", older.Trainer):
        assert_alike(fit(Older(), tmp_path, accumulate_grad_batches=3), reference(accumulation=3))


def test_a_training_step_may_return_a_dict(tmp_path):
    found = fit(Module(returns=lambda loss, index: {"loss": loss, "index": index}), tmp_path, accumulate_grad_batches=3)
    assert_alike(found, reference(accumulation=3))


class Scaled(MixedPrecision):
    """A GradScaler, without autocast: numbers are those of a plain loop."""

    def __init__(self, scale=1024.0):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000))

    def forward_context(self):
        return contextlib.nullcontext()


@CLIPPED
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_gradscaler_changes_nothing(tmp_path, accumulation, clip):
    options = {"accumulate_grad_batches": accumulation, "gradient_clip_val": clip, "plugins": [Scaled()]}
    assert_alike(fit(Module(), tmp_path, **options), reference(accumulation=accumulation, clip=clip))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_that_a_gradscaler_passes_over_is_forgotten(tmp_path, accumulation):
    """The scale overflows in the second window, which has one micro-batch if an epoch is four and windows three."""

    class Overflows(Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * math.inf if (self.current_epoch, index) == (0, 3) else loss

    found = fit(
        Overflows(),
        tmp_path,
        data=batches(4),
        max_epochs=2,
        accumulate_grad_batches=accumulation,
        plugins=[Scaled()],
    )
    cut = windows(batches(4), accumulation, divisor=accumulation)
    assert_alike(found, reference(cut=[*cut[:-1], *cut]))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_momo_uses_the_mean_loss_in_mixed_precision(tmp_path, accumulation, precision):
    module = Module("muonmax-momo", dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "16-mixed" else None
    plugin = {"plugins": [MixedPrecision(precision, "cpu", scaler)]} if "mixed" in precision else {}
    options = {"accumulate_grad_batches": accumulation, "data": batches(dtype=torch.float32)}
    found = fit(module, tmp_path, **options, **(plugin or {"precision": precision}))
    assert found.losses == pytest.approx(means(module.seen, accumulation), rel=1e-6 if plugin else 1e-2)


def ranks_options():
    """How Lightning is told that this process is a rank."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}", "GROUP_RANK": "0"}
    warnings.filterwarnings("ignore", "Gradients were changed between backward and step")
    plugins = [TorchElasticEnvironment()]
    return {"devices": world, "strategy": "ddp", "plugins": plugins, "use_distributed_sampler": False}


def trained_on_ranks(folder, accumulation, clip, route, way):
    """A rank's part of a training in Lightning; its batches are every second one."""
    options = {**ranks_options(), "data": batches(14)[torch.distributed.get_rank() :: 2]}
    if route == "manual":
        return fit(Manual("recorded", accumulation, clip=clip, way=way), folder, pl.Callback(), **options)
    make = METHODS["newton-momo"]
    module = Module((lambda net: make(module.trainer.strategy.model)) if route == "wrapped" else make, way)
    return fit(module, folder, accumulate_grad_batches=accumulation, gradient_clip_val=clip, **options)


@CLIPPED
@pytest.mark.parametrize("route", ["bare", "wrapped", "manual"])
@pytest.mark.parametrize(
    ("accumulation", "clip", "way"),
    [(1, None, "plain"), (3, None, "plain"), (3, 0.2, "plain"), (3, None, "checkpointed"), (3, 0.2, "compiled")],
)
def test_two_ranks_train_as_one_process(tmp_path, pair, accumulation, clip, way, route):
    ranks = pair.run(trained_on_ranks, str(tmp_path), accumulation, clip, route, way)
    cut = windows(batches(14), 2 * accumulation, divisor=None if route == "manual" else 2 * accumulation)
    expected = reference(cut=cut, clip=clip)
    for found in ranks:
        found.weights = [{name.split("net.")[-1]: w for name, w in one.items()} for one in found.weights]
        assert_alike(found, expected)


def test_accumulation_without_the_callback_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"added to them, as under accumulation.* In Lightning, RecordLoss of steepest"
    ):
        fit(Module("muonmax-momo"), tmp_path, pl.Callback(), accumulate_grad_batches=3)


class Grows(Module):
    """Accumulates from its second epoch on, as with GradientAccumulationScheduler."""

    def __init__(self, accumulation):
        super().__init__("muonmax-momo")
        self.accumulation = accumulation

    def on_train_epoch_start(self):
        self.trainer.accumulate_grad_batches = self.accumulation if self.current_epoch else 1


def test_a_window_of_one_batch_whose_loss_was_divided_is_asked_about_at_the_first_step_that_shrinks(tmp_path):
    """Without the callback, such a window returns a third of its loss: far below the others, and below the bound."""
    with pytest.warns(UserWarning, match="far below .*Was it divided by the number of micro-batches, as hosts do"):
        fit(Grows(3), tmp_path, pl.Callback(), max_epochs=2, data=batches(1))


@pytest.mark.parametrize("data", [1, 4, 6])
def test_accumulation_may_change_between_epochs(tmp_path, data):
    module = Grows(3)
    found = fit(module, tmp_path, data=batches(data), max_epochs=2)
    first, then = windows(batches(data)), windows(batches(data), 3, divisor=3)
    assert_alike(found, reference("muonmax-momo", cut=[*first, *then]))


def test_another_librarys_optimizer_is_let_be(tmp_path):
    module = Module(lambda net: torch.optim.AdamW(net.parameters()))
    trainer_of(tmp_path, RecordLoss()).fit(module, DataLoader(batches(), batch_size=None))
    assert len(module.seen) == 7


class Manual(pl.LightningModule):
    """Manual optimization, with one optimizer for matrices and torch's AdamW for the rest, if `two`."""

    def __init__(self, tell, accumulation=1, method="newton-momo", *, clip=None, way="plain", two=False):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.make = Network(way), METHODS[method]
        self.tell, self.accumulation, self.clip, self.two = tell, accumulation, clip, two
        self.losses = []

    def configure_optimizers(self):
        if not self.two:
            return self.make(self.net)
        other = torch.optim.AdamW(self.net.last.parameters(), lr=0.01)
        return [self.make(nn.ModuleList([self.net.first, self.net.middle])), other]

    def training_step(self, batch, index):
        every = self.optimizers() if self.two else [self.optimizers()]
        count = self.trainer.num_training_batches
        last = (index + 1) % self.accumulation == 0 or index + 1 == count
        window = min(self.accumulation, count - index // self.accumulation * self.accumulation)
        loss = loss_of(self.net, batch)
        if self.tell == "recorded":
            every[0].record_loss(loss, weight=1 / window)
        self.losses.append(loss.item() / window)
        self.manual_backward(loss / window)
        if last:
            mean, self.losses = math.fsum(self.losses), []
            if self.clip is not None:
                self.clip_gradients(every[0], gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            every[0].step(**({"loss": mean} if self.tell == "passed" else {}))
            for optimizer in every[1:]:
                optimizer.step()
            for optimizer in every:
                optimizer.zero_grad()


@pytest.mark.parametrize("tell", ["passed", "recorded"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_manual_optimization_passes_or_records_a_scaled_loss(tmp_path, accumulation, tell):
    found = fit(Manual(tell, accumulation), tmp_path, pl.Callback(), plugins=[Scaled()])
    assert_alike(found, reference(cut=windows(batches(), accumulation)))


@CLIPPED
@pytest.mark.parametrize("way", ["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("tell", ["passed", "recorded"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_manual_optimization_passes_or_records_the_loss(tmp_path, accumulation, tell, clip, way):
    found = fit(Manual(tell, accumulation, clip=clip, way=way), tmp_path, pl.Callback())
    assert_alike(found, reference(cut=windows(batches(), accumulation), clip=clip))


@pytest.mark.parametrize("tell", ["passed", "recorded"])
def test_manual_optimization_with_another_librarys_optimizer_beside(tmp_path, tell):
    module = Manual(tell, 3, "muonmax-momo", two=True)
    trainer = trainer_of(tmp_path)
    with Watched() as watched:
        trainer.fit(module, DataLoader(batches(), batch_size=None))
    net = Network()
    ours = METHODS["muonmax-momo"](nn.ModuleList([net.first, net.middle]))
    other = torch.optim.AdamW(net.last.parameters(), lr=0.01)
    means = []
    for window in windows(batches(), 3):
        mean = sum(loss_of(net, batch) * weight for batch, weight in window)
        mean.backward()
        ours.step(loss=mean)
        other.step()
        net.zero_grad()
        means.append(mean.item())
    assert watched.losses == pytest.approx(means, rel=1e-6)
    for a, b in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_manual_optimization_without_a_loss_or_with_the_callback_says_what_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"Momo needs the loss"):
        fit(Manual("nothing"), tmp_path, pl.Callback())
    with pytest.raises(ValueError, match=r"RecordLoss is for automatic .* but Manual\.automatic_optimization is False"):
        fit(Manual("passed"), tmp_path)


def test_roles_of_a_lightning_module_are_those_of_its_network():
    module = Module()
    inner, outer = (steepest.Muon(each).plan.rows for each in (module.net, module))
    assert [(f"net.{row.name}", row.role) for row in inner] == [(row.name, row.role) for row in outer]


def test_learning_rate_monitor_names_groups_after_their_roles(tmp_path):
    seen = {}

    class Logger(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            seen.update(metrics)

    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    fit(Module("muon"), tmp_path, monitor, logger=Logger(tmp_path))
    rates = {name: number for name, number in seen.items() if name.startswith("lr-") and name.count("-") == 1}
    assert rates == pytest.approx({"lr-Muon/matrix": 0.1, "lr-Muon/head": 0.01, "lr-Muon/vector": 0.01})
    assert seen["lr-Muon/matrix-momentum"] == 0.95


class Stateful(DataLoader):
    """A loader that goes on where it was, which Lightning asks for to resume within an epoch."""

    def __init__(self, data):
        super().__init__(data, batch_size=None)
        self.done = 0

    def __iter__(self):
        start, self.done = self.done % len(self.dataset), self.done % len(self.dataset)
        for batch in self.dataset[start:]:
            self.done += 1
            yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def exact_steps(folder, make, *callbacks, **options):
    """At which steps a training of two epochs was stopped and gone on with, to the same bits.

    Args:
        folder: For checkpoints.
        make: A new module.
    """

    def run(resumed=None):
        module, rank = make(), int(os.environ.get("RANK", "0")) if "strategy" in options else 0
        saving = ModelCheckpoint(f"{folder}/saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = trainer_of(folder, saving, *callbacks, enable_checkpointing=True, max_epochs=2, **options)
        data = batches(14, dtype=torch.float32)[rank::2]
        trainer.fit(module, Stateful(data), ckpt_path=resumed, weights_only=True)
        return list(module.parameters())

    whole = run()
    resumed = {step: run(f"{folder}/saved/step={step}.ckpt") for step in (2, 3, 4)}
    return [step for step, found in resumed.items() if all(map(torch.equal, found, whole))]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("method", ["muon", "newton", "muonmax-momo", "newton-momo"])
def test_a_checkpoint_in_the_middle_of_an_epoch_resumes_exactly(tmp_path, method, accumulation):
    def make():
        return Module(method, dtype=torch.float32)

    assert exact_steps(tmp_path, make, RecordLoss(), accumulate_grad_batches=accumulation) == [2, 3, 4]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_manual_optimization_resumes_exactly(tmp_path):
    assert exact_steps(tmp_path, lambda: Manual("recorded").float()) == [2, 3, 4]


def resumed_on_ranks(folder, route):
    options = ranks_options()
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    make = METHODS["newton-momo"]

    def module():
        made = Module(make, dtype=torch.float32)
        made.make = (lambda net: make(made.trainer.strategy.model)) if route == "wrapped" else make
        return made

    return exact_steps(folder, module, RecordLoss(), accumulate_grad_batches=3, **options)


@pytest.mark.parametrize("route", ["bare", "wrapped"])
def test_two_ranks_resume_exactly(tmp_path, pair, route):
    assert pair.run(resumed_on_ranks, str(tmp_path), route) == [[2, 3, 4]] * 2


class Validated(Module):
    """Validates in the middle of an epoch."""

    def validation_step(self, batch, index):
        self.log("mean", self.net.middle.weight.mean())


def test_averaged_weights_that_are_swapped_in_and_back_do_not_disturb_momo(tmp_path):
    """Averages differ from the weights, and validation uses them: weights come back with the values that they had."""
    found = {}
    for name, callbacks in {"plain": [], "averaged": [EMAWeightAveraging(decay=0.5)]}.items():
        module = Validated("muonmax-momo")
        trainer = trainer_of(tmp_path, RecordLoss(), *callbacks, val_check_interval=1, num_sanity_val_steps=0)
        loaders = [DataLoader(batches(count), batch_size=None) for count in (7, 1)]
        with Watched() as watched:
            trainer.fit(module, *loaders)
        found[name] = watched, trainer.callback_metrics["mean"], module.net.middle.weight.mean()
    assert found["plain"][0].losses == found["averaged"][0].losses
    for one, other in zip(found["plain"][0].weights, found["averaged"][0].weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert found["plain"][1] != found["averaged"][1]  # validation saw others
    assert found["plain"][2] != found["averaged"][2]  # which the training ends with


def swa(rates):
    return StochasticWeightAveraging(swa_lrs=rates, swa_epoch_start=1, annealing_epochs=2)


def test_stochastic_weight_averaging_with_one_rate_says_that_the_ratio_of_roles_is_lost(tmp_path):
    with pytest.warns(UserWarning, match="swa_lr"):
        fit(Module("muon"), tmp_path, swa(0.05), max_epochs=4)


def test_stochastic_weight_averaging_with_a_rate_for_each_group_trains_with_momo(tmp_path):
    trainer = trainer_of(tmp_path, RecordLoss(), swa([0.5, 0.05, 0.05]), max_epochs=4)
    module = Module()
    with Watched() as watched:
        trainer.fit(module, DataLoader(batches(), batch_size=None))
    assert [group["lr"] for group in watched.optimizer.param_groups] == [0.5, 0.05, 0.05]
    assert len(watched.losses) == 28


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR"])
def test_schedulers_with_one_rate_for_all_groups_say_that_the_ratio_of_roles_is_lost(tmp_path, kind):
    options = {
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 7},
        "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    }

    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, **options[kind])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    with pytest.warns(UserWarning, match=r"max_lr=\["):
        fit(Scheduled("muon"), tmp_path)
