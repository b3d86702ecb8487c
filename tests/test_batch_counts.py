"""How many batches and steps has an epoch, under each option of the Trainer that changes it?"""

import math
import os
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from loaders import Lazy, N, Numbers, Weighted, batched, ddp, each_epoch, fit, flat, left_over, round_robin, warned
from torch.utils.data import DataLoader

from lightning_diloco._lightning.grouping import group_by_place
from lightning_diloco._lightning.samplers import worker_sampler
from lightning_diloco.comm.world import World
from lightning_diloco.fit import ShardPlan


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
        DataLoader(Numbers(size), 2, drop_last=drop_last), limit_train_batches=limit, accumulate_grad_batches=accumulate
    )
    steps = 2 * math.ceil(limited / accumulate)
    assert model.during["len"] == batches
    assert model.during["batches"] == limited
    assert model.during["steps"] == steps
    assert model.fitted.global_step == steps
    expected = ddp(Numbers(size), 41, batch_size=2, drop_last=drop_last)
    assert model.seen == {key: shard[:limited] for key, shard in expected.items()}


def test_max_steps_counts_local_steps():
    model = fit(DataLoader(Numbers(31), 2), max_steps=7, max_epochs=-1)
    assert model.fitted.global_step == 7
    assert [len(model.seen[epoch, worker]) for epoch in range(2) for worker in range(N)] == [6] * N + [1] * N


@pytest.mark.parametrize("overfit", [2, 0.5])
def test_overfit_batches_gives_the_same_batches_each_epoch_unshuffled(overfit):
    L.seed_everything(41, verbose=False)
    model = fit(DataLoader(Numbers(23), 2), overfit_batches=overfit)
    expected = ddp(Numbers(23), 41, shuffle=False, batch_size=2)
    assert model.seen == {key: shard[:2] for key, shard in expected.items()}
    assert model.seen[0, 1] == model.seen[1, 1] == [[1, 4], [7, 10]]
    assert model.fitted.global_step == 4


def test_overfit_batches_turns_shuffling_off():
    with pytest.warns(UserWarning, match="You requested to overfit but enabled train dataloader shuffling"):
        model = fit(DataLoader(Numbers(23), 2, shuffle=True), overfit_batches=2)
    assert model.seen[0, 1] == model.seen[1, 1] == [[1, 4], [7, 10]]


@pytest.mark.parametrize("drop_last", [False, True])
def test_without_distributed_sampler_a_sequential_loader_is_sharded_batch_by_batch(drop_last):
    with nullcontext() if drop_last else warned(left_over(1)):  # 7 batches, or 6
        model = fit(DataLoader(Numbers(20), 3, drop_last=drop_last), use_distributed_sampler=False)
    expected = round_robin(batched(list(range(20)), 3))
    assert model.seen == each_epoch(lambda _: expected)
    assert (model.during["len"], model.during["batches"], model.fitted.global_step) == (2, 2, 4)


def test_without_distributed_sampler_samplers_are_drawn_once_per_epoch_and_sharded_batch_by_batch():
    def run(seed: int, state: int = 0) -> list[list[int]]:
        os.environ["PL_GLOBAL_SEED"] = str(seed)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        sampler = Weighted(torch.ones(18), 18)
        model = fit(DataLoader(Numbers(18), 2, sampler=sampler), use_distributed_sampler=False)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.seen == each_epoch(lambda e: round_robin(batched(sampler.drawn[e], 2)))
        return sampler.drawn

    first = run(41)
    assert run(41, state=5) == first
    assert len(first) == 2
    assert first[0] != first[1]
    assert run(42)[0] not in first


def test_without_distributed_sampler_a_shuffled_loader_covers_the_data_once():
    model = fit(DataLoader(Numbers(18), 3, shuffle=True), use_distributed_sampler=False)
    orders = [flat(flat(model.seen[epoch, worker] for worker in range(N))) for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(18))
    assert orders[0] != orders[1]
    assert orders[0] != list(range(18))


def test_without_distributed_sampler_a_ragged_round_is_dropped_even_if_the_length_is_unknown():
    sampler = Lazy(9)  # 5 batches
    model = fit(DataLoader(Numbers(9), 2, sampler=sampler), use_distributed_sampler=False)
    assert model.seen == each_epoch(lambda e: round_robin(batched(sampler.drawn[e], 2)))


def test_left_over_batches_are_counted_for_workers_not_for_processes():
    plan = ShardPlan(World(2, size=4), seed=0, partition=None, use_distributed_sampler=False, overfit=False)
    with warned("The last 3 batch(es) of an epoch don't suffice for 2 workers of 2 processes each and are dropped."):
        worker_sampler(DataLoader(Numbers(7), 1), plan)
    with warned("The last 1 batch(es) of an epoch don't suffice for 2 workers of 2 processes each and are dropped."):
        assert len(list(group_by_place(iter(range(5)), plan, plan.workers))) == 1


def test_without_distributed_sampler_and_without_batches():
    with warned(left_over(2)):
        model = fit(DataLoader(Numbers(11), None), use_distributed_sampler=False)
    assert model.seen == each_epoch(lambda _: round_robin(range(11)))
