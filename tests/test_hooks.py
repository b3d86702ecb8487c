"""Hooks of the module, and what they may read and write inside a worker's turn."""

import functools
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from helpers import Net, loader, regression_data, trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_diloco import DilocoStrategy


def counting(seen: list[int | None], function: Any) -> Any:
    """A decorator as profilers and tracers write them."""

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.trainer.strategy.current_worker)
        return function(self, *args, **kwargs)

    return wrapped


HOOKS = ("on_train_batch_start", "on_train_batch_end")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("how", ["class", "instance", "mock", "base class", "callback"])
def test_hooks_that_are_wrapped_run_for_every_worker(hook: str, how: str, monkeypatch: Any) -> None:
    seen: list[int | None] = []

    class Wrapped(Net):
        pass

    module, callbacks = Wrapped(), []
    if how == "class":
        setattr(Wrapped, hook, counting(seen, getattr(L.LightningModule, hook)))
    elif how == "base class":
        monkeypatch.setattr(L.LightningModule, hook, counting(seen, getattr(L.LightningModule, hook)))
    elif how == "instance":
        setattr(module, hook, functools.partial(counting(seen, getattr(L.LightningModule, hook)), module))
    elif how == "mock":
        record = mock.Mock(side_effect=lambda *_: seen.append(module.trainer.strategy.current_worker))
        setattr(module, hook, record)
    else:

        class Attach(L.Callback):
            def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                setattr(pl_module, hook, lambda *_: seen.append(trainer.strategy.current_worker))

        callbacks.append(Attach())
    trainer(DilocoStrategy(num_nodes=3, diloco_interval=2), max_steps=2, callbacks=callbacks).fit(module, loader())
    assert seen == [0, 1, 2] * 2


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_transfer_hooks_that_are_wrapped_run_in_each_workers_turn(hook: str) -> None:
    seen: list[int | None] = []
    module = Net()
    original = getattr(module, hook)

    def wrapped(batch: Any, dataloader_idx: int) -> Any:
        seen.append(module.trainer.strategy.current_worker)
        return original(batch, dataloader_idx)

    setattr(module, hook, wrapped)
    trainer(DilocoStrategy(num_nodes=3, diloco_interval=2), max_steps=1).fit(module, loader())
    assert seen == [0, 1, 2]


def test_gradients_are_kept_for_a_wrapped_hook_that_looks_at_them() -> None:
    grads: list[bool] = []
    module = Net()

    def look(optimizer: Any) -> None:
        grads.append(module.net[0].weight.grad is not None)

    module.on_before_zero_grad = look
    trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), max_steps=2).fit(module, loader())
    assert grads == [False, False, True, True]


class Counter(Metric):
    """A metric with integer (or boolean) state, such as a count of tokens."""

    full_state_update = False

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = dtype
        self.add_state("count", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: int) -> None:
        self.count += value

    def compute(self) -> Tensor:
        return self.count.to(self.kind)


REDUCE = {"mean": 4 / 3, "sum": 4.0, "max": 3.0, "min": 0.0}
KINDS = [int, torch.int64, torch.int32, torch.uint8, torch.float64]


class Counts(Net):
    """Worker w logs (0, 1, 3)[w]."""

    def __init__(self, reduce: str, kind: Any, sync: bool) -> None:
        super().__init__(batch_norm=False)
        self.reduce, self.kind, self.sync = reduce, kind, sync
        self.counter = Counter(torch.int64 if kind is int else kind)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        number = (0, 1, 3)[self.trainer.strategy.current_worker]
        value = number if self.kind is int else torch.tensor(number, dtype=self.kind)
        how: dict[str, Any] = {"reduce_fx": self.reduce, "on_step": True, "sync_dist": self.sync}
        self.log("value", value, on_epoch=True, **how)
        self.log("only_step", value, on_epoch=False, **how)
        self.counter(number)
        self.log("metric", self.counter, on_epoch=True, **how)
        return self.loss(batch)


@pytest.mark.filterwarnings("ignore:You called `self.log.*needs to be floating")
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", REDUCE)
def test_whole_numbers_are_reduced_over_workers(reduce: str, kind: Any, sync: bool) -> None:
    t = trainer(DilocoStrategy(num_nodes=3, diloco_interval=2), max_epochs=1, limit_train_batches=2)
    t.fit(Counts(reduce, kind, sync), loader(regression_data(24)))
    want, metrics = REDUCE[reduce], t.callback_metrics
    for key in ("value_step", "only_step", "metric_step"):
        assert metrics[key].is_floating_point()
        assert metrics[key].item() == pytest.approx(want), key
    assert metrics["value_epoch"].item() == pytest.approx(2 * want if reduce == "sum" else want)
    assert metrics["metric_epoch"].item() == 8, "the metric's state is that of all workers' batches"


@pytest.mark.filterwarnings("ignore:You called `self.log.*needs to be floating")
@pytest.mark.parametrize(("reduce", "want"), [("mean", 2 / 3), ("sum", 2.0), ("max", 1.0), ("min", 0.0)])
def test_truth_values_are_reduced_over_workers(reduce: str, want: float) -> None:
    class Truths(Counts):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            number = self.trainer.strategy.current_worker > 0
            self.log("value", torch.tensor(number), on_step=True, reduce_fx=self.reduce)
            self.log("python", number, on_step=True, reduce_fx=self.reduce)
            self.counter(int(number))
            self.log("metric", self.counter, on_step=True, reduce_fx=self.reduce)
            return self.loss(batch)

    t = trainer(DilocoStrategy(num_nodes=3, diloco_interval=2), max_steps=1)
    t.fit(Truths(reduce, torch.bool, False), loader())
    for key in ("value", "python", "metric"):
        assert t.callback_metrics[key].item() == pytest.approx(want), key


@pytest.mark.parametrize("loss", [torch.tensor(3), torch.tensor([1.0, 2.0])])
def test_outputs_of_manual_optimization_may_call_anything_their_loss(loss: Tensor) -> None:
    seen: list[Any] = []

    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            return {"loss": loss}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs["loss"])

    trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), max_steps=1, callbacks=[Look()]).fit(Manual(), loader())
    assert torch.equal(seen[0], loss)
