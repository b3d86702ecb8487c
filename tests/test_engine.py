"""Does the engine run without a Trainer, and agree with the reference twin?"""

from functools import partial
from typing import Any

import pytest
import torch
from helpers import Net, regression_data
from reference import Reference, shards

from lightning_diloco import Diloco
from lightning_diloco.engine.engine import Engine

SGD = torch.optim.SGD
NESTEROV = {"lr": 0.7, "momentum": 0.9, "nesterov": True}


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
