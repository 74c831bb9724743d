"""Studies made up for tests: directories as a race writes them, with curves whose every constant is known."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steepest.lab.methods.tuned import Tuning
from steepest.lab.runs.config import RunConfig, run_hash
from steepest.lab.runs.version import code_version
from steepest.lab.studies.records import Recorded
from steepest.lab.tasks.task import DataIdentity

SHA = hashlib.sha256(b"data").hexdigest()
STEPS, EVERY, TOKENS = 150, 10, 2048
UNTRAINED = 5.5  # loss of the model that a sweep starts from


@dataclass(frozen=True)
class Pace:
    """A method that ends at loss `end`, reaching it as if `speed` times as many steps had been taken.

    loss(t) = end + drop * log(STEPS / max(1, speed * t)), plus a shift of each seed that all methods share, plus one
    of its own. So a method of twice the speed ends lower by drop * log(2), and needs half the steps.
    """

    speed: float = 1.0
    noise: float = 0.004
    options: Mapping[str, Any] = field(default_factory=lambda: {"lr": 0.02})
    trials: int | None = 6
    edge: bool = False
    optimizer_s: float = 0.012
    forward_backward_s: float = 0.12
    end: float = 1.73
    drop: float = 0.25
    diverges: Mapping[int, int] = field(default_factory=dict)  # seed: step
    stops: Mapping[int, int] = field(default_factory=dict)  # seed: last step of an unfinished run
    absent: Sequence[int] = ()
    data_sha256: str = SHA
    code: str = code_version()
    accuracy: float | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    start: float | None = None  # loss before the first step, if not the formula's
    blocks: float | None = 0.0  # spread of its own over the blocks of what is evaluated; None: an older record


def loss_at(pace: Pace, step: int, shift: float) -> float:
    if step == 0 and pace.start is not None:
        return pace.start
    return pace.end + shift + pace.drop * math.log(STEPS / max(1.0, pace.speed * step))


def write_study(
    study_dir: Path, paces: Mapping[str, Pace], *, seeds: Sequence[int] = (0, 1, 2), **changes: Any
) -> Path:
    """Write a study of these methods, the first being the baseline; `changes` overwrite keys of study.json."""
    configs = [_config(method, pace, seed) for method, pace in paces.items() for seed in seeds]
    runs = {run_hash(config): config for config in configs}
    study = {
        "format": 1,
        "kind": "race",
        "task": "text",
        "preset": "demo",
        "methods": list(paces),
        "baseline": next(iter(paces)),
        "seeds": list(seeds),
        "runs": {name: {"method": config.method, "seed": config.seed} for name, config in runs.items()},
        "command": f"steepest race --methods {','.join(paces)} --seeds {len(seeds)} --task text --out out/race",
        "created": "2025-01-31T12:00:00+00:00",
    }
    study_dir.mkdir(parents=True, exist_ok=True)
    (study_dir / "study.json").write_text(json.dumps(study | changes))
    for name, config in runs.items():
        if config.seed not in paces[config.method].absent:
            _write_run(study_dir / "runs" / name, config, paces[config.method])
    return study_dir


def run_dir(study_dir: Path, method: str, seed: int) -> Path:
    runs = json.loads((study_dir / "study.json").read_text())["runs"]
    return study_dir / "runs" / next(n for n, run in runs.items() if run == {"method": method, "seed": seed})


def change_options(study_dir: Path, method: str, seed: int, options: Mapping[str, Any]) -> None:
    """Make one run another one, under the name that it then has."""
    run = run_dir(study_dir, method, seed)
    config = RunConfig.from_json((run / "config.json").read_text(), path=run / "config.json")
    changed = replace(config, options=options)
    (run / "config.json").write_text(changed.to_json())
    run.rename(run.with_name(run_hash(changed)))
    path = study_dir / "study.json"
    path.write_text(path.read_text().replace(run.name, run_hash(changed)))


def _config(method: str, pace: Pace, seed: int) -> RunConfig:
    return RunConfig(
        task="text",
        preset="demo",
        method=method,
        options=dict(pace.options),
        seed=seed,
        steps=STEPS,
        batch_size=16,
        eval_every=EVERY,
        tuning=None if pace.trials is None else Tuning(pace.trials, "sweep", pace.edge),
        code=pace.code,
        data=DataIdentity("python-stdlib 3.11.7", pace.data_sha256, 12_345_678),
    )


def _write_run(run: Path, config: RunConfig, pace: Pace) -> None:
    method, seed = config.method, config.seed
    shared, own = random.Random(f"seed {seed}"), random.Random(f"{method} {seed}")
    shift = shared.gauss(0, 0.02) + own.gauss(0, pace.noise)
    last = pace.stops.get(seed, pace.diverges.get(seed, STEPS))
    environment = {"python": "3.11.7", "torch": "2.13.0", "cpu model": "Example CPU", "threads": 1, "git commit": None}
    environment |= {"packages": {"numpy": "2.4.6", "scipy": "1.17.1"}, **pace.environment}
    rows = [_eval(pace, 0, shift, 0.0)]
    seconds = 0.0
    for step in range(1, last + 1):
        lost = pace.diverges.get(seed) == step
        forward_backward, optimizer = (
            pace.forward_backward_s * own.uniform(0.95, 1.1),
            pace.optimizer_s * own.uniform(0.95, 1.1),
        )
        seconds += forward_backward + optimizer
        loss = None if lost else loss_at(pace, step, shift + own.gauss(0, 0.05))
        row: dict[str, Any] = {"kind": "train", "step": step, "tokens": TOKENS * step, "loss": loss, "lr": 0.02}
        row |= {"forward_backward_s": forward_backward, "optimizer_s": optimizer, "train_s": seconds}
        rows.append(row | ({"diverged": True} if lost else {}))
        if lost:
            rows.append(_eval(pace, step, None, seconds) | {"diverged": True})
        elif step % EVERY == 0 or step == STEPS:
            rows.append(_eval(pace, step, shift, seconds))
    final: dict[str, Any] = {}
    if pace.blocks is not None and seed not in pace.stops and seed not in pace.diverges:
        loss = rows[-1]["loss"]
        final = {"final_blocks": _blocks(method, pace.blocks, loss), "tuning_loss": loss + 0.01}
        row = {"kind": "final", "step": last, "loss": loss, "accuracy": rows[-1]["accuracy"]}
        rows.append(row | {"blocks": final["final_blocks"], "tuning_loss": final["tuning_loss"]})
    run.mkdir(parents=True)
    (run / "config.json").write_text(config.to_json())
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if seed not in pace.stops:
        diverged = seed in pace.diverges
        result = {
            "format": 1,
            "status": "diverged" if diverged else "finished",
            "steps": last,
            "final_loss": rows[-1]["loss"],
            "final_accuracy": None if diverged else rows[-1]["accuracy"],
            "train_s": seconds,
            "optimizer_s": 1.8,
            "forward_backward_s": 18.0,
            "peak_memory_bytes": 412_000_000 + 1_000_000 * seed,
            "finished": "2025-01-31T12:01:00+00:00",
            **final,
        }
        (run / "result.json").write_text(json.dumps(result))


def _blocks(method: str, spread: float, loss: float) -> list[float]:
    """The loss on 32 blocks: a spread that all methods share, and one of this method's with every seed; or none."""
    if spread == 0:
        return []
    shared, own = random.Random("blocks"), random.Random(f"blocks of {method}")
    offsets = [shared.gauss(0, 0.3) + own.gauss(0, spread) for _ in range(32)]
    mean = sum(offsets) / len(offsets)
    return [loss + offset - mean for offset in offsets]


def _eval(pace: Pace, step: int, shift: float | None, seconds: float) -> dict[str, Any]:
    loss = None if shift is None else loss_at(pace, step, shift)
    accuracy = pace.accuracy if loss is not None else None
    return {
        "kind": "eval",
        "step": step,
        "tokens": TOKENS * step,
        "loss": loss,
        "accuracy": accuracy,
        "train_s": seconds,
    }


@dataclass(frozen=True)
class Valley:
    """A method whose final loss over the learning rate is known: flat around `at`, then rising on both sides.

    loss(lr) = best + tilt * |log10(lr / at)| + slope * max(0, |log10(lr / at)| - flat), at most `most`, plus the
    shifts of `Pace`. A run with lr above `limit` diverges.
    """

    at: float
    lrs: Sequence[float]
    flat: float = 0.3
    slope: float = 0.6
    tilt: float = 0.002
    best: float = 1.6
    most: float = 5.0
    limit: float = math.inf
    noise: float = 0.004
    tie: float | None = 0.25  # other_lr / lr
    absent: Sequence[tuple[float, int]] = ()  # (lr, seed)
    stops: Sequence[tuple[float, int]] = ()
    constant: bool = False  # the learning rate has no effect

    def loss(self, lr: float) -> float:
        away = 0.0 if self.constant else abs(math.log10(lr / self.at))
        return min(self.most, self.best + self.tilt * away + self.slope * max(0.0, away - self.flat))

    def pace(self, lr: float, seed: int) -> Pace:
        return Pace(
            options={"lr": lr, "momentum": 0.95} | ({} if self.tie is None else {"other_lr": self.tie * lr}),
            end=self.loss(lr),
            noise=self.noise,
            start=UNTRAINED,
            trials=None,
            diverges={seed: 64} if lr > self.limit else {},
            stops={seed: 37} if (lr, seed) in self.stops else {},
            absent=[seed] if (lr, seed) in self.absent else [],
        )


def grid_of(low: float, high: float, number: int) -> list[float]:
    """Learning rates from `low` to `high`, evenly spaced in log10, with 4 digits."""
    return [float(f"{low * (high / low) ** (i / (number - 1)):.4g}") for i in range(number)]


def write_sweep(
    study_dir: Path, valleys: Mapping[str, Valley], *, seeds: Sequence[int] = (0, 1, 2), **changes: Any
) -> Path:
    """Write a sweep over these methods, the first being the baseline; `changes` overwrite keys of study.json."""
    asked = [(method, lr, seed) for method, valley in valleys.items() for lr in valley.lrs for seed in seeds]
    runs: dict[str, dict[str, Any]] = {}
    for method, lr, seed in asked:
        pace = valleys[method].pace(lr, seed)
        config = _config(method, pace, seed)
        runs[run_hash(config)] = {"method": method, "seed": seed, "lr": lr}
        if seed not in pace.absent:
            _write_run(study_dir / "runs" / run_hash(config), config, pace)
    study = {
        "format": 1,
        "kind": "sweep",
        "task": "text",
        "preset": "demo",
        "methods": list(valleys),
        "baseline": next(iter(valleys)),
        "seeds": list(seeds),
        "lrs": {method: list(valley.lrs) for method, valley in valleys.items()},
        "runs": runs,
        "command": f"steepest sweep --methods {','.join(valleys)} --seeds {len(seeds)} --task text --out out/sweep",
        "created": "2025-01-31T12:00:00+00:00",
    }
    study_dir.mkdir(parents=True, exist_ok=True)
    (study_dir / "study.json").write_text(json.dumps(study | changes))
    return study_dir


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "$\\frac{",
    "_a\u202eb\x00\n\u2028c" + "x" * 60,
)

SCENARIOS: dict[str, tuple[dict[str, Pace], dict[str, Any]]] = {
    "clear": (
        {"adamw": Pace(), "muon": Pace(speed=1.7, optimizer_s=0.03), "muonadam": Pace(speed=1.35, optimizer_s=0.035)},
        {},
    ),
    "undecided": ({"adamw": Pace(noise=0.02), "muon": Pace(speed=1.05, noise=0.02)}, {}),
    "diverged": ({"adamw": Pace(), "muon": Pace(speed=1.7), "sgd": Pace(speed=0.6, diverges={1: 64})}, {}),
    "missing": ({"adamw": Pace(), "muon": Pace(speed=1.7, absent=(2,), stops={1: 37})}, {}),
    "one-seed": ({"adamw": Pace(), "muon": Pace(speed=1.7)}, {"seeds": (0,)}),
    "unequal": ({"adamw": Pace(), "muon": Pace(speed=1.7, trials=1), "sgd": Pace(speed=0.7, trials=None)}, {}),
    "hostile": (
        {"adamw": Pace(), **{name: Pace(speed=1.2 + i / 5, options={name: name}) for i, name in enumerate(HOSTILE)}},
        {"task": "<b>task</b>"},
    ),
    "many": ({f"method-{i}": Pace(speed=1 + 0.1 * i, accuracy=0.9) for i in range(9)}, {"task": "digits"}),
}


COARSE, FINE = grid_of(0.001, 1.0, 4), grid_of(1e-3, 10, 9)

SWEEPS: dict[str, tuple[dict[str, Valley], dict[str, Any]]] = {
    "sweep-clear": (
        {
            "adamw": Valley(0.004, grid_of(1e-4, 0.3, 7), flat=0.25, slope=0.9, best=1.64, limit=0.1),
            "muon": Valley(0.05, grid_of(2e-3, 2, 7), flat=0.5),
            "muon-momo": Valley(0.1, grid_of(2e-3, 20, 7), flat=0.9, slope=0.4, best=1.61),
        },
        {},
    ),
    "sweep-nine": (
        {
            name: Valley(
                0.012 * 1.5**i,
                FINE,
                flat=0.2 + 0.12 * i,
                slope=1.1 - 0.08 * i,
                best=1.6 + 0.03 * (i % 4),
                limit=(1.0, 0.5, 100, 100)[i % 4],
            )
            for i, name in enumerate(
                f"{base}{momo}" for base in ("adam", "muon", "newton-muon", "muonmax") for momo in ("", "-momo")
            )
        }
        | {"sgd": Valley(2.0, FINE, best=2.2, slope=1.5, most=9.0)},
        {},
    ),
    "sweep-hostile": (
        {
            "adamw": Valley(0.012, COARSE),
            **{name: Valley(0.02 * (i + 1), COARSE, best=1.6 - i / 50) for i, name in enumerate(HOSTILE)},
        },
        {"task": "<b>task</b>", "seeds": (0, 1)},
    ),
    "sweep-troubled": (
        {
            "adamw": Valley(0.012, COARSE, absent=[(0.01, 0), (0.01, 1), (0.01, 2)], stops=[(0.1, 2)]),
            "wild": Valley(0.012, COARSE, limit=0.0),
            "stuck": Valley(0.012, COARSE, constant=True),
            "edgy": Valley(10.0, COARSE, best=1.4),
            "single": Valley(0.1, [0.1], tie=None),
        },
        {},
    ),
}


def write_scenario(study_dir: Path, name: str) -> Path:
    if name in SWEEPS:
        valleys, changes = SWEEPS[name]
        return write_sweep(study_dir, valleys, **changes)
    paces, changes = SCENARIOS[name]
    return write_study(study_dir, paces, **changes)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def only_problem(study: Recorded[Any, Any]) -> str:
    """Why the one run that cannot be used cannot."""
    [problem] = study.absent.values()
    assert problem is not None
    return problem
