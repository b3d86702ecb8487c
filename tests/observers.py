"""Callbacks and a logger that note what a run does."""

from collections import Counter
from typing import Any

import lightning as L
from helpers import copy_of
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_diloco import DilocoCallback, DilocoStrategy, OuterStepReport


class Track(Callback):
    """θ, all workers and the module after every local step."""

    def __init__(self) -> None:
        self.theta: list[dict[str, Tensor]] = []
        self.workers: list[list[dict[str, Tensor]]] = []
        self.module: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DilocoStrategy)
        self.theta.append(strategy.outer_state_dict())
        self.workers.append([strategy.worker_state_dict(i) for i in range(strategy.num_workers)])
        self.module.append(copy_of(pl_module.state_dict()))


class Rounds(DilocoCallback):
    """The reports of a fit, and between them the inner steps that each worker really took."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[OuterStepReport] = []
        self.inner_steps: list[dict[int | None, int]] = []
        self._count: Counter[int | None] = Counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        assert isinstance(trainer.strategy, DilocoStrategy)
        self._count[trainer.strategy.current_worker] += 1

    def on_outer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, report: OuterStepReport) -> None:
        self.reports.append(report)
        self.inner_steps.append(dict(self._count))
        self._count.clear()

    @property
    def seen(self) -> list[tuple[int, int, str]]:
        return [(r.step, r.outer_step, r.kind) for r in self.reports]


def expected_rounds(steps: int, interval: int, flush: bool = True) -> list[tuple[int, int, str]]:
    ends = [(t, "round") for t in range(interval, steps + 1, interval)]
    ends += [(steps, "flush")] if flush and steps % interval else []
    return [(t, k, kind) for k, (t, kind) in enumerate(ends, start=1)]


class Memory(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def of(self, key: str) -> list[tuple[int, float]]:
        return [(step, row[key]) for step, row in self.rows if key in row]


class Probe(L.Callback):
    """Calls ``look(trainer, module)`` in the named hooks."""

    def __init__(self, look: Any, *hooks: str) -> None:
        for hook in hooks:
            setattr(self, hook, lambda trainer, module, *_, hook=hook, **__: look(hook, trainer, module))
