"""Choosing a batch size: the noise of gradients says where larger batches stop to pay, and a sweep checks it.

    pip install 'steepest[lab]'
    python examples/choose_batch_size.py

Half a minute on two processor cores; the digits come with scikit-learn. The lab measures the same with tuned rates,
intervals and refusals: `steepest critical-batch measure --help`.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import steepest
from steepest.batch_size import NoiseScale

TARGET = 0.15  # loss on all images
SMALLEST = 8  # samples of a micro-batch


def build() -> tuple[nn.Module, steepest.SteepestDescent]:
    """A perceptron and its optimizer; Momo spares a search for the best rate of each batch size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, steepest.MuonMax(model, lr=1.0, step_size=steepest.Momo())


def steps_to_target(images, labels, batch: int, *, limit: int = 400) -> int | None:
    """How many steps a batch size needs to the target; None: more than the limit."""
    model, optimizer = build()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, limit + 1):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        with torch.no_grad():
            if cross_entropy(model(images), labels) < TARGET:
                return step
    return None


def main() -> None:
    """Measure the noise at one batch size, then the steps at several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    options = parser.parse_args()
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)

    # One training with micro-batches, as under gradient accumulation: their differences are the noise.
    model, optimizer = build()
    noise = NoiseScale(model, optimizer, every=2, samples=SMALLEST, kinds=("euclidean", "alignment"))
    for _ in range(60):
        for _ in range(16):
            chosen = torch.randint(len(images), (SMALLEST,))
            loss = cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.record_loss(loss, weight=1 / 16)
            (loss / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = noise.read(last=20)
    noise.close()
    print(report)

    print(f"\nbatch   steps   samples to a loss of {TARGET}")
    for batch in options.batches:
        steps = steps_to_target(images, labels, batch)
        print(f"{batch:5d}   {'-' if steps is None else steps:>5}   {'-' if steps is None else steps * batch:>7}")
    print("Where steps stop to halve, larger batches stop to pay.")


if __name__ == "__main__":
    main()
