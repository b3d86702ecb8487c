"""Is an interrupted run, resumed from its file, the uninterrupted run, bit for bit?"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_diloco import DilocoStrategy

SEED = 5


class Project(Net):
    """Dropout, BatchNorm, a schedule per step, draws from the global stream in a callback-like hook, a list of what it saw."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dropout=0.4, **kwargs)
        self.journal: list[Any] = []

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 3, 0.8), "interval": "step"}]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        worker = self.trainer.strategy.current_worker
        self.journal.append((self.trainer.global_step, worker, batch[0].sum().item(), loss.item(), torch.rand(()).item()))
        return loss


class Manual(Project):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = torch.optim.SGD(self.net[0].parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.Adam(self.net[-1].parameters(), lr=0.01)
        return [first, second], [lr_scheduler.StepLR(first, 3, 0.5)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.lr_schedulers().step()


class Global(L.Callback):
    """Draws from the process's own stream after every batch."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.draws.append((trainer.global_step, torch.rand(()).item()))


class Save(L.Callback):
    """Saves in the named hook after the named batches (counted over the whole run)."""

    def __init__(self, hook: str, batches: set[int]) -> None:
        self.batches, self.count = batches, 0
        setattr(self, hook, self.save)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count = trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def save(self, trainer, pl_module, *_):
        if self.count in self.batches and not trainer.sanity_checking:
            trainer.save_checkpoint(f"{self.count}.ckpt")


def everything(t: Any, module: Any, draws: Global) -> dict[str, Any]:
    strategy = t.strategy
    inner = strategy.engine.context.inner
    return {
        "module": copy_of(module.state_dict()),
        "outer": strategy.outer_state_dict(),
        "workers": [strategy.worker_state_dict(w) for w in strategy.local_workers],
        "inner": repr([[list(s.values()) for s in w.states] for w in inner.workers.values()]),
        "control": repr([w.control for w in inner.workers.values()]),
        "streams": repr([None if w.stream is None else w.stream.cpu_state.tolist() for w in inner.workers.values()]),
        "scalers": repr([None if w.scaler is None else w.scaler.state_dict() for w in inner.workers.values()]),
        "outer state": repr(list(strategy.outer_optimizer.state_dict()["state"].values())),
        "counters": (strategy.local_steps, strategy.outer_steps, strategy.ledger, t.global_step, t.current_epoch),
        "random": torch.get_rng_state().tolist(),
    }


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("module", "outer"):
        assert_same(a[key], b[key])
    for x, y in zip(a["workers"], b["workers"], strict=True):
        assert_same(x, y)
    for key in ("inner", "control", "streams", "scalers", "outer state", "counters", "random"):
        assert a[key] == b[key], key


def scaled() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


SETTINGS: dict[str, dict[str, Any]] = {  # strategy arguments, Trainer options, module, loader options
    "default": {},
    "two workers": {"strategy": {"num_nodes": 2, "diloco_interval": 3}},
    "plain average": {"strategy": {"outer_optimizer_kwargs": {"lr": 1.0}}},
    "outer adam": {"strategy": {"outer_optimizer_cls": torch.optim.Adam}},
    "every step": {"strategy": {"diloco_interval": 1}},
    "local buffers": {"strategy": {"buffers": "local", "inner_state": "reset", "eval_weights": "outer"}},
    "first buffers": {"strategy": {"buffers": "first", "inner_state": "average", "eval_weights": "worker"}},
    "no final sync": {"strategy": {"final_sync": False}},
    "processes": {"loader": {"num_workers": 2}},
    "accumulate": {"options": lambda: {"accumulate_grad_batches": 2}},
    "16-mixed": {"options": scaled},
    "16-mixed accumulate": {"options": lambda: {**scaled(), "accumulate_grad_batches": 2}},
    "manual": {"module": Manual},
    "validation": {"options": lambda: {"val_check_interval": 2}},
}


def run(setting: dict[str, Any], callbacks: list[Any], ckpt_path: Any = None, seed: int = SEED, **more: Any) -> Any:
    L.seed_everything(seed, verbose=False)
    module, draws = setting.get("module", Project)(), Global()
    strategy = DilocoStrategy(**{"num_nodes": 3, "diloco_interval": 4, **setting.get("strategy", {})})
    options = {"max_epochs": 3, **setting.get("options", dict)(), **more}
    t = trainer(strategy, callbacks=[draws, *callbacks], **options)
    data = setting.get("data", loader)(regression_data(45), 3, **setting.get("loader", {}))  # 5 batches for each of 3 workers
    t.fit(module, data, loader(regression_data(8), shuffle=False), ckpt_path=ckpt_path)
    return everything(t, module, draws), module.journal, draws.draws


@pytest.mark.parametrize("name", SETTINGS)
def test_interrupted_is_uninterrupted(name: str) -> None:
    setting = SETTINGS[name]
    hook = "on_validation_end" if name == "validation" else "on_train_batch_end"
    undisturbed, journal, draws = run(setting, [])
    saving, _, _ = run(setting, [Save(hook, set(range(1, 99)))])
    assert_equal(saving, undisturbed)  # saving changes nothing
    files = sorted(Path().glob("*.ckpt"), key=lambda p: int(p.stem))
    assert len(files) >= 4
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        resumed, later, later_draws = run(setting, [], ckpt_path=file, seed=99)
        assert_equal(resumed, undisturbed)
        assert later == journal[len(journal) - len(later) :]
        assert later_draws == draws[len(draws) - len(later_draws) :]
        assert len(later) < len(journal)
        assert checkpoint["diloco"]["version"] == 1
