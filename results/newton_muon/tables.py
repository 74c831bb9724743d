"""Two tables of the page: the lead of Newton-Muon over Muon, and how unequal the inputs of each layer are.

    .venv/bin/python results/newton_muon/tables.py lead
    .venv/bin/python results/newton_muon/tables.py spread

"lead" is read from the runs of `tiny`, paired by seed. "spread" trains for 104 steps of Newton-Muon at the preset demo.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

from steepest.lab.disk.packed import StudyFiles
from steepest.lab.methods import build_optimizer
from steepest.lab.studies.records import Listed
from steepest.lab.tasks import make_task
from steepest.lab.tasks.order import ExampleOrder

STUDY = Path(__file__).parent / "tiny"


def lead() -> None:
    """Print the mean difference of evaluation losses, its standard error and its sign per seed, every 100 steps."""
    losses: dict[tuple[str, int], dict[int, float]] = {}
    study = StudyFiles(STUDY)
    for run in map(study.run, study.study(Listed).runs):
        config = json.loads(run.text("config.json"))
        rows = map(json.loads, run.lines("metrics.jsonl"))
        losses[config["method"], config["seed"]] = {r["step"]: r["loss"] for r in rows if r["kind"] == "eval"}
    seeds = sorted(seed for method, seed in losses if method == "muon")
    for step in (100, 200, 300, 400, 500):
        ahead_by = [losses["newton-muon", seed][step] - losses["muon", seed][step] for seed in seeds]
        error = statistics.stdev(ahead_by) / len(ahead_by) ** 0.5
        ahead = sum(x < 0 for x in ahead_by)
        print(f"| {step} | {statistics.mean(ahead_by):+.4f} ± {error:.4f} | {ahead} of {len(ahead_by)} |")  # noqa: T201 - a command


def spread() -> None:
    """Print for each layer of one block the 99th over the 1st percentile of the moment's diagonal.

    Where the moment is full, also its largest eigenvalue over the mean one.
    """
    torch.set_num_threads(1)
    task = make_task("text", "demo")
    model = task.build_model(0)
    optimizer = build_optimizer("newton-muon", model, {"lr": 0.04, "other_lr": 0.02, "structure": "full"})
    order = ExampleOrder(task.train_size, seed=0)
    for _ in range(104):
        task.loss(model, task.batch(order.take(task.budget.batch_size))).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if not name.startswith("blocks.1.") or "input_moment" not in optimizer.state[parameter]:
            continue
        moment = optimizer.state[parameter]["input_moment"][0]
        diagonal = moment if moment.ndim == 1 else moment.diagonal()
        low, high = torch.quantile(diagonal, torch.tensor([0.01, 0.99])).tolist()
        values = None if moment.ndim == 1 else torch.linalg.eigvalsh(moment.double())
        largest = "" if values is None else f"{float(values[-1] / values.mean()):.0f}"
        print(f"| {name} | {high / low:,.0f} | {largest} |")  # noqa: T201 - a command


if __name__ == "__main__":
    {"lead": lead, "spread": spread}[sys.argv[1]]()
