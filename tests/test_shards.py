"""Does each worker read its shard of an ordinary loader, as rank i of DDP would?"""

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from helpers import trainer
from loaders import N, Numbers, Ragged, Recorder, SizedRows, SizedStream, as_lists, ddp, every_nth, fit
from torch.utils.data import (
    DataLoader,
    SequentialSampler,
)

from lightning_diloco import DilocoStrategy
from lightning_diloco._lightning.data import WorkerBatches, shard
from lightning_diloco.comm.world import World
from lightning_diloco.fit import ShardPlan

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
    seen = fit(DataLoader(Numbers(size), **kwargs), max_epochs=3).seen
    oracle = {k: v for k, v in kwargs.items() if k in ("batch_size", "drop_last")}
    assert seen == ddp(Numbers(size), seed=41, epochs=3, **oracle)
    assert len(seen) == 3 * N
    if size > 3:
        assert seen[0, 0] != seen[1, 0]


@pytest.mark.parametrize(("workers", "size"), [(2, 23), (5, 23), (5, 2)])
def test_every_worker_reads_its_distributed_shard_for_other_numbers_of_workers(workers, size):
    L.seed_everything(41, verbose=False)
    seen = fit(DataLoader(Numbers(size), 2), workers=workers).seen
    assert seen == ddp(Numbers(size), seed=41, workers=workers, batch_size=2)


@pytest.mark.parametrize("given", [8, -1])
def test_without_seed_everything_the_order_follows_torchs_seed(given):
    torch.manual_seed(given)
    torch.rand(3)
    seed = torch.initial_seed() & (2**63 - 1)
    assert (seed != torch.initial_seed()) == (given < 0)
    assert fit(DataLoader(Numbers(20), 4, shuffle=True)).seen == ddp(Numbers(20), seed=seed, batch_size=4)


def test_seed_everything_goes_before_torchs_seed():
    L.seed_everything(41, verbose=False)
    torch.manual_seed(8)
    assert fit(DataLoader(Numbers(20), 4, shuffle=True)).seen == ddp(Numbers(20), seed=41, batch_size=4)


@pytest.mark.slow
def test_a_second_fit_of_the_same_trainer_goes_on_with_the_next_epochs():
    L.seed_everything(41, verbose=False)
    for loader_processes in (0, 2):
        model, loader = Recorder(), DataLoader(Numbers(20), 4, shuffle=True, num_workers=loader_processes)
        t = trainer(DilocoStrategy(N, 2), max_epochs=1)
        t.fit(model, loader)
        t.fit_loop.max_epochs = 3
        t.fit(model, loader)
        assert model.seen == ddp(Numbers(20), seed=41, epochs=3, batch_size=4)


def test_a_fit_starts_with_the_first_epoch_again():
    L.seed_everything(41, verbose=False)
    loader = DataLoader(Numbers(20), 4, shuffle=True)
    assert fit(loader).seen == fit(loader).seen


def test_collate_fn_and_the_loaders_own_iter_are_the_users():
    class Doubling(DataLoader):
        def __iter__(self) -> Iterator[Any]:
            return (2 * batch for batch in super().__iter__())

    L.seed_everything(41, verbose=False)
    seen = fit(Doubling(Numbers(20), 4, collate_fn=lambda items: torch.tensor(items) + 100)).seen
    expected = ddp(Numbers(20), seed=41, batch_size=4)
    assert seen == {k: [[2 * (j + 100) for j in b] for b in batches] for k, batches in expected.items()}


# ---------------------------------------------------------------------- a part of the workers


@pytest.mark.parametrize(
    ("make", "partition"),
    [
        (lambda: DataLoader(Numbers(23), 2, shuffle=True), None),
        (lambda: DataLoader(Numbers(23), 2, drop_last=True), None),
        (lambda: DataLoader(Numbers(23), None), None),
        (lambda: DataLoader(Numbers(23), batch_sampler=Ragged(SequentialSampler(Numbers(23)), 2, False)), None),
        (lambda: DataLoader(SizedStream(16), 2), None),
        (lambda: SizedRows(8), None),
        (lambda: DataLoader(Numbers(23), 2, shuffle=True), every_nth),
        (lambda: DataLoader(Numbers(23), None), every_nth),
    ],
)
def test_a_process_that_hosts_some_workers_reads_their_batches_only(make, partition, monkeypatch):
    monkeypatch.setattr(World, "decided_by_first", lambda self, decide: decide())  # there are no other processes to ask

    def read(rank: int, size: int) -> tuple[int, list[dict[int, Any]]]:
        world = World(4, rank, size)
        loader = shard(make(), ShardPlan(world, 41, partition, use_distributed_sampler=True, overfit=False))
        rounds = list(loader)
        assert all(isinstance(r, WorkerBatches) for r in rounds)
        return len(loader), [{w: as_lists(b) for w, b in r.by_worker.items()} for r in rounds]

    length, everyone = read(0, 1)
    assert len(everyone) == length > 0
    for rank, size, some in ((0, 4, [0]), (3, 4, [3]), (1, 2, [2, 3])):
        assert read(rank, size) == (length, [{w: r[w] for w in some} for r in everyone])
