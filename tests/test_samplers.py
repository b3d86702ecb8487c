"""Which samples does each worker get from a sampler or batch sampler of the user?"""

import math
import os
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from helpers import trainer
from loaders import (
    Drawn,
    DrawsLazily,
    Lazy,
    N,
    Numbers,
    Ragged,
    Recorder,
    Repeated,
    SizedLazy,
    Subset,
    Weighted,
    batched,
    ddp,
    each_epoch,
    fit,
    round_robin,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from lightning_diloco import DilocoStrategy

# ---------------------------------------------------------------------- samplers of the user


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


SAMPLERS = {
    "weighted": lambda: Weighted(torch.arange(1.0, 21.0), 19),
    "subset": lambda: Subset(range(3, 20)),
    "with replacement": lambda: Repeated(Numbers(20), replacement=True),
    "a part": lambda: Repeated(Numbers(20), num_samples=7),
    "own class": lambda: SizedLazy(20),
    "own class, drawing at once": lambda: Eager(20),
    "own class without len": lambda: Lazy(20),
    "fewer than workers": lambda: Subset([4]),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_custom_sampler_is_drawn_once_per_epoch_and_sharded(name):
    L.seed_everything(41, verbose=False)
    sampler = SAMPLERS[name]()
    model = fit(DataLoader(Numbers(20), 3, sampler=sampler))
    assert len(sampler.drawn) == 2  # one iter() per epoch
    assert model.seen == each_epoch(lambda e: [batched(shard, 3) for shard in round_robin(sampler.drawn[e], wrap=True)])
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
    model = fit(DataLoader(Numbers(20), batch_size, sampler=sampler, drop_last=drop_last))
    shards = each_epoch(lambda e: round_robin(sampler.drawn[e], wrap=True))  # of 7 indices
    if batch_size is not None:
        shards = {key: batched(shard, 3, drop_last=True) for key, shard in shards.items()}
    assert model.seen == shards


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["weighted", "subset", "own class", "own class, drawing at once", "own class without len"]
)
def test_a_custom_samplers_torch_randomness_comes_from_seed_and_epoch_alone(name):
    def run(seed: int, loader_processes: int = 0, draw: bool = False, state: int = 0) -> list[list[int]]:
        os.environ["PL_GLOBAL_SEED"] = str(seed)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        sampler = SAMPLERS[name]()
        fit(DataLoader(Numbers(20), 3, sampler=sampler, num_workers=loader_processes), model=Recorder(draw))
        assert torch.equal(torch.get_rng_state(), before)
        return sampler.drawn

    first = run(41)
    assert run(41, draw=True, state=5) == first
    assert run(41, loader_processes=2, draw=True) == first
    assert run(42)[0] not in first


def test_a_custom_samplers_order_depends_on_the_epoch_not_on_earlier_epochs():
    L.seed_everything(41, verbose=False)
    both, late = SizedLazy(20), SizedLazy(20)
    fit(DataLoader(Numbers(20), 3, sampler=both))
    t = trainer(DilocoStrategy(N, 2), max_epochs=1)
    t.fit(Recorder(), DataLoader(Numbers(20), 3))
    t.fit_loop.max_epochs = 2
    t.fit(Recorder(), DataLoader(Numbers(20), 3, sampler=late))
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
    model = fit(DataLoader(Numbers(20), 3, sampler=sampler, num_workers=loader_processes), max_epochs=3)
    assert sampler.epochs == [0, 1, 2]
    assert model.seen == each_epoch(lambda e: [batched(s, 3) for s in round_robin(sampler.rotated(e), wrap=True)], 3)


@pytest.mark.parametrize("loader_processes", [0, 2])
def test_set_epoch_reaches_the_batch_sampler(loader_processes):
    sampler = ByEpoch([[0], [1, 2], [3], [4, 5, 6], [7, 8], [9]])
    model = fit(DataLoader(Numbers(10), batch_sampler=sampler, num_workers=loader_processes), max_epochs=3)
    assert sampler.epochs == [0, 1, 2]
    assert model.seen == each_epoch(lambda e: round_robin(sampler.rotated(e)), 3)


def test_set_epoch_reaches_the_sampler_of_a_custom_batch_sampler():
    class Pairs:
        def __init__(self, sampler: ByEpoch) -> None:
            self.sampler = sampler

        def __iter__(self) -> Iterator[list[int]]:
            return iter(batched(list(self.sampler), 2))

        def __len__(self) -> int:
            return math.ceil(len(self.sampler) / 2)

    sampler = ByEpoch(list(range(12)))
    model = fit(DataLoader(Numbers(12), batch_sampler=Pairs(sampler)), max_epochs=3)
    assert sampler.epochs == [0, 1, 2]
    assert model.seen == each_epoch(lambda e: round_robin(batched(sampler.rotated(e), 2)), 3)


# ---------------------------------------------------------------------- batch samplers of the user


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("sampler", [SequentialSampler, RandomSampler])
def test_a_plain_batch_sampler_is_the_default_loader_spelt_out(sampler, drop_last):
    L.seed_everything(41, verbose=False)
    seen = fit(DataLoader(Numbers(22), batch_sampler=BatchSampler(sampler(Numbers(22)), 3, drop_last))).seen
    assert seen == ddp(Numbers(22), seed=41, batch_size=3, drop_last=drop_last)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_plain_batch_sampler_around_a_custom_sampler(drop_last):
    sampler = Weighted(torch.ones(20), 20)
    model = fit(DataLoader(Numbers(20), batch_sampler=BatchSampler(sampler, 3, drop_last)))
    assert len(sampler.drawn) == 2
    assert model.seen == each_epoch(
        lambda e: [batched(s, 3, drop_last) for s in round_robin(sampler.drawn[e], wrap=True)]
    )
    assert model.during["len"] == (2 if drop_last else 3)


@pytest.mark.parametrize(("size", "drop_last"), [(23, False), (23, True), (18, False), (18, True), (2, False)])
def test_a_custom_batch_sampler_is_drawn_once_per_epoch_and_sharded_by_batches(size, drop_last):
    L.seed_everything(41, verbose=False)
    sampler = Ragged(RandomSampler(Numbers(size)), 3, drop_last)
    model = fit(DataLoader(Numbers(size), batch_sampler=sampler))
    assert len(sampler.drawn) == 2
    assert model.seen == each_epoch(lambda e: round_robin(sampler.drawn[e], wrap=not drop_last))
    assert model.during["len"] == (len(sampler) // N if drop_last else math.ceil(len(sampler) / N))
    if size > 2:
        assert sampler.drawn[0] != sampler.drawn[1]


def test_a_custom_batch_sampler_without_length_or_attributes():
    class Twice(DrawsLazily):
        def __iter__(self) -> Iterator[list[int]]:
            return ([j, j] for j in super().__iter__())

    class Bare(Drawn, Twice):
        pass

    sampler = Bare(10)
    model = fit(DataLoader(Numbers(10), batch_sampler=sampler))
    assert model.seen == each_epoch(lambda e: round_robin(sampler.drawn[e], wrap=True))
    assert model.during["batches"] == math.inf


def test_a_batch_sampler_as_the_sampler_of_a_loader_without_batch_size():
    class Several(Numbers):
        def __getitem__(self, index: Any) -> Any:
            return torch.tensor(index)

    sampler = Ragged(RandomSampler(Numbers(20)), 3, False)
    model = fit(DataLoader(Several(20), batch_size=None, sampler=sampler))
    assert model.seen == each_epoch(lambda e: round_robin(sampler.drawn[e], wrap=True))


# ---------------------------------------------------------------------- a DistributedSampler of the user


@pytest.mark.parametrize("replicas", [1, N])
@pytest.mark.parametrize(
    ("size", "shuffle", "drop", "drop_last"),
    [(20, True, False, False), (20, False, False, True), (20, True, True, False), (19, False, True, False)],
)
def test_a_users_distributed_sampler_gives_every_worker_its_shard(replicas, size, shuffle, drop, drop_last):
    L.seed_everything(41, verbose=False)
    own = DistributedSampler(Numbers(size), replicas, replicas - 1, shuffle=shuffle, seed=6, drop_last=drop)
    model = fit(DataLoader(Numbers(size), 3, sampler=own, drop_last=drop_last))
    assert model.seen == ddp(Numbers(size), 6, shuffle=shuffle, drop=drop, batch_size=3, drop_last=drop_last)


def test_a_users_distributed_sampler_for_another_number_of_replicas_is_an_error():
    with pytest.raises(ValueError) as error:
        fit(DataLoader(Numbers(20), 4, sampler=DistributedSampler(Numbers(20), 2, 0)))
    assert str(error.value) == (
        "The training loader has a DistributedSampler with `num_replicas` (=2), but the data is read in 3"
        " shards (workers × processes per worker). Use `num_replicas=3`, or leave the sampler out: every worker gets"
        " its shard by itself."
    )


def test_a_users_distributed_sampler_gives_every_worker_its_shard_without_lightnings_too():
    """The usual pair in projects that make the sampler themselves."""
    own = DistributedSampler(Numbers(18), N, 0, seed=6)
    model = fit(DataLoader(Numbers(18), 2, sampler=own), use_distributed_sampler=False)
    assert model.seen == ddp(Numbers(18), 6, batch_size=2)


def test_a_users_own_kind_of_distributed_sampler_is_used():
    class Backwards(DistributedSampler):
        def __iter__(self) -> Iterator[int]:
            return reversed(list(super().__iter__()))

    model = fit(DataLoader(Numbers(18), 2, sampler=Backwards(Numbers(18), N, 0, seed=6)), max_epochs=1)
    expected = ddp(Numbers(18), 6, 1, batch_size=None)
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
    model = fit(DataLoader(Numbers(24), batch_sampler=kind(DistributedSampler(Numbers(24), N, 0, seed=6), 2, False)))
    assert model.seen == {key: shard[::-1] for key, shard in ddp(Numbers(24), 6, batch_size=2).items()}
