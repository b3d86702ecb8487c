"""Is the interface enough to write other algorithms with, in a few lines each?"""

from collections.abc import Collection, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from algorithms import DataParallel, Gossip, PeriodicAveraging
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DistributedSampler

from lightning_diloco import DilocoCallback, DilocoStrategy, OuterStepReport, SyncAlgorithm
from lightning_diloco.algorithms import Diloco
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.world import World
from lightning_diloco.engine.engine import Engine


class OneAtATime(SyncAlgorithm):
    """Only worker (step mod N) steps."""

    def active(self, step: int) -> Collection[int]:
        return [step % self.ctx.num_workers]

    def after_inner_step(self, step: int) -> Sequence[OuterStepReport]:
        return []


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


@pytest.mark.parametrize("clip", [None, 0.05])
def test_data_parallel_is_the_joined_batch(clip: float | None) -> None:
    """'All backwards first, then all inner steps': N workers on their shards ≡ one worker on the joined batches."""
    make = lambda: Net(lambda p: torch.optim.AdamW(p, lr=1e-2), batch_norm=False)  # noqa: E731
    strategy, _ = run(DataParallel(), make(), precision="64-true", gradient_clip_val=clip)
    data = regression_data(54)
    joined: list[list[int]] = []
    for epoch in range(2):
        shards = [DistributedSampler(data, num_replicas=3, rank=r, seed=6) for r in range(3)]
        for s in shards:
            s.set_epoch(epoch)
        lists = [list(s) for s in shards]
        joined += [[i for own in lists for i in own[b : b + 3]] for b in range(0, 18, 3)]
    module = make()
    batches = torch.utils.data.DataLoader(data, batch_sampler=joined)
    trainer(max_epochs=1, precision="64-true", gradient_clip_val=clip).fit(module, batches)
    for worker in range(3):
        for key, value in strategy.worker_state_dict(worker).items():
            torch.testing.assert_close(value, module.state_dict()[key], rtol=0, atol=1e-12)
    assert strategy.local_steps == 12
    assert strategy.ledger.total_bytes == 12 * 8 * sum(p.numel() for p in module.parameters())
    if clip is None:  # accumulating micro-batches is the same as joining them, too
        twice, _ = run(DataParallel(), make(), precision="64-true", accumulate_grad_batches=2)
        assert twice.local_steps == 6


def test_needs_gradients_refuses_what_it_cannot_serve() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match=r"^DataParallel changes gradients before the inner step"):
        run(DataParallel(), Manual())
    with pytest.raises(MisconfigurationException, match=r"^DataParallel exchanges gradients, which a gradient scaler"):
        run(DataParallel(), plugins=[scaled])
    lbfgs = Net(lambda p: torch.optim.LBFGS(p))
    with pytest.raises(MisconfigurationException, match=r"^DataParallel needs one backward pass per step, but LBFGS"):
        run(DataParallel(), lbfgs)


def test_gossip() -> None:
    seen: list[Any] = []

    class Look(DilocoCallback):
        def on_outer_step(self, trainer, pl_module, report):
            seen.append((report, [trainer.strategy.worker_state_dict(w) for w in range(3)]))

    strategy, _ = run(Gossip(), callbacks=[Look()], max_epochs=1)
    report, states = seen[0]
    assert report.kind == "gossip"
    key = "net.0.weight"
    torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=1e-7)
    assert not torch.equal(states[0][key], states[2][key])
    gossiped = sum(e.payload_bytes for e in strategy.ledger.entries if e.what == "gossip")
    assert gossiped == len(seen) * 4 * sum(p.numel() for p in Net().parameters())
    slot = strategy._engine.context.replicas.slot(0, "partner")
    assert slot.keys() == dict(Net().named_parameters()).keys()
    assert any(t.abs().sum() > 0 for t in slot.values())
    assert all((t == 0).all() for t in strategy._engine.context.replicas.slot(2, "partner").values())


def test_workers_that_are_not_active_stand_still() -> None:
    strategy, _ = run(OneAtATime(), max_epochs=1)
    steps = [
        {int(s["step"].item()) for s in strategy._engine.context.inner.workers[w].states[0].values()} for w in range(3)
    ]
    assert steps == [{2}, {2}, {2}]
    assert strategy.local_steps == 6


def test_publish_decides_what_others_see() -> None:
    class Negative(Diloco):
        def publish(self):
            return {n: -t for n, t in self.ctx.outer.tensors.items()}

    strategy, module = run(Negative())
    for name, theta in strategy._engine.context.outer.tensors.items():
        assert torch.equal(dict(module.named_parameters())[name], -theta)


def test_only_some_parameters_can_move() -> None:
    """`outer.step(names, delta)`: only those get a gradient, so fragments keep their own outer state."""

    class Half(Diloco):
        def _synchronise(self, kind):
            ctx = self.ctx
            ctx.begin_round()
            some = ctx.names[:2]
            ctx.outer.step(some, ctx.channel.mean(some, ctx.pseudo_gradient))
            ctx.restart(ctx.workers, some, ctx.outer.tensors)
            return ctx.end_round(kind)

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
    assert [(e.local_step, e.what, e.payload_bytes) for e in comm.ledger.entries] == [(7, "delta", 4)] * 2
    comm.mean(["x"], tensors.__getitem__, what=None)
    assert comm.ledger.total_bytes == 8
    for weights in ([1, 2], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match=r"must hold one number ≥ 0 for each of the 3 participants"):
            comm.mean(["x"], tensors.__getitem__, weights=weights)
    for pairs in ([(0, 0)], [(0, 1), (1, 2)], [(0, 3)]):
        with pytest.raises(ValueError, match=r"must be disjoint pairs of different workers out of \[0, 1, 2\]"):
            comm.exchange(pairs, ["x"], tensors.__getitem__)


def test_alpha_mixes_and_is_checked() -> None:
    module = torch.nn.Linear(1, 1, bias=False).double()
    module.weight.data.fill_(4.0)
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    engine = Engine(
        module,
        [inner],
        num_workers=2,
        interval=1,
        algorithm=Diloco(),
        outer_factory=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    target = {"weight": torch.zeros(1, 1, dtype=torch.float64)}
    engine.context.restart([1], ["weight"], target, alpha=0.25)
    assert [engine.context.replicas.tensors(w)["weight"].item() for w in range(2)] == [4.0, 1.0]
    engine.context.restart([1], ["weight"], {"weight": torch.full((1, 1), float("nan"))}, alpha=0.0)
    engine.context.restart([1], ["weight"], target)
    assert engine.context.replicas.tensors(1)["weight"].item() == 0.0
    with pytest.raises(ValueError, match=r"^`alpha` \(=1.5\) must lie between 0"):
        engine.context.restart([1], ["weight"], target, alpha=1.5)


def test_a_synchronisation_is_opened_and_closed_once() -> None:
    """Algorithms are users' code."""

    class Unbalanced(Diloco):
        def __init__(self, calls: tuple[str, ...]) -> None:
            self.calls = calls

        def after_inner_step(self, step):
            return [getattr(self.ctx, name)() for name in self.calls]

    with pytest.raises(RuntimeError, match=r"^`begin_round` was called twice\. Close the first synchronisation with"):
        run(Unbalanced(("begin_round", "begin_round")))
    with pytest.raises(RuntimeError, match=r"^`end_round` was called without `begin_round`\. Open the synchronisation"):
        run(Unbalanced(("end_round",)))


def test_an_algorithm_without_state_refuses_foreign_state() -> None:
    assert Diloco().state_dict() == {}
    Diloco().load_state_dict({})
    with pytest.raises(
        ValueError,
        match=r"^Diloco keeps no state, but was given \['x'\]\. Resume with the algorithm that wrote the checkpoint\.$",
    ):
        Diloco().load_state_dict({"x": 1})
