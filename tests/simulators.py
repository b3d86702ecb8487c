"""A small simulator, and what its hooks were given."""

from typing import Any

import torch
from helpers import copy_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_diloco import DilocoSimulator, EvalStats, TrainStats

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(nn.Module):
    """Dropout and BatchNorm: something for random streams and modes to act on."""

    def __init__(self, width: int = 8, dropout: float = 0.2) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def classes(samples: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def simulator(cls: type[DilocoSimulator] = DilocoSimulator, **arguments: Any) -> DilocoSimulator:
    """Three workers, rounds of 4, 10 local steps."""
    given: dict[str, Any] = {
        "model_cls": Classifier,
        "num_nodes": 3,
        "diloco_interval": 4,
        "batch_size": 4,
        "loss_fn": F.cross_entropy,
        "train_dataset": classes(120),
        "optimizer_kwargs": {"lr": 0.01},
        "seed": 5,
        **arguments,
    }
    given["trainer_kwargs"] = {**QUIET, **given.get("trainer_kwargs", {})}
    return cls(**given)


def trained(**arguments: Any) -> DilocoSimulator:
    s = simulator(**arguments)
    s.train()
    return s


class Log(list[Any]):
    """Collects what hooks are given."""

    def hooks(self) -> dict[str, Any]:
        return {"train_loss_hook": self.append, "eval_loss_hook": self.append}

    @property
    def train(self) -> list[TrainStats]:
        return [s for s in self if type(s) is TrainStats]

    @property
    def eval(self) -> list[EvalStats]:
        return [s for s in self if type(s) is EvalStats]


def weights(s: DilocoSimulator) -> dict[str, Tensor]:
    return copy_of(s.model.state_dict())
