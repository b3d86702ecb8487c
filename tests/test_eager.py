"""Delayed and eager updates: do they lose nothing, whoever takes part, and is one worker DiLoCo?"""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from cases import HALF
from family import INTERVAL, STEPS, TOLERANCE, WORKERS, Breaks, Layers, difference, start, train, unequal
from helpers import assert_equal

from lightning_diloco import Delayed, Diloco, DropOut, Eager, Sparta, Table
from lightning_diloco.engine.engine import Engine


@pytest.mark.slow
def test_eager_with_one_worker_is_diloco_bit_for_bit(tmp_path: Path) -> None:
    for steps in (STEPS, 2 * INTERVAL):
        settings: dict[str, Any] = {"num_workers": 1, "steps": steps, "make": partial(Layers, "adamw")}
        ours, plain = train(tmp_path, algorithm=Eager(), **settings), train(tmp_path, **settings)
        assert_equal([w for _, w in ours.history], [w for _, w in plain.history])
        assert_equal(ours.workers, plain.workers)
        assert_equal(ours.module, plain.module)


@pytest.mark.slow
def test_eager_workers_agree_in_the_end_under_sgd(tmp_path: Path) -> None:
    """Everybody has applied the sum of all mean Δ, in another order; nothing is lost on the way, dropped or not."""
    some = {"participation": Table({INTERVAL: [0, 2], 2 * INTERVAL: [1, 2, 3]})}
    for settings in ({}, some, {"partition": unequal, "weights": "samples"}):
        ours = train(tmp_path, algorithm=Eager(), **settings, **HALF[0])
        for w in range(1, WORKERS):
            assert difference(ours.history[-1][1][w], ours.history[-1][1][0]) > 1e-6
            assert difference(ours.workers[w], ours.workers[0]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("make", [Delayed, Eager])
def test_overlapped_rounds_go_on_without_workers_that_are_left_out(make: Any, tmp_path: Path) -> None:
    """A worker that takes no part in step 6 goes on from where it is."""
    ours = train(tmp_path, algorithm=make(), participation=Table({INTERVAL: [0, 1, 3]}))
    alone = train(tmp_path, interval=1000, final_sync=False)
    at = INTERVAL - 1
    assert_equal(ours.history[at][1][2], alone.history[at][1][2])
    assert difference(ours.history[at][1][1], alone.history[at][1][1]) > 1e-6
    before, start_of = start().state_dict(), alone.history[at][1][0]
    if make is Eager:  # lr .7, momentum .9: 1.33 of a third of Δ_0
        for name, value in ours.history[at][1][0].items():
            moved = before[name] - 0.7 * 1.9 / 3 * (before[name] - start_of[name])
            torch.testing.assert_close(value, moved, rtol=0, atol=1e-12)
    lost = train(tmp_path, algorithm=make(), participation=Table({2 * INTERVAL: []}), steps=2 * INTERVAL + 1)
    after = lost.history[2 * INTERVAL - 1][1]
    assert difference(after[0], after[1]) > 1e-6  # nobody has taken θ
    nobody = train(tmp_path, algorithm=make(), participation=DropOut(1.0), steps=INTERVAL + 1, final_sync=False)
    assert_equal([w for _, w in nobody.history], [w for _, w in alone.history[: INTERVAL + 1]])
    assert nobody.reports == []


@pytest.mark.slow
def test_overlapped_rounds_send_what_diloco_sends(tmp_path: Path) -> None:
    plain = train(tmp_path, algorithm=Diloco())
    for make in (Delayed, Eager):
        ours = train(tmp_path, algorithm=make())
        assert (ours.bytes, ours.whats, len(ours.reports)) == (plain.bytes, plain.whats, len(plain.reports))


def three(weights: list[float], algorithm: Any) -> Engine:
    """An engine with three workers at these weights, and θ = 0."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    outer = partial(torch.optim.SGD, lr=1.0, momentum=0.5)
    engine = Engine(module, [optimizer], num_workers=3, interval=4, algorithm=algorithm, outer_factory=outer)
    for w, value in enumerate(weights):
        engine.context.replicas.tensors(w)["weight"].fill_(value)
        if algorithm.anchors == "own":
            engine.context.memory.anchors[w]["weight"].fill_(value)
    return engine


def test_own_outer_steps_leave_theta_alone() -> None:
    """Two optimizers over the same values: θ's moves θ, and the state of the other values is kept apart."""
    ctx = three([1.0, 2.0, 6.0], Eager()).context
    theta = ctx.outer.tensors["weight"]
    for _ in range(2):  # b = 1, then 1.5
        values = ctx.outer_step(1, ["weight"], {"weight": torch.ones_like(theta)})
        ctx.merge([1], ["weight"], values)
    assert (ctx.weights(1)["weight"].item(), theta.item()) == (2.0 - 1.0 - 1.5, 0.0)
    assert ctx.slot(1, "outer state/momentum_buffer", like={})["weight"].item() == 1.5
    assert not ctx.outer.optimizer.state
    ctx.outer.step(["weight"], {"weight": torch.ones_like(theta)})
    assert theta.item() == -1.0


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
@pytest.mark.parametrize("make", [Delayed, Eager, partial(Sparta, 0.3, 2, Diloco())])
def test_overlapped_rounds_survive_a_worker_that_is_not_finite(make: Any, tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=make(), make=Breaks, nonfinite="skip")
    assert all(torch.isfinite(t).all() for t in ours.module.values())
    assert all(torch.isfinite(t).all() for w in ours.workers.values() for t in w.values())


class First(Breaks):
    worker = 0


@pytest.mark.filterwarnings("ignore:Worker . is left out")
@pytest.mark.parametrize("module", [First, Breaks])
@pytest.mark.parametrize("make", [Delayed, Eager])
def test_a_worker_that_is_not_finite_starts_anew_when_it_sends_and_only_then(
    make: Any, module: Any, tmp_path: Path
) -> None:
    """Its momentum is gone after step 6, and there from step 7 on: also in step 12, when the transfer arrives."""
    kept: list[bool] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            kept.append(bool(trainer.strategy._engine.context.inner_state(module.worker, "momentum_buffer")))

    ours = train(tmp_path, algorithm=make(), make=module, nonfinite="skip", callbacks=[Look()])
    assert [t for t, there in enumerate(kept, start=1) if not there] == [INTERVAL]
    others = tuple(w for w in range(WORKERS) if w != module.worker)
    assert [r.participants for r in ours.reports] == [others, *[(0, 1, 2, 3)] * 3]
