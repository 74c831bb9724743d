import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.disk.fields import RecordError
from steepest.lab.methods import LATER, options_of
from steepest.lab.methods.tuned import TUNED, Tuning
from steepest.lab.runs.config import RunConfig, configure, names_of, run_hash
from steepest.lab.runs.version import code_version
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import DataIdentity
from tests.cases import cases

PATH = Path("runs/config.json")
SHA = "ab" * 32
CONFIG = RunConfig(
    task="text",
    preset="demo",
    method="muon",
    options={"lr": 0.02, "nesterov": True},
    seed=3,
    steps=150,
    batch_size=16,
    eval_every=10,
    tuning=Tuning(trials=6, source="docs/results/tuning.json", edge=False),
    code="0.1.0+0123456789ab",
    data=DataIdentity("python-stdlib 3.11.7", SHA, 123),
)
texts = st.text(min_size=1, max_size=8)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
numbers = st.floats(allow_nan=False, allow_infinity=False)
configs = st.builds(
    RunConfig,
    task=texts,
    preset=texts,
    method=texts,
    options=st.dictionaries(texts, numbers | st.booleans() | texts | st.integers(-9, 9), max_size=3),
    seed=st.integers(0, 2**62),
    steps=st.integers(1, 2**62),
    batch_size=st.integers(1, 99),
    eval_every=st.integers(1, 99),
    tuning=st.none() | st.builds(Tuning, st.none() | st.integers(0, 99), st.none() | texts, st.booleans()),
    code=texts,
    data=st.builds(DataIdentity, texts, digests, st.integers(0, 99)),
    schedule=st.sampled_from(["cooldown", "constant", "late-cooldown"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    target=st.none() | numbers,
    watch_from=st.none() | numbers,
    part=st.sampled_from(["tuning", "report"]),
)


@pytest.mark.slow
@given(configs)
def test_a_config_survives_its_file(config):
    again = RunConfig.from_json(config.to_json(), path=PATH)
    assert again == config
    assert run_hash(again) == run_hash(config)


def test_the_hash_is_the_same_on_every_machine_and_day():
    assert names_of(CONFIG) == (run_hash(CONFIG), "9542f64c4fd31aad")
    assert run_hash(CONFIG) == "0721cae7e0a6db94"
    reordered = dataclasses.replace(CONFIG, options={"nesterov": True, "lr": 0.02})
    assert run_hash(reordered) == run_hash(CONFIG)


CHANGES = [
    {"task": "digits"},
    {"preset": "tiny"},
    {"method": "adamw"},
    {"options": {"lr": 0.03, "nesterov": True}},
    {"options": {"lr": 0.02}},
    {"seed": 4},
    {"steps": 151},
    {"batch_size": 17},
    {"eval_every": 11},
    {"code": "0.1.0+0123456789ac"},
    {"data": DataIdentity("python-stdlib 3.11.7", "ac" * 32, 123)},
    {"schedule": "constant"},
    {"tail": 0.3},
    {"tail_parts": 2.0},
    {"tail_mix": 0.6},
    {"outer": 0.5},
    {"target": 2.0},
    {"part": "tuning"},
    {"watch_from": 2.0},
    {"precision": "bf16"},
]


@cases("change", CHANGES)
def test_the_hash_sees_every_change(change):
    assert run_hash(dataclasses.replace(CONFIG, **change)) != run_hash(CONFIG)


def test_every_field_is_tested_for_the_hash():
    assert {key for change in CHANGES for key in change} == {f.name for f in dataclasses.fields(RunConfig)} - {"tuning"}


@pytest.mark.parametrize("tuning", [None, Tuning(trials=6, source="results/tuning.json", edge=False)])
def test_a_run_keeps_its_name_when_the_record_of_its_tuning_moves(tuning):
    moved = dataclasses.replace(CONFIG, tuning=tuning)
    assert run_hash(moved) == run_hash(CONFIG)
    assert (names_of(moved)[1] == run_hash(CONFIG)) == (tuning is None)  # by which older records call it


def test_moving_the_data_changes_no_hash():
    moved = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, name="elsewhere"))
    assert run_hash(moved) == run_hash(CONFIG)


@cases(
    "change, message",
    [
        ({"lr": 1}, r"lr must be absent. Unknown key 'lr'"),
        ({"seeed": 1}, r"seeed must be absent. Unknown key 'seeed': did you mean 'seed'"),
        ({"format": 2}, "format must be 1, got 2"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": "150"}, "steps must be a whole number"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"task": ""}, "task must be a non-empty string"),
        ({"options": {"lr": None}}, "options.lr must be true or false, a finite number or a string, got None"),
        ({"options": [1]}, "options must be an object"),
        ({"tuning": {"trials": 1, "source": None, "edge": 1}}, "tuning.edge must be true or false"),
        ({"tuning": {"trials": 1, "source": None, "who": 1}}, "tuning.who must be absent"),
        ({"data": {"name": "x", "sha256": "y", "bytes": 1}}, "data.sha256 must be 64 hexadecimal digits, got 'y'"),
        ({"data": {"name": "x", "sha256": SHA}}, "data.bytes is missing"),
        ({"data": {"name": "x", "sha256": SHA, "bytes": 1, "url": "z"}}, "data.url must be absent"),
        ({"tail": 1.5}, "tail must be between 0 and 1, a part of the run, got 1.5"),
        ({"outer": -0.5}, "outer must be finite and at least 0, got -0.5"),
        ({"tail_parts": 0.0}, "tail_parts must be finite and above 0, and tail_mix in"),
        ({"tail_mix": 1.5}, "tail_parts must be finite and above 0, and tail_mix in"),
        ({"schedule": "cosine"}, "schedule must be 'constant', 'cooldown', .* or 'warmup-long-cooldown', got 'cosine'"),
        ({"precision": "fp16"}, "precision must be 'bf16' or 'fp32', got 'fp16'"),
        ({"target": "low"}, "target must be a finite number or null, got .low."),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_key(change, message):
    content = {**json.loads(CONFIG.to_json()), **change}
    with pytest.raises(RecordError, match=rf"^runs/config.json: .*{message}.*Delete the run's directory"):
        RunConfig.from_json(json.dumps(content), path=PATH)


@pytest.mark.parametrize(("name", "least"), [("seed", 0), ("steps", 1), ("batch_size", 1), ("eval_every", 1)])
def test_a_number_out_of_range_is_refused(name, least):
    for value in (least - 1, 2**63):  # no file may hold what its own reader refuses
        with pytest.raises(ValueError, match=rf"{name} must be .* at least {least} and below 2\^63, got {value}\."):
            dataclasses.replace(CONFIG, **{name: value})


@cases("method", LATER)
def test_a_config_from_before_an_option_means_what_it_did(method):
    own = options_of(method)
    assert LATER[method].items() <= own.items()
    config = dataclasses.replace(CONFIG, method=method, options=own)
    content = json.loads(config.to_json())
    content["options"] = {name: value for name, value in own.items() if name not in LATER[method]}
    before = RunConfig.from_json(json.dumps(content), path=PATH)
    assert before.counted_options == config.counted_options == before.options
    assert run_hash(before) == run_hash(dataclasses.replace(config, options=content["options"]))
    for name, value in LATER[method].items():
        changed = dataclasses.replace(config, options={**own, name: "other" if isinstance(value, str) else 2.0})
        assert run_hash(changed) != run_hash(config)


def test_a_config_from_before_schedules_and_targets_means_what_it_did():
    content = json.loads(CONFIG.to_json())
    for key in ("schedule", "target", "watch_from"):
        del content[key]
    assert RunConfig.from_json(json.dumps(content), path=PATH) == CONFIG


def test_an_unknown_schedule_and_a_target_without_bound_are_refused():
    with pytest.raises(ValueError, match="Unknown schedule 'cooldwn': did you mean 'cooldown'"):
        dataclasses.replace(CONFIG, schedule="cooldwn")
    for name in ("target", "watch_from"):
        with pytest.raises(ValueError, match=f"{name} must be a finite loss or None, got nan"):
            dataclasses.replace(CONFIG, **{name: float("nan")})


def test_what_is_not_given_comes_from_the_preset():
    task = make_task("digits")
    config = configure(task, method="sgd", seed=1, options={"lr": 0.5}, steps=7)
    assert (config.task, config.preset, config.seed, config.steps) == ("digits", "demo", 1, 7)
    assert (config.batch_size, config.eval_every) == (task.budget.batch_size, task.budget.eval_every)
    assert config.options == {**options_of("sgd"), "lr": 0.5}
    assert config.data == task.data_identity()
    assert config.code == code_version()


@pytest.mark.slow
def test_the_tuning_record_holds_for_the_length_batch_and_data_of_the_search_only(tmp_path):
    task = make_task("text")
    record = TUNED["text", "demo"]["muon"].tuning
    steps, batch_size = task.budget.steps, task.budget.batch_size
    same = {"steps": steps, "batch_size": batch_size, "eval_every": 1}
    assert record is not None
    assert configure(task, method="muon", seed=0).tuning == record
    assert configure(task, method="muon", seed=0, **same).tuning == record
    assert configure(task, method="muon", seed=0, steps=steps + 1).tuning is None
    assert configure(task, method="muon", seed=0, batch_size=batch_size + 1).tuning is None
    (tmp_path / "mine").write_bytes(bytes(99_999))
    mine = configure(make_task("text", data=tmp_path / "mine"), method="muon", seed=0)
    assert mine.tuning is None
    assert mine.options == configure(task, method="muon", seed=0).options
