"""An epoch with fewer batches than workers: it trains every worker, or it is an error that says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import trainer
from lightning.pytorch.utilities import CombinedLoader
from loaders import (
    Lazy,
    N,
    Numbers,
    Ragged,
    Recorder,
    Rows,
    SizedRows,
    SizedStream,
    Stream,
    ddp,
    each_epoch,
    fit,
    left_over,
    warned,
)
from processes import outcomes, start
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_diloco import DilocoStrategy


def too_few(number: int, what: str = "batch(es)", readers: str = "3 workers") -> str:
    return (
        f"An epoch of the training data has {number} {what}, but there are {readers}, and each needs a batch of its"
        " own."
        " Use fewer workers (`num_nodes`), a smaller `batch_size`, more data, or no `drop_last`."
    )


class FullBatch:
    """One batch an epoch, and no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        yield torch.arange(6)


class SizedFullBatch(FullBatch):
    def __len__(self) -> int:
        return 1


SIZED_STREAM = pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")


@pytest.mark.parametrize(
    "make",
    [
        FullBatch,
        SizedFullBatch,
        lambda: DataLoader(Stream(6), 6),
        lambda: DataLoader(SizedStream(6), 6),
        lambda: DataLoader(Stream(6), 6, num_workers=1),
    ],
)
@SIZED_STREAM
def test_a_single_batch_is_given_to_every_worker(make):
    model = fit(make(), max_epochs=3)
    assert model.seen == each_epoch(lambda _: [[list(range(6))]] * N, 3)
    assert model.fitted.global_step == 3


@pytest.mark.parametrize("kwargs", [{}, {"drop_last": True}])
def test_a_single_batch_without_distributed_sampler_is_given_to_every_worker(kwargs):
    model = fit(DataLoader(Numbers(6), 6, **kwargs), use_distributed_sampler=False)
    assert model.seen == each_epoch(lambda _: [[list(range(6))]] * N)
    assert model.during["batches"] == 1


def test_every_worker_may_change_its_single_batch():
    class Takes(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch.pop("x").add_(1), batch_idx)
            return self.weight.sum()

    class Dicts:
        def __iter__(self) -> Iterator[Any]:
            yield {"x": torch.zeros(2)}

    assert fit(Dicts(), model=Takes()).seen == each_epoch(lambda _: [[[1.0, 1.0]]] * N)


def test_a_small_map_style_dataset_wraps():
    assert fit(DataLoader(Numbers(2), 4)).seen == ddp(Numbers(2), torch.initial_seed(), batch_size=4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: DataLoader(Stream(2), 1), {}, too_few(2)),
        (lambda: DataLoader(Stream(8), 4), {}, too_few(2)),
        (lambda: DataLoader(SizedStream(8), 4), {}, too_few(2)),
        (lambda: Rows(2), {}, too_few(2)),
        (lambda: SizedRows(2), {}, too_few(2)),
        (lambda: DataLoader(Numbers(8), 4), {"use_distributed_sampler": False}, too_few(2)),
        (lambda: DataLoader(Numbers(8), 4, sampler=Lazy(8)), {"use_distributed_sampler": False}, too_few(2)),
        (lambda: DataLoader(Numbers(8), 4, drop_last=True), {}, too_few(2)),
        (lambda: DataLoader(Numbers(8), 4, sampler=Lazy(8), drop_last=True), {}, too_few(9, "sample(s)")),
        (lambda: DataLoader(Numbers(2), batch_sampler=Ragged(SequentialSampler(Numbers(2)), 1, True)), {}, too_few(2)),
        (lambda: DataLoader(Numbers(2), batch_sampler=Cut(2)), {}, too_few(2)),
    ],
)
@pytest.mark.parametrize("limits", [{"max_epochs": 1}, {"max_steps": 4, "max_epochs": -1}], ids=str)
@SIZED_STREAM
def test_fewer_batches_than_workers_are_an_error(make, options, message, limits):
    model = Recorder()
    with pytest.raises(ValueError) as error:
        fit(make(), model=model, **options, **limits)
    assert str(error.value) == message
    assert not model.seen


class Cut(BatchSampler):
    """Batches of one, with ``drop_last`` and without a length."""

    def __init__(self, size: int) -> None:
        self.size, self.drop_last = size, True

    def __iter__(self) -> Iterator[Any]:
        return iter([[j] for j in range(self.size)])

    def __len__(self) -> int:
        raise TypeError


class Shrinks:
    """Six batches in the first epoch, two in the second."""

    def __init__(self) -> None:
        self.left = [2, 6]

    def __iter__(self) -> Iterator[Any]:
        yield from torch.arange(self.left.pop())


def test_a_later_epoch_that_is_too_short_is_an_error():
    model = Recorder()
    with pytest.raises(ValueError) as error:
        fit(Shrinks(), model=model, max_epochs=-1, max_steps=40)
    assert str(error.value) == too_few(2)
    assert model.seen == each_epoch(lambda _: [[w, 3 + w] for w in range(N)], 1)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
@pytest.mark.parametrize(
    "short", [lambda: Rows(2), lambda: SizedRows(2), lambda: DataLoader(Numbers(8), 4, drop_last=True)]
)
def test_one_of_several_loaders_is_too_short(mode, short):
    with pytest.raises(ValueError) as error:
        fit(CombinedLoader({"long": DataLoader(Numbers(30), 2), "short": short()}, mode))
    assert str(error.value) == too_few(2)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_one_of_several_loaders_has_a_single_batch(mode):
    model = fit(CombinedLoader({"long": DataLoader(Numbers(12), 2), "short": SizedFullBatch()}, mode), max_epochs=1)
    assert model.fitted.global_step == (1 if mode == "min_size" else 2)
    assert all(batches[0]["short"] == list(range(6)) for batches in model.seen.values())


def test_a_loader_that_leaves_out_too_much_is_too_short():
    class Leaves(DataLoader):
        def __iter__(self) -> Iterator[Any]:
            return (batch for k, batch in enumerate(super().__iter__()) if k < 2)

    with pytest.raises(ValueError) as error:
        fit(Leaves(Numbers(30), 2))
    assert str(error.value) == too_few(2)


def test_an_epoch_that_just_suffices_trains_and_drops_the_rest():
    with warned(left_over(2), times=2):
        model = fit(Rows(5))
    assert model.fitted.global_step == 2


def test_no_data_at_all_are_what_they_are_for_the_plain_trainer():
    for strategy in ("auto", DilocoStrategy(N, 2)):
        t = trainer(strategy, max_epochs=2)
        t.fit(Recorder(), Rows(0))
        assert (t.global_step, t.current_epoch) == (0, 2)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: DataLoader(Stream(3), 1), {}),
        (lambda: SizedRows(3), {}),
        (Shrinks, {}),
        (lambda: DataLoader(Numbers(12), 4), {"use_distributed_sampler": False}),
        (lambda: DataLoader(Numbers(12), 4, drop_last=True), {}),
    ],
)
def test_every_process_comes_to_the_same_verdict(make, options, tmp_path: Path):
    loader = make()
    if isinstance(loader, Shrinks):
        loader.left = [3, 8]

    def short() -> None:
        strategy = DilocoStrategy(4, 2)
        trainer(strategy, devices=2, max_epochs=-1, max_steps=50, **options).fit(Recorder(), loader)

    for outcome in outcomes(start(short, 2, (), tmp_path), tmp_path, 60):
        assert outcome is not None
        assert outcome == ("raised", "ValueError: " + too_few(3, readers="4 workers"))


@pytest.mark.processes
def test_a_single_batch_reaches_the_workers_of_every_process(tmp_path: Path):
    def single() -> tuple[Any, int]:
        L.seed_everything(1, verbose=False)
        model = Recorder()
        t = trainer(DilocoStrategy(4, 2), devices=2, max_epochs=2)
        t.fit(model, FullBatch())
        return model.seen, t.global_step

    for rank, outcome in enumerate(outcomes(start(single, 2, (), tmp_path), tmp_path, 60)):
        assert outcome is not None
        seen, steps = outcome[1]
        assert seen == {(e, w): [list(range(6))] for e in (0, 1) for w in (2 * rank, 2 * rank + 1)}
        assert steps == 2
