"""Whose batch is it: loaders that don't yield what they fetch, in the order in which they fetch it."""

import re
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import lightning as L
import pytest
import torch
from helpers import slow_but, trainer
from loaders import (
    N,
    Numbers,
    Recorder,
    Weighted,
    as_lists,
    each_epoch,
    fit,
    flat,
    own_loader,
    round_robin,
    skip_fifth,
    tens,
)
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_diloco import DilocoStrategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]


def own_only(model: Recorder) -> bool:
    return all(j // 10 == worker for (_, worker), batches in model.seen.items() for j in flat(batches))


class SlowFirst(Numbers):
    """The first third takes longer."""

    def __getitem__(self, index: int) -> int:
        assert get_worker_info() is not None
        time.sleep(0.02 if index < 10 else 0)
        return super().__getitem__(index)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("partition", [tens, None])
def test_processes_that_answer_out_of_order_dont_mix_the_shards(kind, partition):
    make = lambda **kwargs: kind(SlowFirst(30), 2, num_workers=3, **kwargs)  # noqa: E731
    model = fit(make(in_order=False), partition=partition, max_epochs=1)
    assert model.seen == fit(make(), partition=partition, max_epochs=1).seen
    assert own_only(model) == (partition is not None)


# ---------------------------------------------------------------------- an __iter__ of its own


UNEVEN = (
    "The `__iter__` of Loader fetched 15 batch(es) of an epoch, but yielded 5, 4, 5 for the workers 0, 1, 2. A local"
    " step takes one batch of each, so the last 2 batch(es) are dropped."
)


def skip_fifth_repacked(batches: Any) -> Iterator[Any]:
    return ({"numbers": batch} for k, batch in enumerate(batches) if k != 4)


@pytest.mark.parametrize("base", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("change", [skip_fifth, skip_fifth_repacked])
@pytest.mark.parametrize("processes", [0, 2])
def test_left_out_batches_shift_nothing(base, change, processes):
    with pytest.warns(UserWarning, match=r"^The `__iter__` of") as warnings:
        model = fit(own_loader(change, base)(Numbers(30), 2, num_workers=processes), partition=tens, max_epochs=1)
    assert [str(w.message) for w in warnings if "__iter__" in str(w.message)] == [UNEVEN]
    seen = {w: flat(b["numbers"] if isinstance(b, dict) else b for b in model.seen[0, w]) for w in range(N)}
    assert seen == {
        0: [0, 1, 2, 3, 4, 5, 6, 7],
        1: [10, 11, 14, 15, 16, 17, 18, 19],  # without its second batch
        2: [20, 21, 22, 23, 24, 25, 26, 27],
    }


def test_a_whole_round_may_be_left_out_in_silence():
    model = fit(own_loader(lambda it: (b for k, b in enumerate(it) if k // 3 != 1))(Numbers(30), 2), partition=tens)
    assert own_only(model)
    assert [flat(model.seen[e, 1]) for e in (0, 1)] == [[10, 11, 14, 15, 16, 17, 18, 19]] * 2


def by_fours_backwards(batches: Any) -> Iterator[Any]:
    while held := list(islice(batches, 4)):
        yield from reversed(held)


def test_reordered_batches_reach_their_workers():
    model = fit(
        own_loader(by_fours_backwards)(Numbers(24), 2),
        partition=lambda d, n: [range(8 * w, 8 * w + 8) for w in (0, 1, 2)],
    )
    for (_, worker), batches in model.seen.items():
        assert sorted(flat(batches)) == list(range(8 * worker, 8 * worker + 8))


def test_repeated_batches_reach_their_workers():
    model = fit(own_loader(lambda it: (b for b in it for _ in range(2)))(Numbers(30), 2), partition=tens, max_epochs=1)
    assert own_only(model)


@pytest.mark.parametrize("processes", slow_but([0], [0, 2]))
@pytest.mark.parametrize("partition", [tens, None])
def test_changed_batches_go_in_order(processes, partition):
    doubled = fit(
        own_loader(lambda it: (2 * b for b in it))(Numbers(30), 2, num_workers=processes), partition=partition
    )
    plain = fit(DataLoader(Numbers(30), 2, num_workers=processes), partition=partition)
    assert doubled.seen == {key: [[2 * j for j in b] for b in batches] for key, batches in plain.seen.items()}


def read_ahead(batches: Any) -> Iterator[Any]:
    """Fetches one more than it yields, and yields new objects, as loaders do that copy to a device meanwhile."""
    ahead = next(batches).clone()
    for batch in batches:
        yield ahead
        ahead = batch.clone()
    yield ahead


def test_batches_read_ahead_go_in_order():
    assert fit(own_loader(read_ahead)(Numbers(30), 2)).seen == fit(DataLoader(Numbers(30), 2)).seen


def merged(batches: Any) -> Iterator[Any]:
    while held := list(islice(batches, 2)):
        yield torch.cat(held)


def skip_and_change(batches: Any) -> Iterator[Any]:
    return (2 * batch for k, batch in enumerate(batches) if k != 4)


@pytest.mark.parametrize(
    ("change", "yielded", "fetched"),
    [(merged, 8, 15), (skip_and_change, 14, 15), (lambda it: map(list, pairwise(it)), 14, 15)],
)
def test_what_cant_be_told_apart_is_said_with_counts(change, yielded, fetched):
    with pytest.warns(UserWarning, match="can't be told") as warnings:
        fit(own_loader(change)(Numbers(30), 2), max_epochs=1)
    told = [str(w.message) for w in warnings if "can't be told" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith(
        f"The `__iter__` of Loader fetched {fetched} batch(es) of an epoch and yielded {yielded},"
    )


def shuffled_copies(batches: Any) -> Iterator[Any]:
    """A shuffle buffer."""
    held: list[Any] = []
    for batch in batches:
        held.append(batch.clone())
        if len(held) == 4:
            yield held.pop(1)
    yield from held


def sorted_copies(batches: Any) -> Iterator[Any]:
    return iter(sorted((batch.clone() for batch in batches), key=lambda b: -b.sum()))


def chunks(batches: Any) -> Iterator[Any]:
    return (chunk for batch in batches for chunk in batch.split(1))


def twice(batches: Any) -> Iterator[Any]:
    return (twin for batch in batches for twin in (batch, batch.clone()))


@pytest.mark.parametrize("processes", slow_but([0], [0, 2]))
@pytest.mark.parametrize(
    ("change", "limit", "numbers"),
    [
        (shuffled_copies, 1.0, "fetched 15 batch(es) of an epoch and yielded 15, 15 of them"),
        (sorted_copies, 1.0, "fetched 15 batch(es) of an epoch and yielded 15, 15 of them"),
        (chunks, 1.0, r"fetched \d+ batch(es) of an epoch and yielded \d+, \d+ of them"),  # `len` ends the pass
        (twice, 1.0, r"fetched \d+ batch(es) of an epoch and yielded \d+, \d+ of them"),
        (skip_and_change, 3, "fetched 10 batch(es) of an epoch and yielded 9, 9 of them"),
        (merged, 2, "fetched 12 batch(es) of an epoch and yielded 6, 6 of them"),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2])
def test_reordered_and_abandoned_new_objects_are_said_with_counts(change, limit, numbers, processes, epochs):
    data = own_loader(change)(Numbers(30), 2, num_workers=processes)
    with pytest.warns(UserWarning, match="can't be told") as warnings:
        fit(data, max_epochs=epochs, limit_train_batches=limit)
    told = [str(w.message) for w in warnings if "can't be told" in str(w.message)]
    numbers = numbers.replace("(es)", r"\(es\)")
    assert [bool(re.match(f"The `__iter__` of Loader {numbers}", message)) for message in told] == [True] * epochs


@pytest.mark.parametrize("limit", [1, 3, 1.0])
@pytest.mark.parametrize("change", [read_ahead, lambda it: (2 * b for b in it), lambda it: it])
def test_batches_in_order_are_not_worth_a_word_wherever_a_pass_ends(change, limit):
    model = fit(own_loader(change)(Numbers(30), 2), limit_train_batches=limit)
    assert len(model.seen[1, 0]) == (5 if limit == 1.0 and type(limit) is float else limit)


@pytest.mark.parametrize(
    ("change", "number", "since"),
    [(merged, 1, 2), (skip_and_change, 5, 2), (read_ahead, 1, 2), (lambda it: map(list, pairwise(it)), 1, 2)],
)
def test_what_cant_be_told_apart_is_refused_with_a_partition(change, number, since):
    with pytest.raises(ValueError) as error:
        fit(own_loader(change)(Numbers(30), 2), partition=tens)
    assert str(error.value) == (
        f"With `partition` every batch must belong to one worker, but batch {number} that the `__iter__` of Loader"
        f" yields is a new object made after fetching {since} batch(es) since the last one. Yield the fetched batches"
        " themselves, change batches in the dataset or in `collate_fn`, or drop `partition`."
    )


# ---------------------------------------------------------------------- other ways to iterate


class BySampler(DataLoader):
    """Fetches by itself what its sampler says."""

    def __iter__(self) -> Iterator[Any]:
        for indices in self.batch_sampler:
            yield self.collate_fn([self.dataset[j] for j in indices])


class ByLength(DataLoader):
    """Asks for its length, as loaders do that never end."""

    def __iter__(self) -> Iterator[Any]:
        batches = DataLoader.__iter__(self)
        for _ in range(len(self)):
            yield next(batches)


class ByIterator(DataLoader):
    def _get_iterator(self) -> Any:
        return (batch for batch in super()._get_iterator())


@pytest.mark.parametrize("kind", [BySampler, ByLength, ByIterator])
@pytest.mark.parametrize("partition", [tens, None])
def test_other_ways_to_ask_the_sampler(kind, partition):
    expected = fit(DataLoader(Numbers(30), 2, shuffle=True), partition=partition)
    model = fit(kind(Numbers(30), 2, shuffle=True), partition=partition)
    assert model.seen == expected.seen
    assert model.during["batches"] == expected.during["batches"] == 5


class Cuts(DataLoader):
    """Never asks its sampler."""

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(len(self.dataset)).split(self.batch_size))

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)


def test_a_loader_that_never_asks_its_sampler_is_a_stream():
    model = fit(Cuts(Numbers(24), 2))
    assert model.seen == each_epoch(lambda _: round_robin([[j, j + 1] for j in range(0, 24, 2)]))
    assert model.during["batches"] == 4


def test_a_loader_that_never_asks_its_sampler_and_a_partition():
    with pytest.raises(ValueError, match="but the `__iter__` of Cuts doesn't ask the loader's sampler"):
        fit(Cuts(Numbers(30), 2), partition=tens)


def test_samplers_of_the_user_are_drawn_once_per_epoch_for_own_loaders_too():
    sampler = Weighted(torch.ones(30), 30)
    model = fit(own_loader(lambda it: it)(Numbers(30), 2, sampler=sampler))
    for epoch in range(2):
        shards = round_robin(sampler.drawn[epoch])
        assert [flat(model.seen[epoch, w]) for w in range(N)] == shards


class Repeats:
    """A batch sampler that repeats another without an end; has no length."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.sampler


class Endless(DataLoader):
    """Keeps its iterator, and with it its processes, for all epochs, as the loaders of timm and ultralytics do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Repeats(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            yield next(self.iterator)

    def __del__(self) -> None:
        for process in getattr(self.iterator, "_workers", []):
            process.terminate()


@pytest.mark.parametrize("processes", slow_but([0], [0, 2]))
@pytest.mark.parametrize("distributed", [True, False])
def test_loaders_that_keep_their_iterator_for_all_epochs(processes, distributed, tmp_path):
    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if processes == 0:
                read.append(as_lists(next(iter(trainer.train_dataloader))))

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(**kwargs: Any) -> Any:
        data = Endless(Numbers(30), 2, shuffle=True, num_workers=processes)
        t = trainer(DilocoStrategy(N, 2), use_distributed_sampler=distributed, callbacks=[Looks()])
        t.fit(model := Recorder(), data, **kwargs)
        return model

    L.seed_everything(5, verbose=False)
    read: list[Any] = []
    model = run()
    assert model.during["batches"] == model.during["len"] == 5
    for epoch in (0, 1):
        shards = [flat(model.seen[epoch, w]) for w in range(N)]
        assert [len(s) for s in shards] == [10] * N
        assert sorted(flat(shards)) == list(range(30))
    assert model.seen[0, 0] != model.seen[1, 0]
    assert read == [model.seen[e, 0][0] for e in (0, 1) if processes == 0]
    resumed = run(ckpt_path=tmp_path / "a.ckpt")
    assert resumed.seen == {(1, w): model.seen[1, w][2:] for w in range(N)}


def test_batches_that_dont_suffice_for_a_round_are_completed_from_the_next_repetition():
    model = fit(Endless(Numbers(20), 2), max_epochs=2)  # 10 batches
    expected = round_robin([[j, j + 1] for j in [*range(0, 20, 2), 0, 2]])
    assert model.seen == each_epoch(lambda _: expected)


def test_a_loader_that_keeps_its_iterator_and_reads_a_part_of_it_is_a_stream():
    class Part(Endless):
        def __len__(self) -> int:
            return 3

    model = fit(Part(Numbers(12), 2), max_epochs=3)
    assert [flat(model.seen[e, w] for w in range(N)) for e in range(3)] == [
        [[0, 1], [2, 3], [4, 5]],
        [[6, 7], [8, 9], [10, 11]],
        [[0, 1], [2, 3], [4, 5]],
    ]


class Rows(Dataset):
    """Returns one and the same object again and again."""

    def __init__(self) -> None:
        self.row = torch.arange(2)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return self.row


def test_objects_that_several_batches_hold_tell_nothing():
    assert fit(own_loader(lambda it: it)(Rows(), None)).seen == fit(DataLoader(Rows(), None)).seen
