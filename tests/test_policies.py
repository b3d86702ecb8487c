"""What happens to buffers, inner state and non-finite workers at a synchronisation, on numbers done by hand."""

from typing import Any

import pytest
import torch
from helpers import Net, assert_same, loader, regression_data, trainer
from torch import nn

from lightning_diloco import DilocoCallback, DilocoStrategy
from lightning_diloco.algorithms import Diloco
from lightning_diloco.engine.engine import Engine, Policies


def plain(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=1.0)


class Toy(nn.Module):
    """One trainable and one frozen number, one buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("table", torch.full((3,), 0.1))
        self.register_buffer("nothing", None)


def one_round(workers: int = 3, optimizer: Any = None, bad: set[int] = frozenset(), **policies: Any) -> Any:
    """Worker i steps w by −(i + 1), and leaves frozen = mean = 10·i and count = i + 5."""
    module = Toy()
    inner = optimizer(module.parameters()) if optimizer else torch.optim.SGD([module.w], lr=1.0)
    engine = Engine(
        module,
        [inner],
        num_workers=workers,
        interval=1,
        algorithm=Diloco(),
        outer_factory=plain,
        policies=Policies(**policies),
    )
    for w in engine.local_workers:
        with engine.turn(w):
            module.w.grad = torch.full((2,), float("nan") if w in bad else w + 1.0, dtype=torch.float64)
            inner.step()
            module.frozen.data.fill_(10.0 * w)
            module.mean.fill_(float("nan") if w in bad else 10.0 * w)
            module.count.fill_(w + 5)
    reports = engine.end_step()
    return engine, inner, reports


def values(engine: Any, name: str) -> list[float]:
    """θ's value, then each worker's."""
    return [engine.views.state_dict(which)[name].flatten()[0].item() for which in ("outer", *engine.local_workers)]


@pytest.mark.parametrize(
    ("policy", "floating", "integer", "sent"),
    [
        ("average", [10.0, 10.0, 10.0, 10.0], [5, 5, 5, 5], 16 + 8 + 8 + 8),  # Δ, frozen, mean, count; not the table
        ("first", [0.0, 0.0, 0.0, 0.0], [5, 5, 5, 5], 16 + 8 + 8 + 8),
        ("local", [10.0, 0.0, 10.0, 20.0], [5, 5, 6, 7], 16),
    ],
)
def test_buffers_and_frozen_parameters(policy: str, floating: Any, integer: Any, sent: int) -> None:
    engine, _, (report,) = one_round(buffers=policy)
    assert values(engine, "mean") == floating
    assert values(engine, "frozen") == floating
    assert values(engine, "count") == integer
    assert values(engine, "w") == [-2.0] * 4
    assert report.payload_bytes == sent
    table = torch.full((3,), 0.1)
    assert all(torch.equal(engine.views.state_dict(w)["table"], table) for w in ("outer", 0, 1, 2))


def test_batch_norm_statistics_after_a_synchronisation() -> None:
    for policy in ("average", "first", "local"):
        strategy = DilocoStrategy(num_nodes=3, diloco_interval=3, buffers=policy)
        trainer(strategy, max_steps=3, precision="64-true").fit(Net(), loader(regression_data(54), 3))
        key, count = "net.1.running_mean", "net.1.num_batches_tracked"
        theta = strategy.outer_state_dict()
        workers = [strategy.worker_state_dict(w) for w in range(3)]
        together = [torch.equal(w[key], workers[0][key]) for w in workers]
        assert together == ([True, False, False] if policy == "local" else [True] * 3)
        assert all(w[count].item() == theta[count].item() == 3 for w in workers)
        if policy == "local":
            mean = torch.stack([w[key] for w in workers]).mean(0)
            torch.testing.assert_close(theta[key], mean, rtol=0, atol=1e-12)
        else:
            assert torch.equal(theta[key], workers[0][key])


def adam(parameters: Any) -> Any:
    return torch.optim.Adam([p for p in parameters if p.requires_grad], lr=1.0)


def moments(engine: Any) -> list[tuple[float, float]]:
    states = [engine.context.inner.workers[w].states[0] for w in engine.local_workers]
    return [(s["exp_avg"][0].item(), s["step"].item()) for state in states for s in state.values()]


@pytest.mark.parametrize(
    ("policy", "expected", "sent"),
    [  # after one step exp_avg = 0.1 · gradient, gradients 1, 2, 3
        ("keep", [(0.1, 1), (0.2, 1), (0.3, 1)], 0),
        ("average", [(0.2, 1), (0.2, 1), (0.2, 1)], 2 * 16),
        ("reset", [], 0),
    ],
)
def test_inner_state(policy: str, expected: Any, sent: int) -> None:
    engine, inner, (report,) = one_round(optimizer=adam, inner_state=policy, buffers="local")
    assert moments(engine) == [pytest.approx(e) for e in expected]
    assert report.payload_bytes == 16 + sent
    assert inner.state is engine.context.inner.first.states[0]
    tensors = [
        v.data_ptr() for w in engine.context.inner.workers.values() for s in w.states[0].values() for v in s.values()
    ]
    assert len(set(tensors)) == len(tensors)


def test_reset_gives_back_the_state_that_configure_optimizers_made() -> None:
    def adagrad(parameters: Any) -> Any:
        return torch.optim.Adagrad([p for p in parameters if p.requires_grad], initial_accumulator_value=0.5)

    engine, _, _ = one_round(optimizer=adagrad, inner_state="reset")
    sums = [s["sum"][0].item() for w in engine.context.inner.workers.values() for s in w.states[0].values()]
    assert sums == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("policy", ["reset", "average"])
def test_state_in_lists_or_groups_can_be_neither_reset_nor_averaged(policy: str) -> None:
    class KeepsCount(torch.optim.SGD):
        """Keeps a step counter in its groups, like schedule-free optimizers."""

        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            return super().step(closure)

    message = (
        f"`inner_state` (='{policy}') needs an inner optimizer whose state is tensors and numbers; LBFGS keeps a list"
        " under 'old_dirs'. Use `inner_state='keep'`."
    )
    strategy = DilocoStrategy(num_nodes=2, inner_state=policy)
    with pytest.raises(ValueError) as caught:
        trainer(strategy, max_steps=3).fit(Net(lambda p: torch.optim.LBFGS(p, max_iter=2)), loader())
    assert str(caught.value) == message

    message = (
        f"`inner_state` (='{policy}') needs an inner optimizer that keeps its state in `state`; KeepsCount keeps 'k'"
        " in its `param_groups`. Use `inner_state='keep'`."
    )
    with pytest.raises(ValueError) as caught:
        trainer(DilocoStrategy(num_nodes=2, inner_state=policy), max_steps=3).fit(
            Net(lambda p: KeepsCount(p, lr=0.1)), loader()
        )
    assert str(caught.value) == message


def test_a_non_finite_worker_raises_by_default_and_names_worker_and_step() -> None:
    with pytest.raises(RuntimeError) as caught:
        one_round(bad={1})
    assert str(caught.value) == (
        "The pseudo-gradient of worker 1 is not finite at local step 1 (1 of 3 workers). Its weights, or θ's, hold"
        " NaN or infinity. Lower the inner learning rate or clip gradients; `DilocoStrategy(nonfinite='skip')` leaves"
        " such workers out of a mean (one finite worker must remain), 'propagate' lets the values through."
    )


def test_skip_takes_the_mean_of_the_others_and_restarts_the_bad_worker() -> None:
    with pytest.warns(
        UserWarning, match=r"^Worker 1 is left out of the outer step at local step 1: its pseudo-gradient"
    ):
        engine, _, (report,) = one_round(bad={1}, nonfinite="skip", optimizer=adam, buffers="local")
    assert report.participants == (0, 2)
    assert not torch.isfinite(torch.tensor(report.drift[1]))
    expected = -1.0  # Adam's first step is −lr · sign(gradient) for all
    assert values(engine, "w") == pytest.approx([expected] * 4)
    assert values(engine, "mean") == [10.0, 0.0, 10.0, 20.0]  # the bad worker has the others' mean
    assert [len(engine.context.inner.workers[w].states[0]) for w in range(3)] == [1, 0, 1]
    with pytest.raises(RuntimeError, match=r"3 of 3 workers"):
        one_round(bad={0, 1, 2}, nonfinite="skip")


def test_propagate_lets_values_through_and_one_worker_is_never_judged() -> None:
    engine, _, _ = one_round(bad={1}, nonfinite="propagate")
    assert all(v != v for v in values(engine, "w"))
    engine, _, _ = one_round(workers=1, bad={0}, nonfinite="raise")
    assert values(engine, "w")[0] != values(engine, "w")[0]


def test_state_after_a_raise_is_untouched() -> None:
    """Nothing is half synchronised when the error leaves."""
    module = Net(lambda p: torch.optim.SGD(p, lr=0.1))

    class Breaks(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            bad = batch_idx == 3 and self.trainer.strategy.current_worker == 1
            return loss * float("inf") if bad else loss

    module, strategy = Breaks(), DilocoStrategy(num_nodes=3, diloco_interval=2)
    theta: list[Any] = []

    class Keep(DilocoCallback):
        def on_outer_step(self, trainer, pl_module, report):
            theta.append(strategy.outer_state_dict())

    with pytest.raises(RuntimeError, match=r"worker 1 is not finite at local step 4 \(1 of 3 workers\)"):
        trainer(strategy, max_epochs=1, callbacks=[Keep()]).fit(module, loader(batch_size=2))
    assert strategy.outer_steps == 1
    assert_same(strategy.outer_state_dict(), theta[-1])
