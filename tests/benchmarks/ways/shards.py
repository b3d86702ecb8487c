"""A worker's batches, epoch after epoch: what Lightning does unasked."""

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


def batches(data: Any, batch_size: int, worker: int, workers: int) -> Iterator[Any]:
    sampler = DistributedSampler(data, workers, worker)
    loader = DataLoader(data, batch_size, sampler=sampler, drop_last=True)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader
