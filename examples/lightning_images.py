"""Lightning: digits are classified with MuonMax and Momo, and no learning rate was searched for.

    pip install 'steepest[lightning,loggers]' scikit-learn
    python examples/lightning_images.py

Ten seconds on two processor cores; the images come with scikit-learn.
"""

import argparse
import logging
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import steepest
from steepest.integrations.lightning import LogDiagnostics, RecordLoss


class Classifier(pl.LightningModule):
    """A small convolutional network.

    Args:
        lr: Learning rate of all roles; Momo takes as much of each step as the loss allows.
    """

    def __init__(self, lr: float = 1.0) -> None:
        super().__init__()
        self.lr = lr
        first = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU()]
        self.network = nn.Sequential(*first, nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, index):
        images, labels = batch
        loss = cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = steepest.MuonMax(self.network, lr=self.lr, step_size=steepest.Momo())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train, and print the accuracy on images that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--accumulate", type=int, default=2, help="batches of 32 to a step")
    options = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # of its own deprecations, and of few workers
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, held_out = random_split(data, [1500, len(data) - 1500], generator=torch.Generator().manual_seed(0))

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=options.epochs,
            accumulate_grad_batches=options.accumulate,
            log_every_n_steps=5,
            logger=TensorBoardLogger(folder),
            callbacks=[
                RecordLoss(),  # Momo hears the loss of each step
                LogDiagnostics(every=5),  # steepest/t, steepest/matrix/update_rms, ...
                LearningRateMonitor(),  # lr-MuonMax/matrix, lr-MuonMax/head, ...
                EMAWeightAveraging(decay=0.95),  # validation uses averaged weights
            ],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(options.lr), DataLoader(train, 32, shuffle=True), DataLoader(held_out, 297))
        part = trainer.optimizers[0].diagnostics()["t"]
    print(f"accuracy {float(trainer.callback_metrics['accuracy']):.1%}, {trainer.global_step} steps, last t {part:.3f}")


if __name__ == "__main__":
    main()
