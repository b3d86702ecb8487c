"""One loader serves all workers: who gets which samples.

Owns the dealing of indices, batches and streams to workers. Does not own when batches are fetched (Lightning's fetcher)
nor the user's loader, which stays untouched: what is changed is a shallow copy of it.

==============================================  ================================================================
the user's training loader                      worker i of N reads
==============================================  ================================================================
``DataLoader``, shuffled or sequential          the shard of ``DistributedSampler(num_replicas=N, rank=i)``, which
                                                shuffles, as Lightning's DDP does (not with ``overfit_batches``)
its own sampler                                 every N-th index of the sampler, drawn once per epoch
its own batch sampler                           every N-th batch of the batch sampler, drawn once per epoch
``use_distributed_sampler=False``, a stream     every N-th batch; a ragged last group is dropped
with ``partition=``                             its list of indices; shorter lists wrap to the longest
==============================================  ================================================================

Indices and batches that are dealt from a sampler are made divisible by N by repeating the first ones (unless
``drop_last``), as ``DistributedSampler`` does.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from lightning.fabric.utilities.data import sized_len
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_diloco.randomness import RandomStream, derive_seed

Partition = Callable[[Any, int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Dealing:
    """How to deal: N, the workers hosted here, the run's seed, and the user's wishes."""

    num_workers: int
    workers: Sequence[int]
    seed: int
    partition: Partition | None
    use_distributed_sampler: bool
    overfit: bool


class WorkerBatches:
    """What a dealt loader yields: one batch per worker hosted here. A leaf for everything that walks collections."""

    def __init__(self, by_worker: dict[int, Any]) -> None:
        self.by_worker = by_worker


def split_batch(batch: Any, workers: Sequence[int]) -> dict[int, Any]:
    """The batch of each worker. What wasn't dealt in a (nested) batch, all workers share."""

    def pick(worker: int) -> Any:
        return apply_to_collection(batch, WorkerBatches, lambda leaf: leaf.by_worker[worker])

    return {w: pick(w) for w in workers}


def deal(loader: Any, dealing: Dealing) -> Any:
    """A loader that yields :class:`WorkerBatches` from what ``loader`` yields; its length counts local steps.

    Raises:
        ValueError: ``partition`` with a stream or a sampler of its own, a wrong partition, or a ``DistributedSampler``
            for another number of replicas.
    """
    loader = original(loader)
    if not isinstance(loader, DataLoader):
        if dealing.partition is not None:
            raise ValueError(_NO_PARTITION.format(what=f"the loader is a {type(loader).__name__}, a stream"))
        return _DealtIterable(loader, dealing)
    kind = type(f"Dealt{type(loader).__name__}", (_DealtDataLoader, type(loader)), {})
    dealt: Any = object.__new__(kind)
    state = _Dealt(loader, dealing, torch.Generator())
    # the user's attributes, without DataLoader.__setattr__, which guards some; the generator is our own because
    # otherwise each iter() would draw from the global one
    vars(dealt).update(vars(loader), _dealt=state, _iterator=None, generator=state.generator)
    if not isinstance(loader.dataset, IterableDataset):
        state.sampler = _worker_sampler(loader, dealing)
        vars(dealt)["sampler" if loader.batch_sampler is None else "batch_sampler"] = state.sampler
    elif dealing.partition is not None:
        raise ValueError(_NO_PARTITION.format(what=f"{type(loader.dataset).__name__} is an IterableDataset, a stream"))
    return dealt


def original(loader: Any) -> Any:
    """The user's loader behind a dealt one, or the loader itself."""
    if isinstance(loader, _DealtIterable):
        return loader.loader
    return loader._dealt.loader if isinstance(loader, _DealtDataLoader) else loader


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a dealt loader which epoch its next ``iter()`` belongs to."""
    if isinstance(loader, _DealtDataLoader):
        loader._dealt.epoch = epoch
        if loader._dealt.sampler is not None:
            loader._dealt.sampler.set_epoch(epoch)


_NO_PARTITION = (
    "`partition` deals the indices of a map-style dataset, but {what}. Pass a DataLoader over a dataset with"
    " `__len__` and `__getitem__` and without a sampler of its own, or drop `partition`."
)


_LEFT_OVER = "The last {left} batch(es) of an epoch don't suffice for {workers} workers and are dropped."


# -------------------------------------------------------------------------------------------- loaders


@dataclass
class _Dealt:
    """What a dealt DataLoader remembers."""

    loader: DataLoader[Any]
    dealing: Dealing
    generator: torch.Generator
    sampler: "_WorkerSampler | None" = None
    epoch: int = 0
    skip: int = 0  # batches of each worker that the next iter() leaves out, because a checkpoint had consumed them


class _DealtDataLoader:
    """Mixed in before the class of the user's DataLoader; ``_index_sampler`` decides what its workers fetch."""

    _dealt: _Dealt

    def __iter__(self) -> Iterator[WorkerBatches]:
        dealing = self._dealt.dealing
        self._dealt.generator.manual_seed(derive_seed(dealing.seed, "loader", self._dealt.epoch))
        skip, self._dealt.skip = self._dealt.skip, 0
        if self._dealt.sampler is not None:
            self._dealt.sampler.skip = skip
            batches = super().__iter__()  # type: ignore[misc]
            return _grouped(batches, len(dealing.workers), range(len(dealing.workers)), dealing.workers)
        groups = _grouped(super().__iter__(), dealing.num_workers, dealing.workers)  # type: ignore[misc]
        return islice(groups, skip, None)

    def __len__(self) -> int:
        length: int = super().__len__()  # type: ignore[misc]
        dealing = self._dealt.dealing
        return length // (dealing.num_workers if self._dealt.sampler is None else len(dealing.workers))

    def state_dict(self) -> dict[str, int]:
        """Makes Lightning see a loader that can resume; the position itself comes from the training loop's progress."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next ``iter()`` starts in epoch ``state["epoch"]``, after ``state["consumed"]`` batches of each"
        " worker.
        """
        set_epoch(self, state["epoch"])
        self._dealt.skip = _position(self, state)


class _DealtIterable:
    """Deals any iterable batch by batch."""

    def __init__(self, loader: Iterable[Any], dealing: Dealing) -> None:
        self.loader = loader
        self._dealing = dealing
        self._skip = 0

    def __iter__(self) -> Iterator[WorkerBatches]:
        skip, self._skip = self._skip, 0
        return islice(_grouped(iter(self.loader), self._dealing.num_workers, self._dealing.workers), skip, None)

    def state_dict(self) -> dict[str, int]:
        """As a dealt DataLoader's."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """As a dealt DataLoader's."""
        self._skip = _position(self, state)

    def __len__(self) -> int:
        return len(self.loader) // self._dealing.num_workers  # type: ignore[arg-type]


def _position(loader: Any, state: dict[str, int]) -> int:
    """How many batches of the epoch a loader has handed out after ``consumed`` steps; short ones were cycled"
    " through.
    """
    length = sized_len(loader)
    consumed = state["consumed"]
    return consumed if length is None or consumed <= length or not state["cycles"] else consumed % length


def _grouped(
    batches: Iterator[Any], size: int, picks: Sequence[int], workers: Sequence[int] | None = None
) -> Iterator[WorkerBatches]:
    """Groups of ``size`` consecutive batches, of which those at ``picks`` go to ``workers`` (default: the same ids)."""
    workers = picks if workers is None else workers
    while group := list(islice(batches, size)):
        if len(group) < size:
            rank_zero_warn(_LEFT_OVER.format(left=len(group), workers=size))
            return
        yield WorkerBatches({w: group[p] for w, p in zip(workers, picks, strict=True)})


# -------------------------------------------------------------------------------------------- samplers


class _Rounds(Protocol):
    """One item per worker and round; an item is an index or a batch of indices."""

    def __iter__(self) -> Iterator[Sequence[Any]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...


class _DealtRounds:
    """Deals what ``base`` yields, item j to worker j mod N; its draws from torch's generator depend on (seed, epoch)
    only.

    Args:
        base: a sampler or batch sampler, drawn once per epoch.
        num_workers: N.
        seed: the run's seed.
        wrap: complete the last round with the first items, else drop it.
    """

    def __init__(self, base: Any, num_workers: int, seed: int, wrap: bool) -> None:
        self._base = base
        self._n = num_workers
        self._seed = seed
        self._wrap = wrap
        self._epoch = 0

    def __iter__(self) -> Iterator[Sequence[Any]]:
        stream = RandomStream(derive_seed(self._seed, "sampler", self._epoch))
        with stream.active():
            items = iter(self._base)
        first: list[Any] = []
        while True:
            with stream.active():
                drawn = list(islice(items, self._n))
            first += drawn[: self._n - len(first)]
            if len(drawn) < self._n:
                if drawn and self._wrap:
                    yield [*drawn, *(first[j % len(first)] for j in range(self._n - len(drawn)))]
                return
            yield drawn

    def __len__(self) -> int:
        length = len(self._base)
        return math.ceil(length / self._n) if self._wrap else length // self._n

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        for sampler in (self._base, getattr(self._base, "sampler", None)):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _PartitionRounds:
    """Every worker's own list, shuffled per epoch by (seed, epoch, worker) if asked, wrapped to the longest list."""

    def __init__(self, parts: Sequence[Sequence[int]], seed: int, shuffle: bool) -> None:
        self._parts = parts
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0

    def __iter__(self) -> Iterator[Sequence[int]]:
        lists = [self._order(worker, part) for worker, part in enumerate(self._parts)]
        for r in range(len(self)):
            yield [own[r % len(own)] for own in lists]

    def _order(self, worker: int, part: Sequence[int]) -> Sequence[int]:
        if not self._shuffle:
            return part
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "partition", self._epoch, worker))
        return [part[j] for j in torch.randperm(len(part), generator=generator).tolist()]

    def __len__(self) -> int:
        return max(map(len, self._parts))

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch


class _WorkerSampler(Sampler[Any]):
    """Yields the workers' batches in turn: worker a's first, worker b's first, …, worker a's second, …

    Args:
        rounds: the items.
        workers: the workers hosted here; only theirs are yielded.
        batch_size: items per batch; None if an item is what the loader fetches at once.
        drop_last: drop a short last batch.
    """

    def __init__(self, rounds: _Rounds, workers: Sequence[int], batch_size: int | None, drop_last: bool) -> None:
        self._rounds = rounds
        self._workers = workers
        self._batch_size = batch_size
        self._drop_last = drop_last
        self.skip = 0  # batches of each worker that the next iter() leaves out

    @property
    def sampler(self) -> "_WorkerSampler":
        """What Lightning calls ``set_epoch`` on."""
        return self

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        rounds = islice(self._rounds, skip * (self._batch_size or 1), None)
        if self._batch_size is None:
            for items in rounds:
                yield from (items[w] for w in self._workers)
            return
        while batch := list(islice(rounds, self._batch_size)):
            if len(batch) < self._batch_size and self._drop_last:
                return
            yield from ([items[w] for items in batch] for w in self._workers)

    def __len__(self) -> int:
        rounds, size = len(self._rounds), self._batch_size or 1
        return (rounds // size if self._drop_last else math.ceil(rounds / size)) * len(self._workers)

    def set_epoch(self, epoch: int) -> None:
        self._rounds.set_epoch(epoch)


def _worker_sampler(loader: DataLoader[Any], dealing: Dealing) -> _WorkerSampler:
    """The sampler (or batch sampler) that makes ``loader`` fetch the workers' batches in turn."""
    n, seed, batches = dealing.num_workers, dealing.seed, loader.batch_sampler
    plain = batches is None or type(batches) is BatchSampler or _is_torchdatas(batches)
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    shuffles = _shuffles(sampler)
    default = isinstance(sampler, SequentialSampler) or shuffles
    size = None if batches is None else getattr(batches, "batch_size", None)
    drop_last = bool(getattr(batches, "drop_last", False))
    rounds: _Rounds
    if dealing.partition is not None:
        if not (plain and default):
            custom = sampler if plain else batches
            raise ValueError(_NO_PARTITION.format(what=f"the loader has a {type(custom).__name__} of its own"))
        parts = _checked_partition(dealing.partition(loader.dataset, n), n, len(loader.dataset))  # type: ignore[arg-type]
        rounds = _PartitionRounds(parts, seed, shuffle=shuffles and not dealing.overfit)
        return _WorkerSampler(rounds, dealing.workers, size, drop_last)
    if not dealing.use_distributed_sampler:
        whole: Any = sampler if batches is None else batches
        left = 0 if sized_len(whole) is None else len(whole) % n
        if left:
            rank_zero_warn(_LEFT_OVER.format(left=left, workers=n))
        return _WorkerSampler(_DealtRounds(whole, n, seed, wrap=False), dealing.workers, None, False)
    if not plain:
        return _WorkerSampler(_DealtRounds(batches, n, seed, wrap=not drop_last), dealing.workers, None, False)
    wrap = True
    if default:
        sampler = DistributedSampler(loader.dataset, 1, 0, shuffle=not dealing.overfit, seed=seed)
    elif isinstance(sampler, DistributedSampler):
        sampler, wrap = _undistributed(sampler, n), not sampler.drop_last
    return _WorkerSampler(_DealtRounds(sampler, n, seed, wrap), dealing.workers, size, drop_last)


def _is_torchdatas(sampler: Any) -> bool:
    """Whether this is a sampler that StatefulDataLoader makes, which differs from torch's in having a state."""
    return type(sampler).__module__.startswith("torchdata.")


def _shuffles(sampler: Any) -> bool:
    """Whether this is what ``shuffle=True`` makes: every index once, in random order."""
    random = isinstance(sampler, RandomSampler) or (_is_torchdatas(sampler) and hasattr(sampler, "replacement"))
    return random and not sampler.replacement and sampler.num_samples == len(sampler.data_source)


def _undistributed(sampler: DistributedSampler[Any], num_workers: int) -> DistributedSampler[Any]:
    """The order that a user's DistributedSampler cuts its shards from."""
    if sampler.num_replicas not in (1, num_workers):
        raise ValueError(
            f"The training loader has a DistributedSampler with `num_replicas` (={sampler.num_replicas}), but there are"
            f" {num_workers} workers. Use `num_replicas={num_workers}`, or leave the sampler out: every worker gets"
            " its shard by itself."
        )
    return DistributedSampler(sampler.dataset, 1, 0, shuffle=sampler.shuffle, seed=sampler.seed)


def _checked_partition(returned: Any, num_workers: int, size: int) -> list[list[int]]:
    try:
        parts = [[_index(i) for i in part] for part in returned]
    except TypeError as error:
        raise ValueError(
            f"`partition` must return one list of integer indices per worker, not a {type(returned).__name__} like"
            f" this: {error}."
        ) from error
    if len(parts) != num_workers:
        raise ValueError(
            f"`partition` returned {len(parts)} lists of indices for {num_workers} workers. Return exactly one per"
            " worker."
        )
    for worker, part in enumerate(parts):
        outside = [i for i in part if not 0 <= i < size]
        if outside:
            raise ValueError(
                f"`partition` gave worker {worker} the index {outside[0]}, but the dataset has {size} samples."
                f" Indices must lie in 0 … {size - 1}."
            )
        if not part:
            raise ValueError(f"`partition` gave worker {worker} no index. Every worker needs at least one sample.")
    return parts


def _index(value: Any) -> int:
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool":
        raise TypeError(f"{value!r} is a boolean (`nonzero` turns masks into indices)")
    return operator.index(value)
