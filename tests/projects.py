"""A project whose every number a resumed run must reach again."""

from typing import Any

import torch
from helpers import Net
from torch.optim import lr_scheduler


class Project(Net):
    """Dropout, BatchNorm, a schedule per step, and a journal of the batches, losses and random numbers it saw."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dropout=0.4, **kwargs)
        self.journal: list[Any] = []

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 3, 0.8), "interval": "step"}]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        worker = getattr(self.trainer.strategy, "current_worker", None)
        self.journal.append(
            (self.trainer.global_step, worker, batch[0].sum().item(), loss.item(), torch.rand(()).item())
        )
        return loss
