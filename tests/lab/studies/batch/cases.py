"""Batch-size studies that several tests of the report read, each written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.synthetic_batches import World, hyperbola, plan_of, pole, write_batch_study

BATCHES = (4, 8, 16, 32, 64, 128)


def write_case(out: Path, name: str) -> Path:
    match name:
        case "clear":  # muon: b* = 27; adamw: a knee at 40, and runs at b = 4 that are stopped
            world = World({"muon": pole(12.0), "adamw": hyperbola(40.0, 300.0)})
            return write_batch_study(
                out, world, plan_of(batches=(8, *BATCHES[2:], 256), most_steps=3000, targets=(0.1, 0.05))
            )
        case "started":
            world = World({"muon": pole(3.0)}, begun=lambda run: run["tunes"] and run["batch_size"] > 16)
            return write_batch_study(out, world, plan_of(("muon",), batches=(16, 32)))
        case "troubled":  # below the higher target from the start, one diverges, rates at the edge, decay above 1
            world = World(
                {"muon-wd": hyperbola(20.0)},
                best=lambda b: 12.0,
                start=0.09,
                diverges=lambda run: run["batch_size"] == 64 and run["seed"] == 1,
                begun=lambda run: run["tunes"] or run["batch_size"] > 4,
            )
            return write_batch_study(out, world, plan_of(("muon-wd",), batches=BATCHES[:5], seeds=(0, 1)))
        case "varied":
            world = World({f"muon momentum={m}": pole(100 * (1 - m)) for m in (0.8, 0.9)})
            plan = plan_of(("muon",), batches=BATCHES, vary=[("muon", "momentum", (0.8, 0.9))], targets=(0.05,))
            return write_batch_study(out, world, plan)
    raise AssertionError(name)


_WRITTEN: dict[str, Path] = {}


def written(factory: pytest.TempPathFactory, name: str) -> Path:
    """The study, the same one for all tests of a session, which leave its records alone."""
    if name not in _WRITTEN:
        _WRITTEN[name] = write_case(factory.mktemp(name), name)
    return _WRITTEN[name]


CASES = ("clear", "started", "troubled", "varied")
