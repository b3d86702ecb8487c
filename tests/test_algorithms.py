"""Is the interface enough to write other algorithms with, in a few lines each?"""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import processes
import pytest
import torch
from algorithms import Gossip, OneAtATime, PeriodicAveraging
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_diloco import DataParallel, DilocoCallback, DilocoStrategy, SyncAlgorithm
from lightning_diloco.algorithms import Diloco
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.world import World
from lightning_diloco.engine.engine import Engine


class Quiet(Net):
    """Logs nothing."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def run(algorithm: Any, module: Any = None, num_nodes: int = 3, **kwargs: Any) -> Any:
    L.seed_everything(6, verbose=False)
    module = module or Net()
    outer = {"outer_optimizer_kwargs": {"lr": 1.0}} if isinstance(algorithm, Diloco) else {}
    strategy = DilocoStrategy(num_nodes=num_nodes, diloco_interval=3, algorithm=algorithm, **outer)
    t = trainer(strategy, **{"max_epochs": 2, **kwargs})
    t.fit(module, loader(regression_data(54), 3))
    return strategy, module


def test_periodic_averaging_by_hand_is_diloco_with_a_plain_average() -> None:
    by_hand, _ = run(PeriodicAveraging())
    diloco, _ = run(Diloco())
    for worker in range(3):
        assert_same(by_hand.worker_state_dict(worker), diloco.worker_state_dict(worker))
    assert by_hand.outer_steps == diloco.outer_steps == 4
    assert by_hand.ledger.total_bytes == diloco.ledger.total_bytes
    assert {e.what for e in by_hand.ledger.entries} == {"weights", "buffers"}


def test_needs_gradients_refuses_what_it_cannot_serve() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match=r"^DataParallel changes gradients before the inner step"):
        run(DataParallel(), Manual())
    with pytest.raises(MisconfigurationException, match=r"^DataParallel averages gradients, which a gradient scaler"):
        run(DataParallel(), plugins=[scaled])
    lbfgs = Net(lambda p: torch.optim.LBFGS(p))
    with pytest.raises(MisconfigurationException, match=r"^DataParallel needs one backward pass per step, but LBFGS"):
        run(DataParallel(), lbfgs)


def test_gossip() -> None:
    """Groups, slots, alpha, anchors of their own, and a published mean; worker 2 trains by itself."""
    seen: list[Any] = []

    class Look(DilocoCallback):
        def on_outer_step(self, trainer, pl_module, report):
            seen.append((report, [trainer.strategy.worker_state_dict(w) for w in range(3)]))

    class Before(Gossip):
        def after_inner_step(self, step):
            before = [copy_of(dict(self.ctx.weights(w))) for w in range(3)]
            super().after_inner_step(step)
            if self.ctx.taken:
                steps.append((before, [copy_of(dict(self.ctx.anchor(w))) for w in range(3)]))

    steps: list[Any] = []
    strategy, module = run(Before(), Net(batch_norm=False), callbacks=[Look()], max_epochs=1, precision="64-true")
    assert len(seen) == len(steps) == 2
    for (report, after), (before, anchors) in zip(seen, steps, strict=True):
        assert (report.tag, report.participants, report.names) == ("gossip", (0, 1), 4)
        for key in before[0]:
            middle = (before[0][key] + before[1][key]) / 2
            for w in (0, 1):
                mixed = 0.25 * before[w][key] + 0.75 * middle
                torch.testing.assert_close(after[w][key], mixed, rtol=0, atol=1e-12)
                torch.testing.assert_close(anchors[w][key], middle, rtol=0, atol=1e-12)
            assert torch.equal(after[2][key], before[2][key])
            assert not torch.equal(after[0][key], after[1][key])
    size = 8 * sum(p.numel() for p in module.parameters())
    assert [(e.what, e.payload_bytes) for e in strategy.ledger.entries] == [("weights", size)] * 2
    memory = strategy._engine.context.memory
    assert any(t.abs().sum() > 0 for t in memory.slots[0, "middle"].values())
    assert (2, "middle") not in memory.slots
    workers = [strategy.worker_state_dict(w) for w in range(3)]
    for key, value in module.state_dict().items():  # never an untouched θ
        torch.testing.assert_close(value, sum(w[key] for w in workers) / 3, rtol=0, atol=1e-12)


def test_workers_that_are_not_active_stand_still() -> None:
    strategy, _ = run(OneAtATime(), max_epochs=1)
    steps = [
        {int(s["step"].item()) for s in strategy._engine.context.inner.workers[w].states[0].values()} for w in range(3)
    ]
    assert steps == [{2}, {2}, {2}]
    assert strategy.local_steps == 6


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
def test_processes_without_an_active_worker_keep_time(size: int, tmp_path: Path) -> None:
    """Today's step may be nobody's of this process: no hang, and the clocks stay together."""

    def train(size: int) -> Any:
        L.seed_everything(6, verbose=False)
        module, strategy = Quiet(batch_norm=False), DilocoStrategy(4, 3, algorithm=OneAtATime())
        t = trainer(strategy, devices=size, max_epochs=2, accumulate_grad_batches=2)
        t.fit(module, loader(regression_data(112), 4))
        workers = {w: strategy.worker_state_dict(w) for w in strategy.local_workers}
        return workers, module.state_dict(), (t.global_step, strategy.local_steps, strategy.outer_steps)

    (alone,) = processes.run(train, 1, 1, out=tmp_path / "alone")
    several = processes.run(train, size, size, out=tmp_path / "several")
    assert alone[2] == (8, 8, 3)
    for workers, module, done in several:
        assert done == alone[2]
        assert_same(module, alone[1])
        for w, state in workers.items():
            assert_same(state, alone[0][w])


def test_only_some_parameters_can_move() -> None:
    """`outer.step(names, delta)`: only those get a gradient, so fragments keep their own outer state."""

    class Half(Diloco):
        def after_inner_step(self, step):
            ctx = self.ctx
            if ctx.due(step):
                ctx.send(ctx.names[:2], ctx.delta)
            for transfer in ctx.arrived():
                ctx.outer.step(transfer.names, transfer.mean)
                ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)

    L.seed_everything(6, verbose=False)
    module, strategy = Net(batch_norm=False), DilocoStrategy(num_nodes=2, diloco_interval=2, algorithm=Half())
    start = copy_of(module.state_dict())
    trainer(strategy, max_steps=4).fit(module, loader())
    moved = {k: not torch.equal(v, start[k]) for k, v in copy_of(module.state_dict()).items()}
    assert moved == {"net.0.weight": True, "net.0.bias": True, "net.3.weight": False, "net.3.bias": False}
    assert len(strategy.outer_optimizer.state) == 2


def test_weighted_means_and_their_errors() -> None:
    comm = Channel(World(3), lambda: 7)
    tensors = [{"x": torch.tensor([float(10**w)])} for w in range(3)]
    assert comm.mean(["x"], tensors.__getitem__, weights=[1, 2, 1])["x"].item() == 30.25
    assert comm.mean(["x"], tensors.__getitem__, workers=[0, 2])["x"].item() == 50.5
    assert comm.ledger.total_bytes == 0
    for weights in ([1, 2], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match=r"must hold one number ≥ 0 for each of the 3 participants"):
            comm.mean(["x"], tensors.__getitem__, weights=weights)


def test_weights_of_a_transfer() -> None:
    """1, 10, 100 with the weights 1, 2, 1 are 121/4 on average; worker 2 alone has weight 0."""
    engine = three([1.0, 10.0, 100.0])
    ctx = engine.context
    assert ctx.send(["weight"], ctx.weights, weights={0: 1, 1: 2, 2: 1}, what="weights").mean["weight"].item() == 30.25
    only = ctx.send(["weight"], ctx.weights, weights={1: 3, 0: 1, 2: 0}, workers=[1, 2], what="weights")
    assert (only.mean["weight"].item(), only.senders) == (10.0, [1, 2])
    assert [(e.what, e.payload_bytes) for e in ctx.ledger.entries] == [("weights", 8)] * 2


def test_wrong_wishes_of_an_algorithm_are_named() -> None:
    ctx = three([1.0, 2.0, 3.0]).context

    def refused(match: str, **wish: Any) -> None:
        with pytest.raises(ValueError, match=match):
            ctx.send(ctx.names, ctx.delta, **wish)

    for delay in (-1, True, 1.0):
        refused(r"^`delay` \(=.*\) must be an integer ≥ 0", delay=delay)
    for groups in ([[0, 0]], [[0, 1], [1, 2]], [[3]]):
        refused(r"^`workers` or `groups` \(=.*\) must name different workers out of \[0, 1, 2\]", groups=groups)
    refused(r"^`workers` \(=\[0\]\) and `groups` \(=\[\[1\]\]\) can't be combined", workers=[0], groups=[[1]])
    assert ctx.waiting == []
    groups = ctx.send(ctx.names, ctx.weights, groups=[[0, 2], [1]], what="weights")
    assert [groups.mean_of(w)["weight"].item() for w in range(3)] == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="A transfer among 2 groups of workers has no common mean"):
        groups.mean  # noqa: B018


def test_a_delta_that_theta_has_taken_is_not_read_any_more() -> None:
    ctx = three([1.0, 2.0, 6.0]).context
    transfer = ctx.send(ctx.names, ctx.delta)
    assert transfer.mean["weight"].item() == -3.0  # θ = 0
    ctx.outer.step(transfer.names, transfer.mean)
    assert ctx.outer.tensors["weight"].item() == 3.0
    with pytest.raises(RuntimeError, match=r"Read `transfer\.mean` before `ctx\.outer\.step`"):
        transfer.mean["weight"]


def test_positions_of_a_parameter_can_be_merged() -> None:
    module = torch.nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.arange(6.0).view(2, 3))
    engine = engine_of(module, 2)
    ctx = engine.context
    index, values = {"weight": torch.tensor([1, 5])}, {"weight": torch.tensor([10.0, 50.0], dtype=torch.float64)}
    ctx.merge([1], ["weight"], values, index=index)
    ctx.merge([0], ["weight"], values, alpha=0.5, index=index)
    assert ctx.weights(1)["weight"].tolist() == [[0, 10, 2], [3, 4, 50]]
    assert ctx.weights(0)["weight"].tolist() == [[0, 5.5, 2], [3, 4, 27.5]]


def engine_of(module: Any, num_workers: int) -> Engine:
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    outer = partial(torch.optim.SGD, lr=1.0)
    return Engine(module, [inner], num_workers=num_workers, interval=1, algorithm=Diloco(), outer_factory=outer)


def three(values: list[float]) -> Engine:
    """θ = 0, and a weight per worker."""
    module = torch.nn.Linear(1, 1, bias=False).double()
    module.weight.data.zero_()
    engine = engine_of(module, 3)
    for w, value in enumerate(values):
        engine.context.replicas.tensors(w)["weight"].fill_(value)
    return engine


def test_alpha_mixes_and_is_checked() -> None:
    module = torch.nn.Linear(1, 1, bias=False).double()
    module.weight.data.fill_(4.0)
    ctx = engine_of(module, 2).context
    target = {"weight": torch.zeros(1, 1, dtype=torch.float64)}
    ctx.merge([1], ["weight"], target, alpha=0.25)
    assert [ctx.weights(w)["weight"].item() for w in range(2)] == [4.0, 1.0]
    ctx.merge([1], ["weight"], {"weight": torch.full((1, 1), float("nan"))}, alpha=0.0)
    ctx.merge([1], ["weight"], target)
    assert ctx.weights(1)["weight"].item() == 0.0
    with pytest.raises(ValueError, match=r"^`alpha` \(=1.5\) must lie between 0"):
        ctx.merge([1], ["weight"], target, alpha=1.5)


def test_a_transfer_that_nobody_takes_is_an_error() -> None:
    """Algorithms are users' code."""

    class Forgets(Diloco):
        def after_inner_step(self, step):
            self.ctx.send(self.ctx.names, self.ctx.delta, tag="mine", delay=1)
            self.ctx.arrived("another")

    with pytest.raises(
        RuntimeError, match=r"^Forgets took no notice of a transfer that arrived in local step 2 \(sent"
    ):
        run(Forgets())


class Minimal(SyncAlgorithm):
    """Its author has forgotten nothing but `after_inner_step`: half of the model is sent, with a delay."""

    outer_defaults: ClassVar = {"lr": 1.0, "momentum": 0.5}

    def after_inner_step(self, step):
        ctx = self.ctx
        if ctx.due(step):
            ctx.send(ctx.names[:2], ctx.delta, delay=2)
        for transfer in ctx.arrived():
            count = ctx.memo("arrivals").setdefault("count", torch.zeros((), dtype=torch.int64))
            count += 1
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors, alpha=0.5)
            for w in ctx.local_workers:
                ctx.slot(w, "last")[ctx.names[0]].copy_(ctx.weights(w)[ctx.names[0]])


def minimal(folder: Path, resume: Path | None = None) -> Any:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if resume is None and trainer.global_step in (4, 7):
                trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

    reports: list[Any] = []

    class Look(DilocoCallback):
        def on_outer_step(self, trainer, pl_module, report):
            reports.append(report)

    L.seed_everything(6 if resume is None else 7, verbose=False)
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=3, algorithm=Minimal())
    t = trainer(strategy, max_epochs=2, callbacks=[Save(), Look()])
    t.fit(Net(batch_norm=False), loader(regression_data(54), 3), ckpt_path=resume)
    memory = strategy._engine.context.memory
    return strategy, reports, memory


@pytest.mark.parametrize("step", [4, 7])
def test_files_bytes_and_reports_come_for_free(step: int, tmp_path: Path) -> None:
    whole, reports, memory = minimal(tmp_path)
    resumed, later, restored = minimal(tmp_path, tmp_path / f"{step}.ckpt")
    for w in range(3):
        assert_same(resumed.worker_state_dict(w), whole.worker_state_dict(w))
        assert_same(restored.slots[w, "last"], memory.slots[w, "last"])
    assert_same(resumed.outer_state_dict(), whole.outer_state_dict())
    assert restored.memos["arrivals"]["count"].item() == memory.memos["arrivals"]["count"].item() == len(reports) == 4
    assert [(r.sent_step, r.step, r.kind) for r in reports] == [
        (3, 5, "round"),
        (6, 8, "round"),
        (9, 11, "round"),
        (12, 12, "flush"),
    ]
    key = [(r.step, r.outer_step, r.payload_bytes, r.pseudo_gradient_norm, r.cosine) for r in reports]
    assert key[-len(later) :] == [
        (r.step, r.outer_step, r.payload_bytes, r.pseudo_gradient_norm, r.cosine) for r in later
    ]
    half = 4 * sum(p.numel() for p in list(Net(batch_norm=False).parameters())[:2])
    assert resumed.ledger.total_bytes == whole.ledger.total_bytes == 4 * half
    assert {r.names for r in reports} == {2}
