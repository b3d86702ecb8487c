"""Has every round exactly H local steps, and is a partial round flushed once?"""

import copy
import signal
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, differs, loader, regression_data, trainer
from lightning.pytorch.callbacks import Callback
from observers import Rounds, Track, expected_rounds
from torch import Tensor

from lightning_diloco import DilocoStrategy


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("steps", "interval"), [(1, 1), (5, 1), (6, 3), (7, 3), (8, 3), (5, 4), (6, 6), (7, 6), (2, 3), (1, 500)]
)
def test_every_round_has_exactly_h_local_steps(steps, interval, num_workers):
    """6. Exactly H inner steps in *every* round, the first included; rounds = ⌊T/H⌋ (+1 for the flush at the end when
    T % H ≠ 0).
    """
    rounds = Rounds()
    strategy = DilocoStrategy(num_workers, interval)
    trainer(strategy, max_epochs=-1, max_steps=steps, callbacks=[rounds]).fit(Net(), loader(regression_data(24)))
    assert rounds.seen == expected_rounds(steps, interval)
    sizes = [interval] * (steps // interval) + [steps % interval] * (steps % interval > 0)
    assert rounds.inner_steps == [dict.fromkeys(range(num_workers), size) for size in sizes]
    assert (strategy.local_steps, strategy.outer_steps) == (steps, len(sizes))


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_second_fit_has_rounds_of_h_steps_too(same_trainer):
    """A new fit without `ckpt_path` starts counters and outer state afresh; also after a flush."""
    strategy, first, second = DilocoStrategy(2, 3), Rounds(), Rounds()
    module, data = Net(), loader(regression_data(56))
    t = trainer(strategy, max_epochs=1, callbacks=[first])
    t.fit(module, data)
    assert first.seen == [(3, 1, "round"), (6, 2, "round"), (7, 3, "flush")]
    after_first = copy_of(module.state_dict())

    starts: list[Any] = []

    class AtStart(Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            with pytest.raises(RuntimeError, match="until the next fit"):
                strategy.worker_state_dict(0)
            assert (strategy.local_steps, strategy.outer_steps) == (0, 0)

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            starts.append([strategy.local_steps, strategy.outer_steps, len(strategy.outer_optimizer.state)])
            for i in range(2):
                assert_same(strategy.worker_state_dict(i), after_first)

    if same_trainer:
        t.callbacks.remove(first)
        t.callbacks += [second, AtStart()]
        t.fit_loop.max_epochs = 3
    else:
        t = trainer(strategy, max_epochs=2, callbacks=[second, AtStart()])
    t.fit(module, data)
    assert starts == [[0, 0, 0]]
    assert second.seen == expected_rounds(14, 3)
    assert second.inner_steps == [{0: 3, 1: 3}] * 4 + [{0: 2, 1: 2}]
    assert differs(module.state_dict(), after_first)


class StopAt(Callback):
    def __init__(self, step: int, how: BaseException | None = None) -> None:
        self.step = step
        self.how = how

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            if self.how is not None:
                raise self.how
            trainer.should_stop = True


class EndsTraining(Callback):
    """What the module held, and how many outer steps had been done, when callbacks heard of the end."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(trainer.strategy, DilocoStrategy)
        self.heard.append((trainer.strategy.outer_steps, copy_of(pl_module.state_dict())))


@pytest.mark.parametrize("end", ["max_steps", "max_epochs", "should_stop"])
def test_a_partial_round_is_flushed_once(end):
    """One last outer step on a partial round when training ends normally, never twice, before `on_train_end`."""
    rounds, track, ends, module = Rounds(), Track(), EndsTraining(), Net()
    limits: dict[str, Any] = {
        "max_steps": {"max_epochs": -1, "max_steps": 5},
        "max_epochs": {"max_epochs": 1, "limit_train_batches": 5},
        "should_stop": {"max_epochs": 2},
    }[end]
    strategy = DilocoStrategy(2, 3)
    callbacks = [rounds, track, ends, *([StopAt(5)] if end == "should_stop" else [])]
    trainer(strategy, callbacks=callbacks, **limits).fit(module, loader(regression_data(64)))
    assert rounds.seen == [(3, 1, "round"), (5, 2, "flush")]
    ((outer_steps, at_end),) = ends.heard
    assert outer_steps == strategy.outer_steps == 2
    assert_same(at_end, copy_of(module.state_dict()))
    assert differs(at_end, track.theta[-1])

    momentum = copy.deepcopy([s["momentum_buffer"] for s in strategy.outer_optimizer.state.values()])
    assert list(strategy._engine.flush()) == []
    assert strategy.outer_steps == 2
    assert_same(strategy.outer_state_dict(), at_end)
    assert all(map(torch.equal, momentum, (s["momentum_buffer"] for s in strategy.outer_optimizer.state.values())))


@pytest.mark.parametrize("steps", [5, 6])
def test_without_final_sync_the_last_outer_step_is_that_of_the_last_full_round(steps):
    """`final_sync=False`; and after T = 2H steps there is nothing to flush anyway."""
    rounds, track, module = Rounds(), Track(), Net()
    strategy = DilocoStrategy(2, 3, final_sync=steps == 6)
    t = trainer(strategy, max_epochs=-1, max_steps=steps, callbacks=[rounds, track])
    t.fit(module, loader(regression_data(64)))
    assert rounds.seen == expected_rounds(steps, 3, flush=False)
    assert_same(copy_of(module.state_dict()), track.theta[-1])
    assert_same(strategy.worker_state_dict(1), track.workers[-1][1])
    assert differs(strategy.worker_state_dict(0), strategy.worker_state_dict(1)) == (steps == 5)


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_nothing_is_flushed_after_an_exception(error):
    """… not after an exception or KeyboardInterrupt."""
    rounds, track, module = Rounds(), Track(), Net()
    strategy = DilocoStrategy(2, 3)
    t = trainer(strategy, max_epochs=3, callbacks=[rounds, track, StopAt(5, error)])
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(RuntimeError if isinstance(error, RuntimeError) else SystemExit):
            t.fit(module, loader(regression_data(64)))
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores from a KeyboardInterrupt on
    assert rounds.seen == [(3, 1, "round")]
    assert (strategy.local_steps, strategy.outer_steps) == (5, 1)
    assert_same(strategy.outer_state_dict(), track.theta[2])
    assert_same(copy_of(module.state_dict()), track.theta[2])
    for worker in range(2):
        assert_same(strategy.worker_state_dict(worker), track.workers[4][worker])
