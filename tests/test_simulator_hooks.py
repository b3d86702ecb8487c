"""When are the simulator's hooks called, and with which statistics?"""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from simulators import Log, classes, simulator, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_diloco import Diloco, DilocoSimulator, EvalStats, TrainStats
from lightning_diloco.simulator.module import SimulatorModule


def test_a_run_by_hand() -> None:
    """One weight w = 0, loss w·x, inner SGD with lr 1, outer plain average: each worker's w falls by its x.

    Two workers, one sample per step. Whatever the order, all samples 1 … 8 are seen once, so θ ends at
    −(1 + … + 8) / 2 = −18; the sum of the two losses of a step is −(what each worker has already) times its x.
    """

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * x

    class Look(L.Callback):
        """Reads the workers' samples through their weights: w falls by x."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append([-trainer.strategy.worker_state_dict(w)["model.w"].item() for w in (0, 1)])

    seen: list[list[float]] = []
    log = Log()
    numbers = torch.arange(1.0, 9.0).reshape(8, 1)
    s = trained(
        model_cls=Line,
        num_nodes=2,
        diloco_interval=3,
        batch_size=1,
        loss_fn=lambda output, y: (output * y).mean(),
        train_dataset=TensorDataset(numbers, torch.ones(8, 1)),
        eval_dataset=TensorDataset(torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, 1)),
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": 1.0},
        outer_optimizer_kwargs={"lr": 1.0},
        trainer_kwargs={"callbacks": Look()},
        **log.hooks(),
    )
    # 4 steps: outer steps after 3 and, the flush, after 4. Before step t both workers' weights and samples are known.
    assert s.total == 4
    before = [[0.0, 0.0], *seen]
    (a1, b1), (a2, b2), (c, d) = seen[0], seen[1], seen[2]
    assert c == d  # synchronised: what both fell by, halved
    samples = [(a1, b1), (a2 - a1, b2 - b1), None, (seen[3][0] - c, seen[3][1] - d)]
    for t in (0, 1, 3):
        x, y = samples[t]
        expected = (-before[t][0] * x - before[t][1] * y) / 2
        assert log.train[t].loss == pytest.approx(expected, abs=1e-6)
    assert s.model.w.item() == pytest.approx(-18)
    # the evaluated loss: w · mean(1, 2, 6) = 3 w, in batches of one
    assert [e.loss for e in log.eval] == pytest.approx([-3 * c, -3 * 18])
    assert log.eval[-1].perplexity == pytest.approx(math.exp(-54))
    assert [type(e).__name__[0] for e in log] == list("TTTETE")
    assert [(e.local_step, e.global_step, e.epoch, e.num_diloco_steps) for e in log] == [
        (1, 2, 0, 0),
        (2, 4, 0, 0),
        (3, 6, 0, 1),
        (3, 6, 0, 1),
        (4, 8, 0, 1),
        (4, 8, 0, 2),
    ]


def test_hooks_come_in_order_and_epochs_are_counted() -> None:
    log = Log()
    order: list[str] = []

    class Saves(L.Callback):
        def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
            order.append(f"file {trainer.global_step}")

    def train_hook(stats: TrainStats) -> None:
        order.append(f"train {stats.local_step}")
        log.append(stats)

    def eval_hook(stats: EvalStats) -> None:
        order.append(f"eval {stats.local_step}")
        log.append(stats)

    s = trained(
        train_dataset=classes(48),
        num_epochs=2,  # 4 steps each
        diloco_interval=3,
        eval_dataset=classes(20),
        ckpt_interval=2,
        save_dir="files",
        train_loss_hook=train_hook,
        eval_loss_hook=eval_hook,
        trainer_kwargs={"callbacks": [Saves()]},
    )
    assert s.total == 8
    assert order == [
        *("train 1", "train 2", "train 3", "eval 3"),
        *("train 4", "train 5", "train 6", "eval 6", "file 6"),
        *("train 7", "train 8", "eval 8", "file 8"),  # the flush, the third outer step; then the final file
    ]
    assert [t.epoch for t in log.train] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [e.epoch for e in log.eval] == [0, 1, 1]
    assert sorted(p.name for p in Path("files").iterdir()) == ["final.ckpt", "step=000006.ckpt"]


def test_a_checkpoint_due_at_the_flush_is_written() -> None:
    trained(ckpt_interval=3, save_dir="files")  # outer steps at 4, 8 and, the flush, at 10
    assert sorted(p.name for p in Path("files").iterdir()) == ["final.ckpt", "step=000010.ckpt"]


def test_a_complete_last_round_is_evaluated_once() -> None:
    log = Log()
    trained(max_local_step=8, eval_dataset=classes(8), **log.hooks())
    assert [e.local_step for e in log.eval] == [4, 8]


def test_without_the_last_synchronisation_there_is_no_last_evaluation() -> None:
    log = Log()
    trained(eval_dataset=classes(8), strategy_kwargs={"final_sync": False}, **log.hooks())
    assert [e.local_step for e in log.eval] == [4, 8]


def test_accumulated_gradients_make_one_step_with_the_mean_loss() -> None:
    """A step of two micro-batches without learning: its loss is the mean over both, of all workers."""
    log, alone = Log(), Log()
    frozen = {"optimizer_kwargs": {"lr": 0.0}, "model_kwargs": {"dropout": 0.0}, "optimizer_cls": torch.optim.SGD}
    trained(trainer_kwargs={"accumulate_grad_batches": 2}, max_local_step=5, train_loss_hook=log.append, **frozen)
    trained(train_loss_hook=alone.append, **frozen)
    assert [s.local_step for s in log] == [1, 2, 3, 4, 5]
    losses = [s.loss for s in alone]
    assert [s.loss for s in log] == pytest.approx([(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_the_loss_is_that_of_the_workers_that_took_a_step() -> None:
    """A module that trains on nothing every other time, and an algorithm under which only one worker is active."""

    class Pauses(SimulatorModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    class PausingSimulator(DilocoSimulator):
        module_cls = Pauses

    class Alone(Diloco):
        def active(self, step: int) -> list[int]:
            return [step % 3]

    log = Log()
    s = simulator(PausingSimulator, train_loss_hook=log.append)
    s.train()
    assert [math.isnan(stats.loss) for stats in log] == [False, True] * 5
    log.clear()
    calls: list[Tensor] = []

    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        calls.append(F.cross_entropy(output, y))
        return calls[-1]

    trained(strategy_kwargs={"algorithm": Alone()}, loss_fn=loss_fn, train_loss_hook=log.append)
    assert [stats.loss for stats in log] == [loss.item() for loss in calls]


@pytest.mark.parametrize("which", ["train_loss_hook", "eval_loss_hook"])
def test_a_hook_that_raises_stops_the_run_with_its_own_error(which: str) -> None:
    def hook(stats: TrainStats) -> None:
        if stats.local_step == 8:
            raise ZeroDivisionError("mine")

    s = simulator(eval_dataset=classes(8), save_dir="files", **{which: hook})
    with pytest.raises(ZeroDivisionError, match=r"^mine$"):
        s.train()
    assert s.trainer.global_step == 8
    assert not Path("files/final.ckpt").exists()


@pytest.mark.parametrize("which", ["train_loss_hook", "eval_loss_hook"])
def test_a_hook_that_raises_stop_iteration_stops_the_run_too(which: str) -> None:
    """Lightning would take it for the end of the data."""
    s = simulator(eval_dataset=classes(8), save_dir="files", **{which: lambda stats: next(iter(()))})
    with pytest.raises(RuntimeError, match=f"^`{which}` raised StopIteration, which") as caught:
        s.train()
    assert isinstance(caught.value.__cause__, StopIteration)
    assert not Path("files/final.ckpt").exists()


def test_a_run_that_gets_nowhere_ends() -> None:
    class Empty(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            raise StopIteration

    with pytest.raises(RuntimeError, match=r"^The model or `loss_fn` raised StopIteration, which Lightning would take"):
        trained(loss_fn=lambda output, y: next(iter(())))
    with pytest.raises(
        RuntimeError, match=r"^A pass over `train_dataset` ended without a local step \(local steps: 0\)"
    ):
        trained(train_dataset=Empty(*classes(120).tensors))


def test_a_hook_can_stop_the_run() -> None:
    def hook(stats: TrainStats) -> None:
        s.trainer.should_stop = stats.local_step == 3

    log = Log()
    s = simulator(eval_dataset=classes(8), train_loss_hook=hook, eval_loss_hook=log.append)
    s.train()
    assert [(e.local_step, e.num_diloco_steps) for e in log] == [(3, 1)]
