"""Does a Trainer.fit under DilocoStrategy compute DiLoCo? Against the twin in ``reference.py``, in float64."""

import copy
import itertools
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from helpers import differs, loader, regression_data, trainer
from lightning.pytorch.callbacks import Callback
from reference import Reference, shards
from torch import Tensor, nn

from lightning_diloco import DilocoStrategy

TOLERANCE = 1e-12
BATCH_SIZE = 4
MAX_STEPS = 13  # six local steps per epoch: rounds of 5 cross epochs, rounds of 2 and 5 leave a partial one at the end

INNER = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
}
# the strategy's arguments, and the same optimizer as the twin makes it
OUTER: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({}, partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)),
    "sgd": ({"outer_optimizer_kwargs": {"lr": 0.5}}, partial(torch.optim.SGD, lr=0.5)),
    "mean": ({"outer_optimizer_kwargs": {"lr": 1.0}}, None),
    "adam": (
        {"outer_optimizer_cls": torch.optim.Adam, "outer_optimizer_kwargs": {"lr": 0.1, "eps": 0.1}},
        partial(torch.optim.Adam, lr=0.1, eps=0.1),
    ),
}
WORKERS = (1, 2, 3, 4)
INTERVALS = (1, 2, 5)

# every pair of values of (inner, outer, N, H, final_sync) occurs; the first test counts
CASES = [
    (tuple(INNER)[(o + n // 2) % 2], outer, workers, INTERVALS[(o + n) % 3], bool((o + n + n // 2) % 2))
    for o, outer in enumerate(OUTER)
    for n, workers in enumerate(WORKERS)
]


class Regressor(L.LightningModule):
    """BatchNorm, a frozen layer and a tied weight.

    No bias ahead of the BatchNorm: its true gradient is 0, and AdamW would make steps of 1e-11 out of rounding noise.
    """

    def __init__(self, configure: Any) -> None:
        super().__init__()
        self.configure = configure
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.first = nn.Linear(3, 6, bias=False)
            self.norm = nn.BatchNorm1d(6)
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.twice = nn.Linear(6, 6)
            self.tied = nn.Linear(6, 6)
            self.last = nn.Linear(6, 1)
        self.tied.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(self.norm(self.first(x)).tanh())
        return self.last(self.tied(self.twice(hidden).tanh()).tanh())

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.configure(self.parameters())


class Recorder(Callback):
    """θ and all workers at the end of each local step, as the twin's ``history``."""

    def __init__(self) -> None:
        self.history: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        s = trainer.strategy
        assert isinstance(s, DilocoStrategy)
        self.history.append((s.outer_state_dict(), [s.worker_state_dict(i) for i in range(s.num_workers)]))


def assert_close(ours: Any, twin: Any, where: str) -> None:
    assert ours.keys() == twin.keys(), where
    for key, value in ours.items():
        assert torch.is_tensor(value) == torch.is_tensor(twin[key]), f"{where} {key}"
        if torch.is_tensor(value) and value.is_floating_point():
            assert value.dtype == twin[key].dtype, f"{where} {key}"
            difference = float((value - twin[key]).abs().max())
            assert difference <= TOLERANCE, f"{where} {key}: {difference}"
        else:
            assert value == twin[key], f"{where} {key}: {value} against {twin[key]}"


def data_of(num_workers: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Any, list[list[Any]]]:
    """A loader for ``fit``, and the twin's batches for the same steps: five of 4 samples and a short one per epoch.

    One sample short of 23 per worker, so that the shards wrap around. A single worker reads the loader as it is.
    """
    dataset = regression_data(23 * num_workers - 1, dtype=dtype)
    batches = shards(dataset.tensors, num_workers, BATCH_SIZE, epochs=3, seed=seed)
    if num_workers == 1:
        batches = [list(loader(dataset, BATCH_SIZE, shuffle=False)) * 3]
    return loader(dataset, BATCH_SIZE, shuffle=num_workers > 1), [own[:MAX_STEPS] for own in batches]


def fit(
    module: Regressor, strategy: DilocoStrategy, train: Any, max_steps: int = MAX_STEPS, **kwargs: Any
) -> list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]]:
    recorder = Recorder()
    t = trainer(strategy, max_epochs=3, max_steps=max_steps, callbacks=[recorder], **kwargs)
    t.fit(module, train)
    assert t.global_step == strategy.local_steps == max_steps
    return recorder.history


def assert_agree(module: Regressor, strategy: DilocoStrategy, history: Any, twin: Reference) -> None:
    """Everything there is to compare: all steps on the way, all weights, inner states and outer state at the end."""
    assert len(history) == len(twin.history)
    for t, (ours, theirs) in enumerate(zip(history, twin.history, strict=True), start=1):
        assert_close(ours[0], theirs[0], f"step {t}, θ")
        for i, (worker, expected) in enumerate(zip(ours[1], theirs[1], strict=True)):
            assert_close(worker, expected, f"step {t}, worker {i}")

    assert strategy.outer_steps == len(twin.synced_at)
    assert_close(strategy.outer_state_dict(), twin.theta.state_dict(), "θ")
    assert_close(module.state_dict(), twin.theta.state_dict(), "module")
    for i, worker in enumerate(twin.workers):
        assert_close(strategy.worker_state_dict(i), worker.state_dict(), f"worker {i}")

    for i, (worker, optimizer) in enumerate(zip(twin.workers, twin.inner, strict=True)):
        (state,) = strategy._engine.context.inner.workers[i].states
        named = dict(module.named_parameters())
        expected_state = {name: optimizer.state[p] for name, p in worker.named_parameters() if p in optimizer.state}
        assert expected_state
        assert {name for name, p in named.items() if p in state} == set(expected_state)
        for name, expected in expected_state.items():
            assert_close(state[named[name]], expected, f"inner state of worker {i}, {name}")

    if twin.outer is not None:
        ours = [p for group in strategy.outer_optimizer.param_groups for p in group["params"]]
        theirs = [p for group in twin.outer.param_groups for p in group["params"]]
        for p, q in zip(ours, theirs, strict=True):
            assert_close({"p": p.detach()}, {"p": q.detach()}, "parameter of the outer optimizer")
            assert_close(strategy.outer_optimizer.state[p], twin.outer.state[q], "outer state")


def test_the_cases_cover_every_pair():
    factors = [tuple(INNER), tuple(OUTER), WORKERS, INTERVALS, (False, True)]
    for (i, a), (j, b) in itertools.combinations(enumerate(factors), 2):
        assert {(case[i], case[j]) for case in CASES} == set(itertools.product(a, b))


@pytest.mark.parametrize(("inner", "outer", "num_workers", "interval", "final_sync"), CASES)
def test_fit_agrees_with_the_twin(inner, outer, num_workers, interval, final_sync):
    L.seed_everything(23, verbose=False)
    arguments, twin_outer = OUTER[outer]
    module = Regressor(INNER[inner]).double()
    start = copy.deepcopy(module)
    train, batches = data_of(num_workers, seed=23)

    strategy = DilocoStrategy(num_workers, interval, final_sync=final_sync, **arguments)
    history = fit(module, strategy, train)

    twin = Reference(start, batches, Regressor.loss, INNER[inner], twin_outer, interval, final_sync)
    partial_round = MAX_STEPS % interval != 0
    assert len(twin.synced_at) == MAX_STEPS // interval + (final_sync and partial_round)
    if num_workers > 1 and interval > 1:
        assert differs(*twin.history[0][1][:2])
    assert_agree(module, strategy, history, twin)


def test_precision_64_true_agrees_with_the_twin():
    """The Trainer makes the module and the batches float64."""
    L.seed_everything(4, verbose=False)
    module = Regressor(INNER["adamw"])
    start = copy.deepcopy(module).double()
    dataset = regression_data(46)
    batches = shards([t.double() for t in dataset.tensors], 2, BATCH_SIZE, epochs=2, seed=4)

    strategy = DilocoStrategy(2, 4)
    history = fit(module, strategy, loader(dataset, BATCH_SIZE), max_steps=11, precision="64-true")

    twin = Reference(start, [b[:11] for b in batches], Regressor.loss, INNER["adamw"], OUTER["default"][1], 4)
    assert_agree(module, strategy, history, twin)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_clipping_and_the_inner_schedule_agree_with_the_twin(num_workers):
    """Inner gradients are clipped, and "the inner LR schedule runs on completed inner steps straight through syncs"."""
    L.seed_everything(6, verbose=False)

    def rate(step: int) -> float:
        return min(step + 1, 4) / 4 * 0.9**step

    def configure(parameters: Any) -> Any:
        optimizer = INNER["adamw"](parameters)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def by_hand(parameters: Any) -> Any:
        parameters, steps = list(parameters), itertools.count()
        optimizer = INNER["adamw"](parameters)

        def before_step(*_: Any) -> None:
            nn.utils.clip_grad_norm_(parameters, 0.3)
            optimizer.param_groups[0]["lr"] = 0.02 * rate(next(steps))

        optimizer.register_step_pre_hook(before_step)
        return optimizer

    module = Regressor(configure).double()
    start = copy.deepcopy(module)
    train, batches = data_of(num_workers, seed=6)
    strategy = DilocoStrategy(num_workers, 5)
    history = fit(module, strategy, train, gradient_clip_val=0.3)

    twin = Reference(start, batches, Regressor.loss, by_hand, OUTER["default"][1], 5)
    assert_agree(module, strategy, history, twin)
    unclipped = Reference(start, batches, Regressor.loss, INNER["adamw"], OUTER["default"][1], 5)
    assert not torch.equal(unclipped.theta.last.weight, twin.theta.last.weight)


def test_accumulated_micro_batches_agree_with_the_twin():
    """With ``accumulate_grad_batches=2`` a local step is two batches, whose mean gradient counts."""
    L.seed_everything(8, verbose=False)
    module = Regressor(INNER["sgd"]).double()
    start = copy.deepcopy(module)
    dataset = regression_data(48, dtype=torch.float64)
    batches = shards(dataset.tensors, 2, BATCH_SIZE, epochs=3, seed=8)

    strategy = DilocoStrategy(2, 2)
    history = fit(module, strategy, loader(dataset, BATCH_SIZE), max_steps=7, accumulate_grad_batches=2)

    pairs = [list(zip(own[0::2], own[1::2], strict=True))[:7] for own in batches]

    def mean_loss(model: Any, pair: Any) -> Tensor:
        return (model.loss(pair[0]) + model.loss(pair[1])) / 2

    twin = Reference(start, pairs, mean_loss, INNER["sgd"], OUTER["default"][1], 2)
    assert_agree(module, strategy, history[1::2], twin)
