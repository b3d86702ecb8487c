"""Which samples each worker gets: as DDP with N processes would have it, from the user's own, untouched loaders."""

import math
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_diloco import DilocoStrategy
from lightning_diloco._lightning.data import WorkerBatches, shard
from lightning_diloco.comm.world import World
from lightning_diloco.fit import ShardPlan
from tests.helpers import trainer

N = 3

pytestmark = [
    # torch's advice for machines with one core; two loader processes are what these tests are about
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),
    # Python 3.12+ about torch's loader processes
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


# ---------------------------------------------------------------------- what is fed, what is seen


class Own(Dataset):
    """Sample j is the number j."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return index


class Stream(IterableDataset):
    """0, 1, …, split over the loader's processes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(range(first, self.size, step))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.size


def plain(batch: Any) -> Any:
    """The numbers in a batch."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {k: plain(v) for k, v in batch.items()}
    return [plain(v) for v in batch] if isinstance(batch, (list, tuple)) else batch


class Recorder(L.LightningModule):
    """Notes what each worker got, and what the Trainer counts; ``draw``: every step draws from torch's generator."""

    def __init__(self, draw: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.draw = draw
        self.seen: dict[tuple[int, int | None], list[Any]] = {}
        self.validated: list[tuple[int, int | None, Any]] = []
        self.during: dict[str, Any] = {}

    def on_train_epoch_start(self) -> None:
        t = self.trainer
        try:
            length = len(t.train_dataloader)
        except TypeError:
            length = None
        self.during = {
            "loader": t.train_dataloader,
            "len": length,
            "batches": t.num_training_batches,
            "steps": t.estimated_stepping_batches if length is not None else None,
        }

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.draw:
            torch.rand(5)
        self.seen.setdefault((self.current_epoch, self.trainer.strategy.current_worker), []).append(plain(batch))
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append((dataloader_idx, self.trainer.strategy.current_worker, plain(batch)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(loader: Any, workers: int = N, model: Any = None, partition: Any = None, **kwargs: Any) -> Recorder:
    model = model or Recorder()
    t = trainer(DilocoStrategy(workers, 2, partition=partition), **kwargs)
    t.fit(model, loader)
    model.fitted = t
    return model


def ddp(
    dataset: Any, seed: int, epochs: Any = 2, workers: int = N, shuffle: bool = True, drop: bool = False, **kwargs: Any
) -> dict[tuple[int, int], list[Any]]:
    """What rank i of DDP with N processes would get; ``drop`` is the sampler's own ``drop_last``."""
    seen = {}
    for worker in range(workers):
        sampler = DistributedSampler(dataset, workers, worker, shuffle=shuffle, seed=seed, drop_last=drop)
        for epoch in range(epochs) if isinstance(epochs, int) else epochs:
            sampler.set_epoch(epoch)
            seen[epoch, worker] = [plain(batch) for batch in DataLoader(dataset, sampler=sampler, **kwargs)]
    return seen


def dealt(items: Any, wrap: bool = False, workers: int = N) -> list[list[Any]]:
    """Item j to worker j mod N; a short last round is completed with the first items, or dropped."""
    items = list(items)
    short = -len(items) % workers
    if short and wrap:
        items += list(islice(cycle(items), short))
    whole = len(items) // workers * workers
    return [items[w:whole:workers] for w in range(workers)]


def each_epoch(shards: Callable[[int], list[Any]], number: int = 2) -> dict[tuple[int, int], Any]:
    """In the form of ``Recorder.seen``: ``shards(epoch)`` lists what each worker gets."""
    return {(epoch, worker): shard for epoch in range(number) for worker, shard in enumerate(shards(epoch))}


def batched(items: list[Any], size: int, drop_last: bool = False) -> list[list[Any]]:
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    return [b for b in batches if len(b) == size or not drop_last]


def flat(batches: Any) -> list[Any]:
    return [j for batch in batches for j in batch]


def left_over(batches: int) -> str:
    return f"The last {batches} batch(es) of an epoch don't suffice for 3 workers and are dropped."


@contextmanager
def warned(message: str, times: int = 1) -> Iterator[None]:
    """Inside, ``message`` is given ``times`` times as a warning, and no other that begins in the same way."""
    with pytest.warns(UserWarning, match=message[:8]) as warnings:
        yield
    assert [str(w.message) for w in warnings if str(w.message).startswith(message[:8])] == [message] * times


def processes() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


# ---------------------------------------------------------------------- ordinary loaders


@pytest.mark.parametrize(
    ("size", "kwargs"),
    [
        (24, {"batch_size": 4, "shuffle": True}),
        (25, {"batch_size": 4, "shuffle": False}),
        (23, {"batch_size": 4, "shuffle": True, "drop_last": True}),
        (26, {"batch_size": 3, "shuffle": False, "drop_last": True}),
        (2, {"batch_size": 2, "shuffle": True}),
        (1, {"batch_size": 2, "shuffle": False}),
        (10, {"batch_size": None, "shuffle": True}),
        (11, {"batch_size": None, "shuffle": False}),
        (23, {"batch_size": 4, "shuffle": True, "num_workers": 2}),
        (23, {"batch_size": 4, "shuffle": False, "drop_last": True, "num_workers": 2, "persistent_workers": True}),
        (11, {"batch_size": None, "shuffle": True, "num_workers": 2, "persistent_workers": True}),
    ],
)
def test_every_worker_reads_its_distributed_shard_epoch_by_epoch(size, kwargs):
    L.seed_everything(41, verbose=False)
    torch.rand(3)
    seen = fit(DataLoader(Own(size), **kwargs), max_epochs=3).seen
    oracle = {k: v for k, v in kwargs.items() if k in ("batch_size", "drop_last")}
    assert seen == ddp(Own(size), seed=41, epochs=3, **oracle)
    assert len(seen) == 3 * N
    if size > 3:
        assert seen[0, 0] != seen[1, 0]


@pytest.mark.parametrize(("workers", "size"), [(2, 23), (5, 23), (5, 2)])
def test_every_worker_reads_its_distributed_shard_for_other_numbers_of_workers(workers, size):
    L.seed_everything(41, verbose=False)
    seen = fit(DataLoader(Own(size), 2), workers=workers).seen
    assert seen == ddp(Own(size), seed=41, workers=workers, batch_size=2)


@pytest.mark.parametrize("given", [8, -1])
def test_without_seed_everything_the_order_follows_torchs_seed(given):
    torch.manual_seed(given)
    torch.rand(3)
    seed = torch.initial_seed() & (2**63 - 1)
    assert (seed != torch.initial_seed()) == (given < 0)
    assert fit(DataLoader(Own(20), 4, shuffle=True)).seen == ddp(Own(20), seed=seed, batch_size=4)


def test_seed_everything_goes_before_torchs_seed():
    L.seed_everything(41, verbose=False)
    torch.manual_seed(8)
    assert fit(DataLoader(Own(20), 4, shuffle=True)).seen == ddp(Own(20), seed=41, batch_size=4)


def test_a_second_fit_of_the_same_trainer_goes_on_with_the_next_epochs():
    L.seed_everything(41, verbose=False)
    for loader_processes in (0, 2):
        model, loader = Recorder(), DataLoader(Own(20), 4, shuffle=True, num_workers=loader_processes)
        t = trainer(DilocoStrategy(N, 2), max_epochs=1)
        t.fit(model, loader)
        t.fit_loop.max_epochs = 3
        t.fit(model, loader)
        assert model.seen == ddp(Own(20), seed=41, epochs=3, batch_size=4)


def test_a_fit_starts_with_the_first_epoch_again():
    L.seed_everything(41, verbose=False)
    loader = DataLoader(Own(20), 4, shuffle=True)
    assert fit(loader).seen == fit(loader).seen


def test_collate_fn_and_the_loaders_own_iter_are_the_users():
    class Doubling(DataLoader):
        def __iter__(self) -> Iterator[Any]:
            return (2 * batch for batch in super().__iter__())

    L.seed_everything(41, verbose=False)
    seen = fit(Doubling(Own(20), 4, collate_fn=lambda items: torch.tensor(items) + 100)).seen
    expected = ddp(Own(20), seed=41, batch_size=4)
    assert seen == {k: [[2 * (j + 100) for j in b] for b in batches] for k, batches in expected.items()}


# ---------------------------------------------------------------------- samplers of the user


class Drawn:
    """Mixed into a sampler: ``drawn`` holds what each ``iter()`` yielded."""

    drawn: list[list[Any]]

    def __iter__(self) -> Iterator[Any]:
        self.__dict__.setdefault("drawn", []).append([])
        mine = self.drawn[-1]
        for item in super().__iter__():  # type: ignore[misc]
            mine.append(item)
            yield item


class Weighted(Drawn, WeightedRandomSampler):
    pass


class Subset(Drawn, SubsetRandomSampler):
    pass


class Repeated(Drawn, RandomSampler):
    """Not the default: with replacement, or not as many as there are samples."""


class _Lazy:
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield int(torch.randint(self.size, ()))


class Eager:
    """Draws everything in ``iter()`` itself."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.drawn: list[list[int]] = []

    def __iter__(self) -> Iterator[int]:
        self.drawn.append(torch.randperm(self.size).tolist())
        return iter(self.drawn[-1])

    def __len__(self) -> int:
        return self.size


class Lazy(Drawn, _Lazy):
    """Draws one number at a time from torch's generator; has no length and no base class."""


class SizedLazy(Lazy):
    def __len__(self) -> int:
        return self.size


SAMPLERS = {
    "weighted": lambda: Weighted(torch.arange(1.0, 21.0), 19),
    "subset": lambda: Subset(range(3, 20)),
    "with replacement": lambda: Repeated(Own(20), replacement=True),
    "a part": lambda: Repeated(Own(20), num_samples=7),
    "own class": lambda: SizedLazy(20),
    "own class, drawing at once": lambda: Eager(20),
    "own class without len": lambda: Lazy(20),
    "fewer than workers": lambda: Subset([4]),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_custom_sampler_is_drawn_once_per_epoch_and_dealt(name):
    L.seed_everything(41, verbose=False)
    sampler = SAMPLERS[name]()
    model = fit(DataLoader(Own(20), 3, sampler=sampler))
    assert len(sampler.drawn) == 2  # one iter() per epoch
    assert model.seen == each_epoch(lambda e: [batched(shard, 3) for shard in dealt(sampler.drawn[e], wrap=True)])
    if name != "fewer than workers":
        assert sampler.drawn[0] != sampler.drawn[1]
    if name == "own class without len":
        assert (model.during["len"], model.during["batches"]) == (None, math.inf)
    else:
        batches = math.ceil(math.ceil(len(sampler) / N) / 3)
        assert (model.during["len"], model.during["batches"], model.during["steps"]) == (batches, batches, 2 * batches)


@pytest.mark.parametrize("sampler", [Subset(range(20)), Lazy(20)])
@pytest.mark.parametrize(("drop_last", "batch_size"), [(True, 3), (False, None)])
def test_a_custom_sampler_with_drop_last_and_without_batches(sampler, drop_last, batch_size):
    sampler.drawn = []
    model = fit(DataLoader(Own(20), batch_size, sampler=sampler, drop_last=drop_last))
    shards = each_epoch(lambda e: dealt(sampler.drawn[e], wrap=True))  # of 7 indices
    if batch_size is not None:
        shards = {key: batched(shard, 3, drop_last=True) for key, shard in shards.items()}
    assert model.seen == shards


@pytest.mark.parametrize(
    "name", ["weighted", "subset", "own class", "own class, drawing at once", "own class without len"]
)
def test_a_custom_samplers_torch_randomness_comes_from_seed_and_epoch_alone(name):
    def run(seed: int, loader_processes: int = 0, draw: bool = False, state: int = 0) -> list[list[int]]:
        os.environ["PL_GLOBAL_SEED"] = str(seed)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        sampler = SAMPLERS[name]()
        fit(DataLoader(Own(20), 3, sampler=sampler, num_workers=loader_processes), model=Recorder(draw))
        assert torch.equal(torch.get_rng_state(), before)
        return sampler.drawn

    first = run(41)
    assert run(41, draw=True, state=5) == first
    assert run(41, loader_processes=2, draw=True) == first
    assert run(42)[0] not in first


def test_a_custom_samplers_order_depends_on_the_epoch_not_on_earlier_epochs():
    L.seed_everything(41, verbose=False)
    both, late = SizedLazy(20), SizedLazy(20)
    fit(DataLoader(Own(20), 3, sampler=both))
    t = trainer(DilocoStrategy(N, 2), max_epochs=1)
    t.fit(Recorder(), DataLoader(Own(20), 3))
    t.fit_loop.max_epochs = 2
    t.fit(Recorder(), DataLoader(Own(20), 3, sampler=late))
    assert late.drawn[-1] == both.drawn[1]


class ByEpoch:
    """A sampler of indices (or of batches) whose order is a function of ``set_epoch`` only."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.epoch = 0
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        self.epochs.append(self.epoch)
        return iter(self.rotated(self.epoch))

    def rotated(self, epoch: int) -> list[Any]:
        return self.items[epoch:] + self.items[:epoch]

    def __len__(self) -> int:
        return len(self.items)


@pytest.mark.parametrize("loader_processes", [0, 2])
def test_set_epoch_reaches_the_sampler(loader_processes):
    sampler = ByEpoch(list(range(20)))
    model = fit(DataLoader(Own(20), 3, sampler=sampler, num_workers=loader_processes), max_epochs=3)
    assert sampler.epochs == [0, 1, 2]
    assert model.seen == each_epoch(lambda e: [batched(s, 3) for s in dealt(sampler.rotated(e), wrap=True)], 3)


@pytest.mark.parametrize("loader_processes", [0, 2])
def test_set_epoch_reaches_the_batch_sampler(loader_processes):
    sampler = ByEpoch([[0], [1, 2], [3], [4, 5, 6], [7, 8], [9]])
    model = fit(DataLoader(Own(10), batch_sampler=sampler, num_workers=loader_processes), max_epochs=3)
    assert sampler.epochs == [0, 1, 2]
    assert model.seen == each_epoch(lambda e: dealt(sampler.rotated(e)), 3)


def test_set_epoch_reaches_the_sampler_of_a_custom_batch_sampler():
    class Pairs:
        def __init__(self, sampler: ByEpoch) -> None:
            self.sampler = sampler

        def __iter__(self) -> Iterator[list[int]]:
            return iter(batched(list(self.sampler), 2))

        def __len__(self) -> int:
            return math.ceil(len(self.sampler) / 2)

    sampler = ByEpoch(list(range(12)))
    model = fit(DataLoader(Own(12), batch_sampler=Pairs(sampler)), max_epochs=3)
    assert sampler.epochs == [0, 1, 2]
    assert model.seen == each_epoch(lambda e: dealt(batched(sampler.rotated(e), 2)), 3)


# ---------------------------------------------------------------------- batch samplers of the user


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("sampler", [SequentialSampler, RandomSampler])
def test_a_plain_batch_sampler_is_the_default_loader_spelt_out(sampler, drop_last):
    L.seed_everything(41, verbose=False)
    seen = fit(DataLoader(Own(22), batch_sampler=BatchSampler(sampler(Own(22)), 3, drop_last))).seen
    assert seen == ddp(Own(22), seed=41, batch_size=3, drop_last=drop_last)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_plain_batch_sampler_around_a_custom_sampler(drop_last):
    sampler = Weighted(torch.ones(20), 20)
    model = fit(DataLoader(Own(20), batch_sampler=BatchSampler(sampler, 3, drop_last)))
    assert len(sampler.drawn) == 2
    assert model.seen == each_epoch(lambda e: [batched(s, 3, drop_last) for s in dealt(sampler.drawn[e], wrap=True)])
    assert model.during["len"] == (2 if drop_last else 3)


class Ragged(Drawn, BatchSampler):
    """A batch sampler of the user's own."""


@pytest.mark.parametrize(("size", "drop_last"), [(23, False), (23, True), (18, False), (18, True), (2, False)])
def test_a_custom_batch_sampler_is_drawn_once_per_epoch_and_dealt_by_batches(size, drop_last):
    L.seed_everything(41, verbose=False)
    sampler = Ragged(RandomSampler(Own(size)), 3, drop_last)
    model = fit(DataLoader(Own(size), batch_sampler=sampler))
    assert len(sampler.drawn) == 2
    assert model.seen == each_epoch(lambda e: dealt(sampler.drawn[e], wrap=not drop_last))
    assert model.during["len"] == (len(sampler) // N if drop_last else math.ceil(len(sampler) / N))
    if size > 2:
        assert sampler.drawn[0] != sampler.drawn[1]


def test_a_custom_batch_sampler_without_length_or_attributes():
    class Twice(_Lazy):
        def __iter__(self) -> Iterator[list[int]]:
            return ([j, j] for j in super().__iter__())

    class Bare(Drawn, Twice):
        pass

    sampler = Bare(10)
    model = fit(DataLoader(Own(10), batch_sampler=sampler))
    assert model.seen == each_epoch(lambda e: dealt(sampler.drawn[e], wrap=True))
    assert model.during["batches"] == math.inf


def test_a_batch_sampler_as_the_sampler_of_a_loader_without_batch_size():
    class Several(Own):
        def __getitem__(self, index: Any) -> Any:
            return torch.tensor(index)

    sampler = Ragged(RandomSampler(Own(20)), 3, False)
    model = fit(DataLoader(Several(20), batch_size=None, sampler=sampler))
    assert model.seen == each_epoch(lambda e: dealt(sampler.drawn[e], wrap=True))


# ---------------------------------------------------------------------- a DistributedSampler of the user


@pytest.mark.parametrize("replicas", [1, N])
@pytest.mark.parametrize(
    ("size", "shuffle", "drop", "drop_last"),
    [(20, True, False, False), (20, False, False, True), (20, True, True, False), (19, False, True, False)],
)
def test_a_users_distributed_sampler_gives_every_worker_its_shard(replicas, size, shuffle, drop, drop_last):
    L.seed_everything(41, verbose=False)
    own = DistributedSampler(Own(size), replicas, replicas - 1, shuffle=shuffle, seed=6, drop_last=drop)
    model = fit(DataLoader(Own(size), 3, sampler=own, drop_last=drop_last))
    assert model.seen == ddp(Own(size), 6, shuffle=shuffle, drop=drop, batch_size=3, drop_last=drop_last)


def test_a_users_distributed_sampler_for_another_number_of_replicas_is_an_error():
    with pytest.raises(ValueError) as error:
        fit(DataLoader(Own(20), 4, sampler=DistributedSampler(Own(20), 2, 0)))
    assert str(error.value) == (
        "The training loader has a DistributedSampler with `num_replicas` (=2), but there are 3 workers. Use"
        " `num_replicas=3`, or leave the sampler out: every worker gets its shard by itself."
    )


def test_a_users_distributed_sampler_gives_every_worker_its_shard_without_lightnings_too():
    """The usual pair in projects that make the sampler themselves."""
    own = DistributedSampler(Own(18), N, 0, seed=6)
    model = fit(DataLoader(Own(18), 2, sampler=own), use_distributed_sampler=False)
    assert model.seen == ddp(Own(18), 6, batch_size=2)


def test_a_users_own_kind_of_distributed_sampler_is_used():
    class Backwards(DistributedSampler):
        def __iter__(self) -> Iterator[int]:
            return reversed(list(super().__iter__()))

    model = fit(DataLoader(Own(18), 2, sampler=Backwards(Own(18), N, 0, seed=6)), max_epochs=1)
    expected = ddp(Own(18), 6, 1, batch_size=None)
    assert model.seen == {key: batched(shard[::-1], 2) for key, shard in expected.items()}


@pytest.mark.parametrize("with_attributes", [True, False])
def test_a_custom_batch_sampler_around_a_distributed_sampler_cuts_the_batches(with_attributes):
    class Backwards(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return reversed(list(super().__iter__()))

    class Bare:
        def __init__(self, *args: Any) -> None:
            self.sampler = args[0]

        def __iter__(self) -> Iterator[list[int]]:
            return iter(Backwards(self.sampler, 2, False))

        def __len__(self) -> int:
            return math.ceil(len(self.sampler) / 2)

    kind = Backwards if with_attributes else Bare
    model = fit(DataLoader(Own(24), batch_sampler=kind(DistributedSampler(Own(24), N, 0, seed=6), 2, False)))
    assert model.seen == {key: shard[::-1] for key, shard in ddp(Own(24), 6, batch_size=2).items()}


# ---------------------------------------------------------------------- streams


class Rows:
    """An iterable that is no DataLoader."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[j, 10 * j] for j in range(self.rows)])


class SizedRows(Rows):
    def __len__(self) -> int:
        return self.rows


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
def test_a_stream_is_dealt_batch_by_batch_and_a_ragged_end_is_dropped_with_a_warning(name):
    everything = [plain(batch) for batch in STREAMS[name]()]
    with warned(left_over(len(everything) % N), times=2):
        model = fit(STREAMS[name]())
    assert model.seen == each_epoch(lambda _: dealt(everything))
    assert model.during["batches"] == math.inf
    assert model.fitted.global_step == 2 * (len(everything) // N)


def test_a_stream_that_comes_out_even_gives_no_warning():
    assert fit(DataLoader(Stream(36), 3)).seen == each_epoch(lambda _: dealt(batched(list(range(36)), 3)))


def test_a_generator_serves_one_epoch():
    model = fit((j for j in range(12)), max_epochs=1)
    assert model.seen == each_epoch(lambda _: dealt(range(12)), 1)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("size", "left"), [(32, 2), (35, 0)])
def test_a_stream_with_a_length(size, left, drop_last):
    loader = DataLoader(SizedStream(size), 3, drop_last=drop_last)
    with pytest.warns(UserWarning, match="Your `IterableDataset` has `__len__` defined"):
        model = fit(loader)
    everything = [plain(batch) for batch in loader]
    steps = len(everything) // N
    assert model.seen == each_epoch(lambda _: dealt(everything))
    assert (model.during["len"], model.during["batches"], model.during["steps"]) == (steps, steps, 2 * steps)
    assert model.fitted.global_step == 2 * steps


@pytest.mark.parametrize("loader", [range(11), SizedRows(11)], ids=["range", "class"])
def test_an_iterable_with_a_length(loader):
    model = fit(loader)
    assert model.seen == each_epoch(lambda _: dealt(loader))
    assert (model.during["len"], model.during["batches"], model.during["steps"]) == (3, 3, 6)


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(36), 3), lambda: Rows(12), lambda: SizedRows(12)])
def test_limit_train_batches_counts_local_steps_of_a_stream(make):
    everything = [plain(batch) for batch in make()]
    model = fit(make(), limit_train_batches=2)
    assert model.seen == each_epoch(lambda _: dealt(everything[: 2 * N]))
    assert (model.during["batches"], model.fitted.global_step) == (2, 4)


def test_a_stream_too_short_for_one_round_is_an_error():
    model = Recorder()
    with pytest.raises(ValueError, match=r"^An epoch of the training data has 2 batch\(es\), but there are 3 workers"):
        fit(DataLoader(Stream(2), 1), max_epochs=1, model=model)
    assert model.seen == {}


# ---------------------------------------------------------------------- several loaders


def _pair(mode: str, kind: type = dict, loader_processes: int = 0) -> CombinedLoader:
    a = DataLoader(Own(13), 2, shuffle=True, num_workers=loader_processes)
    b = DataLoader(Own(30), 2, drop_last=True)
    return CombinedLoader({"a": a, "b": b} if kind is dict else [a, b], mode)


def _pair_under_ddp(mode: str, kind: type, epochs: int) -> dict[tuple[int, int], list[Any]]:
    seen = {}
    for worker in range(N):
        for epoch in range(epochs):
            loaders = []
            for size in (13, 30):
                sampler = DistributedSampler(Own(size), N, worker, seed=41)
                sampler.set_epoch(epoch)
                loaders.append(DataLoader(Own(size), 2, sampler=sampler))
            combined = CombinedLoader(dict(zip("ab", loaders, strict=True)) if kind is dict else loaders, mode)
            seen[epoch, worker] = [plain(batch) for batch, *_ in combined]
    return seen


@pytest.mark.parametrize("kind", [dict, list])
@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_combined_loaders_give_every_worker_its_shard_of_each(mode, kind):
    L.seed_everything(41, verbose=False)
    expected = _pair_under_ddp(mode, kind, 2)
    lengths = {"min_size": 3, "max_size_cycle": 5, "max_size": 5}
    combined = _pair(mode, kind)
    before = list(combined.flattened)
    for _ in range(2):  # a second fit finds the loaders as the first one did
        model = fit(combined)
        assert model.seen == expected
        assert model.during["batches"] == lengths[mode]
        assert model.fitted.global_step == 2 * lengths[mode]
        assert all(now is then for now, then in zip(combined.flattened, before, strict=True))
        assert model.fitted.train_dataloader is combined.iterables
        now = combined.iterables.values() if kind is dict else combined.iterables
        assert all(x is y for x, y in zip(now, before, strict=True))
    if mode == "max_size":
        last = expected[0, 0][-1]
        assert None in (last.values() if kind is dict else last)


@pytest.mark.parametrize("kind", [dict, list])
def test_a_dict_or_a_list_of_loaders(kind):
    L.seed_everything(41, verbose=False)
    loaders = _pair("max_size_cycle", kind).iterables
    before = loaders.copy()
    assert fit(loaders).seen == _pair_under_ddp("max_size_cycle", kind, 2)
    assert loaders == before


def test_combined_loaders_with_processes():
    L.seed_everything(41, verbose=False)
    others = processes()
    model = fit(_pair("max_size_cycle", dict, 2))
    assert processes() <= others
    assert model.seen == _pair_under_ddp("max_size_cycle", dict, 2)


def test_a_loader_and_a_stream_together():
    L.seed_everything(41, verbose=False)
    model = fit({"a": DataLoader(Own(13), 2), "b": Rows(12)}, max_epochs=1)
    shards = ddp(Own(13), 41, 1, batch_size=2)
    rows = dealt([[j, 10 * j] for j in range(12)])
    for worker in range(N):
        cycled = list(islice(cycle(shards[0, worker]), 4))
        assert model.seen[0, worker] == [{"a": a, "b": b} for a, b in zip(cycled, rows[worker], strict=True)]


def test_samplers_of_several_loaders_draw_independently():
    a, b = Weighted(torch.ones(20), 20), Weighted(torch.ones(20), 20)
    fit({"a": DataLoader(Own(20), 2, sampler=a), "b": DataLoader(Own(20), 2, sampler=b)})
    assert a.drawn != b.drawn


def test_a_failing_fit_leaves_the_users_combined_loader_as_it_was():
    class Failing(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("stop")

    combined = _pair("min_size")
    before = list(combined.flattened)
    with pytest.raises(RuntimeError, match=r"^stop$"):
        fit(combined, model=Failing())
    assert all(now is then for now, then in zip(combined.flattened, before, strict=True))


# ---------------------------------------------------------------------- Trainer options, counts


def _closed_form(size: int, batch_size: int, drop_last: bool) -> int:
    shard = math.ceil(size / N)
    return shard // batch_size if drop_last else math.ceil(shard / batch_size)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("limit", [None, 2, 0.5])
@pytest.mark.parametrize(("size", "drop_last"), [(31, False), (31, True), (36, False)])
def test_counts_are_those_of_ddp(size, drop_last, limit, accumulate):
    L.seed_everything(41, verbose=False)
    batches = _closed_form(size, 2, drop_last)
    limited = {None: batches, 2: 2, 0.5: batches // 2}[limit]
    model = fit(
        DataLoader(Own(size), 2, drop_last=drop_last), limit_train_batches=limit, accumulate_grad_batches=accumulate
    )
    steps = 2 * math.ceil(limited / accumulate)
    assert model.during["len"] == batches
    assert model.during["batches"] == limited
    assert model.during["steps"] == steps
    assert model.fitted.global_step == steps
    expected = ddp(Own(size), 41, batch_size=2, drop_last=drop_last)
    assert model.seen == {key: shard[:limited] for key, shard in expected.items()}


def test_max_steps_counts_local_steps():
    model = fit(DataLoader(Own(31), 2), max_steps=7, max_epochs=-1)
    assert model.fitted.global_step == 7
    assert [len(model.seen[epoch, worker]) for epoch in range(2) for worker in range(N)] == [6] * N + [1] * N


@pytest.mark.parametrize("overfit", [2, 0.5])
def test_overfit_batches_gives_the_same_batches_each_epoch_unshuffled(overfit):
    L.seed_everything(41, verbose=False)
    model = fit(DataLoader(Own(23), 2), overfit_batches=overfit)
    expected = ddp(Own(23), 41, shuffle=False, batch_size=2)
    assert model.seen == {key: shard[:2] for key, shard in expected.items()}
    assert model.seen[0, 1] == model.seen[1, 1] == [[1, 4], [7, 10]]
    assert model.fitted.global_step == 4


def test_overfit_batches_turns_shuffling_off():
    with pytest.warns(UserWarning, match="You requested to overfit but enabled train dataloader shuffling"):
        model = fit(DataLoader(Own(23), 2, shuffle=True), overfit_batches=2)
    assert model.seen[0, 1] == model.seen[1, 1] == [[1, 4], [7, 10]]


@pytest.mark.parametrize("drop_last", [False, True])
def test_without_distributed_sampler_a_sequential_loader_is_dealt_batch_by_batch(drop_last):
    with nullcontext() if drop_last else warned(left_over(1)):  # 7 batches, or 6
        model = fit(DataLoader(Own(20), 3, drop_last=drop_last), use_distributed_sampler=False)
    expected = dealt(batched(list(range(20)), 3))
    assert model.seen == each_epoch(lambda _: expected)
    assert (model.during["len"], model.during["batches"], model.fitted.global_step) == (2, 2, 4)


def test_without_distributed_sampler_samplers_are_drawn_once_per_epoch_and_dealt_batch_by_batch():
    def run(seed: int, state: int = 0) -> list[list[int]]:
        os.environ["PL_GLOBAL_SEED"] = str(seed)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        sampler = Weighted(torch.ones(18), 18)
        model = fit(DataLoader(Own(18), 2, sampler=sampler), use_distributed_sampler=False)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.seen == each_epoch(lambda e: dealt(batched(sampler.drawn[e], 2)))
        return sampler.drawn

    first = run(41)
    assert run(41, state=5) == first
    assert len(first) == 2
    assert first[0] != first[1]
    assert run(42)[0] not in first


def test_without_distributed_sampler_a_shuffled_loader_covers_the_data_once():
    model = fit(DataLoader(Own(18), 3, shuffle=True), use_distributed_sampler=False)
    orders = [flat(flat(model.seen[epoch, worker] for worker in range(N))) for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(18))
    assert orders[0] != orders[1]
    assert orders[0] != list(range(18))


def test_without_distributed_sampler_a_ragged_round_is_dropped_even_if_the_length_is_unknown():
    sampler = Lazy(9)  # 5 batches
    model = fit(DataLoader(Own(9), 2, sampler=sampler), use_distributed_sampler=False)
    assert model.seen == each_epoch(lambda e: dealt(batched(sampler.drawn[e], 2)))


def test_without_distributed_sampler_and_without_batches():
    with warned(left_over(2)):
        model = fit(DataLoader(Own(11), None), use_distributed_sampler=False)
    assert model.seen == each_epoch(lambda _: dealt(range(11)))


# ---------------------------------------------------------------------- processes, generators


class Where(Own):
    """What a loader's process is, seen from the dataset."""

    def __getitem__(self, index: int) -> list[int]:
        info = get_worker_info()
        return [os.getpid(), -1 if info is None else info.num_workers, torch.initial_seed() % 2**53]


@pytest.mark.parametrize("persistent", [False, True])
def test_one_pool_of_processes_serves_all_workers(persistent):
    others = processes()
    model = fit(DataLoader(Where(24), 2, num_workers=2, persistent_workers=persistent), model=Recorder(), max_epochs=3)
    assert processes() <= others
    pids, sizes = Counter(), set()
    for batches in model.seen.values():
        for pid, pool, _ in batches:
            pids.update(pid)
            sizes.update(pool)
    assert sizes == {2}
    assert len(pids) == (2 if persistent else 2 * 3)  # a new pool each epoch unless it persists, as with any DataLoader
    for epoch in range(3):
        assert len({pid for w in range(N) for batch in model.seen[epoch, w] for pid in batch[0]}) == 2
    assert os.getpid() not in pids


def test_the_processes_seeds_come_from_seed_and_epoch_alone():
    def run(seed: int, state: int = 0, workers: int = N) -> list[set[int]]:
        os.environ["PL_GLOBAL_SEED"] = str(seed)
        torch.manual_seed(state)
        seen = fit(DataLoader(Where(24), 2, num_workers=2), workers=workers).seen
        return [{s for w in range(workers) for b in seen[epoch, w] for s in b[2]} for epoch in range(2)]

    first = run(41)
    assert [len(seeds) for seeds in first] == [2, 2]
    assert not first[0] & first[1]
    assert run(41, state=5) == first
    assert not run(42)[0] & (first[0] | first[1])


class Noise(Own):
    def __getitem__(self, index: int) -> list[float]:
        return [index, random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_seed_workers_makes_all_randomness_in_datasets_reproducible():
    runs = []
    for seed in (41, 41, 42):
        L.seed_everything(seed, workers=True, verbose=False)
        loader = DataLoader(Noise(12), 2, num_workers=2)
        seen = fit(loader).seen
        runs.append([row for key in sorted(seen) for batch in seen[key] for row in zip(*batch, strict=True)])
        assert loader.worker_init_fn is None
    assert runs[0] == runs[1]
    for column in (1, 2, 3):
        values = [row[column] for row in runs[0]]
        assert len({*values}) == len(values) == 24
        assert not {*values} & {row[column] for row in runs[2]}


@pytest.mark.parametrize(
    "make",
    [
        lambda n: DataLoader(Own(20), 3, shuffle=True, num_workers=n),
        lambda n: DataLoader(Own(20), 3, shuffle=True, num_workers=n, persistent_workers=n > 0),
        lambda n: DataLoader(Own(20), 3, sampler=Weighted(torch.ones(20), 20), num_workers=n),
        lambda n: DataLoader(Own(20), 3, sampler=Lazy(20), num_workers=n),
        lambda n: DataLoader(Own(20), batch_sampler=Ragged(RandomSampler(Own(20)), 3, False), num_workers=n),
        lambda n: DataLoader(Stream(36), 3, num_workers=n),
        lambda n: {"a": DataLoader(Own(13), 2, num_workers=n), "b": DataLoader(Own(30), 2, shuffle=True)},
    ],
)
def test_torchs_generator_is_left_alone_however_many_processes_load(make):
    before = torch.get_rng_state()
    for loader_processes in (0, 2):
        model = fit(make(loader_processes), model=Recorder(draw=True))
        assert torch.equal(torch.get_rng_state(), before)
        assert len(model.seen) == 2 * N


# ---------------------------------------------------------------------- partition


def thirds(dataset: Any, workers: int) -> list[list[int]]:
    """Unequal parts: 0 … 4, 5 … 7, 8 … 19."""
    return [list(range(0, 5)), list(range(5, 8)), list(range(8, len(dataset)))]


def every_nth(dataset: Any, workers: int) -> list[range]:
    return [range(worker, len(dataset), workers) for worker in range(workers)]


@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize("loader_processes", [0, 2])
def test_partition_without_shuffling_reads_each_list_in_order_and_wraps(batch_size, loader_processes):
    asked = []

    def partition(dataset: Any, workers: int) -> list[list[int]]:
        asked.append((dataset, workers))
        return thirds(dataset, workers)

    dataset = Own(20)
    model = fit(DataLoader(dataset, batch_size, num_workers=loader_processes), partition=partition)
    assert len(asked) == 1
    assert asked[0][0] is dataset
    assert asked[0][1] == N
    shards = [list(islice(cycle(part), 12)) for part in thirds(dataset, N)]
    assert model.seen == each_epoch(lambda _: shards if batch_size is None else [batched(s, 4) for s in shards])
    assert model.during["len"] == model.during["batches"] == (12 if batch_size is None else 3)


def _orders(partition: Any = thirds, workers: int = N, epochs: int = 3, **kwargs: Any) -> dict[Any, list[int]]:
    seen = fit(DataLoader(Own(20), 4, shuffle=True, **kwargs), workers, partition=partition, max_epochs=epochs).seen
    return {key: flat(batches) for key, batches in seen.items()}


def test_partition_shuffles_each_list_per_epoch_if_the_loader_shuffles():
    L.seed_everything(41, verbose=False)
    orders = _orders()
    parts = thirds(Own(20), N)
    for (_, worker), order in orders.items():
        own = parts[worker]
        assert sorted(order[: len(own)]) == own
        assert order == list(islice(cycle(order[: len(own)]), 12))
    whole = [flat(orders[epoch, worker] for worker in range(N)) for epoch in range(3)]
    assert whole[0] != whole[1] != whole[2] != whole[0]
    assert all(orders[epoch, 2] != parts[2] for epoch in range(3))


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
    model = fit(DataLoader(Own(20), 4), partition=lambda d, n: [convert(part) for part in thirds(d, n)])
    assert flat(model.seen[0, 1]) == [5, 6, 7] * 4


def test_partition_with_drop_last():
    model = fit(DataLoader(Own(20), 5, drop_last=True), partition=thirds)
    assert [len(flat(batches)) for batches in model.seen.values()] == [10] * 2 * N
    assert (model.during["len"], model.during["batches"], model.fitted.global_step) == (2, 2, 4)


def test_partition_may_share_and_leave_out_samples():
    model = fit(DataLoader(Own(20), 2), partition=lambda d, n: [[0, 1], [1, 1], [19, 0]])
    assert model.seen == each_epoch(lambda _: [[[0, 1]], [[1, 1]], [[19, 0]]])


def test_partition_with_overfit_batches_does_not_shuffle():
    with pytest.warns(UserWarning, match="You requested to overfit but enabled train dataloader shuffling"):
        model = fit(DataLoader(Own(20), 2, shuffle=True), partition=thirds, overfit_batches=2)
    assert model.seen == each_epoch(lambda _: [[[0, 1], [2, 3]], [[5, 6], [7, 5]], [[8, 9], [10, 11]]])


def test_partition_holds_without_distributed_sampler_too():
    model = fit(DataLoader(Own(20), 4), partition=thirds, use_distributed_sampler=False)
    assert flat(model.seen[0, 1]) == [5, 6, 7] * 4


def test_partition_is_asked_for_every_loader():
    loaders = {"a": DataLoader(Own(20), 6), "b": DataLoader(Own(6), 1)}
    model = fit(loaders, partition=every_nth, max_epochs=1)
    assert model.seen[0, 1] == [{"a": [1, 4, 7, 10, 13, 16], "b": [1]}, {"a": [19, 1][:1], "b": [4]}]


def test_partition_of_one_worker():
    asked = []

    def partition(dataset: Any, workers: int) -> list[list[int]]:
        asked.append(workers)
        return [[3, 1, 4, 15, 9]]

    model = fit(DataLoader(Own(20), 2), 1, partition=partition)
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
        fit(DataLoader(Own(20), 4), partition=lambda dataset, workers: parts)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: DataLoader(Stream(20), 4), "Stream is an IterableDataset, a stream."),
        (lambda: Rows(20), "the loader is a Rows, a stream."),
        (lambda: DataLoader(Own(20), 4, sampler=Weighted(torch.ones(20), 20)), "the loader has a custom Weighted."),
        (lambda: DataLoader(Own(20), None, sampler=Lazy(20)), "the loader has a custom Lazy."),
        (
            lambda: DataLoader(Own(20), 4, sampler=Repeated(Own(20), replacement=True)),
            "the loader has a custom Repeated.",
        ),
        (
            lambda: DataLoader(Own(20), batch_sampler=Ragged(SequentialSampler(Own(20)), 4, False)),
            "the loader has a custom Ragged.",
        ),
        (
            lambda: DataLoader(Own(20), 4, sampler=DistributedSampler(Own(20), 1, 0)),
            "the loader has a custom DistributedSampler.",
        ),
    ],
)
def test_partition_with_a_loader_that_decides_by_itself_is_an_error(make, what):
    for workers in (N, 1):
        with pytest.raises(ValueError) as error:
            fit(make(), workers, partition=lambda dataset, n: [[0]] * n)
        assert str(error.value) == DEALS + what + NEEDS


# ---------------------------------------------------------------------- objects of the user


class MyLoader(DataLoader):
    pass


@pytest.mark.parametrize("kind", [DataLoader, MyLoader])
@pytest.mark.parametrize("kwargs", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("partition", [None, thirds])
def test_the_users_loader_is_left_as_it_was(kind, kwargs, partition):
    generator = torch.Generator().manual_seed(12)
    loader = kind(Own(20), 4, shuffle=True, generator=generator, **kwargs)
    loader.note = ["mine"]
    list(loader)  # from here on the user's own processes run, if they persist
    state = generator.get_state()
    before = dict(vars(loader))
    sampler = dict(vars(loader.sampler))
    batch_sampler = dict(vars(loader.batch_sampler))
    others = processes()
    model = fit(loader, partition=partition)
    assert processes() <= others
    for now, then in (
        (vars(loader), before),
        (vars(loader.sampler), sampler),
        (vars(loader.batch_sampler), batch_sampler),
    ):
        assert now.keys() == then.keys()
        assert all(now[key] is then[key] for key in now)
    assert type(loader) is kind
    assert torch.equal(generator.get_state(), state)
    during = model.during["loader"]
    assert during is not loader
    assert isinstance(during, kind)
    assert during.note is loader.note
    assert during.dataset is loader.dataset
    assert model.fitted.train_dataloader is loader
    assert len(loader) == 5
    assert sorted(flat(plain(batch) for batch in loader)) == list(range(20))
    loader._iterator = None  # ends persistent processes now; the garbage collector would wait 5 s for each


def test_one_worker_reads_the_users_own_loader_as_the_plain_trainer_does():
    seen = []
    for strategy in (DilocoStrategy(1, 2), "auto"):
        torch.manual_seed(4)
        model, loader = Recorder(), DataLoader(Own(20), 3, shuffle=True)
        model.trainer = t = trainer(strategy)
        if strategy == "auto":
            t.strategy.current_worker = 0
        t.fit(model, loader)
        assert model.during["loader"] is loader
        seen.append((model.seen, torch.get_rng_state().tolist(), model.during["batches"], t.global_step))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("make", [lambda: Rows(4), lambda: _pair("max_size_cycle"), lambda: DataLoader(Stream(9), 2)])
def test_one_workers_loaders_of_other_kinds_are_the_users_own(make):
    loader = make()
    before = loader.flattened if isinstance(loader, CombinedLoader) else [loader]
    during = fit(loader, 1).during["loader"]
    assert all(now is then for now, then in zip(CombinedLoader(during).flattened, before, strict=True))


@pytest.mark.parametrize("sanity_steps", [0, 2])  # set up after the training loader, or before
def test_validation_loaders_are_untouched(sanity_steps):
    loaders = [DataLoader(Own(5), 2), DataLoader(Own(3), 1, num_workers=2), DataLoader(Stream(4), 3), Rows(1)]
    before = [dict(vars(loader)) for loader in loaders]
    model = Recorder()

    class Identity(L.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            assert all(now is then for now, then in zip(trainer.val_dataloaders, loaders, strict=True))

    t = trainer(DilocoStrategy(N, 2), callbacks=[Identity()], num_sanity_val_steps=sanity_steps)
    t.fit(model, DataLoader(Own(20), 4), loaders)
    once = [
        *[(0, None, b) for b in ([0, 1], [2, 3], [4])],
        *[(1, None, b) for b in ([0], [1], [2])],
        *[(2, None, b) for b in ([0, 1, 2], [3])],
        (3, None, [0, 0]),
    ]
    assert model.validated == once * 2
    for loader, then in zip(loaders, before, strict=True):
        assert all(vars(loader)[key] is value for key, value in then.items())
    assert len(model.seen) == 2 * N


def test_the_batch_size_finder_finds_validation_loaders_untouched():
    """It sets validation loaders up while ``trainer.training`` is True."""

    class Module(Recorder):
        batch_size = 2

        def train_dataloader(self) -> DataLoader:
            return DataLoader(Own(48), self.batch_size)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(Own(10), self.batch_size)

    model = Module()
    t = trainer(DilocoStrategy(N, 2), callbacks=[BatchSizeFinder(max_trials=2, steps_per_trial=2)], max_epochs=1)
    t.fit(model)
    assert model.batch_size == 4
    assert model.validated[-3:] == [(0, None, b) for b in batched(list(range(10)), 4)]
    assert t.global_step == 4


# ---------------------------------------------------------------------- loaders from hooks, reloading


def _sizes(epoch: int) -> int:
    return 12 + 6 * epoch


@pytest.mark.parametrize("kwargs", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_reloaded_loaders_are_dealt_for_their_epoch(owner, kwargs):
    L.seed_everything(41, verbose=False)
    others = processes()
    made: list[DataLoader] = []

    def make() -> DataLoader:
        made.append(DataLoader(Own(_sizes(len(made))), 2, shuffle=True, **kwargs))
        return made[-1]

    counts = []

    class WithHook(Recorder):
        def on_train_epoch_end(self) -> None:
            counts.append((self.during["len"], self.during["batches"]))
            assert len(processes() - others) <= 2  # the last epoch's pool has ended

    class Module(WithHook):
        def train_dataloader(self) -> DataLoader:
            return make()

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return make()

    model = Module() if owner == "module" else WithHook()
    t = trainer(DilocoStrategy(N, 2), reload_dataloaders_every_n_epochs=1, max_epochs=3)
    t.fit(model, datamodule=Data() if owner == "datamodule" else None)
    assert len(made) == 3
    for epoch in range(3):
        expected = ddp(Own(_sizes(epoch)), 41, [epoch], batch_size=2)
        assert {key: shard for key, shard in model.seen.items() if key[0] == epoch} == expected
        batches = _sizes(epoch) // N // 2
        assert counts[epoch] == (batches, batches)
    assert all(type(loader) is DataLoader for loader in made)
    assert t.global_step == 2 + 3 + 4


@pytest.mark.parametrize("combined", [False, True])
def test_reloading_the_same_objects(combined):
    L.seed_everything(41, verbose=False)
    loader = _pair("min_size") if combined else DataLoader(Own(20), 2, shuffle=True)

    class Module(Recorder):
        def train_dataloader(self) -> Any:
            return loader

    model = Module()
    trainer(DilocoStrategy(N, 2), reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(model)
    assert model.seen == (_pair_under_ddp("min_size", dict, 3) if combined else ddp(Own(20), 41, 3, batch_size=2))
    if combined:
        assert [type(x) for x in loader.flattened] == [DataLoader, DataLoader]


def test_reloading_does_not_change_what_custom_samplers_draw():
    class Module(Recorder):
        def train_dataloader(self) -> Any:
            return {name: DataLoader(Own(20), 2, sampler=Weighted(torch.ones(20), 20)) for name in "ab"}

    L.seed_everything(41, verbose=False)
    once, again = Module(), Module()
    trainer(DilocoStrategy(N, 2), max_epochs=3).fit(once)
    trainer(DilocoStrategy(N, 2), reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(again)
    assert len(once.seen) == 3 * N
    assert again.seen == once.seen


def test_a_partition_is_asked_again_when_the_loader_is_reloaded():
    class Module(Recorder):
        def train_dataloader(self) -> Any:
            return DataLoader(Own(6 * (1 + self.current_epoch)), 2)

    model = Module()
    strategy = DilocoStrategy(N, 2, partition=every_nth)
    trainer(strategy, reload_dataloaders_every_n_epochs=1).fit(model)
    assert flat(model.seen[0, 1]) == [1, 4]
    assert flat(model.seen[1, 1]) == [1, 4, 7, 10]


# ---------------------------------------------------------------------- a part of the workers


@pytest.mark.parametrize(
    ("make", "partition"),
    [
        (lambda: DataLoader(Own(23), 2, shuffle=True), None),
        (lambda: DataLoader(Own(23), 2, drop_last=True), None),
        (lambda: DataLoader(Own(23), None), None),
        (lambda: DataLoader(Own(23), batch_sampler=Ragged(SequentialSampler(Own(23)), 2, False)), None),
        (lambda: DataLoader(SizedStream(16), 2), None),
        (lambda: SizedRows(8), None),
        (lambda: DataLoader(Own(23), 2, shuffle=True), every_nth),
        (lambda: DataLoader(Own(23), None), every_nth),
    ],
)
def test_a_process_that_hosts_some_workers_reads_their_batches_only(make, partition, monkeypatch):
    monkeypatch.setattr(World, "decided_by_first", lambda self, decide: decide())  # there are no other processes to ask

    def read(rank: int, size: int) -> tuple[int, list[dict[int, Any]]]:
        world = World(4, rank, size)
        loader = shard(make(), ShardPlan(world, 41, partition, use_distributed_sampler=True, overfit=False))
        rounds = list(loader)
        assert all(isinstance(r, WorkerBatches) for r in rounds)
        return len(loader), [{w: plain(b) for w, b in r.by_worker.items()} for r in rounds]

    length, everyone = read(0, 1)
    assert len(everyone) == length > 0
    for rank, size, some in ((0, 4, [0]), (3, 4, [3]), (1, 2, [2, 3])):
        assert read(rank, size) == (length, [{w: r[w] for w in some} for r in everyone])
