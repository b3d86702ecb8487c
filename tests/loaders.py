"""Datasets, samplers and loaders of numbers, what the workers of a fit read of them, and what ranks of DDP would."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import lightning as L
import pytest
import torch
from helpers import trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_diloco import DilocoStrategy

N = 3


class Numbers(Dataset):
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


def as_lists(batch: Any) -> Any:
    """The numbers in a batch."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {k: as_lists(v) for k, v in batch.items()}
    return [as_lists(v) for v in batch] if isinstance(batch, (list, tuple)) else batch


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
        self.seen.setdefault((self.current_epoch, self.trainer.strategy.current_worker), []).append(as_lists(batch))
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append((dataloader_idx, self.trainer.strategy.current_worker, as_lists(batch)))

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
            seen[epoch, worker] = [as_lists(batch) for batch in DataLoader(dataset, sampler=sampler, **kwargs)]
    return seen


def round_robin(items: Any, wrap: bool = False, workers: int = N) -> list[list[Any]]:
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


def child_processes() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


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


class DrawsLazily:
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            yield int(torch.randint(self.size, ()))


class Lazy(Drawn, DrawsLazily):
    """Draws one number at a time from torch's generator; has no length and no base class."""


class SizedLazy(Lazy):
    def __len__(self) -> int:
        return self.size


class Ragged(Drawn, BatchSampler):
    """A batch sampler of the user's own."""


class Rows:
    """An iterable that is no DataLoader."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[j, 10 * j] for j in range(self.rows)])


class SizedRows(Rows):
    def __len__(self) -> int:
        return self.rows


def pair_of_loaders(mode: str, kind: type = dict, loader_processes: int = 0) -> CombinedLoader:
    a = DataLoader(Numbers(13), 2, shuffle=True, num_workers=loader_processes)
    b = DataLoader(Numbers(30), 2, drop_last=True)
    return CombinedLoader({"a": a, "b": b} if kind is dict else [a, b], mode)


def pair_under_ddp(mode: str, kind: type, epochs: int) -> dict[tuple[int, int], list[Any]]:
    seen = {}
    for worker in range(N):
        for epoch in range(epochs):
            loaders = []
            for size in (13, 30):
                sampler = DistributedSampler(Numbers(size), N, worker, seed=41)
                sampler.set_epoch(epoch)
                loaders.append(DataLoader(Numbers(size), 2, sampler=sampler))
            combined = CombinedLoader(dict(zip("ab", loaders, strict=True)) if kind is dict else loaders, mode)
            seen[epoch, worker] = [as_lists(batch) for batch, *_ in combined]
    return seen


def thirds(dataset: Any, workers: int) -> list[list[int]]:
    """Unequal parts: 0 … 4, 5 … 7, 8 … 19."""
    return [list(range(0, 5)), list(range(5, 8)), list(range(8, len(dataset)))]


def every_nth(dataset: Any, workers: int) -> list[range]:
    return [range(worker, len(dataset), workers) for worker in range(workers)]


def tens(dataset: Any, workers: int) -> list[range]:
    """Worker w owns 10 w … 10 w + 9."""
    return [range(10 * w, 10 * w + 10) for w in range(workers)]


def own_loader(change: Callable[[Any], Iterator[Any]], base: type = DataLoader) -> type:
    """A loader that yields ``change(what is fetched)``."""

    class Loader(base):  # type: ignore[misc]
        def __iter__(self) -> Iterator[Any]:
            return change(super().__iter__())

    return Loader


def skip_fifth(batches: Any) -> Iterator[Any]:
    return (batch for k, batch in enumerate(batches) if k != 4)
