"""DiLoCo against one worker and against data parallelism, on handwritten digits that ship with scikit-learn.

Three runs of the same small CNN: same initial weights, same optimizer, same number of local steps:

* one worker, a plain Trainer: batch B;
* N workers under DiLoCo: batch B *per worker*, one exchange every H steps;
* N data-parallel workers, which equal a plain Trainer with batch N·B: one exchange of gradients every step.

The batch is fixed per worker, so the last two see N times the samples of the first. Bytes are what one worker sends, in
one direction.

Each run is done with several seeds, which change initial weights and the order of the data; the table has mean ±
standard deviation over the seeds.

Run ``python examples/digits.py`` (needs scikit-learn; five seeds, well under a minute on a quiet CPU core), then
``tensorboard --logdir runs/digits``.
"""

import argparse
import logging
import statistics
import warnings
from typing import Any, NamedTuple

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
    """One run: accuracy and loss on the test images, seed by seed, and the bytes that a worker sent."""

    run: str
    accuracy: list[float]
    loss: list[float]
    bytes_sent: int


def train(name: str, args: argparse.Namespace, seed: int, batch_size: int, strategy: Any) -> tuple[float, float]:
    """Fits one model, evaluates it on the test images, and returns accuracy and loss."""
    L.seed_everything(seed, verbose=False)  # the same initial weights for every run
    data = DigitsData(batch_size)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 20),
        check_val_every_n_epoch=None,
        logger=TensorBoardLogger(args.logdir, name=name, version=f"seed {seed}"),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = DigitsCNN(args.lr)
    trainer.fit(model, data)
    (result,) = trainer.validate(model, data, verbose=False)
    return result["val_acc"], result["val_loss"]


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation; of a single seed its value."""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def main(argv: list[str] | None = None) -> list[Row]:
    """Runs the three with every seed, prints the table and returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="N")
    parser.add_argument("--interval", type=int, default=10, help="H: local steps between outer steps")
    parser.add_argument("--steps", type=int, default=500, help="local steps of each worker")
    parser.add_argument("--batch-size", type=int, default=8, help="B: samples per worker and step")
    parser.add_argument("--lr", type=float, default=2e-3, help="inner learning rate")
    parser.add_argument("--outer-lr", type=float, default=0.7, help="learning rate of the outer SGD")
    parser.add_argument("--outer-momentum", type=float, default=0.9, help="its Nesterov momentum; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds")
    parser.add_argument("--logdir", default="runs/digits", help="for TensorBoard")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")  # advice on loader workers; its own deprecations
    torch.set_num_threads(1)  # threads cost more than they give on tensors this small

    outer = {"lr": args.outer_lr, "momentum": args.outer_momentum, "nesterov": args.outer_momentum > 0}
    gradient_bytes = sum(p.nbytes for p in DigitsCNN(args.lr).parameters())
    rows = [Row("one worker", [], [], 0), Row("diloco", [], [], 0), Row("data parallel", [], [], 0)]
    rows[2] = rows[2]._replace(bytes_sent=args.steps * gradient_bytes)
    for seed in range(args.seed, args.seed + args.seeds):
        diloco = DilocoStrategy(args.workers, args.interval, outer_optimizer_kwargs=outer)
        settings = [(args.batch_size, "auto"), (args.batch_size, diloco), (args.workers * args.batch_size, "auto")]
        for row, (batch_size, strategy) in zip(rows, settings, strict=True):
            results = train(row.run, args, seed, batch_size, strategy)
            for values, result in zip((row.accuracy, row.loss), results, strict=True):
                values.append(result)
        rows[1] = rows[1]._replace(bytes_sent=diloco.ledger.total_bytes)
    print(f"{'run':<15}{'accuracy':>17}{'loss':>18}{'bytes sent per worker':>24}")
    for row in rows:
        measured = f"{spread(row.accuracy, '.2%'):>17}{spread(row.loss, '.4f'):>18}"
        print(f"{row.run:<15}{measured}{row.bytes_sent:>24,}")
    return rows


if __name__ == "__main__":
    main()
