"""DiLoCo against one worker and against data parallelism, on handwritten digits that ship with scikit-learn.

Three runs of the same small CNN: same initial weights, same optimizer, same number of local steps:

* one worker, a plain Trainer: batch B;
* N workers under DiLoCo: batch B *per worker*, one exchange every H steps;
* N data-parallel workers, which equal a plain Trainer with batch N·B: one exchange of gradients every step.

The batch is fixed per worker, so the last two see N times the samples of the first. Bytes are what one worker sends, in
one direction; seconds are those of this process, in which DiLoCo's workers take turns.

Run ``python examples/digits.py`` (needs scikit-learn; about 15 seconds on one CPU core), then
``tensorboard --logdir runs/digits``.
"""

import argparse
import logging
import time
import warnings
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_diloco import DilocoStrategy


class DigitsCNN(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows about workers.

    Args:
        lr: learning rate of AdamW.
    """

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 2 * 2, 10),
        )
        self.val_accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.val_accuracy(logits, labels)
        self.log_dict({"val_loss": F.cross_entropy(logits, labels), "val_acc": self.val_accuracy})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class DigitsData(L.LightningDataModule):
    """1437 training and 360 test images of 8 × 8 pixels in [0, 1]; the split is the same in every run.

    Args:
        batch_size: training images per worker and step.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images / 16).float().reshape(-1, 1, 8, 8), torch.tensor(labels))
        self.train_data, self.test_data = random_split(data, [1437, 360], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.train_data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.test_data, len(self.test_data))


class Row(NamedTuple):
    """One run: accuracy and loss on the test images, bytes that one worker sent, seconds of the fit."""

    run: str
    accuracy: float
    loss: float
    bytes_sent: int
    seconds: float


def train(name: str, args: argparse.Namespace, batch_size: int, strategy: str | L.pytorch.strategies.Strategy) -> Row:
    """Fits one model and evaluates it on the test images; counts no bytes."""
    L.seed_everything(args.seed, verbose=False)  # the same initial weights for every run
    data = DigitsData(batch_size)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 20),
        check_val_every_n_epoch=None,
        logger=TensorBoardLogger(args.logdir, name=None, version=name),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = DigitsCNN(args.lr)
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    (result,) = trainer.validate(model, data, verbose=False)
    return Row(name, result["val_acc"], result["val_loss"], 0, seconds)


def main(argv: list[str] | None = None) -> list[Row]:
    """Runs the three, prints the table and returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="N")
    parser.add_argument("--interval", type=int, default=10, help="H: local steps between outer steps")
    parser.add_argument("--steps", type=int, default=500, help="local steps of each worker")
    parser.add_argument("--batch-size", type=int, default=8, help="B: samples per worker and step")
    parser.add_argument("--lr", type=float, default=2e-3, help="inner learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logdir", default="runs/digits", help="for TensorBoard")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")  # advice on loader workers; its own deprecations
    torch.set_num_threads(1)  # threads cost more than they give on tensors this small

    diloco = DilocoStrategy(num_nodes=args.workers, diloco_interval=args.interval)
    gradient_bytes = sum(p.nbytes for p in DigitsCNN(args.lr).parameters())
    rows = [
        train("one worker", args, args.batch_size, "auto"),
        train("diloco", args, args.batch_size, diloco),
        train("data parallel", args, args.workers * args.batch_size, "auto"),
    ]
    rows[1] = rows[1]._replace(bytes_sent=diloco.ledger.total_bytes)
    rows[2] = rows[2]._replace(bytes_sent=args.steps * gradient_bytes)
    print(f"{'run':<15}{'accuracy':>10}{'loss':>9}{'bytes sent per worker':>24}{'seconds':>10}")
    for row in rows:
        print(f"{row.run:<15}{row.accuracy:>10.2%}{row.loss:>9.4f}{row.bytes_sent:>24,}{row.seconds:>10.1f}")
    return rows


if __name__ == "__main__":
    main()
