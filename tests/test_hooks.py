"""Hooks of the module, and what they may read and write inside a worker's turn."""

import functools
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from helpers import Net, loader, regression_data, trainer
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
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


# -------------------------------------------------------------------------------------------- rank zero in a turn


class Zero(Net):
    """Notes who passes each kind of "only rank zero" in its hooks."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.passed: dict[str, list[int | None]] = {}

    def note(self, kind: str) -> None:
        self.passed.setdefault(kind, []).append(self.trainer.strategy.current_worker)

    @rank_zero_only
    def decorated(self) -> None:
        self.note("rank_zero_only")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.is_global_zero:
            self.note("is_global_zero")
        self.decorated()
        self.print("hello from", self.trainer.strategy.current_worker)
        rank_zero_info(f"info from {self.trainer.strategy.current_worker}")
        for logger in self.loggers:
            logger.log_metrics({"mine": float(self.trainer.strategy.current_worker)}, step=batch_idx)
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.experiment.add_scalar("raw", self.trainer.strategy.current_worker, batch_idx)
        return self.loss(batch)


class Outside(L.Callback):
    """A callback of the common kind: files and prints on rank zero, in hooks between and inside turns."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int | None, bool]] = []

    def note(self, hook: str, trainer: L.Trainer) -> None:
        assert trainer.is_global_zero == (rank_zero_only.rank == 0)
        self.seen.append((hook, trainer.strategy.current_worker, trainer.is_global_zero))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.note("start", trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.note("step", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.note("end", trainer)

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        self.note("exception", trainer)


@pytest.mark.parametrize("workers", [1, 3])
def test_in_a_turn_only_worker_zero_is_rank_zero(workers: int, tmp_path: Any, capsys: Any, caplog: Any) -> None:
    module, callback = Zero(), Outside()
    csv, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    t = trainer(
        DilocoStrategy(num_nodes=workers, diloco_interval=2), max_steps=2, callbacks=[callback], logger=[board, csv]
    )
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        t.fit(module, loader())
    assert module.passed == {"is_global_zero": [0, 0], "rank_zero_only": [0, 0]}
    out = capsys.readouterr().out
    assert out.count("hello from 0") == 2
    assert "hello from 1" not in out
    assert [r.message for r in caplog.records if r.message.startswith("info from")] == ["info from 0"] * 2
    rows = next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()
    column = rows[0].split(",").index("mine")
    assert [row.split(",")[column] for row in rows[1:] if row.split(",")[column]] == ["0.0", "0.0"]
    one_step = [("start", None, True), *[("step", w, w == 0) for w in range(workers)], ("end", None, True)]
    assert callback.seen == one_step * 2


def test_rank_zero_is_back_after_an_exception_in_a_turn() -> None:
    class Fails(Zero):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.strategy.current_worker == 2:
                raise ValueError("worker 2 is ill")
            return super().training_step(batch, batch_idx)

    callback = Outside()
    t = trainer(DilocoStrategy(num_nodes=3), max_steps=1, callbacks=[callback])
    with pytest.raises(ValueError, match="ill"):
        t.fit(Fails(), loader())
    assert callback.seen[-1] == ("exception", None, True)
    assert rank_zero_only.rank == 0
    assert t.is_global_zero


# -------------------------------------------------------------------------------------------- what a turn can read


def test_a_workers_step_sees_no_metrics_of_the_workers_before_it() -> None:
    """Worker w logs 10·batch + w; the step begins with the mean of the batch before, and later sees its own value."""
    seen: list[tuple[int, int, Any, Any, Any]] = []

    class Reads(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            t, w = self.trainer, self.trainer.strategy.current_worker
            before = [m.get("value") for m in (t.callback_metrics, t.logged_metrics, t.progress_bar_metrics)]
            assert f"only_{1 - min(w, 1)}" not in t.callback_metrics or batch_idx
            self.log("value", 10.0 * batch_idx + w, prog_bar=True)
            self.log(f"only_{min(w, 1)}", 1.0)
            assert t.callback_metrics["value"] == 10.0 * batch_idx + w
            assert t.progress_bar_metrics["value"] == 10.0 * batch_idx + w
            seen.append((batch_idx, w, *before))
            return self.loss(batch)

    class After(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert trainer.callback_metrics["value"] == 10.0 * batch_idx + 1
            assert trainer.callback_metrics.keys() >= {"only_0", "only_1"}

    t = trainer(
        DilocoStrategy(num_nodes=3, diloco_interval=2), max_epochs=1, limit_train_batches=3, callbacks=[After()]
    )
    t.fit(Reads(), loader(regression_data(36)))
    for batch_idx, _, *before in seen:
        assert before == ([10.0 * batch_idx - 9] * 3 if batch_idx else [None] * 3)
    assert len(seen) == 9


def test_what_worker_zero_writes_into_the_metrics_stays() -> None:
    class Writes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer.callback_metrics["mine"] = torch.tensor(float(self.trainer.strategy.current_worker + 1))
            return self.loss(batch)

    t = trainer(DilocoStrategy(num_nodes=3, diloco_interval=2), max_steps=2)
    t.fit(Writes(), loader())
    assert t.callback_metrics["mine"] == 1


# -------------------------------------------------------------------------------------------- no batch, no loss


class Gaps(torch.utils.data.IterableDataset):
    """One batch in four is None: with two workers every second one of worker 1's."""

    def __iter__(self) -> Any:
        for i in range(8):
            yield None if i % 4 == 3 else [torch.ones(2, 3), torch.ones(2, 1)]


def test_a_loader_that_yields_none_for_some_workers_is_warned_about() -> None:
    starts: list[int] = []
    ends: list[int] = []

    class Notes(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert batch is not None
            starts.append(self.trainer.strategy.current_worker)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert (outputs is None) == (batch is None)
            ends.append(self.trainer.strategy.current_worker)

    t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), max_epochs=1)
    source = torch.utils.data.DataLoader(Gaps(), batch_size=None)
    with pytest.warns(UserWarning, match="train_dataloader yielded None"):
        t.fit(Notes(), source)
    assert starts == [0, 1, 0] * 2
    assert ends == [0, 1] * 4
