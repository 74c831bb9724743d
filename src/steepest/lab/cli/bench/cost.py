"""`steepest bench momo | newton-muon | coverage`: what is added to a training step, and how often intervals hold."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated

from steepest.lab.cli.bench.measured import BenchCommand, Measured
from steepest.lab.cli.command import Arg
from steepest.lab.cli.options import Count, OnTask, OnThreads, checking_usage, count
from steepest.lab.cli.outcome import Table


def _table(name: str, rows: Sequence[dict[str, object]]) -> Measured:
    return Measured({"rows": rows}, rows, [Table(name, list(rows[0]), [list(map(str, row.values())) for row in rows])])


class MomoBench(BenchCommand, OnTask, OnThreads):
    """Time training steps with Momo in turns with those without.

    examples:
      steepest bench momo --pairs 60 --out out/momo_cost

    Each pair is one training step of a method and one of its Momo version, on the same weights and batch, in
    alternating order; the ratio is the median over pairs.
    """

    name = "momo"

    pairs: Annotated[int, functools.partial(count, least=2), Arg("of steps", "N")] = 60

    def measure(self) -> Measured:
        """Every recipe, with both kinds of dual norms."""
        from steepest.lab.bench.cost import RECIPES, momo_cost

        with checking_usage():
            task = self.load()
        where: dict[str, object] = {"preset": self.preset, "threads": self.threads}
        duals = ("stale", "cached")
        rows = [{**where, **momo_cost(task, name, dual, pairs=self.pairs)} for name in RECIPES for dual in duals]
        return _table(self.name, rows)


class NewtonMuonBench(BenchCommand, OnThreads):
    """Time steps of Newton-Muon in turns with those of Muon.

    examples:
      steepest bench newton-muon --width 256 --tokens 2048 --pairs 24 --out out/newton_muon_cost

    Each pair is one training step of Muon and one of Newton-Muon. Steps that refresh are measured apart, one in four,
    and weighed as one in --every steps.
    """

    name = "newton-muon"
    files = "cost"

    width: Annotated[Count, Arg("", "W")] = 768
    layers: Annotated[Count, Arg("", "L")] = 1
    tokens: Annotated[tuple[Count, ...], Arg("of a step; default: 2048 8192", "N")] = (2048, 8192)
    every: Annotated[Count, Arg("steps per refresh", "N")] = 32
    pairs: Annotated[int, functools.partial(count, least=8), Arg("of steps", "N")] = 24  # two refreshes

    def measure(self) -> Measured:
        """Every case, at every number of tokens."""
        import torch

        from steepest.lab.bench.cost import CASES, newton_muon_cost
        from steepest.lab.models.gpt import GPTConfig

        config = GPTConfig(vocabulary=256, layers=self.layers, width=self.width, head_size=64)
        rows: list[dict[str, object]] = []
        for tokens in self.tokens:
            window = min(1024, tokens)
            generator = torch.Generator(device="cpu").manual_seed(0)
            batch = torch.randint(256, (tokens // window, window + 1), generator=generator, device="cpu")
            for name in CASES:
                row = newton_muon_cost(name, config, batch, every=self.every, pairs=self.pairs)
                rows.append({"threads": self.threads, **row})
        return _table("cost", rows)


class CoverageBench(BenchCommand):
    """How often intervals of the critical batch size hold the truth, on made-up runs.

    examples:
      steepest bench coverage --replications 20 --out out/coverage

    Runs with known answers are made up and fitted, many times: how often do 90% intervals of the critical batch size
    hold the truth? Where a range is answered instead of a number, it counts in the column "contained".
    """

    name = "coverage"

    replications: Annotated[Count, Arg("", "N")] = 500
    resamples: Annotated[int, functools.partial(count, least=100), Arg("", "N")] = 500  # for intervals of 90%

    def measure(self) -> Measured:
        """Every setting."""
        from steepest.lab.studies.batch.coverage import coverage_row, measure, settings

        many = {"replications": self.replications, "resamples": self.resamples}
        rows = [coverage_row(setting, measure(setting, **many), self.replications) for setting in settings()]
        return _table(self.name, rows)
