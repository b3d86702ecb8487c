"""Do progress bars show the round and the speed, and does nobody else notice?"""

import csv
import io
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, loader, regression_data, trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_diloco import DataParallel, DilocoCallback, DilocoStrategy


class Logs(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("bar", loss, prog_bar=True)
        return loss


class Shown(TQDMProgressBar):
    """A user's bar, which notes what it would show after every batch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self.shown: list[dict[str, Any]] = []

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        self.shown.append(dict(super().get_metrics(trainer, pl_module)))
        return super().get_metrics(trainer, pl_module)


def rounds(strategy: Any = None, model: Any = None, data: Any = None, **kwargs: Any) -> list[str | None]:
    bar = Shown()
    strategy = strategy or DilocoStrategy(num_nodes=2, diloco_interval=3)
    callbacks = [bar, *kwargs.pop("callbacks", [])]  # it stands before the callback that is attached
    t = trainer(strategy, callbacks=callbacks, enable_progress_bar=True, **kwargs)
    t.fit(model or Logs(), loader() if data is None else data)
    return [shown.get("round") for shown in bar.shown]


def test_rounds_of_a_run_of_known_length() -> None:
    # 96 samples in batches of 4 for 2 workers: 12 steps per epoch; the bar asks once more at an epoch's end
    expected = ["1/3"] * 3 + ["2/3"] * 3 + ["3/3"] * 3
    assert rounds(max_steps=8)[:8] == expected[:8]
    assert rounds(max_epochs=1, limit_train_batches=7)[:7] == expected[:7]
    accumulating = rounds(max_epochs=1, accumulate_grad_batches=2)  # 6 steps
    assert accumulating == ["0/2"] + ["1/2"] * 6 + ["2/2"] * 5 + ["2/2"]


class Stops(L.Callback):
    def on_train_batch_end(self, trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 6


@pytest.mark.slow
def test_the_length_of_a_run_may_be_unknown() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(regression_data())

    assert rounds(data=DataLoader(Stream(), 4), max_epochs=1)[:4] == ["1/?"] * 3 + ["2/?"]
    assert rounds(data=DataLoader(Stream(), 4), max_steps=5)[:4] == ["1/2"] * 3 + ["2/2"]
    assert rounds(max_epochs=-1, max_time={"hours": 9}, callbacks=[Stops()])[:4] == ["1/?"] * 3 + ["2/?"]


def test_a_schedule_of_accumulation_leaves_the_length_unknown() -> None:
    shown = rounds(max_epochs=3, callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})])
    assert {text.partition("/")[2] for text in shown if text is not None} == {"?"}


class Manual(Logs):
    """Two optimizers step in every batch, so that ``max_steps`` counts double."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.net[0], self.net[-1])]

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_max_steps_of_several_optimizers() -> None:
    assert rounds(model=Manual(), max_steps=8) == ["1/?"] * 3 + ["2/?"] * 2
    assert rounds(model=Manual(), max_epochs=1) == [f"{-(-step // 3)}/4" for step in [*range(1, 13), 12]]


def test_rounds_after_a_flush_are_counted_from_there(tmp_path: Any) -> None:
    t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=3), max_steps=4)
    t.fit(Logs(), loader())  # rounds of 3 steps and of 1
    t.save_checkpoint(tmp_path / "flushed.ckpt")
    bar = Shown()
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=3)
    again = trainer(strategy, max_steps=11, callbacks=[bar], enable_progress_bar=True)
    again.fit(Logs(), loader(), ckpt_path=tmp_path / "flushed.ckpt", weights_only=False)
    assert [shown["round"] for shown in bar.shown] == ["3/5"] * 3 + ["4/5"] * 3 + ["5/5"] * 2
    assert strategy.outer_steps == 5


def test_switched_off_in_the_plain_run_and_without_rounds() -> None:
    assert set(rounds(max_steps=4, callbacks=[DilocoCallback(progress_bar=False)])) == {None}
    plain = DilocoStrategy(num_nodes=1, outer_optimizer_kwargs={"lr": 1.0})
    assert set(rounds(plain, max_steps=4)) == {None}
    plain = DilocoStrategy(num_nodes=1, outer_optimizer_kwargs={"lr": 1.0})
    bar = Shown()
    t = trainer(plain, max_steps=4, callbacks=[DilocoCallback(), bar], enable_progress_bar=True)
    t.fit(Logs(), loader())
    assert {key for shown in bar.shown for key in shown} == {"bar"}
    bar = Shown()
    t = trainer(
        DilocoStrategy(num_nodes=2, algorithm=DataParallel()), max_steps=4, callbacks=[bar], enable_progress_bar=True
    )
    t.fit(Logs(), loader())
    assert {key for shown in bar.shown for key in shown} == {"bar", "steps/s"}
    with pytest.raises(ValueError, match=r"`progress_bar` \(='yes'\) must be True or False."):
        DilocoCallback(progress_bar="yes")


@pytest.mark.slow
def test_the_speed_is_that_of_all_workers_without_validations(monkeypatch: Any) -> None:
    now = [100.0]
    for module in ("reporting.progress", "engine.times"):
        monkeypatch.setattr(f"lightning_diloco.{module}.perf_counter", lambda: now[0])

    class Timed(Logs):
        def training_step(self, batch, batch_idx):
            now[0] += 0.5 if self.trainer.global_step < 12 else 0.125
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            now[0] += 1000

    bar = Shown()
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=3)
    t = trainer(strategy, max_steps=100, max_epochs=-1, val_check_interval=6, callbacks=[bar], enable_progress_bar=True)
    t.fit(Timed(), loader(), loader(shuffle=False))
    speeds = [shown["steps/s"] for shown in bar.shown if "round" in shown]  # else in the sanity check
    assert speeds[0] == "2"  # a step of two workers takes a second: two local steps per second
    assert set(speeds[:11]) == {"2"}
    assert speeds[-1] == "8"  # then a quarter of a second, and what is older than ten seconds doesn't count


def test_the_order_leaves_the_round_in_a_narrow_terminal() -> None:
    bar = Shown()
    t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=3), max_steps=3, callbacks=[bar], enable_progress_bar=True)
    t.fit(Logs(), loader())
    assert [list(shown) for shown in bar.shown] == [["round", "bar", "steps/s"]] * 4


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_lightnings_bars_show_it(bar: Any, monkeypatch: Any) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    wide = {"console_kwargs": {"file": out, "width": 200, "force_terminal": True}} if bar is RichProgressBar else {}
    t = trainer(
        DilocoStrategy(num_nodes=2, diloco_interval=3), max_steps=8, callbacks=[bar(**wide)], enable_progress_bar=True
    )
    t.fit(Logs(), loader())
    text = out.getvalue()
    assert ("round=3/3, bar=" if bar is TQDMProgressBar else "round: 3/3") in text, text
    assert ("steps/s=" if bar is TQDMProgressBar else "steps/s: ") in text


def test_loggers_callback_metrics_and_weights_are_the_same_without(tmp_path: Any) -> None:
    runs = []
    for on in (True, False):
        model, logger = Logs(dropout=0.5), CSVLogger(tmp_path, name=str(on))
        t = trainer(
            DilocoStrategy(num_nodes=2, diloco_interval=3),
            max_steps=8,
            callbacks=[Shown(), DilocoCallback(progress_bar=on)],
            enable_progress_bar=True,
            logger=logger,
        )
        L.seed_everything(1, verbose=False)
        t.fit(model, loader())
        logger.save()
        with Path(logger.experiment.metrics_file_path).open() as file:
            rows = [{k: v for k, v in row.items() if "_seconds" not in k} for row in csv.DictReader(file)]
        runs.append((model.state_dict(), dict(t.callback_metrics), str(rows)))
    (weights, metrics, text), (weights_off, metrics_off, text_off) = runs
    assert_same(weights, weights_off)
    assert_same(metrics, metrics_off)
    assert text == text_off
    assert "round" not in text and "steps/s" not in text and not {"round", "steps/s"} & metrics.keys()  # noqa: PT018
