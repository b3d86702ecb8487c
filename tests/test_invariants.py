"""Do the invariants that prove an implementation of DiLoCo hold? Each test quotes the sentence it proves."""

import copy
import itertools
import signal
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, differs, loader, regression_data, trainer
from lightning.pytorch.callbacks import Callback
from reference import Reference, shards
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_diloco import Diloco, DilocoCallback, DilocoStrategy, OuterStepReport
from lightning_diloco.comm import means
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.means import Differences, mean_of
from lightning_diloco.comm.tensors import flat
from lightning_diloco.comm.world import World
from lightning_diloco.engine.engine import Engine

SGD = torch.optim.SGD
NESTEROV = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
FAR = 10**6  # an interval that no run reaches


class Track(Callback):
    """θ, all workers and the module after every local step."""

    def __init__(self) -> None:
        self.theta: list[dict[str, Tensor]] = []
        self.workers: list[list[dict[str, Tensor]]] = []
        self.module: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DilocoStrategy)
        self.theta.append(strategy.outer_state_dict())
        self.workers.append([strategy.worker_state_dict(i) for i in range(strategy.num_workers)])
        self.module.append(copy_of(pl_module.state_dict()))


class Rounds(DilocoCallback):
    """The reports of a fit, and between them the inner steps that each worker really took."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[OuterStepReport] = []
        self.inner_steps: list[dict[int | None, int]] = []
        self._count: Counter[int | None] = Counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        assert isinstance(trainer.strategy, DilocoStrategy)
        self._count[trainer.strategy.current_worker] += 1

    def on_outer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, report: OuterStepReport) -> None:
        self.reports.append(report)
        self.inner_steps.append(dict(self._count))
        self._count.clear()

    @property
    def seen(self) -> list[tuple[int, int, str]]:
        return [(r.step, r.outer_step, r.kind) for r in self.reports]


def expected_rounds(steps: int, interval: int, flush: bool = True) -> list[tuple[int, int, str]]:
    ends = [(t, "round") for t in range(interval, steps + 1, interval)]
    ends += [(steps, "flush")] if flush and steps % interval else []
    return [(t, k, kind) for k, (t, kind) in enumerate(ends, start=1)]


# ---------------------------------------------------------------------------------------- 1: the plain run


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


# ---------------------------------------------------------------------------------------- 2: data parallel


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


# ---------------------------------------------------------------------------------------- 3: workers alike


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


# ---------------------------------------------------------------------------------------- 4: whole numbers


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


# ---------------------------------------------------------------------------------------- 5: after a sync


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

    def after_inner_step(self, step: int) -> Any:
        before = copy.deepcopy(self._states())
        reports = super().after_inner_step(step)
        torch.testing.assert_close(self._states()[0], before[0], atol=0, rtol=0)
        assert self._states()[1] == before[1]
        assert torch.stack([state[0][0]["exp_avg"] for state in before[0]]).std(0).any()
        self.syncs += len(reports)
        return reports


def test_a_sync_leaves_the_inner_state_untouched():
    """5. (After a sync …) inner state untouched."""
    algorithm = LooksAtInnerState()
    trainer(DilocoStrategy(3, 3, algorithm=algorithm)).fit(Net(), loader(regression_data(72)))
    assert algorithm.syncs == 4


# ---------------------------------------------------------------------------------------- 6: rounds


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


# ---------------------------------------------------------------------------------------- 7: θ frozen, θ far


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


# ---------------------------------------------------------------------------------------- the mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8])
def test_the_mean_of_identical_tensors_is_the_tensor(count, dtype):
    """x_0 + (Σ_{i>0}(x_i − x_0))/N: exact when all are equal; a plain sum / N is not, for N = 3, 5, 6, 7."""
    x = (torch.randn(1000, dtype=torch.complex64 if dtype.is_complex else torch.float64) * 100).to(dtype)
    tensors = [x.clone() for _ in range(count)]
    accumulated = torch.float32 if dtype.itemsize == 2 else dtype
    for weights in (None, [1.0] * count, [0.1 * (i + 1) for i in range(count)], [0.0] * (count - 1) + [0.3]):
        mean = mean_of(tensors, weights)
        assert mean.dtype == accumulated
        assert torch.equal(mean, x.to(accumulated))
        assert mean.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}
    assert all(torch.equal(t, x) for t in tensors)


def test_the_mean_of_identical_infinities_is_the_infinity():
    """Attention masks hold −inf, running extrema start at ±inf."""
    x = torch.tensor([0.0, -torch.inf, torch.inf])
    assert torch.equal(mean_of([x, x.clone(), x.clone()]), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_of_whole_numbers(dtype):
    """(1 + 4 + 7)/3 = 4; with the weights 1, 2, 1 (also as 3, 6, 3): (1 + 8 + 7)/4 = 4, with 1, 0, 2: 15/3 = 5."""
    tensors = [torch.tensor([x, -x, 10 * x], dtype=dtype) for x in (1.0, 4.0, 7.0)]

    def mean(weights: list[float] | None = None) -> list[float]:
        return mean_of(tensors, weights).tolist()

    assert mean() == mean([1, 1, 1]) == mean([0.5, 0.5, 0.5]) == [4, -4, 40]
    assert mean([1, 2, 1]) == mean([3, 6, 3]) == [4, -4, 40]
    assert mean([1, 0, 2]) == [5, -5, 50]
    assert mean([0, 0, 1]) == [7, -7, 70]
    assert mean([1, 0, 0]) == [1, -1, 10]


def test_a_mean_is_taken_in_pieces_of_bounded_size(monkeypatch):
    """All workers' pseudo-gradients at once would be N more models in memory."""

    class Look:
        def add(self, what, name, start, rows, mean):
            seen.append((name, start, len(mean)))

    def tensors(seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"a": (5, 3), "few": (2,), "none": (0, 4), "scalar": ()}
        real = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        return real | {"complex": torch.randn(2, 2, generator=generator, dtype=torch.complex128).T}

    seen, reads, flattened = [], [], []
    theta, held = tensors(9), {w: tensors(w) for w in range(3)}
    names = list(theta)
    over = Channel(World(3), lambda: 0)
    over.observer = Look()
    differences = {n: [theta[n] - held[w][n] for w in range(3)] for n in names}
    pairs = [torch.view_as_real(d) for d in differences.pop("complex")]  # so that no layout divides complex numbers
    whole = {n: mean_of(d, [1, 2, 3]) for n, d in differences.items()}
    whole["complex"] = torch.view_as_complex(mean_of(pairs, [1, 2, 3]).contiguous())
    monkeypatch.setattr(means, "CHUNK", 12)  # 4 elements of each worker
    monkeypatch.delattr(Differences, "__getitem__")  # nobody asks for a whole one
    monkeypatch.setattr(Differences, "__abstractmethods__", frozenset())
    monkeypatch.setattr(means, "flat", lambda tensor: flattened.append(tensor) or flat(tensor))
    mean = over.mean(names, lambda w: reads.append(w) or Differences(names, theta, held[w]), weights=[1, 2, 3])
    assert reads == [0, 1, 2]  # each worker is asked once
    assert len(flattened) == 2 * 3 * len(names)  # which copies tensors that are stored in another order
    assert_same(mean, whole)
    assert mean["complex"].shape == (2, 2)
    assert seen[:5] == [("a", 0, 4), ("a", 4, 4), ("a", 8, 4), ("a", 12, 3), ("few", 0, 2)]
    assert seen[5:] == [("scalar", 0, 1), ("complex", 0, 4), ("complex", 4, 4)]
    assert over.ledger.total_bytes == 8 * (15 + 2 + 0 + 1 + 2 * 4)


def test_half_types_are_accumulated_in_float32():
    """1 and its neighbour in bfloat16, 1 + 2^-7: the mean of three lies between them, where bfloat16 has nothing."""
    one, next_to_one = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1 + 2**-7], dtype=torch.bfloat16)
    assert mean_of([one, one, next_to_one]).item() == pytest.approx(1 + 2**-7 / 3, abs=1e-7)


class Constant(Net):
    """Random numbers and a causal mask as buffers, and as frozen parameters."""

    names = ("rotary", "mask", "frozen", "frozen_mask")

    def __init__(self) -> None:
        super().__init__()
        mask = torch.full((3, 3), -torch.inf).triu(1)
        self.register_buffer("rotary", torch.randn(100))
        self.register_buffer("mask", mask)
        self.frozen = nn.Parameter(torch.randn(100), requires_grad=False)
        self.frozen_mask = nn.Parameter(mask.clone(), requires_grad=False)
        self.validated: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(copy_of(self.state_dict()))


@pytest.mark.parametrize("eval_weights", ["average", "outer", "worker"])
def test_what_all_workers_hold_alike_is_left_alone(eval_weights):
    """Tensors bitwise equal on all workers are left alone (else frozen weights and rotary tables would drift)."""
    track, module = Track(), Constant()
    start = copy_of(module.state_dict())
    strategy = DilocoStrategy(3, 2, eval_weights=eval_weights)
    t = trainer(strategy, max_epochs=1, callbacks=[track], num_sanity_val_steps=0, val_check_interval=1)
    t.fit(module, loader(regression_data(36)), loader(regression_data(4), shuffle=False))
    assert len(track.theta) == len(module.validated) == 3
    states = [*track.theta, *track.module, *itertools.chain(*track.workers), copy_of(module.state_dict())]
    for state in [*states, *module.validated]:
        for name in Constant.names:
            assert torch.equal(state[name], start[name]), name


# ---------------------------------------------------------------------------------------- without a Trainer


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize(
    ("inner", "batch_norm"), [(partial(SGD, lr=0.05, momentum=0.9), True), (partial(torch.optim.AdamW, lr=0.02), False)]
)
@pytest.mark.parametrize("outer", [partial(SGD, **NESTEROV), partial(SGD, lr=0.5), None])
def test_the_engine_runs_without_a_trainer_and_agrees_with_the_twin(outer, inner, batch_norm, num_workers):
    """The engine runs without a Trainer."""
    model = Net(batch_norm=batch_norm).double()
    batches = shards(regression_data(60, dtype=torch.float64).tensors, num_workers, 5, epochs=1, seed=9)
    batches = [own[:4] * 2 for own in batches]
    twin = Reference(model, batches, Net.loss, inner, outer, interval=3)

    optimizer = inner(model.parameters())
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    engine = Engine(
        model,
        [optimizer],
        num_workers=num_workers,
        interval=3,
        algorithm=Diloco(),
        outer_factory=outer or partial(SGD, lr=1.0),
    )

    def same(ours: Any, theirs: Any) -> None:
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert float((ours[name] - value).abs().max()) <= 1e-12, name

    seen: list[tuple[int, int, str]] = []
    for step, (theta, workers) in zip(zip(*batches, strict=True), twin.history, strict=True):
        for w in engine.local_workers:
            with engine.turn(w):
                assert engine.current_worker == w
                optimizer.load_state_dict(optimizer.state_dict())  # gives the optimizer a new `state` object
                optimizer.zero_grad()
                model.loss(step[w]).backward()
                optimizer.step()
        assert engine.current_worker is None
        seen += [(r.step, r.outer_step, r.kind) for r in engine.end_step()]
        same(engine.views.state_dict("outer"), theta)
        for w, worker in enumerate(workers):
            same(engine.views.state_dict(w), worker)
    seen += [(r.step, r.outer_step, r.kind) for r in engine.flush()]
    assert list(engine.flush()) == []
    engine.finish()
    engine.close()

    assert seen == [(3, 1, "round"), (6, 2, "round"), (8, 3, "flush")]
    same(model.state_dict(), twin.theta.state_dict())
    same(engine.views.state_dict("outer"), twin.theta.state_dict())
    for w, worker in enumerate(twin.workers):
        same(engine.views.state_dict(w), worker.state_dict())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
