"""The runs of the papers: their presets, held to the papers' numbers; and a rehearsal of each, on real ranks."""

import copy
import dataclasses
import math
import os
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from steepest.lab.methods import build_optimizer, resolve
from steepest.lab.models.gpt import GPT
from steepest.lab.runs.config import configure
from steepest.lab.runs.crew import Crew
from steepest.lab.runs.schedule import rate_factor
from steepest.lab.runs.train import Training, train_run
from steepest.lab.studies.sweep.plan import rates_by_method
from steepest.lab.tasks import TASKS, cifar10, cifar100, fineweb, make_task
from steepest.lab.tasks.order import seeded
from tests.cases import cases
from tests.lab.runs.test_crew import WORLD, ranks, rows, same_but_for_rounding
from tests.lab.tasks.fake_data import write_cifar10, write_cifar100, write_fineweb
from tests.processes import join_ranks, leave_ranks

# Parameters, tokens of a step, steps, tokens of a run. Sources: arXiv:2604.01472 (124M with 6,200 steps of 524,288
# tokens, 3.25 billion; about 275M with 1,695 of 8 x 49,152, about 0.67 billion), whose parameters are counted in its
# scripts: 50,257 x 768 in the tied table, 12 blocks of 12 x 768² without biases or gains; for the larger one five
# tables of 50,304 x 768, 11 x 4 x 768² in attention and 12 x 8 x 768² in MLPs, and six mixtures of two numbers.
# arXiv:2510.09827: GPT-2 of 124,439,808 parameters, batches of 2^19 tokens, one epoch of 10^9.
LANGUAGE = {
    "gpt2-short": (123_532_032, 524_288, 6200, 3.25e9),
    "gpt2-medium": (275_742_732, 393_216, 1695, 6.67e8),
    "gpt2-fineweb1b": (124_439_808, 524_288, 1907, 1.00e9),
}
# ResNet-18 for CIFAR has 11,173,962 parameters with ten classes, VGG16-bn for CIFAR 34,015,396 with a hundred (three
# hidden and output layers, biases): the networks of arXiv:2507.01598's scripts and of those that they cite.
IMAGES = {"resnet18": (cifar10, 11_173_962), "vgg16": (cifar100, 34_015_396)}


@cases("preset", LANGUAGE)
def test_models_and_lengths_of_language_are_those_of_the_papers(preset):
    parameters, tokens, steps, total = LANGUAGE[preset]
    size = fineweb.PRESETS[preset]
    with torch.device("meta"):
        model = GPT(size.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert size.window == 1024
    assert size.budget.batch_size * size.window == tokens
    assert size.budget.steps == steps
    assert steps * tokens == pytest.approx(total, rel=2e-3)
    assert (size.model.layers, size.model.width) == (12, 768)
    assert size.model.head_size == 768 // (6 if preset == "gpt2-medium" else 12)
    assert size.budget.precision == "bf16"


@cases("preset", IMAGES)
def test_networks_of_images_are_those_of_the_papers(preset):
    module, parameters = IMAGES[preset]
    with torch.device("meta"):
        model = module.PRESETS[preset].network(classes=module.KIND.classes, in_channels=3)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# Of steps at batch size b: floor(100 * 512 / b) epochs of floor(50,000 / b) steps, as the scripts have it with
# BASE_EPOCHS=100, BASE_BS_PER_GPU=512 and drop_last.
LENGTHS = {2: 25_600 * 25_000, 512: 100 * 97, 2048: 25 * 24, 4096: 12 * 12}


def test_runs_of_images_have_the_papers_batch_sizes_lengths_and_rates():
    assert tuple(2**n for n in range(1, 13)) == cifar10.BATCHES
    assert cifar10.BATCHES[:-1] == cifar100.BATCHES
    for module, preset in ((cifar10, "resnet18"), (cifar100, "vgg16")):
        budget = module.PRESETS[preset].budget
        assert (budget.steps, budget.batch_size, budget.schedule, budget.precision) == (9700, 512, "constant", "fp32")
        assert {b: budget.at_batch_size(b)[0] for b in LENGTHS} == LENGTHS
        assert budget.at_batch_size(512) == (9700, 97)


def test_at_another_batch_size_rates_go_with_its_root_unless_they_are_given(tmp_path):
    task = make_task("cifar10", "resnet18", data=write_cifar10(tmp_path / "cifar"))
    usual = configure(task, method="muon", seed=0)
    assert (usual.steps, usual.options["lr"], usual.options["other_lr"]) == (9700, 0.005, 0.001)
    larger = configure(task, method="muon", seed=0, batch_size=2048)
    assert (larger.steps, larger.eval_every) == (600, 24)
    assert (larger.options["lr"], larger.options["other_lr"]) == pytest.approx((0.01, 0.002))
    given = configure(task, method="muon", seed=0, batch_size=2048, steps=3, options={"lr": 0.3})
    assert (given.steps, given.options["lr"], given.options["other_lr"]) == (3, 0.3, pytest.approx(0.002))
    demo = configure(make_task("digits"), method="muon", seed=0, batch_size=256)
    assert demo.options == configure(make_task("digits"), method="muon", seed=0).options


# Steps of a matrix of m x n in units of its polar factor, at the first step: train_newton_muon_1.py takes 0.1 times the
# rate of the tied table times sqrt(max(m, n)), with 0.0040 for Newton-Muon and 0.0036 for Muon; its AdamW has 0.16
# times 0.0036. The larger model's scale is that of the shape as stored, 768 x 3072 for both maps of the MLP: 1.
@cases(
    "preset, method, shape, step, other, table",
    [
        ("gpt2-short", "newton-muon", (768, 768), 0.1 * 0.0040 * 768**0.5, 0.0040, 0.0040),
        ("gpt2-short", "newton-muon", (3072, 768), 0.1 * 0.0040 * 3072**0.5, 0.0040, 0.0040),
        ("gpt2-short", "muon", (768, 3072), 0.1 * 0.0036 * 3072**0.5, 0.0036, 0.0036),
        ("gpt2-short", "adamw", (768, 3072), 0.16 * 0.0036, 0.0036, 0.0036),
        ("gpt2-medium", "muon", (3072, 768), 0.05, 0.008, 75 * 0.008),
        ("gpt2-medium", "newton-muon", (768, 3072), 0.05, 0.008, 75 * 0.008),
        ("gpt2-fineweb1b", "muonadam", (3072, 768), 16e-3, 1e-3, 1e-3),  # s = 16 in constrained descent
        ("gpt2-fineweb1b", "scion-momo", (768, 768), 4e-3, 1e-3, 1e-3),
        ("gpt2-fineweb1b", "muonmax-momo", (768, 768), 4**2 * 1e-3, 1e-3, 1e-3),  # its square in regularised descent
        ("gpt2-fineweb1b", "polargrad", (768, 768), 64**2 * 1e-3, 1e-3, 1e-3),
    ],
)
def test_rates_are_those_of_the_papers(preset, method, shape, step, other, table):
    options = resolve(method, task="fineweb", preset=preset, options={}).options
    scale = {"match_rms_adamw": 0.2 * max(shape) ** 0.5, "original": max(1, shape[0] / shape[1]) ** 0.5}
    assert options["lr"] * scale.get(options.get("scale", "none"), 1.0) == pytest.approx(step)
    assert options["other_lr"] == other
    assert (options.get("table_lr") or other) == table
    assert options.get("momentum", options.get("beta1")) == (0.9 if method == "adamw" else 0.95)
    if method.endswith("-momo"):
        assert options["lower_bound"] == 3.2
    if method == "newton-muon":
        short = preset == "gpt2-short"
        assert (options["preset"], options["every"]) == (("paper_record4", 32) if short else ("paper_record28", 16))


@cases("preset", ["gpt2-short-rehearsal", "gpt2-medium-rehearsal"])
@cases("method", ["muon", "newton-muon", "adamw"])
def test_groups_of_the_optimizer_have_these_rates(preset, method):
    if (preset, method) == ("gpt2-medium-rehearsal", "adamw"):
        return  # the paper's rates for it are not among the presets
    with seeded("model", 0):
        model = GPT(fineweb.PRESETS[preset].model)
    options = resolve(method, task="fineweb", preset=preset, options={}).options
    optimizer = build_optimizer(method, model, options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    for name, rate in rates.items():
        inside = name.startswith("blocks") and name.endswith("weight")
        table = "embedding" in name or "table" in name
        expected = options["lr"] if inside else (options["table_lr"] or options["other_lr"]) if table else None
        assert rate == (options["other_lr"] if expected is None else expected), name


def test_the_grid_of_the_page_is_the_papers():
    text = (Path(__file__).parents[3] / "docs" / "tracks.md").read_text()
    found = re.findall(r"--lrs ((\S+)=\S+)", text)
    s = {"muonadam-momo": 16, "scion-momo": 4, "muonmax-momo": 4**2, "polargrad-momo": 64**2}
    assert {method for _, method in found} == s.keys()
    grids = rates_by_method([words for words, _ in found], tuple(s))
    for method, rates in grids.items():
        options = resolve(method, task="fineweb", preset="gpt2-fineweb1b", options={}).options
        ratio = float(options["other_lr"]) / float(options["lr"])  # which a sweep keeps
        assert [rate * ratio for rate in rates] == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
        assert ratio == pytest.approx(1 / s[method])


def test_the_lengths_of_the_page_are_those_of_the_preset():
    text = (Path(__file__).parents[3] / "docs" / "tracks.md").read_text()
    sizes, steps = (re.search(rf"^\| {word} \|(.*)\|$", text, re.MULTILINE)[1].split("|") for word in ("b", "steps"))
    lengths = cifar10.PRESETS["resnet18"].budget.at_batch_size
    assert tuple(int(size.replace(",", "")) for size in sizes) == cifar10.BATCHES
    assert [int(count.replace(",", "")) for count in steps] == [lengths(b)[0] for b in cifar10.BATCHES]


def test_only_the_stem_and_the_head_of_images_are_with_adamw(tmp_path):
    task = make_task("cifar10", "resnet18-rehearsal", data=write_cifar10(tmp_path / "cifar"))
    options = resolve("muon", task="cifar10", preset=task.preset, options={}).options
    plan = build_optimizer("muon", task.build_model(0), options).plan
    others = {row.name for row in plan if row.role != "matrix" and len(row.shape) > 1}
    assert others == {"stem.weight", "head.weight"}
    assert len(list(plan.parameters("matrix"))) == 16 + 3  # two in each of eight blocks, and three shortcuts
    task = make_task("cifar100", "vgg16-rehearsal", data=write_cifar100(tmp_path / "cifar100"))
    options = resolve("muon", task="cifar100", preset=task.preset, options={}).options
    plan = build_optimizer("muon", task.build_model(0), options).plan
    assert all(row.name.startswith("features") for row in plan if row.role == "matrix")
    assert len(list(plan.parameters("matrix"))) == 5


def test_the_first_steps_of_a_polynomial_are_had_by_their_number():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    moved = {}
    for name in ("jordan", "jordan:5", "jordan:3"):
        twin = copy.deepcopy(model)
        optimizer = build_optimizer("muon", twin, {"coefficients": name, "lr": 1.0, "scale": "none"})
        twin(torch.eye(4)).square().sum().backward()
        optimizer.step()
        moved[name] = (model[0].weight - twin[0].weight).detach()
    assert torch.equal(moved["jordan"], moved["jordan:5"])
    gradient = torch.linalg.svdvals(momentum_of(model))
    images = gradient / gradient.norm()
    for _ in range(3):
        images = 3.4445 * images - 4.7750 * images**3 + 2.0315 * images**5
    torch.testing.assert_close(
        torch.linalg.svdvals(moved["jordan:3"]), images.sort(descending=True).values, rtol=1e-3, atol=1e-4
    )
    for wrong in ("jordan:0", "jordan:6", "jordan:x", "nobody:2"):
        with pytest.raises(ValueError, match=rf"'coefficients' takes a name, or NAME:N .*got '{wrong}'"):
            build_optimizer("muon", model, {"coefficients": wrong})


def momentum_of(model):
    """Nesterov's average after one step is the gradient."""
    twin = copy.deepcopy(model)
    twin(torch.eye(4)).square().sum().backward()
    return twin[0].weight.grad


# --- rehearsals

REHEARSED = {
    "gpt2-short-rehearsal": ("fineweb", "newton-muon", "ddp"),
    "gpt2-medium-rehearsal": ("fineweb", "newton-muon", "fsdp"),
    "gpt2-fineweb1b-rehearsal": ("fineweb", "muonmax-momo", "ddp"),
    "resnet18-rehearsal": ("cifar10", "muon", "ddp"),
    "vgg16-rehearsal": ("cifar100", "muon", "ddp"),
}
KILLED_AT, SAVED_EVERY = 5, 3


class Killed(BaseException):
    """Ends a run at once, with nothing saved."""


def kill_at(step, *, really):
    calls = iter(range(1, 1000))

    def stop():
        if next(calls) == step:
            if really:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed
        return False

    return stop


def rehearse(folder, preset, out, *, crew=None, stop=None):
    task, method, _ = REHEARSED[preset]
    made = make_task(task, preset, data=folder / task)
    config = configure(made, method=method, seed=1)
    if crew is not None:
        crew = crew.dividing(config.batch_size, most=made.budget.micro_batch)
    return train_run(config, out / preset, data=folder / task, checkpoint_every=SAVED_EVERY, crew=crew, stop=stop)


def rank_main(rank, folder, presets, first):
    join_ranks(rank, WORLD, folder)
    warnings.simplefilter("error")
    for preset in presets:
        crew = Crew(REHEARSED[preset][2], rank=rank, size=WORLD)
        if not first:
            rehearse(folder, preset, folder / "ranks", crew=crew)
            continue
        last = preset == presets[-1]
        with pytest.raises(Killed):
            rehearse(folder, preset, folder / "ranks", crew=crew, stop=kill_at(KILLED_AT, really=last))
    leave_ranks()


def test_every_track_has_a_rehearsal_and_every_rehearsal_is_rehearsed():
    tracks = {track for one in TASKS.values() for track in one.tracks}
    real = {track for track in tracks if not track.endswith("-rehearsal")}
    assert tracks == real | {f"{track}-rehearsal" for track in real}
    assert set(REHEARSED) == tracks - real


@ranks
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-short", "gpt2-medium", "gpt2-fineweb1b", "images"])
def test_rehearsals_that_are_killed_on_two_ranks_end_with_the_losses_of_one_process(tmp_path, subtests, name):
    images = ["resnet18-rehearsal", "vgg16-rehearsal"]
    presets = images if name == "images" else [f"{name}-rehearsal"]
    write_fineweb(tmp_path / "fineweb")
    write_cifar10(tmp_path / "cifar10", images=40)
    write_cifar100(tmp_path / "cifar100", images=200)
    for preset in presets:
        rehearse(tmp_path, preset, tmp_path / "alone")
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.spawn(rank_main, args=(tmp_path, presets, True), nprocs=WORLD)
    assert {rows(tmp_path / "ranks" / preset)[-1]["step"] for preset in presets} == {KILLED_AT}
    (tmp_path / "init").unlink()  # in which the first ranks met
    mp.spawn(rank_main, args=(tmp_path, presets, False), nprocs=WORLD)
    for preset in presets:
        with subtests.test(preset=preset):
            same_but_for_rounding(tmp_path / "ranks" / preset, tmp_path / "alone" / preset)
            losses = [row["loss"] for row in rows(tmp_path / "alone" / preset) if row["kind"] == "train"]
            assert len(losses) == (6 if name == "images" else 8)
            assert all(map(math.isfinite, losses))
            assert len(set(losses)) == len(losses)


def test_a_rehearsal_has_the_parts_and_the_schedule_of_its_track():
    sizes = {"layers", "width", "head_size", "context", "value_tables", "without_attention", "attention_gain"}
    for track in LANGUAGE:
        real, rehearsed = (fineweb.PRESETS[name] for name in (track, f"{track}-rehearsal"))
        assert rehearsed.budget.schedule == real.budget.schedule
        assert rate_factor(7, steps=8, schedule=rehearsed.budget.schedule) < 0.5
        for field in dataclasses.fields(real.model):
            mine, its = getattr(rehearsed.model, field.name), getattr(real.model, field.name)
            assert bool(mine) == bool(its)
            assert field.name in sizes or mine == its


def test_under_autocast_forward_passes_round_and_weights_do_not(tmp_path):
    data = write_fineweb(tmp_path / "fineweb")
    task = make_task("fineweb", "gpt2-short-rehearsal", data=data)
    seen = {}
    for precision in ("fp32", "bf16"):
        config = configure(task, method="newton-muon", seed=1, steps=3, precision=precision)
        training = Training(config, task, Crew(accumulate=2))
        recorder = Losses()
        kinds = set()
        up = training.module.blocks[0].mlp.up
        up.register_forward_hook(lambda module, inputs, out, seen=kinds: seen.add(out.dtype))
        for _ in range(3):
            training.train_step(recorder)
        assert kinds == {torch.float32 if precision == "fp32" else torch.bfloat16}
        state = training.optimizer.state_dict()["state"]
        kept = [value for entries in state.values() for value in entries.values() if isinstance(value, torch.Tensor)]
        for tensor in (*training.module.parameters(), *kept):
            assert tensor.dtype != torch.bfloat16
        kinds.clear()
        training.evaluate(recorder)
        assert kinds == {torch.float32}
        seen[precision] = recorder.losses
    assert seen["bf16"] != seen["fp32"]
    assert seen["bf16"] == pytest.approx(seen["fp32"], rel=1e-3)  # a relative step of bfloat16 is 2^-8


class Losses:
    """Stands for a recorder."""

    def __init__(self):
        self.losses = []

    def train(self, *, loss, **_):
        self.losses.append(loss)

    def evaluation(self, evaluation, **_):
        self.losses.append(evaluation.loss)
