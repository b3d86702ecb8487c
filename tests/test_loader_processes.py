"""Do the workers share a loader's processes, and do their seeds come from seed and epoch alone?"""

import os
import random
from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch
from loaders import Lazy, N, Numbers, Ragged, Recorder, Stream, Weighted, child_processes, fit
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    get_worker_info,
)


class Where(Numbers):
    """What a loader's process is, seen from the dataset."""

    def __getitem__(self, index: int) -> list[int]:
        info = get_worker_info()
        return [os.getpid(), -1 if info is None else info.num_workers, torch.initial_seed() % 2**53]


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_one_pool_of_processes_serves_all_workers(persistent):
    others = child_processes()
    model = fit(DataLoader(Where(24), 2, num_workers=2, persistent_workers=persistent), model=Recorder(), max_epochs=3)
    assert child_processes() <= others
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


@pytest.mark.slow
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


class Noise(Numbers):
    def __getitem__(self, index: int) -> list[float]:
        return [index, random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda n: DataLoader(Numbers(20), 3, shuffle=True, num_workers=n),
        lambda n: DataLoader(Numbers(20), 3, shuffle=True, num_workers=n, persistent_workers=n > 0),
        lambda n: DataLoader(Numbers(20), 3, sampler=Weighted(torch.ones(20), 20), num_workers=n),
        lambda n: DataLoader(Numbers(20), 3, sampler=Lazy(20), num_workers=n),
        lambda n: DataLoader(Numbers(20), batch_sampler=Ragged(RandomSampler(Numbers(20)), 3, False), num_workers=n),
        lambda n: DataLoader(Stream(36), 3, num_workers=n),
        lambda n: {"a": DataLoader(Numbers(13), 2, num_workers=n), "b": DataLoader(Numbers(30), 2, shuffle=True)},
    ],
)
def test_torchs_generator_is_left_alone_however_many_processes_load(make):
    before = torch.get_rng_state()
    for loader_processes in (0, 2):
        model = fit(make(loader_processes), model=Recorder(draw=True))
        assert torch.equal(torch.get_rng_state(), before)
        assert len(model.seen) == 2 * N
