"""How unequal the inputs of each layer are, after 104 steps of Newton-Muon at the preset demo.

    .venv/bin/python results/newton_muon/spread.py

Prints for each layer of one block the 99th over the 1st percentile of the moment's diagonal, and, where the moment is
full, its largest eigenvalue over the mean one.
"""

import torch

from steepest.lab.methods import build_optimizer
from steepest.lab.tasks import make_task
from steepest.lab.tasks.order import ExampleOrder


def main() -> None:
    """Train, and print the table."""
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
    main()
