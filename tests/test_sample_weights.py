"""Does `weights="samples"` weigh every worker by its shard? In float64, against the oracles, at every step."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import codec_reference as slow
import lightning as L
import pytest
import torch
from family import (
    BATCH_SIZE,
    EPOCHS,
    INNER,
    INTERVAL,
    SAMPLES,
    STEPS,
    WORKERS,
    Layers,
    Run,
    Save,
    assert_agrees,
    assert_same_run,
    by_numbers,
    layers,
    several,
    start,
    train,
)
from helpers import Net, assert_equal, loader, regression_data, trainer
from loaders import Numbers, Ragged, Rows, Stream
from oracles import DataParallel as DataParallelOracle
from oracles import Oracle
from processes import outcomes
from processes import start as start_processes
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from lightning_diloco import (
    DataParallel,
    Diloco,
    DilocoCallback,
    DilocoStrategy,
    ErrorFeedback,
    PeriodicAveraging,
    StreamingDiloco,
    Table,
)
from lightning_diloco.codecs import FP4

SIZES = [6, 30, 12, 24]  # of the workers' shards
SGD = torch.optim.SGD
NESTEROV = partial(SGD, lr=0.7, momentum=0.9, nesterov=True)


def uneven(dataset: Any, workers: int) -> list[list[int]]:
    assert workers == WORKERS
    indices = iter(range(len(dataset)))
    return [list(islice(indices, size)) for size in SIZES]


def batches() -> list[list[Any]]:
    """The lists in order, the shorter ones wrapping to the longest."""
    x, y = regression_data(SAMPLES, dtype=torch.float64).tensors
    parts = [list(islice(cycle(part), max(SIZES))) for part in uneven(x, WORKERS)]
    cuts = [[part[k : k + BATCH_SIZE] for k in range(0, max(SIZES), BATCH_SIZE)] for part in parts]
    return [[(x[cut], y[cut]) for cut in own * EPOCHS][:STEPS] for own in cuts]


LEFT_OUT = {6: [0, 1], 12: [], 18: [1, 2, 3]}


def participants(step: int, fragment: int) -> list[int] | None:
    return LEFT_OUT.get(step)


def oracle(outer: Any = NESTEROV, inner: str = "sgd", **kwargs: Any) -> Callable[[], Oracle]:
    def make() -> Oracle:
        twin = Oracle(start(inner), WORKERS, Layers.loss, INNER[inner], outer, INTERVAL, weights=SIZES, **kwargs)
        return twin.train(batches()).flush()

    return make


def data_parallel() -> DataParallelOracle:
    return DataParallelOracle(start(), batches(), Layers.loss, INNER["sgd"], weights=SIZES)


CASES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], Any]]] = {
    "diloco": (dict, oracle()),
    "adamw": (lambda: {"make": partial(Layers, "adamw")}, oracle(inner="adamw")),
    "plain average": (lambda: {"outer_optimizer_kwargs": {"lr": 1.0}}, oracle(partial(SGD, lr=1.0))),
    "periodic averaging": (lambda: {"algorithm": PeriodicAveraging()}, oracle(partial(SGD, lr=1.0))),
    "four bits with error feedback": (
        lambda: {"codec": ErrorFeedback(FP4(), 0.9)},
        oracle(codec=by_numbers(slow.fp4), decay=0.9),
    ),
    "workers left out": (lambda: {"participation": Table(LEFT_OUT)}, oracle(participants=participants)),
    "streaming": (
        lambda: {"algorithm": StreamingDiloco(2, delay=2, alpha=0.25)},
        oracle(
            partial(SGD, lr=0.4, momentum=0.9, nesterov=True),
            fragments=[layers(0, 2), layers(1, 3)],
            delay=2,
            alpha=0.25,
        ),
    ),
    "data parallel": (lambda: {"algorithm": DataParallel()}, data_parallel),
}


def weighted(name: str) -> dict[str, Any]:
    return {"partition": uneven, "weights": "samples", "shuffle": False, **CASES[name][0]()}


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_agrees_with_its_oracle(name: str, tmp_path: Path) -> None:
    assert_agrees(train(tmp_path, **weighted(name)), CASES[name][1]())


@pytest.mark.processes
def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    names = ["diloco", "four bits with error feedback", "data parallel"]
    for name, run in zip(names, several(tmp_path, 2, [weighted(name) for name in names]), strict=True):
        assert_same_run(run, train(tmp_path, **weighted(name)), measured=1e-9)


@pytest.mark.processes
def test_the_back_ends_sum_agrees_with_the_oracle(tmp_path: Path) -> None:
    (run,) = several(tmp_path, 2, [{**weighted("diloco"), "reduction": "all_reduce"}])
    assert_agrees(run, CASES["diloco"][1]())


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 6, 14])
def test_a_run_resumes(step: int, tmp_path: Path) -> None:
    whole = train(tmp_path, callbacks=[Save([step], tmp_path)], **weighted("diloco"))
    resumed = train(tmp_path, resume=tmp_path / f"{step}.ckpt", seed=99, **weighted("diloco"))
    assert_equal(resumed.history, whole.history[step:])
    assert_equal(resumed.theta, whole.theta)


def test_a_run_with_other_weights_is_not_resumed(tmp_path: Path) -> None:
    train(tmp_path, steps=6, callbacks=[Save([5], tmp_path)], **weighted("diloco"))
    train(tmp_path, steps=6, callbacks=[Save([4], tmp_path)])
    words = r"other settings: `weights` is (uniform|samples) in the file and (uniform|samples) now\. "
    with pytest.raises(ValueError, match=words) as caught:
        train(tmp_path, resume=tmp_path / "5.ckpt", **{**weighted("diloco"), "weights": "uniform"})
    assert "`weights` is samples in the file and uniform now." in str(caught.value)
    with pytest.raises(ValueError, match=words) as caught:
        train(tmp_path, resume=tmp_path / "4.ckpt", weights="samples")
    assert "`weights` is uniform in the file and samples now." in str(caught.value)


@pytest.mark.slow
def test_files_from_before_the_argument_are_uniform(tmp_path: Path) -> None:
    whole = train(tmp_path, callbacks=[Save([4], tmp_path)])
    file = torch.load(tmp_path / "4.ckpt", weights_only=True)
    settings = file["diloco"]["settings"]
    assert settings.pop("weights") == "uniform"
    file["diloco"]["entries"]["settings"] -= 1
    torch.save(file, tmp_path / "old.ckpt")
    assert_equal(train(tmp_path, resume=tmp_path / "old.ckpt").theta, whole.theta)
    with pytest.raises(ValueError, match=r"`weights` is uniform in the file and samples now"):
        train(tmp_path, resume=tmp_path / "old.ckpt", weights="samples")


@pytest.mark.processes
def test_processes_compare_their_weights(tmp_path: Path) -> None:
    def fit() -> Run:
        weights = ["samples", "uniform"][int(os.environ["LOCAL_RANK"])]
        return train(tmp_path, devices=2, **{**weighted("diloco"), "weights": weights})

    out = tmp_path / "out"
    for outcome in outcomes(start_processes(fit, 2, (), out), out):
        assert outcome is not None
        assert outcome[0] == "raised"
        assert "`weights`" in outcome[1]


# ------------------------------------------------------------------------------------ what else is averaged, and how


def mean(tensors: Sequence[Tensor], shares: Sequence[float] = SIZES) -> Tensor:
    return torch.stack([share * t for share, t in zip(shares, tensors, strict=True)]).sum(0) / sum(shares)


class Looking(L.Callback):
    """The weights that the last validation has seen, and the replicas of that time."""

    def on_validation_start(self, trainer, pl_module):
        self.seen = {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.replicas = [trainer.strategy.worker_state_dict(w) for w in range(WORKERS)]


class Counting(Net):
    """Has a buffer that sums up the inputs that a worker has seen; ``spoil`` are workers that learn nonsense."""

    def __init__(self, spoil: Sequence[int] = ()) -> None:
        super().__init__(batch_norm=False)
        self.spoil = spoil
        self.register_buffer("seen", torch.zeros(3))
        self.double()

    def training_step(self, batch, batch_idx):
        self.seen.add_(batch[0].mean(0))
        factor = float("nan") if self.trainer.strategy.current_worker in self.spoil else 1.0
        return super().training_step(batch, batch_idx) * factor


def count(
    interval: int = 100, steps: int = 6, module: Any = None, data: Any = None, **kwargs: Any
) -> tuple[DilocoStrategy, Looking, list[list[Tensor]]]:
    """A fit; the strategy, what validations saw, and the workers' first moments."""
    arguments = {"partition": uneven, "outer_optimizer_kwargs": {"lr": 1.0}, "final_sync": False, "weights": "samples"}
    strategy, looking = DilocoStrategy(WORKERS, interval, **{**arguments, **kwargs}), Looking()
    t = trainer(
        strategy, max_steps=steps, max_epochs=-1, callbacks=[looking], val_check_interval=steps, num_sanity_val_steps=0
    )
    dataset = regression_data(SAMPLES, dtype=torch.float64)
    t.fit(module or Counting(), data or loader(dataset, shuffle=False), loader(dataset, shuffle=False))
    inner = strategy._engine.context.inner.workers
    return strategy, looking, [[v["exp_avg"] for v in w.states[0].values()] for w in inner.values()]


def test_buffers_and_inner_states_are_weighted_like_the_weights() -> None:
    """A worker's statistics stand for its samples: those of all samples are the mean in these proportions."""
    apart, _, moments = count()
    before = [apart.worker_state_dict(w) for w in range(WORKERS)]
    after, _, moments_after = count(6, inner_state="average")
    for w in range(WORKERS):
        for key, value in after.worker_state_dict(w).items():
            torch.testing.assert_close(value, mean([b[key] for b in before]), rtol=0, atol=1e-12)
        for value, of_workers in zip(moments_after[w], zip(*moments, strict=True), strict=True):
            if value.numel() > 1:
                torch.testing.assert_close(value, mean(of_workers), rtol=0, atol=1e-12)
    assert not torch.allclose(mean([b["seen"] for b in before]), mean([b["seen"] for b in before], [1] * WORKERS))


def test_the_evaluated_mean_is_the_model_that_a_synchronisation_would_make() -> None:
    _, looking, _ = count()
    for key, seen in looking.seen.items():
        torch.testing.assert_close(seen, mean([r[key] for r in looking.replicas]), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Worker 3 is left out")
def test_the_others_count_in_proportion_when_a_worker_is_rejected() -> None:
    apart, _, _ = count()
    before = [apart.worker_state_dict(w) for w in range(WORKERS)]
    after, _, _ = count(6, module=Counting(spoil=[3]), nonfinite="skip")
    for key, value in after.outer_state_dict().items():
        torch.testing.assert_close(value, mean([b[key] for b in before[:3]], SIZES[:3]), rtol=0, atol=1e-12)


class Own(Diloco):
    """Names weights."""

    def after_inner_step(self, step):
        ctx = self.ctx
        if ctx.due(step):
            ctx.send(ctx.names, ctx.delta, weights={0: 1, 1: 1, 2: 0, 3: 2})
        for transfer in ctx.arrived():
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)


def test_weights_that_an_algorithm_names_come_first() -> None:
    apart, _, _ = count()
    after, _, _ = count(6, algorithm=Own())
    for key in ("net.0.weight", "net.3.bias"):
        expected = mean([apart.worker_state_dict(w)[key] for w in range(WORKERS)], [1, 1, 0, 2])
        torch.testing.assert_close(after.outer_state_dict()[key], expected, rtol=0, atol=1e-12)


def test_several_loaders_count_together() -> None:
    def by_size(dataset: Any, workers: int) -> list[range]:
        return [range(w + 1) for w in range(workers)] if len(dataset) == 20 else [range(w, 8, 4) for w in range(4)]

    class First(Counting):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    data = {
        "a": loader(regression_data(20, dtype=torch.float64), 2, shuffle=False),
        "b": loader(regression_data(8, dtype=torch.float64), 2, shuffle=False),
    }
    strategy, _, _ = count(module=First(), data=data, partition=by_size, steps=1)
    assert strategy._engine.context.channel.weights == {0: 3, 1: 4, 2: 5, 3: 6}


def test_a_loader_that_is_made_again_is_weighed_again() -> None:
    """One epoch of six steps each; the outer step at the end of the second sees the second partition's sizes."""
    asked: list[list[range]] = []

    def partition(dataset: Any, workers: int) -> list[range]:
        asked.append([range(24)] * 3 + [range(12 * len(asked) + 12)])
        return asked[-1]

    weights = []

    class Note(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            weights.append(trainer.strategy._engine.context.channel.weights)

    strategy = DilocoStrategy(WORKERS, 6, partition=partition, weights="samples")
    t = trainer(strategy, max_epochs=3, reload_dataloaders_every_n_epochs=1, callbacks=[Note()])
    t.fit(Net(), loader(shuffle=False))
    assert weights == [{0: 24, 1: 24, 2: 24, 3: 12}, None, {0: 24, 1: 24, 2: 24, 3: 36}]


# ------------------------------------------------------------------------------------------------- without a partition


@pytest.mark.slow
def test_shards_without_a_partition_are_equal(tmp_path: Path) -> None:
    assert_same_run(train(tmp_path, weights="samples"), train(tmp_path))


class Batches:
    """Has no samples to count."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader())


@pytest.mark.slow
def test_a_single_worker_is_not_weighed(tmp_path: Path) -> None:
    for more in ({}, {"outer_optimizer_kwargs": {"lr": 1.0}}):
        assert_same_run(train(tmp_path, 1, weights="samples", **more), train(tmp_path, 1, **more))
    strategy = DilocoStrategy(1, weights="samples", outer_optimizer_kwargs={"lr": 1.0})
    t = trainer(strategy, max_steps=2)
    t.fit(Net(), Batches())
    assert not any(isinstance(c, DilocoCallback) for c in t.callbacks)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: DataLoader(Stream(20), 4), "DataLoader"),
        (lambda: Rows(20), "Rows"),
        (lambda: DataLoader(Numbers(20), None), "DataLoader"),
        (lambda: DataLoader(Numbers(20), batch_sampler=Ragged(SequentialSampler(Numbers(20)), 4, False)), "DataLoader"),
    ],
)
def test_a_loader_whose_shards_have_no_known_size_is_an_error(make: Any, name: str) -> None:
    with pytest.raises(ValueError) as caught:
        trainer(DilocoStrategy(2, weights="samples"), max_steps=2).fit(Net(), make())
    assert str(caught.value) == (
        f"`weights` (='samples') needs the number of samples in each worker's shard, but the training loader (a {name})"
        " is read batch by batch: it is a stream, has a batch sampler of its own, or the Trainer has"
        " `use_distributed_sampler=False`. Pass a DataLoader with a `batch_size` over a dataset with `__len__` and"
        " `__getitem__`, with `DilocoStrategy(partition=...)` for shards of your choice; or use `weights='uniform'`."
    )


def test_a_wrong_value_is_an_error() -> None:
    with pytest.raises(ValueError) as caught:
        DilocoStrategy(weights="size")
    assert str(caught.value) == "`weights` (='size') must be one of 'uniform', 'samples'."
