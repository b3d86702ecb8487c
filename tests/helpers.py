"""Small modules, data and Trainers that several tests share."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_diloco.comm.tensors import bitwise_equal


def regression_data(
    samples: int = 96, features: int = 3, seed: int = 7, dtype: torch.dtype = torch.float32
) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    y = (x.sin().sum(1, keepdim=True) + 0.1 * torch.randn(samples, 1, generator=generator, dtype=torch.float64)).to(
        dtype
    )
    return TensorDataset(x.to(dtype), y)


def loader(dataset: Any = None, batch_size: int = 4, shuffle: bool = True, **kwargs: Any) -> DataLoader:
    return DataLoader(dataset if dataset is not None else regression_data(), batch_size, shuffle=shuffle, **kwargs)


class Net(L.LightningModule):
    """A small regressor with BatchNorm, logging on step and epoch; ``optimizer`` is called with the parameters."""

    def __init__(self, optimizer: Any = None, batch_norm: bool = True, dropout: float = 0.0, seed: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = [nn.Linear(3, 8)]
            layers += [nn.BatchNorm1d(8)] if batch_norm else []
            layers += [nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)]
            self.net = nn.Sequential(*layers)
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class WithSlowLayer(Net):
    """A frozen layer, too, that a hook moves and no optimizer knows."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.slow = nn.Linear(2, 2).requires_grad_(False)
        with torch.no_grad():
            self.slow.weight.fill_(0.5)
            self.slow.bias.fill_(0.5)

    def on_train_batch_start(self, batch, batch_idx):
        self.slow.weight.data.add_(self.net[0].weight.data[:2, :2], alpha=0.1)


def trainer(strategy: Any = "auto", **kwargs: Any) -> L.Trainer:
    """A quiet CPU Trainer."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(strategy=strategy, **{**defaults, **kwargs})


def slow_but(quick: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """For ``parametrize``: all but the ``quick`` values are marked slow; together they take long."""
    quick = list(quick)
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in state.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), f"{key}: {a[key]} != {b[key]}"


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, whatever is inside."""
    if isinstance(a, torch.Tensor):
        assert bitwise_equal(a, b), f"{where}: {a} != {b}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert repr(a) == repr(b), f"{where}: {a} != {b}"  # so that NaN is itself


def differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(a[key], b[key]) for key in a)
