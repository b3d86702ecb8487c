"""Do whole numbers that you can check in your head come out? Tests quote the sentence they prove."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from helpers import trainer
from lightning.pytorch.callbacks import Callback
from observers import Rounds, Track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_diloco import DilocoStrategy

SGD = torch.optim.SGD
FAR = 10**6  # an interval that no run reaches


class Line(L.LightningModule):
    """One weight that starts at 100; a batch is its gradient. Two buffers sum the gradients up."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(100.0, dtype=torch.float64))
        self.register_buffer("floating", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("integer", torch.tensor(0))
        self.momentum = momentum

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.floating += batch[0].sum()
        self.integer += batch[0].sum().long()
        return (batch[0] * self.w).sum()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1.0, momentum=self.momentum)


def fit_line(
    gradients: list[float],
    steps: int,
    interval: int,
    outer: dict[str, Any] | None = None,
    momentum: float = 0.0,
    callbacks: Sequence[Callback] = (),
    make: type[Line] = Line,
    **policies: Any,
) -> tuple[Line, Track, Rounds]:
    """Worker i's gradient is ``gradients[i]`` at every step; the inner optimizer is SGD(1, momentum)."""
    module, track, rounds = make(momentum), Track(), Rounds()
    strategy = DilocoStrategy(
        len(gradients),
        interval,
        outer_optimizer_kwargs=outer,
        partition=lambda dataset, n: [[worker] * steps for worker in range(n)],
        **policies,
    )
    data = TensorDataset(torch.tensor(gradients, dtype=torch.float64))
    trainer(strategy, max_epochs=1, callbacks=[*callbacks, track, rounds]).fit(module, DataLoader(data, batch_size=1))
    return module, track, rounds


def weight(states: list[dict[str, Tensor]], name: str = "w") -> list[float]:
    return [state[name].item() for state in states]


def test_whole_numbers():
    """4. One round of the outer step ≡ `torch.optim.SGD(nesterov=True)` fed mean Δ, on whole numbers you can check in
    your head.
    """
    # Three workers with the gradients 1, 4 and 7 and inner SGD(1): a local step moves them by −1, −4 and −7.
    # H = 4: Δ_i = 4, 16, 28 and Δ = 16. Outer Nesterov(lr 1, μ 1/2):  b ← b/2 + Δ;  θ ← θ − (Δ + b/2).
    #   round 1 (steps 1-4)     Δ = 16   b =      16 = 16   θ = 100 − (16 +  8) = 76
    #   round 2 (steps 5-8)     Δ = 16   b =  8 + 16 = 24   θ =  76 − (16 + 12) = 48
    #   round 3 (steps 9-12)    Δ = 16   b = 12 + 16 = 28   θ =  48 − (16 + 14) = 18
    #   flush   (steps 13, 14)  Δ =  8   b = 14 +  8 = 22   θ =  18 − ( 8 + 11) = −1
    module, track, rounds = fit_line([1.0, 4.0, 7.0], 14, 4, {"lr": 1.0, "momentum": 0.5, "nesterov": True})

    assert weight(track.theta) == [100] * 3 + [76] * 4 + [48] * 4 + [18] * 3
    assert weight(track.module) == weight(track.theta)
    assert [weight(workers) for workers in track.workers] == [
        *[[99, 96, 93], [98, 92, 86], [97, 88, 79], [76, 76, 76]],
        *[[75, 72, 69], [74, 68, 62], [73, 64, 55], [48, 48, 48]],
        *[[47, 44, 41], [46, 40, 34], [45, 36, 27], [18, 18, 18]],
        *[[17, 14, 11], [16, 10, 4]],
    ]
    assert module.w.item() == -1

    assert rounds.seen == [(4, 1, "round"), (8, 2, "round"), (12, 3, "round"), (14, 4, "flush")]
    reports = rounds.reports
    assert [r.pseudo_gradient_norm for r in reports] == [16, 16, 16, 8]
    assert reports[0].drift == (4 / 100, 16 / 100, 28 / 100)  # relative to θ before the step
    assert reports[3].drift == (2 / 18, 8 / 18, 14 / 18)
    assert [r.cosine for r in reports] == pytest.approx([1, 1, 1, 1])
    assert [r.payload_bytes for r in reports] == [3 * 8] * 4  # Δ and two buffers
    assert [r.participants for r in reports] == [(0, 1, 2)] * 4


def test_whole_numbers_of_plain_averaging():
    # Gradients 2 and 6, H = 3: θ_i = 100 − 6 and 100 − 18, mean 88; then 76; then one step of −2 and −6, mean 72.
    module, track, rounds = fit_line([2.0, 6.0], 7, 3, {"lr": 1.0})
    assert weight(track.theta) == [100, 100, 88, 88, 88, 76, 76]
    assert weight(track.workers[-1]) == [74, 70]
    assert module.w.item() == 72
    assert [r.pseudo_gradient_norm for r in rounds.reports] == [12, 12, 4]


def test_numbers_of_the_default_outer_optimizer():
    """Outer Nesterov lr 0.7, μ 0.9: the first outer step moves η(1+μ)Δ (1.33 Δ)."""
    # Gradients 60 and 140, H = 1: Δ = 100, b = 100, θ = 100 − 0.7·(100 + 0.9·100) = 100 − 133 = −33.
    # Then Δ = 100, b = 90 + 100 = 190, θ = −33 − 0.7·(100 + 0.9·190) = −33 − 189.7 = −222.7.
    _, track, _ = fit_line([60.0, 140.0], 2, 1)
    assert weight(track.theta) == pytest.approx([-33, -222.7], abs=1e-12)


def test_whole_numbers_of_inner_momentum():
    """Inner optimizer state is **kept** per worker across rounds, neither reset nor averaged."""
    # Gradients g = 1 and 3, inner SGD(1, momentum 1): the velocities are g, 2g, 3g, … H = 2, θ becomes the mean.
    #   round 1   θ_i = 100 −  g, then − 2g     θ = 100 −  3·2 = 94
    #   round 2   θ_i =  94 − 3g, then − 4g     θ =  94 −  7·2 = 80    (with a reset: 94 − 3·2 = 88)
    #   round 3   θ_i =  80 − 5g, then − 6g     θ =  80 − 11·2 = 58    (with averaging: θ_i = 80 − 8 − g, …)
    _, track, _ = fit_line([1.0, 3.0], 6, 2, {"lr": 1.0}, momentum=1.0)
    assert [weight(workers) for workers in track.workers] == [
        *[[99, 97], [94, 94]],
        *[[91, 85], [80, 80]],
        *[[75, 65], [58, 58]],
    ]


class Faster(Line):
    """Raises the learning rate by 1 before every step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.param_groups[0]["lr"] += 1
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def test_whole_numbers_of_learning_rates():
    """What is written into an optimizer's groups during a worker's turn belongs to that worker, what is written between
    turns to all.
    """

    class Raise(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] += 10

    # Gradients 1 and 2. Both learning rates are 1 + 1, then 2 + 10 + 1 = 13, then 13 + 10 + 1 = 24.
    _, track, _ = fit_line([1.0, 2.0], 3, FAR, callbacks=[Raise()], make=Faster, final_sync=False)
    assert [weight(workers) for workers in track.workers] == [[98, 96], [85, 70], [61, 22]]


def test_whole_numbers_of_buffers():
    """Floating buffers at a sync: mean to all; worker 0's to all; each keeps its own (θ then shows the mean). Integer
    buffers: worker 0's to all (local: kept).
    """
    # Gradients 1 and 3, H = 2: in a round the sums grow by 2 and 6 (mean 4), in the flush after one step by 1 and 3.
    seen = {}
    for policy in ("average", "first", "local"):
        module, track, _ = fit_line([1.0, 3.0], 5, 2, buffers=policy)
        for name in ("floating", "integer"):
            workers = [weight(states, name) for states in track.workers]
            seen[policy, name] = workers, [*weight(track.theta, name), getattr(module, name).item()]
    theta_mean, theta_first = [0, 4, 4, 8, 8, 10], [0, 2, 2, 4, 4, 5]
    from_first = [[1, 3], [2, 2], [3, 5], [4, 4], [5, 7]]
    kept = [[1, 3], [2, 6], [3, 9], [4, 12], [5, 15]]
    assert seen == {
        ("average", "floating"): ([[1, 3], [4, 4], [5, 7], [8, 8], [9, 11]], theta_mean),
        ("average", "integer"): (from_first, theta_first),
        ("first", "floating"): (from_first, theta_first),
        ("first", "integer"): (from_first, theta_first),
        ("local", "floating"): (kept, theta_mean),
        ("local", "integer"): (kept, theta_first),
    }


def test_whole_numbers_of_the_average_of_the_workers():
    """The mean of the replicas and of their floating buffers, worker 0's integer buffers. What is written to weights
    that were put into the module for a while is dropped.
    """
    # Gradients 1, 4 and 7, H = 2: mean 4, so that on average the weight falls by 4 per step and `floating` grows by 4.
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            assert isinstance(trainer.strategy, DilocoStrategy)
            with trainer.strategy.weights("average"):
                seen.append(tuple(t.item() for t in pl_module.state_dict().values()))
            for which in (0, 1, 2, "average", "outer"):
                with trainer.strategy.weights(which):
                    for tensor in (pl_module.w.data, pl_module.floating, pl_module.integer):
                        tensor.zero_()

    module, track, _ = fit_line([1.0, 4.0, 7.0], 5, 2, {"lr": 1.0}, callbacks=[Look()])
    assert seen == [(96, 4, 1), (92, 8, 2), (88, 12, 3), (84, 16, 4), (80, 20, 5)]
    assert weight(track.theta) == [100, 92, 92, 84, 84]
    assert [t.item() for t in module.state_dict().values()] == [80, 20, 5]
