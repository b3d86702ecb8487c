"""A fit of a small model with any algorithm, in double precision, and the reports of its arrivals."""

from typing import Any

import lightning as L
import torch
from helpers import Net, loader, regression_data, trainer

from lightning_diloco import DilocoCallback, DilocoStrategy, OuterStepReport


class Plain(Net):
    """Four parameters in two layers; double precision comes from the Trainer."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__(optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2)), batch_norm=False)


class Look(DilocoCallback):
    def __init__(self) -> None:
        super().__init__()
        self.reports: list[OuterStepReport] = []

    def on_outer_step(self, trainer, pl_module, report):
        self.reports.append(report)


def fit(
    algorithm: Any = None, module: Any = None, steps: int = 6, callbacks: Any = (), ckpt: Any = None, **kwargs: Any
):
    options, samples = kwargs.pop("options", {}), kwargs.pop("samples", 96)
    L.seed_everything(3, verbose=False)
    strategy = DilocoStrategy(**{"num_nodes": 3, "diloco_interval": 3, "algorithm": algorithm, **kwargs})
    look, module = Look(), module or Plain()
    t = trainer(
        strategy, max_epochs=-1, max_steps=steps, callbacks=[look, *callbacks], **{"precision": "64-true", **options}
    )
    t.fit(module, loader(regression_data(samples, dtype=torch.float64), shuffle=samples == 96), ckpt_path=ckpt)
    return strategy, module, look.reports
