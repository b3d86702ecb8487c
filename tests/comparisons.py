"""Factories and settings for comparisons; importable by the processes that a comparison starts."""

import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from helpers import Net, copy_of, loader, regression_data
from torch.utils.data import DataLoader

from lightning_diloco import DilocoStrategy, compare
from lightning_diloco.comparison import Comparison

TRAINER = {"max_steps": 14, "val_check_interval": 5, "check_val_every_n_epoch": None, "accelerator": "cpu"}
RUNS: dict[str, Any] = {
    "one worker": "plain",
    "longer": "same samples",
    "all": "DataParallel",
    "short": {"num_nodes": 2, "diloco_interval": 4},
    "long": {"num_nodes": 2, "diloco_interval": 7, "outer_optimizer_kwargs": {"lr": 1.0}},
}


class Drawn(Net):
    """Initial weights come from torch's generator, as in an ordinary module."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__(dropout=dropout)
        for layer in self.net:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()


class Witness(Drawn):
    """Keeps its initial weights, and which samples each worker saw, for all modules of this class."""

    seen: ClassVar[list[tuple[dict[str, Any], list[tuple[int, bytes]]]]] = []

    def on_fit_start(self) -> None:
        self.batches: list[tuple[int, bytes]] = []
        self.seen.append((copy_of(self.state_dict()), self.batches))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        strategy = self.trainer.strategy
        worker = strategy.current_worker if isinstance(strategy, DilocoStrategy) else 0
        self.batches.append((worker, batch[0].numpy().tobytes()))
        return super().training_step(batch, batch_idx)


class Failing(Drawn):
    """Fails under a seed."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if os.environ["PL_GLOBAL_SEED"] == "1" and batch_idx == 2:
            raise ArithmeticError("out of luck")
        return super().training_step(batch, batch_idx)


class Dying(Drawn):
    """Kills its process, once, in a step of the run with seed 1, or stays in one with seed 2, if a file says so."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        order = Path("die")
        if os.environ["PL_GLOBAL_SEED"] == "2" and Path("stay").exists():
            signal.pause()
        if os.environ["PL_GLOBAL_SEED"] == "1" and batch_idx == 6 and order.exists():
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


class Slow(Drawn):
    """Says which process trains it, and takes its time."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        Path(f"process {os.getpid()}").touch()
        signal.pause() if batch_idx == 3 else None
        return super().training_step(batch, batch_idx)


def data() -> tuple[DataLoader, DataLoader]:
    return loader(batch_size=8), loader(shuffle=False, batch_size=32)


class Data(L.LightningDataModule):
    """The same as a DataModule.

    Args:
        batch_size: samples per worker and step.
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(regression_data(), 32)


def quiet(module: Any = Drawn, data: Any = data, runs: Any = None, **kwargs: Any) -> Comparison:
    """``compare`` with one seed, in a folder of the test, without a bar."""
    settings = {"trainer": TRAINER, "seeds": 1, "folder": "comparison", "progress_bar": False}
    return compare(module, data, RUNS if runs is None else runs, **{**settings, **kwargs})
