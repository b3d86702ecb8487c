"""A project for runs over several processes, and everything that such a run leaves behind."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from helpers import Net, WithSlowLayer, assert_equal, loader, regression_data, trainer
from processes import run

from lightning_diloco import DilocoCallback, DilocoStrategy
from lightning_diloco.comm import means

LAYOUTS = [1, 2, 4]


class Project(WithSlowLayer):
    """Dropout, BatchNorm, a frozen layer that a hook moves, per-step and per-epoch logging, validation."""

    def __init__(self, optimizer: Any = None, batch_norm: bool = True, dropout: float = 0.2) -> None:
        super().__init__(optimizer, batch_norm, dropout)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("largest", loss, on_step=True, on_epoch=False, reduce_fx="max", sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)


class Watch(DilocoCallback):
    """Every metric that callbacks see after every step, and every report."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []
        self.reports: list[Any] = []

    def on_train_batch_end(self, trainer, *_):
        names = ("loss_step", "largest")
        self.steps.append({k: trainer.callback_metrics[k].item() for k in names})

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.epochs.append({k: trainer.callback_metrics[k].item() for k in ("val_loss",)})

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({k: v.item() for k, v in trainer.callback_metrics.items() if k == "loss_epoch"})

    def on_outer_step(self, trainer, pl_module, report):
        self.reports.append(report)


def train(
    folder: Path,
    devices: int,
    machines: int = 1,
    make: Any = Project,
    resume: Path | None = None,
    samples: int = 72,
    batch: int = 4,
    data: Any = None,
    strategy: dict[str, Any] | None = None,
    shuffle: bool = True,
    chunk: int = means.CHUNK,
    more: Any = list,
    **kwargs: Any,
) -> dict[str, Any]:
    """Everything that a run leaves behind on this rank."""
    L.seed_everything(5, verbose=False)
    module, watch = make(), Watch()
    means.CHUNK = chunk
    diloco = DilocoStrategy(**{"num_nodes": 4, "diloco_interval": 4, **(strategy or {})})
    t = trainer(
        diloco,
        devices=devices,
        num_nodes=machines,
        callbacks=[watch, *more()],
        **{"max_epochs": 3, "val_check_interval": 3, "default_root_dir": folder, **kwargs},
    )
    dtype = torch.float64 if kwargs.get("precision") == "64-true" else torch.float32
    train_data = loader(data or regression_data(samples, dtype=dtype), batch, shuffle=shuffle)
    t.fit(module, train_data, loader(regression_data(16, seed=9, dtype=dtype), 2, shuffle=False), ckpt_path=resume)
    t.save_checkpoint(folder / "end.ckpt")
    inner = diloco._engine.context.inner.workers
    return {
        "workers": {w: diloco.worker_state_dict(w) for w in diloco.local_workers},
        "inner": {w: [[v for v in s.values() if v] for s in inner[w].states] for w in diloco.local_workers},
        "theta": diloco.outer_state_dict(),
        "outer": diloco.outer_optimizer.state_dict(),
        "module": {k: v.clone() for k, v in module.state_dict().items()},
        "steps": watch.steps,
        "epochs": watch.epochs,
        "reports": watch.reports,
        "bytes": diloco.ledger.total_bytes,
        "done": (t.global_step, diloco.local_steps, diloco.outer_steps, t.world_size),
    }


def joined(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One result from those of all ranks, which must agree in what all have."""
    whole = dict(ranks[0])
    for other in ranks[1:]:
        for key in ("theta", "outer", "module", "steps", "bytes"):
            assert_equal(other[key], ranks[0][key])
    for key in ("workers", "inner"):
        whole[key] = {w: state for rank in ranks for w, state in rank[key].items()}
    return whole


def layout(folder: Path, size: int, **kwargs: Any) -> dict[str, Any]:
    out = folder / f"{size} processes"
    out.mkdir()
    return joined(run(lambda: train(out, size, **kwargs), size, out=out / "results"))


def thirds(dataset: Any, num_workers: int) -> list[list[int]]:
    """Uneven parts of the data."""
    return [list(range(w, len(dataset) // (1 + w % 2), num_workers)) for w in range(num_workers)]


def smooth(optimizer: Any = None) -> Project:
    """Without what depends on a batch's size or on random numbers."""
    return Project(optimizer, batch_norm=False, dropout=0.0)


class Plain(Net):
    """BatchNorm and dropout; no metrics that several processes would have to share."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__(dropout=0.2)
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if batch_idx % 2:
                optimizer = self.optimizers()
                self.clip_gradients(optimizer, 0.1, "norm")
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)
