"""Asynchronous workers: who steps when, what each reads, and what the server makes of what arrives."""

import random
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import interruptions
import lightning as L
import processes
import pytest
import torch
import yaml
from algorithms import OneAtATime
from event_server import EventServer
from family import (
    INNER,
    INTERVAL,
    STEPS,
    Layers,
    Run,
    Save,
    assert_same_run,
    batches_of,
    difference,
    several,
    start,
    train,
)
from helpers import Net, assert_equal, loader, regression_data, slow_but, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, get_worker_info
from torchmetrics import MeanSquaredError

from lightning_diloco import (
    FP4,
    Availability,
    Cluster,
    DelayedNesterov,
    Diloco,
    DilocoStrategy,
    ErrorFeedback,
    Identity,
    Table,
    compare,
)
from lightning_diloco._lightning.own_pace import OwnPace
from lightning_diloco.cluster.pace import Pace

N = 4
EQUAL, FAST, ODD = [0.1] * N, [0.1, 0.2, 0.1, 0.3], [0.17, 0.1, 0.13, 0.41]


def cluster(seconds: Sequence[float] | float, **more: Any) -> Cluster:
    return Cluster(seconds, **{"bandwidth_gbit_s": 1.0, "latency_ms": 0.0, **more})


# ---------------------------------------------------------------------------------------------------- who steps when


@pytest.mark.parametrize("seed", range(6))
def test_the_pace_is_that_of_a_queue_of_events(seed: int) -> None:
    """All completions up to a horizon, sorted; cut wherever a worker would complete a second one."""
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    seconds = [rng.choice([0.1, 0.2, 0.25, 0.3, 0.7, 1.1]) for _ in range(n)]
    described = cluster(seconds, jitter=0.4 * (seed % 2), seed=seed)
    steps = 60
    events = []
    for w in range(n):
        time = 0
        for k in range(1, 40 * steps):
            time += round(described.seconds_of_step(w, k) * 10**15)
            events.append((time, w, k))
    events.sort()
    turns: list[list[tuple[int, int, int]]] = [[]]
    times = sorted({time for time, _, _ in events})
    at = {time: [e for e in events if e[0] == time] for time in times[: 12 * steps]}
    for group in at.values():
        if {w for _, w, _ in turns[-1]} & {w for _, w, _ in group}:
            turns.append([])
        turns[-1] += group
    pace = Pace(described, n)
    order = list(range(1, steps + 1))
    assert [[tuple(event) for event in pace.at(t)] for t in order] == turns[:steps]
    rng.shuffle(order)  # a pure function of the step, whoever asks in which order
    assert all([tuple(event) for event in pace.at(t)] == turns[t - 1] for t in order[:10])
    if not described.jitter:  # a turn is a step of the fastest
        fastest = seconds.index(min(seconds))
        assert [[k for _, w, k in turn if w == fastest] for turn in turns[:steps]] == [[t] for t in range(1, steps + 1)]


def test_budgets_are_rounded_down_and_not_below_one() -> None:
    pace = Pace(cluster([0.3, 0.1, 0.9, 0.2]), 4)  # 0.3 is a little less than 3 × 0.1 in binary
    assert [pace.budget(w, 10) for w in range(4)] == [3, 10, 1, 5]
    assert [pace.budget(w, 9) for w in range(4)] == [3, 9, 1, 4]
    assert [pace.budget(w, 2) for w in range(4)] == [1, 2, 1, 1]


# -------------------------------------------------------------------------------------------------------- the oracle


def twin(
    seconds: Sequence[float],
    optimizer: str = "sgd",
    dylu: bool = True,
    length: Callable[[int, int], int] | None = None,
    batches: Sequence[Sequence[Any]] | None = None,
    **more: Any,
) -> EventServer:
    lengths = [round(s * 100) for s in seconds]
    return EventServer(
        start(optimizer),
        more.pop("loss", lambda model, batch: model.loss(batch)),
        more.pop("inner", INNER[optimizer]),
        batches or batches_of(N),
        length or (lambda worker, step: lengths[worker]),
        [max(1, min(lengths) * INTERVAL // length) if dylu else INTERVAL for length in lengths],
        STEPS,
        **more,
    )


def assert_agrees(ours: Run, theirs: EventServer) -> None:
    """At every step and at the end, to 1e-12; and who sent when."""
    assert len(ours.history) == len(theirs.history) == STEPS
    for t, ((theta, workers), (their_theta, their_workers)) in enumerate(
        zip(ours.history, theirs.history, strict=True), start=1
    ):
        assert difference(theta, their_theta) <= 1e-12, f"θ after step {t}"
        for w, expected in enumerate(their_workers):
            assert difference(workers[w], expected) <= 1e-12, f"worker {w} after step {t}"
    assert difference(ours.module, theirs.theta.state_dict()) <= 1e-12
    for w, worker in enumerate(theirs.workers):
        assert difference(ours.workers[w], worker.state_dict()) <= 1e-12, f"worker {w} at the end"
    assert [(r.step, r.participants) for r in ours.reports] == theirs.pushes


class Jittered:
    """The lengths of steps that a cluster draws."""

    def __init__(self, described: Cluster) -> None:
        self.described = described

    def __call__(self, worker: int, step: int) -> int:
        return round(self.described.seconds_of_step(worker, step) * 10**15)


JITTERED = cluster(ODD, jitter=0.5, seed=4)
LOST = {6: [0, 2], 12: [0, 1, 3]}  # local step → who takes part


def lost(step: list[int]) -> Callable[[int, dict[str, Tensor]], dict[str, Tensor] | None]:
    """What is lost in a run with ``participation=Table(LOST)`` at the speeds of FAST."""
    pushes: dict[int, int] = {}

    def mangle(w: int, delta: dict[str, Tensor]) -> dict[str, Tensor] | None:
        pushes[w] = pushes.get(w, 0) + 1
        return None if w not in LOST.get(INTERVAL * pushes[w], range(N)) else delta

    return mangle


CASES: dict[str, tuple[dict[str, Any], Callable[[], EventServer]]] = {
    "fast and slow": ({"algorithm": DelayedNesterov(), "cluster": cluster(FAST)}, lambda: twin(FAST)),
    "odd speeds": (
        {"algorithm": DelayedNesterov(3, 0.2, dylu=False), "cluster": cluster(ODD)},
        lambda: twin(ODD, size=3, activation=0.2, dylu=False),
    ),
    "adamw": (
        {"algorithm": DelayedNesterov(2, 0.5), "cluster": cluster(ODD), "make": partial(Layers, "adamw")},
        lambda: twin(ODD, "adamw", size=2, activation=0.5),
    ),
    "Nesterov at once": (
        {
            "algorithm": DelayedNesterov(1, dylu=False),
            "cluster": cluster(FAST),
            "outer_optimizer_kwargs": {"lr": 0.175, "momentum": 0.9, "nesterov": True},
        },
        lambda: twin(FAST, size=1, lr=0.175, dylu=False),
    ),
    "SGD": (
        {"algorithm": DelayedNesterov(), "cluster": cluster(FAST), "outer_optimizer_kwargs": {"lr": 0.5}},
        lambda: twin(FAST, lr=0.5, momentum=0.0),
    ),
    "jitter": (
        {"algorithm": DelayedNesterov(), "cluster": JITTERED},
        lambda: twin(ODD, length=Jittered(JITTERED)),
    ),
    "lost": (
        {"algorithm": DelayedNesterov(), "cluster": cluster(FAST), "participation": Table(LOST)},
        lambda: twin(FAST, mangle=lost([0])),
    ),
    "no final synchronisation": (
        {"algorithm": DelayedNesterov(), "cluster": cluster(FAST), "final_sync": False},
        lambda: twin(FAST, end=False),
    ),
}
QUICK = {"fast and slow", "odd speeds"}


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_it_agrees_with_a_queue_of_events(name: str, tmp_path: Path) -> None:
    settings, make = CASES[name]
    assert_agrees(train(tmp_path, **settings), make())


TOGETHER = [CASES["fast and slow"][0], CASES["jitter"][0]]


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
def test_processes_agree_with_the_oracle_and_with_one(size: int, tmp_path: Path) -> None:
    """A process may have no worker that steps."""
    coded = {"algorithm": DelayedNesterov(), "cluster": cluster(ODD), "codec": ErrorFeedback(FP4(), 0.9)}
    runs = several(tmp_path, size, [*TOGETHER, coded])
    for name, ours in zip(("fast and slow", "jitter"), runs, strict=False):
        assert_agrees(ours, CASES[name][1]())
    for settings, ours in zip([*TOGETHER, coded], runs, strict=True):
        assert_same_run(ours, train(tmp_path, **settings), measured=1e-9)


RESUMED: dict[str, dict[str, Any]] = {
    "odd": {**CASES["adamw"][0]},
    "coded": {"algorithm": DelayedNesterov(), "cluster": cluster(FAST), "codec": ErrorFeedback(FP4(), 0.9)},
    "jitter": {**CASES["jitter"][0]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_at_any_step(name: str, tmp_path: Path) -> None:
    settings, steps = RESUMED[name], range(1, STEPS + 1)
    whole = train(tmp_path, callbacks=[Save(steps, tmp_path)], **settings)
    for step in steps if name == "odd" else (4, 7, 12, STEPS):
        rest = train(tmp_path, resume=tmp_path / f"{step}.ckpt", **settings)
        assert_equal(rest.history, whole.history[step:], f"resumed after step {step}")
        assert_equal(rest.workers, whole.workers)
        assert_equal(rest.module, whole.module)
        assert rest.steps == whole.steps
        assert rest.bytes == whole.bytes


@pytest.mark.filterwarnings("ignore:.*(was called without a model|is set, but there is no last)")
@pytest.mark.parametrize(("worker", "batch"), [(1, 3), (2, 3), (2, 5), (1, 6)])
def test_a_run_that_resumes_from_a_torn_step_finishes_it_for_the_others(worker: int, batch: int) -> None:
    settings = {"algorithm": DelayedNesterov(), "cluster": cluster([0.1, 0.1, 0.2])}
    undisturbed, *_ = interruptions.run(interruptions.Ill(None), **settings)
    with pytest.warns(UserWarning, match=f"Local step {batch + 1} was interrupted"), pytest.raises(ArithmeticError):
        interruptions.run(interruptions.Ill(worker, "training_step", batch), **settings)
    resumed, *_ = interruptions.run(interruptions.Ill(None), "rescue.ckpt", **settings)
    interruptions.assert_same_run(resumed, undisturbed)


@pytest.mark.processes
def test_a_run_of_one_process_resumes_in_two(tmp_path: Path) -> None:
    settings = RESUMED["odd"]
    whole = train(tmp_path, callbacks=[Save([8], tmp_path)], **settings)
    (rest,) = several(tmp_path, 2, [{**settings, "resume": tmp_path / "8.ckpt"}])
    assert_equal(rest.history, whole.history[8:])
    assert_equal(rest.workers, whole.workers)


# -------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.slow
@pytest.mark.parametrize("dylu", [True, False])
def test_at_equal_speeds_it_is_diloco(dylu: bool, tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=DelayedNesterov(dylu=dylu), cluster=cluster(EQUAL), make=partial(Layers, "adamw"))
    diloco = train(tmp_path, algorithm=Diloco(), make=partial(Layers, "adamw"))
    for t, ((theta, workers), (other_theta, others)) in enumerate(zip(ours.history, diloco.history, strict=True), 1):
        assert difference(theta, other_theta) <= 1e-12, f"after step {t}"
        assert all(difference(workers[w], others[w]) <= 1e-12 for w in range(N))
    assert difference(ours.module, diloco.module) <= 1e-12
    assert ours.bytes == diloco.bytes
    assert [r.step for r in ours.reports] == [r.step for r in diloco.reports]


def test_at_equal_speeds_it_is_diloco_with_batch_norm_and_shards_of_different_size(tmp_path: Path) -> None:
    def parts(dataset: Any, workers: int) -> list[list[int]]:
        return [list(range(30)), list(range(30, 40)), list(range(40, 60)), list(range(60, 96))]

    runs = []
    for more in ({}, {"algorithm": DelayedNesterov(), "cluster": cluster(0.1)}):
        L.seed_everything(1, verbose=False)
        sgd = partial(torch.optim.SGD, lr=0.01)  # AdamW makes steps of rounding errors: a bias before BatchNorm
        strategy, module = DilocoStrategy(N, 3, partition=parts, weights="samples", **more), Net(sgd)
        t = trainer(strategy, max_steps=14, precision="64-true", limit_train_batches=5)
        t.fit(module, loader(regression_data(dtype=torch.float64)))
        runs.append((module.state_dict(), strategy.outer_steps, t.current_epoch))
    for key, value in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][key], value, rtol=1e-12, atol=1e-12)
    assert runs[0][1:] == runs[1][1:] == (4, 2)


# ---------------------------------------------------------------------------------------------- what each worker reads


class Numbered(Dataset[Any]):
    """Its samples are their numbers."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([float(i)])


class Reads(L.LightningModule):
    """Notes every worker's batches, and the learning rates with which it steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.read: dict[int, list[Any]] = {}
        self.rates: dict[int, list[float]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        worker = self.trainer.strategy.current_worker
        x = batch["x"] if isinstance(batch, dict) else batch
        self.read.setdefault(worker, []).append(x.flatten().tolist())
        self.rates.setdefault(worker, []).append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(x).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def halves(dataset: Any, workers: int) -> list[list[int]]:
    return [list(range(24)), list(range(24, 48))]


class Batches:
    """No loader of torch's."""

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Any:
        return (torch.full((2, 1), float(i)) for i in range(12))


class Stream(IterableDataset[Any]):
    """A stream that knows its length, read by one process or more."""

    def __len__(self) -> int:
        return 48

    def __iter__(self) -> Any:
        info = get_worker_info()
        step = 1 if info is None else info.num_workers
        return (torch.tensor([float(i)]) for i in range(0 if info is None else info.id, 48, step))


LOADERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "shuffled": (lambda: DataLoader(Numbered(), 4, shuffle=True), {}),
    "in processes": (lambda: DataLoader(Numbered(), 4, shuffle=True, num_workers=1), {}),
    "kept processes": (
        lambda: DataLoader(Numbered(), 4, shuffle=True, num_workers=1, persistent_workers=True),
        {},
    ),
    "batch by batch": (lambda: DataLoader(Numbered(), 4, shuffle=True), {"use_distributed_sampler": False}),
    "a partition": (lambda: DataLoader(Numbered(), 4, shuffle=True), {"partition": halves}),
    "a stream": (lambda: DataLoader(Stream(), 4), {}),
    "in a dict": (lambda: {"x": DataLoader(Numbered(), 4, shuffle=True)}, {}),
    "batches of one's own": (lambda: Batches(), {}),
    "fewer per epoch": (lambda: DataLoader(Numbered(), 4, shuffle=True), {"limit_train_batches": 4}),
}


def seen_of(data: Any) -> Any:
    """The attributes of a loader, without torch's note that its length was asked for."""
    attributes = vars(data) if isinstance(data, DataLoader) else {"data": repr(data)}
    return {name: value for name, value in attributes.items() if name != "_IterableDataset_len_called"}


def steps_of(worker: int, turns: int, seconds: Sequence[float]) -> int:
    """How often it has stepped before the fastest takes its next step."""
    fastest, own = round(100 * min(seconds)), round(100 * seconds[worker])
    return ((turns + 1) * fastest - 1) // own


def reads(make: Callable[[], Any], options: dict[str, Any], epochs: int, ckpt: Any = None, **strategy: Any) -> Any:
    L.seed_everything(3, verbose=False)
    options = dict(options)
    partition = options.pop("partition", None)
    s, module = DilocoStrategy(2, 4, partition=partition, **strategy), Reads()
    data = make()
    before = seen_of(data)
    save = Save([5, 7], options.pop("folder", Path()))
    t = trainer(s, max_epochs=epochs, callbacks=[save] if save.folder.parts else [], **options)
    t.fit(module, data, ckpt_path=ckpt)
    assert seen_of(data) == before
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("name", LOADERS)
def test_a_worker_reads_in_its_kth_step_what_it_would_read_among_equals(name: str, tmp_path: Path) -> None:
    """No batch is lost, none comes twice, also from epoch to epoch of its own, and resumed in between."""
    make, options = LOADERS[name]
    together = reads(make, options, 5)
    apart = {"algorithm": DelayedNesterov(), "cluster": cluster([0.1, 0.25])}
    alone = reads(make, {**options, "folder": tmp_path}, 5, **apart)
    steps = len(together.read[0])
    assert steps == 5 * (4 if name == "fewer per epoch" else 6)
    assert alone.read[0] == together.read[0]
    assert alone.read[1] == together.read[1][: steps_of(1, steps, [0.1, 0.25])]
    for step in (5, 7):
        rest = reads(make, options, 5, tmp_path / f"{step}.ckpt", **apart)
        assert rest.read[0] == alone.read[0][step:]
        assert rest.read[1] == alone.read[1][steps_of(1, step, [0.1, 0.25]) :]


class Counting(Sampler[int]):
    """Another order in every pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([(i * (2 * self.passes + 5)) % 48 for i in range(48)])

    def __len__(self) -> int:
        return 48


def with_generator(**more: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(8)
    return DataLoader(Numbered(), 4, sampler=RandomSampler(Numbered(), generator=generator, **more))


REMEMBERING: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "a generator of its own": (lambda: with_generator(replacement=True), {}),
    "counts its passes": (lambda: DataLoader(Numbered(), 4, sampler=Counting()), {}),
    "batch by batch": (with_generator, {"use_distributed_sampler": False}),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_samplers_that_remember_go_on_from_epoch_to_epoch(name: str, tmp_path: Path) -> None:
    make, options = REMEMBERING[name]
    together = reads(make, options, 5)
    assert together.read[0][:6] != together.read[0][6:12]
    apart = {"algorithm": DelayedNesterov(), "cluster": cluster([0.1, 0.25])}
    alone = reads(make, {**options, "folder": tmp_path}, 5, **apart)
    assert alone.read[0] == together.read[0]
    assert alone.read[1] == together.read[1][:12]
    rest = reads(make, options, 5, tmp_path / "7.ckpt", **apart)
    assert (rest.read[0], rest.read[1]) == (alone.read[0][7:], alone.read[1][3:])


class Itself(Stream):
    """A stream that is its own iterator."""

    def __iter__(self) -> Any:
        self.at = -1
        return self

    def __next__(self) -> Tensor:
        self.at += 1
        if self.at == 48:
            raise StopIteration
        return torch.tensor([float(self.at)])


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_every_worker_reads_a_stream_of_its_own() -> None:
    together = reads(lambda: DataLoader(Itself(), 4), {}, 3)
    alone = reads(lambda: DataLoader(Itself(), 4), {}, 3, algorithm=DelayedNesterov(), cluster=cluster([0.1, 0.25]))
    assert alone.read[0] == together.read[0]
    assert alone.read[1] == together.read[1][:7]


class Drawing(Numbered):
    """Its samples are random numbers."""

    def __getitem__(self, i: int) -> Tensor:
        return torch.rand(1)


def test_workers_draw_other_numbers_in_their_datasets() -> None:
    apart = {"algorithm": DelayedNesterov(), "cluster": cluster([0.1, 0.1])}
    found = reads(lambda: DataLoader(Drawing(), 4, shuffle=True, num_workers=1), {}, 1, **apart)
    assert not {x for batch in found.read[0] for x in batch} & {x for batch in found.read[1] for x in batch}


class Changing(L.LightningDataModule):
    """Fewer batches from epoch to epoch: by another loader, or by another batch size."""

    def __init__(self, reloads: bool) -> None:
        super().__init__()
        self.reloads = reloads

    def train_dataloader(self) -> DataLoader[Any]:
        size = 2 if not self.reloads or not self.trainer.current_epoch else 4
        return DataLoader(Numbered(), size, shuffle=True)


class Larger(L.Callback):
    """A larger batch in the second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.train_dataloader.batch_sampler.batch_size = 4


@pytest.mark.parametrize("seconds", [[0.1, 0.1], [0.1, 0.25]])
@pytest.mark.parametrize("reloads", [True, False])
def test_epochs_may_become_shorter(reloads: bool, seconds: list[float]) -> None:
    def fit(**settings: Any) -> Reads:
        L.seed_everything(3, verbose=False)
        module = Reads()
        options = {"reload_dataloaders_every_n_epochs": 1} if reloads else {"callbacks": [Larger()]}
        trainer(DilocoStrategy(2, 4, **settings), max_epochs=3, **options).fit(module, datamodule=Changing(reloads))
        return module

    alone = fit(algorithm=DelayedNesterov(), cluster=cluster(seconds))
    assert [len(batch) for batch in alone.read[0]] == [2] * 12 + [4] * 12
    if seconds == [0.1, 0.1]:
        assert alone.read == fit().read
    else:
        assert all(len(set(batch)) == len(batch) for batch in alone.read[1])


def test_a_fit_after_a_tuners_trial_reads_from_the_beginning() -> None:
    """The trial has gone through several epochs, of a sampler that remembers."""

    def fit(tunes: bool) -> Reads:
        L.seed_everything(3, verbose=False)
        module = Reads()
        strategy = DilocoStrategy(2, 4, algorithm=DelayedNesterov(), cluster=cluster([0.1, 0.25]))
        finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None, update_attr=False)
        t = trainer(strategy, max_epochs=3, callbacks=[finder] if tunes else [], enable_checkpointing=tunes)
        module.lr = 1e-3
        t.fit(module, REMEMBERING["counts its passes"][0]())
        return module

    tuned, plain = fit(True), fit(False)
    trial = {w: len(tuned.read[w]) - len(plain.read[w]) for w in (0, 1)}
    assert trial[0] > 12
    assert {w: tuned.read[w][n:] for w, n in trial.items()} == plain.read


def test_an_epoch_that_a_hook_has_ended_is_over_for_the_workers_that_stepped() -> None:
    class Ends(Reads):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    def fit(**settings: Any) -> Reads:
        L.seed_everything(3, verbose=False)
        module = Ends()
        trainer(DilocoStrategy(2, 4, **settings), max_epochs=3).fit(module, LOADERS["shuffled"][0]())
        return module

    together, alone = fit(), fit(algorithm=DelayedNesterov(), cluster=cluster(0.1))
    assert alone.read == together.read
    assert len(alone.read[0]) == 9


def test_learning_rates_follow_a_workers_own_steps() -> None:
    module = reads(LOADERS["shuffled"][0], {}, 5, algorithm=DelayedNesterov(), cluster=cluster([0.25, 0.1]))
    assert module.rates[1] == [1e-3 * 0.5**k for k in range(30)]
    assert module.rates[0] == [1e-3 * 0.5**k for k in range(12)]


@pytest.mark.processes
def test_two_processes_read_the_same(tmp_path: Path) -> None:
    settings = {"algorithm": DelayedNesterov(), "cluster": cluster([0.1, 0.25])}

    def read() -> Any:
        module = reads(LOADERS["shuffled"][0], {"devices": 2}, 5, **settings)
        return module.read, module.rates

    found = processes.run(read, 2, out=tmp_path)
    whole = reads(LOADERS["shuffled"][0], {}, 5, **settings)
    assert {**found[0][0], **found[1][0]} == whole.read
    assert {**found[0][1], **found[1][1]} == whole.rates


def test_a_shard_is_opened_once_per_epoch_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[int, Any]] = []
    before = OwnPace._open

    def note(self: Any, worker: int, place: Any) -> Any:
        opened.append((worker, tuple(place)))
        return before(self, worker, place)

    monkeypatch.setattr(OwnPace, "_open", note)
    reads(LOADERS["shuffled"][0], {}, 4, algorithm=DelayedNesterov(), cluster=cluster([0.1, 0.2]))
    assert sorted(opened) == [*((0, (epoch, 0)) for epoch in range(4)), (1, (0, 0)), (1, (1, 0))]


class Logs(Net):
    """Logs a loss on steps and epochs, the same reduced over processes, and a metric object."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.error = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("reduced", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.error(self(batch[0]), batch[1])
        self.log("error", self.error, on_step=False, on_epoch=True)
        return loss


class Metrics(L.Callback):
    """What callbacks find at the end of every epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seen.append({k: float(v) for k, v in sorted(trainer.callback_metrics.items())})


@pytest.mark.processes
def test_a_process_that_takes_no_step_in_an_epoch_has_the_metrics_of_the_others(tmp_path: Path) -> None:
    """Its worker takes a step in the fourth of six epochs of four batches."""

    def fit(devices: int) -> Any:
        for text in ("The ``compute`` method of metric", "It is recommended to use `self.log"):
            warnings.filterwarnings("ignore", text)
        L.seed_everything(3, verbose=False)
        metrics, best = Metrics(), ModelCheckpoint(tmp_path / f"{devices}", monitor="loss_epoch", every_n_train_steps=2)
        strategy = DilocoStrategy(2, 4, algorithm=DelayedNesterov(), cluster=cluster([0.1, 1.5]))
        callbacks = [metrics, EarlyStopping("loss_epoch", patience=9), best]
        t = trainer(strategy, devices=devices, max_epochs=6, callbacks=callbacks, enable_checkpointing=True)
        t.fit(Logs(), loader(regression_data(32)))
        return metrics.seen, strategy.local_steps

    first, second = processes.run(lambda: fit(2), 2, out=tmp_path / "two")
    alone, steps = fit(1)
    assert first[1] == second[1] == steps == 24
    for ours, theirs, whole in zip(first[0], second[0], alone, strict=True):
        assert ours.keys() == theirs.keys() == whole.keys()
        assert ours["reduced_epoch"] == theirs["reduced_epoch"] == pytest.approx(whole["reduced_epoch"], rel=1e-5)
        assert ours["error"] == theirs["error"] == pytest.approx(whole["error"], rel=1e-5)
    by_itself = [ours["loss_epoch"] != theirs["loss_epoch"] for ours, theirs in zip(first[0], second[0], strict=True)]
    assert by_itself == [False, False, False, True, False, False]


def test_any_algorithm_that_chooses_workers_reads_so() -> None:
    together = reads(LOADERS["shuffled"][0], {}, 2)
    alone = reads(LOADERS["shuffled"][0], {}, 2, algorithm=OneAtATime())
    assert [alone.read[w] for w in (0, 1)] == [together.read[w][:6] for w in (0, 1)]


def test_accumulated_batches_are_the_workers_next_ones() -> None:
    together = reads(LOADERS["shuffled"][0], {}, 4)
    apart = {"algorithm": DelayedNesterov(), "cluster": cluster([0.1, 0.2])}
    alone = reads(LOADERS["shuffled"][0], {"accumulate_grad_batches": 3}, 4, **apart)
    assert alone.read[0] == together.read[0]
    assert alone.read[1] == together.read[1][:12]


def test_a_second_fit_reads_from_the_beginning() -> None:
    apart = {"algorithm": DelayedNesterov(), "cluster": cluster([0.1, 0.25])}
    module, strategy = Reads(), DilocoStrategy(2, 4, **apart)
    L.seed_everything(3, verbose=False)
    for _ in range(2):
        module.read.clear()
        trainer(strategy, max_steps=7).fit(module, LOADERS["shuffled"][0]())
        first, strategy = dict(module.read), DilocoStrategy(2, 4, **apart)
    assert (len(first[0]), len(first[1])) == (7, 3)


# ------------------------------------------------------------------------------------------------ workers in mid-round


class Looks(L.Callback):
    """Buffers and inner states of all workers after every step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        ctx = trainer.strategy._engine.context
        self.seen.append(
            {
                w: (
                    {key: b.clone() for key, b in ctx.replicas.states[w].named_buffers()},
                    [t.clone() for s in ctx.inner.workers[w].states for v in s.values() for t in v.values()],
                )
                for w in ctx.local_workers
            }
        )


@pytest.mark.parametrize("policy", ["keep", "average", "reset"])
def test_arrivals_of_others_touch_nothing_of_a_worker_in_mid_round(policy: str) -> None:
    seconds, looks = [0.1, 0.1, 0.2, 0.5], Looks()
    strategy = DilocoStrategy(N, 4, algorithm=DelayedNesterov(dylu=False), cluster=cluster(seconds), inner_state=policy)
    trainer(strategy, max_steps=16, callbacks=[looks]).fit(Net(), loader(regression_data(320)))
    pace = Pace(cluster(seconds), N)
    stood = 0
    for t, (before, after) in enumerate(pairwise(looks.seen), start=2):
        for w in set(range(N)) - {event.worker for event in pace.at(t)}:
            assert_equal(after[w], before[w], f"worker {w} in step {t}")
            stood += 1
    assert stood == 2 * 15 - sum(steps_of(w, 16, seconds) for w in (2, 3))
    shared = [(e.local_step, e.participants) for e in strategy.ledger.entries if e.what == "buffers"]
    assert shared, "buffers of workers that arrive together are averaged"


class Marks(Net):
    """Worker w has 10^w in a buffer."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.register_buffer("mark", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        strategy: Any = self.trainer.strategy
        self.mark = torch.tensor(10.0**strategy.current_worker)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("policy", "expected"), [("average", 111 / 3), ("first", 1.0)])
def test_thetas_buffers_are_those_of_all_workers_by_the_policy(policy: Any, expected: float) -> None:
    strategy = DilocoStrategy(3, 4, algorithm=DelayedNesterov(), cluster=cluster([0.19, 0.1, 0.12]), buffers=policy)
    seen: list[float] = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            arrived = strategy.reports and strategy.reports[-1].step == trainer.global_step
            if arrived and trainer.global_step > 4:
                seen.append(strategy.outer_state_dict()["mark"].item())

    module = Marks()
    trainer(strategy, max_steps=14, callbacks=[See()]).fit(module, loader(regression_data(240)))
    assert len(seen) >= 4
    # a worker that has just taken θ over has θ's buffer until it steps
    assert seen[0] == pytest.approx(expected) or policy == "average"
    assert all(1 < value < 100 for value in seen) if policy == "average" else set(seen) <= {1.0, 37.0}
    assert module.mark.item() == strategy.outer_state_dict()["mark"].item()


def test_the_outer_momentum_survives_weights_from_outside(tmp_path: Path) -> None:
    class Write(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step in (8, 15):
                with torch.no_grad():
                    pl_module.layers[1].weight.mul_(0.5)

    ours = train(tmp_path, algorithm=DelayedNesterov(), cluster=cluster(0.1), callbacks=[Write()])
    diloco = train(tmp_path, callbacks=[Write()])
    assert difference(ours.module, diloco.module) <= 1e-12


@pytest.mark.slow
def test_a_worker_sends_as_much_as_under_diloco_whoever_arrives_together(tmp_path: Path) -> None:
    together = train(tmp_path, steps=18)
    for seconds in ([0.1] * N, [0.1, 0.1001, 0.1002, 0.1003]):
        run = train(tmp_path, steps=18, algorithm=DelayedNesterov(dylu=False), cluster=cluster(seconds))
        assert run.bytes == together.bytes
        assert [r.payload_bytes for r in run.reports] == [together.reports[0].payload_bytes] * len(run.reports)


class Bad(Layers):
    """Worker 3 gets a NaN in its second step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        strategy: Any = self.trainer.strategy
        self.steps = {**getattr(self, "steps", {})}
        self.steps[strategy.current_worker] = self.steps.get(strategy.current_worker, 0) + 1
        poisoned = strategy.current_worker == 3 and self.steps[3] == 2
        return loss * float("nan") if poisoned else loss


def test_a_worker_that_is_not_finite_starts_again_from_theta(tmp_path: Path) -> None:
    settings = {"algorithm": DelayedNesterov(), "cluster": cluster(ODD), "make": Bad}
    with pytest.raises(RuntimeError, match="pseudo-gradient of worker 3 is not finite"):
        train(tmp_path, **settings)
    with pytest.warns(UserWarning, match="Worker 3 is left out"):
        run = train(tmp_path, nonfinite="skip", **settings)
    assert all(torch.isfinite(t).all() for t in run.module.values())
    assert all(torch.isfinite(t).all() for worker in run.workers.values() for t in worker.values())
    sent = [w for r in run.reports for w in r.participants]
    assert sent.count(3) == 3  # its first Δ, and those of its third and fourth step
    assert all(r.participants for r in run.reports)


# ------------------------------------------------------------------------------------------- in a project's company


def test_accumulation_and_clipping_agree_with_the_oracle(tmp_path: Path) -> None:
    class Clipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 0.05)
            return super().step(closure)

    pairs = [
        [[torch.cat(both) for both in zip(a, b, strict=True)] for a, b in zip(own[::2], own[1::2], strict=False)]
        for own in (batches_of(N, 2 * 12))
    ]
    theirs = EventServer(
        start(),
        lambda model, batch: model.loss(batch),
        partial(Clipping, lr=0.05, momentum=0.9),
        pairs,
        lambda worker, step: round(100 * FAST[worker]),
        [6, 3, 6, 2],
        12,
    )
    ours = train(
        tmp_path,
        algorithm=DelayedNesterov(),
        cluster=cluster(FAST),
        steps=12,
        options={"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    )
    assert difference(ours.module, theirs.theta.state_dict()) <= 1e-12
    assert [(r.step, r.participants) for r in ours.reports] == theirs.pushes


def test_epochs_are_the_fastest_workers_and_validations_see_the_mean(tmp_path: Path) -> None:
    seen: list[Any] = []

    class See(L.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                s = trainer.strategy
                means = {k: sum(s.worker_state_dict(w)[k] for w in range(N)) / N for k in pl_module.state_dict()}
                seen.append(max(float((v - means[k]).abs().max()) for k, v in pl_module.state_dict().items()))

    strategy = DilocoStrategy(N, INTERVAL, algorithm=DelayedNesterov(), cluster=cluster(FAST))
    t = trainer(strategy, max_epochs=3, callbacks=[See()], precision="64-true")
    data = regression_data(dtype=torch.float64)
    t.fit(Net(batch_norm=False), loader(data), loader(data, shuffle=False))
    assert (strategy.local_steps, t.global_step, t.current_epoch) == (18, 18, 3)
    assert len(seen) == 3
    assert max(seen) <= 1e-12


def test_the_clock_adds_up_what_each_worker_has_computed(tmp_path: Path) -> None:
    slow = Cluster([0.1, 0.2], bandwidth_gbit_s=1e-6, latency_ms=10.0)
    strategy = DilocoStrategy(2, 4, algorithm=DelayedNesterov(), cluster=slow)
    data = loader(regression_data(dtype=torch.float64))
    trainer(strategy, max_steps=8, precision="64-true").fit(Layers(sizes=(3, 1)), data)
    link = 2 * (3 * 8 * 8 / 1e3 + 0.01)  # three parameters in float64 at 1 kbit/s, up and down
    first, second = strategy.clock.workers
    assert (first.computing, second.computing) == pytest.approx((0.8, 0.8))
    assert (first.link, second.link) == pytest.approx((2 * link, 2 * link))
    assert first.waiting == second.waiting == 0.0
    assert strategy.clock.seconds == pytest.approx(0.8 + 2 * link)
    with pytest.raises(RuntimeError, match="don't wait for each other"):
        _ = strategy.clock.data_parallel


def test_the_clock_draws_the_jitter_of_a_workers_own_steps() -> None:
    described = cluster([0.1, 0.25], jitter=0.5, seed=3)
    strategy = DilocoStrategy(2, 4, algorithm=DelayedNesterov(), cluster=described)
    trainer(strategy, max_steps=20).fit(Net(), loader(regression_data(320)))
    last = {event.worker: event for t in range(1, 21) for event in Pace(described, 2).at(t)}
    assert last[1].step < last[0].step
    for w, worker in enumerate(strategy.clock.workers):
        assert worker.computing == pytest.approx(last[w].ticks / 10**15, rel=1e-12)


@pytest.mark.slow
def test_a_worker_that_joins_starts_from_theta_with_a_whole_budget(tmp_path: Path) -> None:
    events = [{"kind": "leave", "step": 3, "worker": 1}, {"kind": "join", "step": 8, "worker": 1}]
    described = cluster(EQUAL, availability=Availability(events))
    run = train(tmp_path, algorithm=DelayedNesterov(), cluster=described, steps=16)
    assert [(r.step, r.participants) for r in run.reports] == [
        (6, (0, 2, 3)),
        (12, (0, 2, 3)),
        (13, (1,)),
        (16, (0, 1, 2, 3)),
    ]
    whole = train(tmp_path, algorithm=DelayedNesterov(), cluster=described, callbacks=[Save([4, 9], tmp_path)])
    for step in (4, 9):
        rest = train(tmp_path, algorithm=DelayedNesterov(), cluster=described, resume=tmp_path / f"{step}.ckpt")
        assert_equal(rest.history, whole.history[step:])


def test_a_comparison_counts_the_samples_that_were_trained_on(tmp_path: Path) -> None:
    run = {"num_nodes": 2, "diloco_interval": 4, "algorithm": DelayedNesterov(), "cluster": cluster([0.1, 0.2])}
    options = {"accelerator": "cpu", "max_steps": 7, "val_check_interval": 7, "check_val_every_n_epoch": None}
    found = compare(Net, loaders, {"apart": run}, trainer=options, folder=tmp_path, seeds=1, progress_bar=False)
    assert found.data["samples"].tolist() == [4 * (7 + 3), 4 * (7 + 3)]


def loaders() -> Any:
    return loader(regression_data(320)), loader(regression_data(8), shuffle=False)


def test_time_goes_on_where_nobody_who_is_there_completes_a_step(tmp_path: Path) -> None:
    events = [{"kind": "leave", "step": 5, "worker": 0}, {"kind": "join", "step": 9, "worker": 0}]
    described = cluster([0.1, 0.4], availability=Availability(events))
    run = train(tmp_path, 2, steps=12, algorithm=DelayedNesterov(dylu=False), cluster=described)
    assert run.steps[0] == 12
    pace = Pace(described, 2, lambda step: [1] if 5 <= step < 9 else [0, 1])
    assert [[e.worker for e in pace.at(t)] for t in range(1, 13)] == [
        *([0], [0], [0], [0, 1]),
        *([1], [1], [1], [1]),
        *([0], [0], [0], [0, 1]),
    ]
    assert [e.step for t in range(4, 10) for e in pace.at(t) if e.worker == 1] == [1, 2, 3, 4, 5]


def test_an_algorithm_that_leaves_nobody_is_an_error() -> None:
    class Nobody(OneAtATime):
        def active(self, step: int) -> Sequence[int]:
            return [] if step == 3 else super().active(step)

    with pytest.raises(RuntimeError, match="leaves nobody to take local step 3"):
        trainer(DilocoStrategy(2, 4, algorithm=Nobody()), max_steps=5).fit(Net(), loader())


@pytest.mark.slow
def test_codecs_pack_every_arrival(tmp_path: Path) -> None:
    settings = {"algorithm": DelayedNesterov(), "cluster": cluster(FAST)}
    plain, same = train(tmp_path, **settings), train(tmp_path, codec=Identity(), **settings)
    assert_same_run(plain, same, trace=False)
    coded = train(tmp_path, codec=FP4(), **settings)
    assert coded.bytes < plain.bytes / 4


@pytest.mark.slow
def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["python -m lightning_diloco"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own use of it

    def given(name: str, **arguments: Any) -> dict[str, Any]:
        return {"class_path": f"lightning_diloco.{name}", "init_args": arguments}

    strategy = given(
        "DilocoStrategy",
        num_nodes=2,
        diloco_interval=3,
        algorithm=given("DelayedNesterov", buffer_size=4, activation=0.25, dylu=False),
        cluster=given("Cluster", step_seconds=[0.1, 0.3], bandwidth_gbit_s=1.0, latency_ms=0.0),
    )
    path = tmp_path / "given.yaml"
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 7}
    path.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, **options}}))
    cli = LightningCLI(BoringModel, args=["fit", f"--config={path}"], seed_everything_default=1)
    made = cli.trainer.strategy
    assert repr(made._settings.algorithm) == "DelayedNesterov(buffer_size=4, activation=0.25, dylu=False)"
    assert (made.local_steps, made.outer_steps) == (7, 3)  # worker 0 after 3 and 6; the flush


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: DelayedNesterov(0), "`buffer_size` (=0) must be an integer ≥ 1"),
        (lambda: DelayedNesterov(True), "`buffer_size` (=True)"),
        (lambda: DelayedNesterov(activation=-0.1), "`activation` (=-0.1) must be a number from 0 to 1/n"),
        (lambda: DelayedNesterov(activation="x"), "`activation` (='x')"),
        (lambda: DelayedNesterov(dylu=1), "`dylu` (=1) must be True or False"),
    ],
)
def test_wrong_arguments_are_named(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match="DelayedNesterov: ") as error:
        make()
    assert text in str(error.value)


CLUSTER = {"cluster": cluster(FAST)}
MATRIX = {"bandwidth_gbit_s": [[1.0] * N] * N}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "nobody has said how fast they are"),
        ({"cluster": Cluster("measured", 1.0, 0.0)}, "`step_seconds` (='measured') gives all workers the same speed"),
        ({"cluster": cluster(FAST, pattern="ring")}, "`pattern` (='ring') has none"),
        ({"cluster": cluster(FAST, **MATRIX)}, "has no link to a server"),
        ({**CLUSTER, "algorithm": DelayedNesterov(8, 0.2)}, "`activation` (=0.2) must be at most 1/n, where n (=8)"),
        ({**CLUSTER, "outer_optimizer_cls": torch.optim.Adam}, "must be torch.optim.SGD"),
        ({**CLUSTER, "outer_optimizer_kwargs": {"lr": 0.7, "momentum": 0.9}}, "Nesterov momentum (or none)"),
        ({**CLUSTER, "outer_optimizer_kwargs": {"lr": 0.7, "weight_decay": 0.1}}, "and nothing else"),
    ],
)
def test_settings_that_it_cannot_serve_are_named(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        train(tmp_path, **{"algorithm": DelayedNesterov(), **settings})


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(regression_data())


class Short(Endless):
    def __len__(self) -> int:
        return 400


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_data_that_cannot_be_read_at_ones_own_pace_are_refused() -> None:
    settings: dict[str, Any] = {"algorithm": DelayedNesterov(), "cluster": cluster([0.1, 0.2])}

    def fit(data: Any) -> None:
        trainer(DilocoStrategy(2, 4, **settings), max_steps=40).fit(Net(), data)

    with pytest.raises(ValueError, match=re.escape("training loader (a DataLoader) has no length")):
        fit(DataLoader(Endless(), 4))
    with pytest.raises(RuntimeError, match="epoch 0 of the training data ended after 12 batch"):
        fit(DataLoader(Short(), 4))
    with pytest.raises(MisconfigurationException, match="takes a single training loader"):
        fit({"a": loader(), "b": loader()})


@pytest.mark.slow
def test_a_file_is_resumed_with_the_same_workers_and_speeds(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"algorithm": DelayedNesterov(), "cluster": cluster(FAST)}
    train(tmp_path, callbacks=[Save([6], tmp_path)], **settings)
    with pytest.raises(ValueError, match="`speeds of the cluster` is"):
        train(tmp_path, resume=tmp_path / "6.ckpt", **{**settings, "cluster": cluster(ODD)})
    equal = {**settings, "cluster": cluster(0.1)}
    train(tmp_path, end=tmp_path / "end.ckpt", **equal)
    with pytest.raises(ValueError, match="every worker has a place of its own in the data"):
        train(tmp_path, 2, resume=tmp_path / "end.ckpt", steps=30, options={"max_epochs": 20}, **equal)
    links = cluster(FAST, bandwidth_gbit_s=9.0)  # which decide nothing
    rest = train(tmp_path, resume=tmp_path / "6.ckpt", **{**settings, "cluster": links})
    assert rest.steps[0] == STEPS
