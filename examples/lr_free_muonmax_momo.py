"""No sweep of learning rates: MuonMax with Momo takes the step that the loss allows.

One network is trained on scikit-learn's digits with learning rates three orders of magnitude apart, with Momo and
without. A loss that cannot be negative needs nothing else; give a `lower_bound` where you know that zero is far away.

    pip install 'steepest[lab]'
    python examples/lr_free_muonmax_momo.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import steepest

STEPS, BATCH = 80, 64


def final_loss(lr: float, *, momo: bool) -> float:
    """The loss of all examples after training."""
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16 - 0.3
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = steepest.MuonMax(model, lr=lr, momo=momo)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)  # with Momo, the loss bounds the step
    with torch.no_grad():
        return nn.functional.cross_entropy(model(images), labels).item()


def main() -> None:
    """Print the final loss for each learning rate."""
    print("lr       MuonMax   with Momo")
    for lr in (0.01, 0.1, 1.0, 10.0):
        print(f"{lr:<8g} {final_loss(lr, momo=False):7.3f}   {final_loss(lr, momo=True):9.3f}")


if __name__ == "__main__":
    main()
