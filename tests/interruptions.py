"""A run that an error in one worker's turn interrupts, with a file that is saved then."""

from typing import Any

import lightning as L
import torch
from helpers import Net, assert_same, loader, trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from lightning_diloco import DilocoStrategy


class Ill(Net):
    """Fails once, in one worker's turn of one batch; draws random numbers before it does."""

    def __init__(self, worker: int | None, hook: str = "training_step", batch: int = 6, error: Any = ArithmeticError):
        super().__init__(lambda p: torch.optim.Adam(p, lr=1e-2), batch_norm=False, dropout=0.3)
        self.worker, self.hook, self.batch, self.error = worker, hook, batch, error

    def fail(self, hook: str, batch_idx: int) -> None:
        here = self.trainer.strategy.current_worker
        if hook == self.hook and here == self.worker and batch_idx == self.batch:
            raise self.error("ill")

    def on_train_batch_start(self, batch, batch_idx):
        self.fail("on_train_batch_start", batch_idx)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.fail("training_step", batch_idx)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.fail("on_before_optimizer_step", self.trainer.fit_loop.epoch_loop.batch_idx)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.fail("after optimizer_step", self.trainer.fit_loop.epoch_loop.batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.fail("on_train_batch_end", batch_idx)


def run(module: Any, ckpt: Any = None, interval: int = 4, **kwargs: Any) -> Any:
    L.seed_everything(1, verbose=False)
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=interval, **kwargs)
    seen: list[int] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.global_step)

    rescue = OnExceptionCheckpoint(".", "rescue")
    t = trainer(strategy, callbacks=[rescue, Watch()], enable_checkpointing=True)
    t.fit(module, loader(), ckpt_path=ckpt)
    return strategy, t, seen


def assert_same_run(a: Any, b: Any) -> None:
    for w in range(3):
        assert_same(a.worker_state_dict(w), b.worker_state_dict(w))
    assert_same(a.outer_state_dict(), b.outer_state_dict())
    assert (a.local_steps, a.outer_steps) == (b.local_steps, b.outer_steps)
