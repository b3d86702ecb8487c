"""The models whose steps are timed: under the plain Trainer, under DilocoStrategy, and in a hand-written loop."""

import importlib
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_diloco import DilocoStrategy
from tests.benchmarks.rows import ROOT

sys.path.insert(0, str(ROOT / "examples"))
byte_gpt = importlib.import_module("byte_gpt")

WARM_UP = 4  # steps that aren't timed
BATCH = 16
GPT = ("--megabytes", "0.3")  # arguments of examples/byte_gpt.py: 1 M parameters
WIDE = (*GPT, "--width", "256", "--heads", "4", "--context", "16", "--batch-size", "1")
SMALL, LARGE = (*WIDE, "--layers", "6"), (*WIDE, "--layers", "13")  # 4.8 M and 10.3 M parameters


class Classifier(L.LightningModule):
    """An ordinary project: a network on 28 × 28 images, AdamW, one logged value."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def mlp() -> Classifier:
    """784-128-10."""
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)))


def cnn() -> Classifier:
    """105,866 parameters."""
    features = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    deeper = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return Classifier(
        nn.Sequential(*features, *deeper, nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10))
    )


def gpt(options: tuple[str, ...] = GPT) -> Any:
    """The byte GPT of the examples."""
    return byte_gpt.build(byte_gpt.parse(list(options)))[0]


def images() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(10_000, 1, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (len(pixels),), generator=generator)
    return DataLoader(TensorDataset(pixels, labels), batch_size=BATCH, shuffle=True)


def text(options: tuple[str, ...] = GPT) -> DataLoader[Any]:
    loader: DataLoader[Any] = byte_gpt.build(byte_gpt.parse(list(options)))[1].train_dataloader()
    return loader


class Marks(L.Callback):
    """The time at the end of every step, by ``clock``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.marks: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.marks.append(self.clock())


def trainer(strategy: str | DilocoStrategy, steps: int, **options: Any) -> L.Trainer:
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"accelerator": "cpu", "devices": 1, **dict.fromkeys(silent, False), **options}
    return L.Trainer(strategy=strategy, max_steps=steps, **settings)


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def seconds_per_step(marks: list[float]) -> float:
    """From end to end, the fastest tenth: other people's load makes steps slower, and never faster."""
    steps = sorted(b - a for a, b in itertools.pairwise(marks[WARM_UP:]))
    return steps[len(steps) // 10]


def mean_seconds(marks: list[float]) -> float:
    """From end to end, the mean without the first step: a fastest tenth would favour short steps, of which more fit."""
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def fitted(
    module: L.LightningModule, data: Iterable[Any], strategy: str | DilocoStrategy, steps: int, **options: Any
) -> float:
    """CPU seconds of a Lightning step."""
    watch = Marks(time.process_time)
    trainer(strategy, WARM_UP + steps, callbacks=watch, **options).fit(module, data)
    return seconds_per_step(watch.marks)


def local_steps(workers: int) -> DilocoStrategy:
    """Steps without an outer step."""
    return DilocoStrategy(num_nodes=workers, diloco_interval=10**9, final_sync=False)


def looped(
    make: Callable[[], Any],
    data: Iterable[Any],
    workers: int,
    steps: int,
    clip: float = 0.0,
    clock: Any = time.process_time,
) -> list[float]:
    """The time at the end of every step of ``workers`` models in plain PyTorch, batches included."""
    models = [make() for _ in range(workers)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models]
    batches, marks = iter(()), []
    for _ in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            batch = next(batches, None)
            if batch is None:
                batches = iter(data)
                batch = next(batches)
            model.loss(batch).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        marks.append(clock())
    return marks
