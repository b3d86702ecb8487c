"""How are the batches of streams and other iterables spread over the workers?"""

import math

import pytest
from loaders import (
    N,
    Recorder,
    Rows,
    SizedRows,
    SizedStream,
    Stream,
    as_lists,
    batched,
    each_epoch,
    fit,
    left_over,
    round_robin,
    warned,
)
from torch.utils.data import (
    DataLoader,
)

STREAMS = {
    "IterableDataset": lambda: DataLoader(Stream(32), 3),
    "IterableDataset in two processes": lambda: DataLoader(Stream(40), 3, num_workers=2, persistent_workers=True),
    "IterableDataset without batches": lambda: DataLoader(Stream(11), None),
    "iterable": lambda: Rows(11),
    "rows by index": lambda: _ByIndex(11),
}


class _ByIndex:
    """The old protocol: ``__getitem__`` until IndexError."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> list[int]:
        if index >= self.rows:
            raise IndexError
        return [index]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_sharded_batch_by_batch_and_a_ragged_end_is_dropped_with_a_warning(name):
    everything = [as_lists(batch) for batch in STREAMS[name]()]
    with warned(left_over(len(everything) % N), times=2):
        model = fit(STREAMS[name]())
    assert model.seen == each_epoch(lambda _: round_robin(everything))
    assert model.during["batches"] == math.inf
    assert model.fitted.global_step == 2 * (len(everything) // N)


def test_a_stream_that_comes_out_even_gives_no_warning():
    assert fit(DataLoader(Stream(36), 3)).seen == each_epoch(lambda _: round_robin(batched(list(range(36)), 3)))


def test_a_generator_serves_one_epoch():
    model = fit((j for j in range(12)), max_epochs=1)
    assert model.seen == each_epoch(lambda _: round_robin(range(12)), 1)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("size", "left"), [(32, 2), (35, 0)])
def test_a_stream_with_a_length(size, left, drop_last):
    loader = DataLoader(SizedStream(size), 3, drop_last=drop_last)
    with pytest.warns(UserWarning, match="Your `IterableDataset` has `__len__` defined"):
        model = fit(loader)
    everything = [as_lists(batch) for batch in loader]
    steps = len(everything) // N
    assert model.seen == each_epoch(lambda _: round_robin(everything))
    assert (model.during["len"], model.during["batches"], model.during["steps"]) == (steps, steps, 2 * steps)
    assert model.fitted.global_step == 2 * steps


@pytest.mark.parametrize("loader", [range(11), SizedRows(11)], ids=["range", "class"])
def test_an_iterable_with_a_length(loader):
    model = fit(loader)
    assert model.seen == each_epoch(lambda _: round_robin(loader))
    assert (model.during["len"], model.during["batches"], model.during["steps"]) == (3, 3, 6)


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(36), 3), lambda: Rows(12), lambda: SizedRows(12)])
def test_limit_train_batches_counts_local_steps_of_a_stream(make):
    everything = [as_lists(batch) for batch in make()]
    model = fit(make(), limit_train_batches=2)
    assert model.seen == each_epoch(lambda _: round_robin(everything[: 2 * N]))
    assert (model.during["batches"], model.fitted.global_step) == (2, 4)


def test_a_stream_too_short_for_one_round_is_an_error():
    model = Recorder()
    with pytest.raises(ValueError, match=r"^An epoch of the training data has 2 batch\(es\), but there are 3 workers"):
        fit(DataLoader(Stream(2), 1), max_epochs=1, model=model)
    assert model.seen == {}
