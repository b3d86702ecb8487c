"""Does `partition` decide the samples of each worker?"""

from itertools import cycle, islice
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from loaders import (
    Lazy,
    N,
    Numbers,
    Ragged,
    Repeated,
    Rows,
    Stream,
    Weighted,
    batched,
    each_epoch,
    every_nth,
    fit,
    flat,
    thirds,
)
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    SequentialSampler,
)


@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize("loader_processes", [0, 2])
def test_partition_without_shuffling_reads_each_list_in_order_and_wraps(batch_size, loader_processes):
    asked = []

    def partition(dataset: Any, workers: int) -> list[list[int]]:
        asked.append((dataset, workers))
        return thirds(dataset, workers)

    dataset = Numbers(20)
    model = fit(DataLoader(dataset, batch_size, num_workers=loader_processes), partition=partition)
    assert len(asked) == 1
    assert asked[0][0] is dataset
    assert asked[0][1] == N
    shards = [list(islice(cycle(part), 12)) for part in thirds(dataset, N)]
    assert model.seen == each_epoch(lambda _: shards if batch_size is None else [batched(s, 4) for s in shards])
    assert model.during["len"] == model.during["batches"] == (12 if batch_size is None else 3)


def _orders(partition: Any = thirds, workers: int = N, epochs: int = 3, **kwargs: Any) -> dict[Any, list[int]]:
    seen = fit(DataLoader(Numbers(20), 4, shuffle=True, **kwargs), workers, partition=partition, max_epochs=epochs).seen
    return {key: flat(batches) for key, batches in seen.items()}


def test_partition_shuffles_each_list_per_epoch_if_the_loader_shuffles():
    L.seed_everything(41, verbose=False)
    orders = _orders()
    parts = thirds(Numbers(20), N)
    for (_, worker), order in orders.items():
        own = parts[worker]
        assert sorted(order[: len(own)]) == own
        assert order == list(islice(cycle(order[: len(own)]), 12))
    whole = [flat(orders[epoch, worker] for worker in range(N)) for epoch in range(3)]
    assert whole[0] != whole[1] != whole[2] != whole[0]
    assert all(orders[epoch, 2] != parts[2] for epoch in range(3))


@pytest.mark.slow
def test_partitions_orders_come_from_seed_epoch_and_worker_alone():
    def same(dataset: Any, workers: int) -> list[range]:
        return [range(20)] * workers

    def other(dataset: Any, workers: int) -> list[range]:
        return [range(20), range(3), range(1)]

    L.seed_everything(41, verbose=False)
    first = _orders(same)
    assert len({tuple(order) for order in first.values()}) == 3 * N  # differs over workers and epochs
    torch.manual_seed(99)
    assert _orders(same, num_workers=2) == first
    with_others = _orders(other)
    assert [with_others[epoch, 0] for epoch in range(3)] == [first[epoch, 0] for epoch in range(3)]
    L.seed_everything(42, verbose=False)
    assert not {tuple(o) for o in _orders(same).values()} & {tuple(o) for o in first.values()}


def test_partition_consumes_nothing_of_torchs_generator():
    before = torch.get_rng_state()
    _orders()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor, tuple])
def test_partition_takes_arrays(convert):
    model = fit(DataLoader(Numbers(20), 4), partition=lambda d, n: [convert(part) for part in thirds(d, n)])
    assert flat(model.seen[0, 1]) == [5, 6, 7] * 4


def test_partition_with_drop_last():
    model = fit(DataLoader(Numbers(20), 5, drop_last=True), partition=thirds)
    assert [len(flat(batches)) for batches in model.seen.values()] == [10] * 2 * N
    assert (model.during["len"], model.during["batches"], model.fitted.global_step) == (2, 2, 4)


def test_partition_may_share_and_leave_out_samples():
    model = fit(DataLoader(Numbers(20), 2), partition=lambda d, n: [[0, 1], [1, 1], [19, 0]])
    assert model.seen == each_epoch(lambda _: [[[0, 1]], [[1, 1]], [[19, 0]]])


def test_partition_with_overfit_batches_does_not_shuffle():
    with pytest.warns(UserWarning, match="You requested to overfit but enabled train dataloader shuffling"):
        model = fit(DataLoader(Numbers(20), 2, shuffle=True), partition=thirds, overfit_batches=2)
    assert model.seen == each_epoch(lambda _: [[[0, 1], [2, 3]], [[5, 6], [7, 5]], [[8, 9], [10, 11]]])


def test_partition_holds_without_distributed_sampler_too():
    model = fit(DataLoader(Numbers(20), 4), partition=thirds, use_distributed_sampler=False)
    assert flat(model.seen[0, 1]) == [5, 6, 7] * 4


def test_partition_is_asked_for_every_loader():
    loaders = {"a": DataLoader(Numbers(20), 6), "b": DataLoader(Numbers(6), 1)}
    model = fit(loaders, partition=every_nth, max_epochs=1)
    assert model.seen[0, 1] == [{"a": [1, 4, 7, 10, 13, 16], "b": [1]}, {"a": [19, 1][:1], "b": [4]}]


def test_partition_of_one_worker():
    asked = []

    def partition(dataset: Any, workers: int) -> list[list[int]]:
        asked.append(workers)
        return [[3, 1, 4, 15, 9]]

    model = fit(DataLoader(Numbers(20), 2), 1, partition=partition)
    assert asked == [1]
    assert model.seen == each_epoch(lambda _: [[[3, 1], [4, 15], [9]]])


NEEDS = (
    " Pass a DataLoader over a dataset with `__len__` and `__getitem__` and without a custom sampler, or drop"
    " `partition`."
)


DEALS = "`partition` shards the indices of a map-style dataset, but "


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0], [1]], "`partition` returned 2 lists of indices for 3 workers. Return exactly one per worker."),
        ([[0]] * 4, "`partition` returned 4 lists of indices for 3 workers. Return exactly one per worker."),
        ([], "`partition` returned 0 lists of indices for 3 workers. Return exactly one per worker."),
        ([[0], [], [1]], "`partition` gave worker 1 no index. Every worker needs at least one sample."),
        (
            [[0], [1], [19, 20]],
            "`partition` gave worker 2 the index 20, but the dataset has 20 samples. Indices must lie in 0 … 19.",
        ),
        (
            [[3, -1], [1], [2]],
            "`partition` gave worker 0 the index -1, but the dataset has 20 samples. Indices must lie in 0 … 19.",
        ),
        (
            [[0], [1.0], [2]],
            "`partition` must return one list of integer indices per worker, not a list like this: 'float' object"
            " cannot be interpreted as an integer.",
        ),
        (
            ([0, True], [1], [2]),
            "`partition` must return one list of integer indices per worker, not a tuple like this: True is a boolean"
            " (`nonzero` turns masks into indices).",
        ),
        (
            None,
            "`partition` must return one list of integer indices per worker, not a NoneType like this: 'NoneType'"
            " object is not iterable.",
        ),
    ],
)
def test_a_wrong_partition_is_an_error(parts, message):
    with pytest.raises(ValueError) as error:
        fit(DataLoader(Numbers(20), 4), partition=lambda dataset, workers: parts)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: DataLoader(Stream(20), 4), "Stream is an IterableDataset, a stream."),
        (lambda: Rows(20), "the loader is a Rows, a stream."),
        (
            lambda: DataLoader(Numbers(20), 4, sampler=Weighted(torch.ones(20), 20)),
            "the loader has a custom Weighted.",
        ),
        (lambda: DataLoader(Numbers(20), None, sampler=Lazy(20)), "the loader has a custom Lazy."),
        (
            lambda: DataLoader(Numbers(20), 4, sampler=Repeated(Numbers(20), replacement=True)),
            "the loader has a custom Repeated.",
        ),
        (
            lambda: DataLoader(Numbers(20), batch_sampler=Ragged(SequentialSampler(Numbers(20)), 4, False)),
            "the loader has a custom Ragged.",
        ),
        (
            lambda: DataLoader(Numbers(20), 4, sampler=DistributedSampler(Numbers(20), 1, 0)),
            "the loader has a custom DistributedSampler.",
        ),
    ],
)
def test_partition_with_a_loader_that_decides_by_itself_is_an_error(make, what):
    for workers in (N, 1):
        with pytest.raises(ValueError) as error:
            fit(make(), workers, partition=lambda dataset, n: [[0]] * n)
        assert str(error.value) == DEALS + what + NEEDS
