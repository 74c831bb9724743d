"""`steepest bench COMMAND`: measured on this machine, against others where they are installed."""

from __future__ import annotations

from steepest.lab.cli.bench.accuracy import AccuracyBench
from steepest.lab.cli.bench.cost import CoverageBench, MomoBench, NewtonMuonBench
from steepest.lab.cli.bench.measured import BenchCommand
from steepest.lab.cli.bench.passes import PassesBench
from steepest.lab.cli.bench.scaling import ScalingBench
from steepest.lab.cli.bench.step import StepBench
from steepest.lab.cli.bench.train import TrainBench
from steepest.lab.cli.command import Group

_ALL: tuple[type[BenchCommand], ...] = (
    StepBench,
    TrainBench,
    ScalingBench,
    AccuracyBench,
    PassesBench,
    MomoBench,
    NewtonMuonBench,
    CoverageBench,
)
GROUP = Group("Measure time, memory and accuracy on this machine.", {one.name: one for one in _ALL})
