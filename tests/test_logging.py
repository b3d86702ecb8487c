"""What is logged: one value from N workers, reports of outer steps, values of each worker."""

from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, loader, regression_data, trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from observers import Memory
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy

from lightning_diloco import DilocoCallback, DilocoStrategy, OuterStepReport


class Logs(Net):
    """Worker w logs w (and 10·batch + w), from several hooks."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.metric = MeanMetric()
        self.accuracy = BinaryAccuracy()

    @property
    def worker(self) -> float:
        return float(self.trainer.strategy.current_worker or 0)

    def training_step(self, batch, batch_idx):
        value = torch.tensor(10.0 * batch_idx + self.worker)
        for reduce in ("mean", "sum", "max", "min"):
            self.log(reduce, value, on_step=True, on_epoch=True, reduce_fx=reduce)
            self.log(f"{reduce}_only_step", value, on_step=True, on_epoch=False, reduce_fx=reduce)
        self.log("weighted", value, on_epoch=True, on_step=False, batch_size=1 + int(self.worker))
        if self.worker == 1:
            self.log("only_one", value, on_step=True, on_epoch=True, prog_bar=True)
        self.metric(value)
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.log("norm", 1.0, on_step=True, on_epoch=True, reduce_fx="sum")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("end", self.worker, on_step=True, on_epoch=True)


def fit(module: Any, **kwargs: Any) -> tuple[Any, Memory]:
    memory = Memory()
    strategy = kwargs.pop("strategy", None) or DilocoStrategy(num_nodes=4, diloco_interval=3)
    t = trainer(strategy, logger=memory, max_epochs=kwargs.pop("max_epochs", 1), **kwargs)
    t.fit(module, loader(regression_data(48), 3))
    return t, memory


def test_logged_values_are_reduced_over_workers() -> None:
    """4 workers, 4 batches each; worker w logs 10·batch + w: on the step over 0, 1, 2, 3, on the epoch over all 16."""
    t, memory = fit(Logs())
    of = {"mean": 1.5, "sum": 6.0, "max": 3.0, "min": 0.0}
    for reduce, value in of.items():
        scale = 4 if reduce == "sum" else 1
        expected = [(step, 10.0 * step * scale + value) for step in range(4)]
        assert memory.of(f"{reduce}_step") == expected
        assert memory.of(f"{reduce}_only_step") == expected
    epoch = {"mean": 16.5, "sum": 264.0, "max": 33.0, "min": 0.0}
    for reduce, value in epoch.items():
        assert memory.of(f"{reduce}_epoch") == [(3, value)]
    # weights 1 + w: Σ (1 + w)(10·batch + w) / Σ (1 + w) = 15 + 20/10
    assert memory.of("weighted") == [(3, 17.0)]
    assert memory.of("only_one_step") == [(step, 10.0 * step + 1) for step in range(4)]
    assert memory.of("only_one_epoch") == [(3, 16.0)]
    assert memory.of("metric_step") == memory.of("mean_step")
    assert memory.of("metric_epoch") == [(3, 16.5)]
    assert memory.of("end_step") == [(step, 1.5) for step in range(4)]
    assert memory.of("end_epoch") == [(3, 1.5)]
    assert t.progress_bar_metrics["only_one_epoch"] == 16.0


def test_the_first_batch_of_an_epoch_loses_no_workers_values() -> None:
    """A module that logs from two hooks: Lightning resets a hook's values when the hook changes in the first batch."""
    _, memory = fit(Logs(), max_epochs=2)
    assert memory.of("norm_epoch") == [(3, 16.0), (7, 16.0)]
    assert memory.of("sum_epoch") == [(3, 264.0), (7, 264.0)]


def test_epoch_means_are_weighted_by_each_workers_batch_size() -> None:
    """Ten samples per worker in batches of 3, 3, 3, 1: (3·(0 + 10 + 20) + 1·30) / 10, plus the mean worker, 1.5."""
    memory = Memory()
    t = trainer(DilocoStrategy(num_nodes=4), logger=memory, max_epochs=1)
    t.fit(Logs(), loader(regression_data(40), 3))
    assert memory.of("mean_epoch") == [(3, 13.5)]


def test_the_loss_that_callbacks_see_is_the_mean_and_the_batch_is_worker_zeros() -> None:
    losses: list[Any] = []
    seen: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((outputs, batch))

    class Extra(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append((self.trainer.strategy.current_worker, loss.detach(), batch))
            return {"loss": loss, "worker": self.trainer.strategy.current_worker}

    fit(Extra(batch_norm=False), strategy=DilocoStrategy(num_nodes=3), callbacks=[Look()])
    for i, (outputs, batch) in enumerate(seen):
        group = losses[3 * i : 3 * i + 3]
        torch.testing.assert_close(outputs["loss"], torch.stack([loss for _, loss, _ in group]).mean())
        assert outputs["worker"] == 0
        assert batch is group[0][2]


def test_metric_objects_are_one_state_that_all_workers_update() -> None:
    hits: list[float] = []

    class Accuracy(Logs):
        def training_step(self, batch, batch_idx):
            predicted, target = self(batch[0]).squeeze(1) > 0, batch[1].squeeze(1) > 0
            hits.extend((predicted == target).float().tolist())
            self.accuracy(predicted, target)
            self.log("accuracy", self.accuracy, on_epoch=True)
            return Net.training_step(self, batch, batch_idx)

    _, memory = fit(Accuracy())
    assert memory.of("accuracy_epoch")[0][1] == pytest.approx(sum(hits) / 48)
    assert len(hits) == 48


def test_reports_reach_every_logger_at_lightnings_step_for_every_outer_step(tmp_path: Any) -> None:
    reports: list[OuterStepReport] = []

    class Mine(DilocoCallback):
        def on_outer_step(self, trainer, pl_module, report):
            assert trainer.strategy.outer_steps == report.outer_step
            assert trainer.strategy.local_steps == report.step
            reports.append(report)

    memory, csv = Memory(), CSVLogger(tmp_path / "csv")
    board = TensorBoardLogger(tmp_path / "board")
    strategy, module = DilocoStrategy(num_nodes=3, diloco_interval=3), Net()
    t = trainer(strategy, logger=[memory, csv, board], log_every_n_steps=50, callbacks=[Mine()], max_steps=8)
    t.fit(module, loader())

    assert [(r.step, r.outer_step, r.kind) for r in reports] == [(3, 1, "round"), (6, 2, "round"), (8, 3, "flush")]
    parameters = 4 * sum(p.numel() for p in module.parameters())
    statistics = 4 * 16  # running mean and variance; the number of batches is the same on all workers
    assert [r.payload_bytes for r in reports] == [parameters + statistics] * 3
    assert all(r.participants == (0, 1, 2) and len(r.drift) == 3 and r.seconds > 0 for r in reports)
    assert memory.of("diloco/outer_step") == [(2, 1.0), (5, 2.0), (7, 3.0)]
    assert memory.of("diloco/comm_bytes") == [(s, i * (parameters + statistics)) for i, s in ((1, 2), (2, 5), (3, 7))]
    for key, name in (("pseudo_gradient_norm", "pseudo_gradient_norm"), ("cosine", "cosine")):
        assert memory.of(f"diloco/{key}") == [(r.step - 1, getattr(r, name)) for r in reports]
    assert memory.of("diloco/drift") == [(r.step - 1, sum(r.drift) / 3) for r in reports]
    text = (tmp_path / "csv").rglob("metrics.csv").__next__().read_text()
    assert "diloco/pseudo_gradient_norm" in text
    assert list((tmp_path / "board").rglob("events*"))
    assert not any(k.startswith("diloco") for k in t.callback_metrics)
    assert sum(isinstance(c, DilocoCallback) for c in t.callbacks) == 1


def test_the_numbers_of_a_report() -> None:
    """Two workers, θ = (3, 4) with ‖θ‖ = 5, θ_0 = (3, 1), θ_1 = (0, 4): Δ_0 = (0, 3), Δ_1 = (3, 0), Δ = (1.5, 1.5)."""
    from lightning_diloco.algorithms import Diloco
    from lightning_diloco.engine.engine import Engine

    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.data = torch.tensor([[3.0, 4.0]])
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    engine = Engine(
        module,
        [inner],
        num_workers=2,
        interval=1,
        algorithm=Diloco(),
        outer_factory=lambda p: torch.optim.SGD(p, lr=0.5),
    )
    for worker, gradient in enumerate(([0.0, 3.0], [3.0, 0.0])):
        with engine.turn(worker):
            module.weight.grad = torch.tensor([gradient])
            inner.step()
    (report,) = engine.end_step()
    assert report.drift == pytest.approx((0.6, 0.6))
    assert report.cosine == pytest.approx(0.0, abs=1e-12)
    assert report.pseudo_gradient_norm == pytest.approx(1.5 * 2**0.5)
    assert report.payload_bytes == 8
    assert module.weight.tolist() == [[2.25, 3.25]]
    for worker, gradient in enumerate(([0.0, 3.0], [0.0, -3.0])):
        with engine.turn(worker):
            module.weight.grad = torch.tensor([gradient])
            inner.step()
    (report,) = engine.end_step()
    assert report.cosine == pytest.approx(-1.0)
    assert report.pseudo_gradient_norm == 0
    assert report.outer_step == 2


def test_the_callback_is_attached_once_and_a_users_own_takes_its_place() -> None:
    t = trainer(DilocoStrategy(num_nodes=2), max_steps=1)
    for _ in range(2):
        t.fit(Net(), loader())
        t.fit_loop.epoch_loop.max_steps += 1
    automatic = [c for c in t.callbacks if isinstance(c, DilocoCallback)]
    assert len(automatic) == 1
    mine = DilocoCallback()
    t.callbacks.append(mine)
    t.fit(Net(), loader())
    assert [c for c in t.callbacks if isinstance(c, DilocoCallback)] == [mine]


def test_chosen_keys_can_be_monitored() -> None:
    callback = DilocoCallback(callback_metrics=("diloco/drift",))
    stop = L.pytorch.callbacks.EarlyStopping("diloco/drift", stopping_threshold=100.0, check_on_train_epoch_end=True)
    t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), callbacks=[callback, stop], max_epochs=3)
    t.fit(Net(), loader())
    assert t.callback_metrics["diloco/drift"] > 0
    assert "diloco/cosine" not in t.callback_metrics
    assert t.current_epoch == 1, "stopped after the first epoch"
    with pytest.raises(
        ValueError, match=r"^`callback_metrics` \(=\('diloco/typo',\)\) must be a sequence of names out of"
    ):
        DilocoCallback(callback_metrics=("diloco/typo",))


@pytest.mark.parametrize("workers", [1, 4])
def test_values_of_each_worker(workers: int) -> None:
    strategy = DilocoStrategy(num_nodes=workers, diloco_interval=3)
    _, memory = fit(Logs(), strategy=strategy, callbacks=[DilocoCallback(per_worker=True)], limit_train_batches=4)
    for w in range(workers):
        assert memory.of(f"sum_step/worker_{w}") == [(step, 10.0 * step + w) for step in range(4)]
        assert memory.of(f"sum_epoch/worker_{w}") == [(3, 60.0 + 4 * w)]
        assert memory.of(f"mean_epoch/worker_{w}") == [(3, 15.0 + w)]
        assert memory.of(f"max_only_step/worker_{w}") == [(step, 10.0 * step + w) for step in range(4)]
        assert memory.of(f"end_step/worker_{w}") == [(step, float(w)) for step in range(4)]
    assert not any(f"/worker_{workers}" in key for _, row in memory.rows for key in row)
    if workers == 4:
        assert memory.of("only_one_step/worker_1") == [(step, 10.0 * step + 1) for step in range(4)]
        assert memory.of("only_one_step/worker_0") == []


@pytest.mark.slow
def test_per_worker_values_follow_log_every_n_steps_and_are_off_by_default() -> None:
    _, memory = fit(Logs(), callbacks=[DilocoCallback(per_worker=True)], log_every_n_steps=2)
    assert [step for step, _ in memory.of("sum_step/worker_1")] == [1, 3]
    _, memory = fit(Logs())
    assert not any("/worker_" in key and "diloco" not in key for _, row in memory.rows for key in row)


def test_under_another_strategy_the_callback_raises() -> None:
    with pytest.raises(MisconfigurationException) as caught:
        trainer(callbacks=[DilocoCallback()]).fit(Net(), loader())
    assert str(caught.value) == (
        "DilocoCallback reports the outer steps of a DilocoStrategy, but the Trainer's strategy is"
        " SingleDeviceStrategy. Pass `Trainer(strategy=DilocoStrategy(...))` or remove the callback."
    )


def test_barebones_and_no_logger() -> None:
    class Silent(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            pass

    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    trainer(strategy, barebones=True, logger=None, log_every_n_steps=None).fit(Silent(), loader())
    assert strategy.outer_steps > 0
