"""Do the invariants that prove an implementation of DiLoCo hold? Each test quotes the sentence it proves."""

import copy
import itertools
from collections import Counter
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, differs, loader, regression_data, trainer
from lightning.pytorch.callbacks import Callback
from observers import Rounds, Track, expected_rounds
from reference import shards

from lightning_diloco import Diloco, DilocoStrategy

SGD = torch.optim.SGD
NESTEROV = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
FAR = 10**6  # an interval that no run reaches

# -------------------------------------------------------------------------------------------- 1: the plain run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("interval", [1, 3, FAR])
def test_one_worker_with_plain_averaging_is_the_plain_trainer(interval, dtype):
    """1. N=1, outer SGD lr 1, no momentum ≡ plain `Trainer` (bit for bit, any dtype, because "assign the mean")."""
    results = []
    for strategy in ("auto", DilocoStrategy(1, interval, outer_optimizer_kwargs={"lr": 1.0})):
        torch.manual_seed(1)
        module = Net(dropout=0.2).to(dtype)
        trainer(strategy).fit(module, loader(regression_data(24, dtype=dtype)))
        results.append(copy_of(module.state_dict()))
    assert_same(*results)
    assert differs(results[0], Net().to(dtype).state_dict())


# -------------------------------------------------------------------------------------------- 2: data parallel


@pytest.mark.parametrize("num_workers", [2, 3, 4])
@pytest.mark.parametrize(
    "momentum", [{}, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.8}], ids=["none", "nesterov", "heavy ball"]
)
def test_a_sync_at_every_step_is_data_parallel_training(num_workers, momentum):
    """2. H=1, inner SGD(lr), outer SGD(1) ≡ data-parallel SGD on the joined batch; with outer Nesterov(1, μ) ≡
    data-parallel Nesterov-SGD(lr, μ).
    """
    L.seed_everything(2, verbose=False)
    module = Net(partial(SGD, lr=0.1), batch_norm=False).double()
    plain = copy.deepcopy(module)
    data = regression_data(16 * num_workers, dtype=torch.float64)
    track = Track()
    strategy = DilocoStrategy(num_workers, 1, outer_optimizer_kwargs={"lr": 1.0, **momentum})
    trainer(strategy, callbacks=[track]).fit(module, loader(data, batch_size=4))

    optimizer = SGD(plain.parameters(), lr=0.1, **momentum)
    steps = list(zip(*shards(data.tensors, num_workers, batch_size=4, epochs=2, seed=2), strict=True))
    assert len(steps) == len(track.theta) == 8
    for theta, batches in zip(track.theta, steps, strict=True):
        joined = [torch.cat(tensors) for tensors in zip(*batches, strict=True)]
        assert len(joined[0]) == 4 * num_workers
        optimizer.zero_grad()
        plain.loss(joined).backward()
        optimizer.step()
        for name, value in plain.state_dict().items():
            assert float((theta[name] - value).abs().max()) <= 1e-12


# -------------------------------------------------------------------------------------------- 3: workers alike


@pytest.mark.slow
@pytest.mark.parametrize("outer", [NESTEROV, {"lr": 1.0}], ids=["nesterov", "mean"])
def test_workers_with_the_same_data_are_one_worker(outer):
    """3. Same data and seed on all workers ⇒ result independent of N. (Here bit for bit, float32, AdamW, BatchNorm.)"""
    results = []
    for num_workers in (1, 2, 3, 5, 6, 7):
        L.seed_everything(3, verbose=False)
        module = Net()
        strategy = DilocoStrategy(
            num_workers, 3, outer_optimizer_kwargs=outer, partition=lambda dataset, n: [list(range(len(dataset)))] * n
        )
        trainer(strategy).fit(module, loader(regression_data(16), shuffle=False))
        assert (strategy.local_steps, strategy.outer_steps) == (8, 3)
        for worker in range(num_workers):
            assert_same(strategy.worker_state_dict(worker), strategy.outer_state_dict())
        results.append(copy_of(module.state_dict()))
    for result in results:
        assert_same(result, results[0])
    assert differs(results[0], Net().state_dict())


# -------------------------------------------------------------------------------------------- 5: after a sync


class Separate(Callback):
    """Asserts between steps that no two owners of tensors share memory; counts how often it saw each owner."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(trainer.strategy, DilocoStrategy)
        context = trainer.strategy._engine.context
        owned: dict[str, list[Any]] = {
            "module": [*pl_module.parameters(), *pl_module.buffers()],
            "θ": [*context.outer.tensors.values(), *(b for _, b in context.outer.state.named_buffers())],
            "outer state": [v for s in trainer.strategy.outer_optimizer.state.values() for v in s.values()],
            "θ for users": list(trainer.strategy.outer_state_dict().values()),
        }
        for i in context.workers:
            state = context.replicas.states[i]
            owned[f"worker {i}"] = [*state.tensors.values(), *(b for _, b in state.named_buffers())]
            owned[f"worker {i} for users"] = list(trainer.strategy.worker_state_dict(i).values())
            owned[f"inner state {i}"] = [
                v for s in context.inner.workers[i].states for values in s.values() for v in values.values()
            ]
        owner_of: dict[int, str] = {}
        for owner, tensors in owned.items():
            for tensor in filter(torch.is_tensor, tensors):
                first = owner_of.setdefault(tensor.untyped_storage().data_ptr(), owner)
                assert first == owner, f"{owner} shares memory with {first}"
                self.seen[owner] += 1

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.on_train_batch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)


@pytest.mark.parametrize("inner_state", ["keep", "reset", "average"])
@pytest.mark.parametrize(("outer", "buffers"), [(NESTEROV, "average"), ({"lr": 1.0}, "first")])
def test_after_a_sync_all_workers_equal_the_outer_model_and_share_no_memory(outer, buffers, inner_state):
    """5. After a sync every θ_i equals θ and shares no storage with it or with another worker (`data_ptr`)."""
    track, separate, module = Track(), Separate(), Net()
    strategy = DilocoStrategy(3, 3, outer_optimizer_kwargs=outer, buffers=buffers, inner_state=inner_state)
    trainer(strategy, callbacks=[track, separate]).fit(module, loader(regression_data(48)))

    assert len(track.theta) == 8
    for step, (theta, workers) in enumerate(zip(track.theta, track.workers, strict=True), start=1):
        if step % 3 == 0:
            for worker in workers:
                assert_same(worker, theta)
        else:
            for a, b in itertools.combinations([theta, *workers], 2):
                assert differs(a, b)
        assert_same(track.module[step - 1], theta)
    for worker in range(3):
        assert_same(strategy.worker_state_dict(worker), copy_of(module.state_dict()))

    parts = [f"{kind} {i}" for kind in ("worker", "inner state") for i in range(3)]
    assert all(separate.seen[owner] for owner in ["module", "θ", *parts])
    assert bool(separate.seen["outer state"]) == ("momentum" in outer)


class LooksAtInnerState(Diloco):
    """Copies all inner states right before and right after whatever happens at the end of a local step."""

    def __init__(self) -> None:
        self.syncs = 0

    def _states(self) -> Any:
        workers = self.ctx.inner.workers
        return [[list(s.values()) for s in workers[i].states] for i in workers], [workers[i].control for i in workers]

    def after_inner_step(self, step: int) -> None:
        before = copy.deepcopy(self._states())
        super().after_inner_step(step)
        torch.testing.assert_close(self._states()[0], before[0], atol=0, rtol=0)
        assert self._states()[1] == before[1]
        assert torch.stack([state[0][0]["exp_avg"] for state in before[0]]).std(0).any()
        self.syncs += len(self.ctx.taken)


def test_a_sync_leaves_the_inner_state_untouched():
    """5. (After a sync …) inner state untouched."""
    algorithm = LooksAtInnerState()
    trainer(DilocoStrategy(3, 3, algorithm=algorithm)).fit(Net(), loader(regression_data(72)))
    assert algorithm.syncs == 4


# -------------------------------------------------------------------------------------------- 7: θ frozen, θ far


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9, "nesterov": True}])
def test_outer_lr_0_freezes_theta(momentum):
    """7. Outer lr 0 ⇒ θ frozen."""
    rounds, track, module = Rounds(), Track(), Net(batch_norm=False)
    start = copy_of(module.state_dict())
    strategy = DilocoStrategy(3, 2, outer_optimizer_kwargs={"lr": 0.0, **momentum})
    trainer(strategy, max_epochs=-1, max_steps=5, callbacks=[rounds, track]).fit(module, loader())
    assert rounds.seen == expected_rounds(5, 2)
    assert all(r.pseudo_gradient_norm > 0 for r in rounds.reports)
    for theta in [*track.theta, copy_of(module.state_dict()), strategy.outer_state_dict()]:
        assert_same(theta, start)
    for step, workers in enumerate(track.workers, start=1):
        assert [differs(worker, start) for worker in workers] == [step % 2 != 0] * 3


def test_without_an_outer_step_in_reach_workers_differ_and_theta_stays():
    rounds, track, module = Rounds(), Track(), Net()
    start = copy_of(module.state_dict())
    strategy = DilocoStrategy(3, FAR, final_sync=False)
    trainer(strategy, callbacks=[rounds, track]).fit(module, loader(regression_data(36)))
    assert rounds.seen == []
    assert (strategy.local_steps, strategy.outer_steps) == (6, 0)
    for workers in track.workers:
        for a, b in itertools.combinations([start, *workers], 2):
            assert differs(a, b)
    for theta in [*track.theta, *track.module, copy_of(module.state_dict())]:
        assert_same(theta, start)
