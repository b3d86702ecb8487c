"""Does ``strategy.times`` count every second once, and in the right place?"""

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, loader, trainer
from lightning.pytorch.tuner import Tuner
from processes import run
from typing_extensions import override

from lightning_diloco import DataParallel, Diloco, DilocoStrategy, StreamingDiloco
from lightning_diloco.engine.times import Stopwatch, Times


class Clock:
    """Stands still, unless it is moved; whole numbers, so that sums are exact."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: Any) -> Clock:
    clock = Clock()
    for module in ("engine.times", "comm.waiting"):
        monkeypatch.setattr(f"lightning_diloco.{module}.perf_counter", clock)
    return clock


class Slow(Diloco):
    """An outer step takes 100 s, the algorithm's part of other steps 7 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    @override
    def after_inner_step(self, step: int) -> None:
        self.clock.now += 100 if self.ctx.due(step) else 7
        super().after_inner_step(step)

    @override
    def flush(self, step: int) -> None:
        self.clock.now += 1000
        super().flush(step)


class Timed(Net):
    """A training step takes 3 s, a validation step 20 s, the hooks around a training batch a second each."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 3
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 20
        return super().validation_step(batch, batch_idx)

    def on_train_batch_start(self, batch, batch_idx):
        self.clock.now += 1

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.clock.now += 1


class Between(L.Callback):
    """Callbacks take time: 10 000 s between steps, and 300 s within a validation."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock.now += 10_000

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock.now += 300


def test_turns_outer_steps_and_validations(clock: Clock) -> None:
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=2, algorithm=Slow(clock))
    t = trainer(strategy, max_steps=5, val_check_interval=4, limit_val_batches=2, callbacks=[Between(clock)])
    assert strategy.times == Times(0, 0, 0, 0)
    t.fit(Timed(clock), loader(), loader(shuffle=False))
    # 5 steps of 3 workers; syncs after 2 and 4 and in the flush after 5; three other steps; a validation after step 4
    # (the sanity check comes before training)
    assert strategy.times == Times(inner=5 * 3 * 5, outer=3 * 100 + 3 * 7 + 1000, evaluation=2 * 20 + 300, waiting=0)


@pytest.mark.parametrize("algorithm", [None, DataParallel()], ids=["plain", "data parallel"])
def test_the_plain_run_and_second_turns(clock: Clock, algorithm: Any) -> None:
    options: dict[str, Any] = {"outer_optimizer_kwargs": {"lr": 1.0}} if algorithm is None else {"algorithm": algorithm}
    strategy = DilocoStrategy(num_nodes=1, diloco_interval=2, **options)
    trainer(strategy, max_steps=4).fit(Timed(clock), loader())
    assert strategy.times == Times(inner=4 * 5)


def test_a_collective_counts_as_waiting_only(clock: Clock) -> None:
    def collective(strategy: DilocoStrategy, seconds: float) -> None:
        with strategy._world.label_errors("a test"):
            clock.now += seconds

    class Waits(Timed):
        def training_step(self, batch, batch_idx):
            collective(self.trainer.strategy, 50)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            collective(self.trainer.strategy, 500)
            return super().validation_step(batch, batch_idx)

        def on_train_epoch_end(self):
            collective(self.trainer.strategy, 5000)

    class WaitsInStep(Slow):
        def after_inner_step(self, step: int) -> None:
            collective(strategy, 50_000)
            super().after_inner_step(step)

    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2, algorithm=WaitsInStep(clock))
    t = trainer(strategy, max_steps=2, max_epochs=1, limit_val_batches=1, num_sanity_val_steps=0)
    t.fit(Waits(clock), loader(batch_size=24), loader(shuffle=False))
    waiting = 2 * 2 * 50 + 500 + 5000 + 2 * 50_000
    assert strategy.times == Times(inner=2 * 2 * 5, outer=100 + 7 + 1000, evaluation=20, waiting=waiting)
    collective(strategy, 1)  # as `trainer.test` would
    assert strategy.times.waiting == waiting


def test_a_fit_begins_at_zero_and_tuners_do_not_count(clock: Clock) -> None:
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    seen: list[Times] = []

    class Watched(Timed):
        def __init__(self, clock: Clock) -> None:
            super().__init__(clock)
            self.lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            seen.append(self.trainer.strategy.times)  # inside a turn

    t = trainer(strategy, max_steps=1)
    model = Watched(clock)
    Tuner(t).lr_find(model, loader(), num_training=3)
    assert len(seen) == 3 * 2
    seen.clear()
    t.fit(model, loader())
    assert strategy.times == Times(inner=2 * 5)
    assert seen == [Times(inner=2 * 4 + 1), Times(inner=2 * 5)]  # the hooks at the end are a round of turns
    t.fit_loop.epoch_loop.max_steps = 3
    t.fit(Timed(clock), loader())
    assert strategy.times == Times(inner=2 * 2 * 5)


def test_an_error_ends_the_part(clock: Clock) -> None:
    stopwatch = Stopwatch(lambda: 64.0)  # earlier fits in these processes have waited

    def fail() -> None:
        with stopwatch.part("inner"), stopwatch.part("outer"):
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 4
    with stopwatch.part("evaluation"):
        clock.now += 8
    assert stopwatch.times == Times(outer=2, evaluation=8)
    stopwatch.stop()
    with stopwatch.part("inner"):
        clock.now += 16
    assert stopwatch.times == Times(outer=2, evaluation=8)


def _late(seconds: float) -> tuple[int, Times]:
    class Late(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.strategy._world.rank == 1:
                time.sleep(seconds)
            return self.loss(batch)

    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    trainer(strategy, devices=2, max_steps=4).fit(Late(), loader())
    return strategy._world.rank, strategy.times


@pytest.mark.processes
def test_the_quick_process_waits_for_the_slow_one(tmp_path: Path) -> None:
    times = dict(run(_late, 2, 0.25, out=tmp_path))
    quick, slow = times[0], times[1]
    assert slow.inner >= 4 * 0.25
    assert quick.inner < slow.inner
    assert quick.waiting > slow.waiting
    quick_sum, slow_sum = (t.inner + t.outer + t.waiting for t in (quick, slow))
    assert quick_sum == pytest.approx(slow_sum, rel=0.3)
    assert times[0].evaluation == times[1].evaluation == 0


def test_trajectories_know_nothing_of_clocks(clock: Clock) -> None:
    weights = []
    for _ in range(2):
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=2, algorithm=StreamingDiloco(fragments=2))
        model = Timed(clock)
        trainer(strategy, max_steps=4).fit(model, loader(shuffle=False))
        clock.now = 5.0
        weights.append(model.state_dict())
    assert_same(*weights)
