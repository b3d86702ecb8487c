"""Does the engine run without a Trainer, and agree with the reference twin?"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Net, regression_data
from reference import Reference, shards

from lightning_diloco import Diloco
from lightning_diloco.engine.engine import Engine
from lightning_diloco.state.policies import Policies
from lightning_diloco.state.replicas import Layout

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


def two_layers(num_workers: int = 3) -> tuple[torch.nn.Sequential, Engine]:
    """A model with dropout whose second layer is frozen."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)).double()
    model[2].requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    options = {"num_workers": num_workers, "interval": 2, "algorithm": Diloco(), "seed": 5}
    return model, Engine(model, [optimizer], outer_factory=partial(SGD, lr=1.0), **options)


def step(model: torch.nn.Module, engine: Engine) -> None:
    """A local step of the worker that is active."""
    loss = model(torch.ones(2, 4, dtype=torch.float64) * (1 + engine.current_worker)).square().mean()
    (optimizer,) = engine._inner.live
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_a_row_of_turns_is_turns_one_by_one_and_leaves_the_generators_as_they_were() -> None:
    """Also with a row, every worker draws its own numbers, and none is drawn from the process's generator."""
    states = []
    for in_row in (False, True):
        model, engine = two_layers()
        torch.manual_seed(9)
        for _ in range(3):
            with engine.row_of_turns() if in_row else nullcontext():
                for w in engine.local_workers:
                    with engine.turn(w):
                        step(model, engine)
            assert engine.current_worker is None
            engine.end_step()
        drawn = torch.rand(3)
        states.append([*engine.views.state_dict("outer").values(), *engine.views.state_dict(2).values(), drawn])
        engine.close()
    torch.manual_seed(9)
    assert torch.equal(states[1][-1], torch.rand(3))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_after_an_error_in_a_row_the_module_holds_theta_and_the_generator_is_back() -> None:
    model, engine = two_layers()
    theta = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(9)

    def row() -> None:
        with engine.row_of_turns():
            for w in engine.local_workers:
                with engine.turn(w):
                    step(model, engine)
                    if w == 1:
                        raise KeyError(w)

    with pytest.raises(KeyError):
        row()
    assert all(torch.equal(p, theta[n]) for n, p in model.named_parameters())
    assert engine.current_worker is None
    drawn = torch.rand(3)
    torch.manual_seed(9)
    assert torch.equal(drawn, torch.rand(3))
    with engine.turn(0):  # turns go on
        step(model, engine)
    engine.close()


def test_what_a_row_has_unfrozen_is_synchronised_at_its_end() -> None:
    model, engine = two_layers(num_workers=2)
    for last in (False, True):  # the step that is synchronised
        with engine.row_of_turns():
            for w in engine.local_workers:
                with engine.turn(w):
                    model[2].requires_grad_(last)
                    step(model, engine)
        reports = engine.end_step()
    assert len(reports) == 1
    theta, workers = engine.views.state_dict("outer"), [engine.views.state_dict(w) for w in (0, 1)]
    assert all(torch.equal(theta[n], own[n]) for own in workers for n in theta)
    engine.close()


def test_between_the_turns_of_a_row_the_module_belongs_to_the_last_worker_and_nothing_can_be_saved() -> None:
    model, engine = two_layers()
    with engine.row_of_turns():
        with engine.turn(1):
            step(model, engine)
        assert engine.current_worker == 1
        with pytest.raises(RuntimeError, match="can't be saved inside worker 1's turn"):
            engine.pack(0)
        with engine.turn(2), pytest.raises(RuntimeError, match="can't begin inside"), engine.turn(0):
            pass
    assert engine.current_worker is None
    assert engine.pack(0)["num_workers"] == 3
    engine.close()


def test_a_layer_that_the_workers_share_while_it_is_frozen_is_each_workers_own_once_a_turn_unfreezes_it() -> None:
    """One step of SGD from the same weights: θ_w = θ − lr·g_w, by hand."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)).double()
    model[1].requires_grad_(False)
    theta, lr = {n: p.detach().clone() for n, p in model.named_parameters()}, 0.1
    options = {"num_workers": 3, "interval": 9, "algorithm": Diloco(), "outer_factory": partial(SGD, lr=1.0)}
    optimizer = SGD(model.parameters(), lr=lr)
    engine = Engine(model, [optimizer], policies=Policies(share_frozen=True), **options)
    inputs = [torch.full((2, 4), 1.0 + w, dtype=torch.float64) for w in range(3)]
    by_hand = []
    for w, x in enumerate(inputs):
        twin = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)).double()
        twin.load_state_dict(theta)
        twin[1].requires_grad_(w > 0)  # worker 0 unfreezes it after its forward pass
        twin(x).square().mean().backward()
        by_hand.append({n: theta[n] - lr * (0 if p.grad is None else p.grad) for n, p in twin.named_parameters()})
    with engine.row_of_turns():
        for w, x in enumerate(inputs):
            with engine.turn(w):
                loss = model(x).square().mean()
                model[1].requires_grad_(True)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    engine.end_step()
    for w, want in enumerate(by_hand):
        found = engine.views.state_dict(w)
        assert all(float((found[n] - want[n]).abs().max()) <= 1e-12 for n in want), w
    engine.close()


def test_a_parameter_that_a_turn_froze_counts_as_trainable_until_it_is_frozen_between_turns() -> None:
    model = torch.nn.Linear(2, 1)
    layout = Layout(model)

    def turn(frozen_inside: bool) -> None:
        layout.begin_turn()
        model.bias.requires_grad_(not frozen_inside)
        layout.end_turn()

    turn(frozen_inside=True)
    assert layout.trainable == ["weight", "bias"]
    model.bias.requires_grad_(True)
    turn(frozen_inside=False)
    model.bias.requires_grad_(False)
    assert layout.trainable == ["weight"]


def test_parameters_that_are_replaced_or_added_anywhere_in_the_module_are_noticed() -> None:
    def noticed(change: Any) -> bool:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 1)))
        layout = Layout(model)
        change(model)
        return layout.replaced()

    assert not noticed(lambda model: None)
    assert not noticed(lambda model: model[1].__setitem__(0, torch.nn.GELU()))  # without parameters
    assert noticed(lambda model: model[1].__setitem__(1, torch.nn.Linear(2, 1)))
    assert noticed(lambda model: setattr(model[1][1], "bias", torch.nn.Parameter(torch.zeros(1))))
    assert noticed(lambda model: model[1][0].register_parameter("slope", torch.nn.Parameter(torch.zeros(1))))
    assert noticed(lambda model: model[0].add_module("more", torch.nn.Linear(1, 1)))
