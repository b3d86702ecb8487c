"""Samplers that give each worker its indices, or its batches of indices.

Owns the samplers of a sharded DataLoader over a map-style dataset; ``data.py`` has the table of who reads what. Does
not own the fetching.
"""

import copy
import math
import operator
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning_diloco.fit import ShardPlan
from lightning_diloco.state.randomness import RandomStream, derive_seed

NO_PARTITION = (
    "`partition` deals the indices of a map-style dataset, but {what}. Pass a DataLoader over a dataset with"
    " `__len__` and `__getitem__` and without a sampler of its own, or drop `partition`."
)


ONCE = (
    "The training data come from a {kind}, which can be read only once: `trainer.train_dataloader` would take"
    " batches away from the training. Pass an object whose `__iter__` starts again."
)

TOO_FEW = (
    "An epoch of the training data has {number}, but there are {readers}, and each needs a batch of its own. Use fewer"
    " workers (`num_nodes`), a smaller `batch_size`, more data, or no `drop_last`."
)

LEFT_OVER = "The last {left} batch(es) of an epoch don't suffice for {workers} workers and are dropped."


def too_few(number: int, plan: ShardPlan, what: str = "batch(es)") -> ValueError:
    """The error for an epoch in which some worker would have no batch."""
    team = f" of {plan.world.team} processes each" if plan.world.team > 1 else ""
    return ValueError(TOO_FEW.format(number=f"{number} {what}", readers=f"{plan.world.num_workers} workers{team}"))


class _Rounds(Protocol):
    """One item per shard and round; an item is an index or a batch of indices.

    Attributes:
        left: how many items the last pass has dropped because they made no whole round.
    """

    left: int

    def __iter__(self) -> Iterator[Sequence[Any]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...
    def copied(self) -> "_Rounds": ...


class _ShardedRounds:
    """Deals what ``base`` yields, item j to shard j mod n; its draws from torch's generator depend on (seed, epoch)
    only.

    Args:
        base: a sampler or batch sampler, drawn once per epoch.
        shards: n.
        seed: the run's seed.
        wrap: complete the last round with the first items, else drop it.
        single: without ``wrap``, still give an item that is the only one to every shard.
    """

    def __init__(self, base: Any, shards: int, seed: int, wrap: bool, single: bool = False) -> None:
        self._base = base
        self._single = single
        self._n = shards
        self._seed = seed
        self._wrap = wrap
        self._epoch = 0
        self.left = 0

    def __iter__(self) -> Iterator[Sequence[Any]]:
        self.left = 0
        stream = RandomStream(derive_seed(self._seed, "sampler", self._epoch))
        with stream.active():
            items = iter(self._base)
        first: list[Any] = []
        while True:
            with stream.active():
                drawn = list(islice(items, self._n))
            first += drawn[: self._n - len(first)]
            if len(drawn) < self._n:
                if drawn and (self._wrap or (self._single and len(first) == 1)):
                    yield [*drawn, *(first[j % len(first)] for j in range(self._n - len(drawn)))]
                else:
                    self.left = len(drawn)
                return
            yield drawn

    def __len__(self) -> int:
        length = len(self._base)
        if self._single and length == 1:
            return 1
        return math.ceil(length / self._n) if self._wrap else length // self._n

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        for sampler in (self._base, getattr(self._base, "sampler", None)):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)  # type: ignore[union-attr]

    def copied(self) -> "_ShardedRounds":
        twin = copy.copy(self)
        twin._base = independent(self._base)
        if isinstance(getattr(twin._base, "sampler", None), Sampler):
            twin._base.sampler = independent(twin._base.sampler)
        return twin


class _RankRounds:
    """Every shard's own copy of a user's DistributedSampler for as many replicas, each with the shard as rank.

    Args:
        sampler: the user's.
        shards: how many.
        batches: the user's own kind of batch sampler around it, copied too; None: items are indices.

    Raises:
        ValueError: the sampler was made for another number of replicas.
    """

    left = 0

    def __init__(self, sampler: DistributedSampler[Any], shards: int, batches: Any = None) -> None:
        if sampler.num_replicas != shards:
            raise ValueError(
                f"The training loader has a DistributedSampler with `num_replicas` (={sampler.num_replicas}), but there"
                f" are {shards} workers. Use `num_replicas={shards}`, or leave the sampler out: every worker"
                " gets its shard by itself."
            )
        self._samplers = [copy.copy(sampler) for _ in range(shards)]
        for rank, own in enumerate(self._samplers):
            own.rank = rank
        self._items: list[Any] = (
            [copy.copy(batches) for _ in range(shards)] if batches is not None else [*self._samplers]
        )
        for item, own in zip(self._items, self._samplers, strict=True):
            if batches is not None:
                item.sampler = own

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return zip(*self._items, strict=True)

    def __len__(self) -> int:
        return len(self._items[0])

    def set_epoch(self, epoch: int) -> None:
        for own in self._samplers:
            own.set_epoch(epoch)

    def copied(self) -> "_RankRounds":
        twin = copy.copy(self)
        twin._items = [independent(item) for item in self._items]
        return twin


class _PartitionRounds:
    """Every worker's own list, shuffled per epoch by (seed, epoch, worker) if asked, wrapped to the longest list.

    The members of a worker's team take the entries of its list in turn.
    """

    left = 0

    def __init__(self, parts: Sequence[Sequence[int]], seed: int, shuffle: bool, team: int = 1) -> None:
        self._parts = parts
        self._team = team
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0

    def __iter__(self) -> Iterator[Sequence[int]]:
        lists = [self._order(worker, part) for worker, part in enumerate(self._parts)]
        for r in range(len(self)):
            yield [own[(r * self._team + j) % len(own)] for j in range(self._team) for own in lists]

    def _order(self, worker: int, part: Sequence[int]) -> Sequence[int]:
        if not self._shuffle:
            return part
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "partition", self._epoch, worker))
        return [part[j] for j in torch.randperm(len(part), generator=generator).tolist()]

    def __len__(self) -> int:
        return math.ceil(max(map(len, self._parts)) / self._team)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def copied(self) -> "_PartitionRounds":
        return self


class WorkerSampler(Sampler[Any]):
    """Yields the workers' batches in turn: worker a's first, worker b's first, …, worker a's second, …

    Args:
        rounds: the items.
        shards: those of the workers hosted here; only theirs are yielded.
        batch_size: items per batch; None if an item is what the loader fetches at once.
        drop_last: drop a short last batch.

    Attributes:
        drawn: how many were yielded since somebody set it to 0.
        left: how many items (batches, or samples where this cuts batches) the last pass has dropped.
    """

    def __init__(self, rounds: _Rounds, shards: Sequence[int], batch_size: int | None, drop_last: bool) -> None:
        self._rounds = rounds
        self._shards = shards
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.skip = 0  # batches of each worker that the next iter() leaves out
        self.drawn = 0
        self.left = 0

    @property
    def sampler(self) -> "WorkerSampler":
        """What Lightning calls ``set_epoch`` on."""
        return self

    def __iter__(self) -> Iterator[Any]:
        self.left = 0
        for batch in self._batches():
            self.drawn += 1
            yield batch
        self.left += self._rounds.left

    def _batches(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        rounds = islice(self._rounds, skip * (self.batch_size or 1), None)
        if self.batch_size is None:
            for items in rounds:
                yield from (items[s] for s in self._shards)
            return
        while batch := list(islice(rounds, self.batch_size)):
            if len(batch) < self.batch_size and self.drop_last:
                self.left = sum(map(len, batch))
                return
            yield from ([items[s] for items in batch] for s in self._shards)

    def __len__(self) -> int:
        rounds, size = len(self._rounds), self.batch_size or 1
        return (rounds // size if self.drop_last else math.ceil(rounds / size)) * len(self._shards)

    def set_epoch(self, epoch: int) -> None:
        self._rounds.set_epoch(epoch)

    def of(self, shards: Sequence[int]) -> "WorkerSampler":
        """A sampler of these shards' batches only, which leaves this one and the user's samplers alone."""
        return WorkerSampler(self._rounds.copied(), shards, self.batch_size, self.drop_last)


def independent(holder: Any) -> Any:
    """A shallow copy whose random generators are copies, too.

    Raises:
        TypeError: it can't be copied since it is read only once.
    """
    if isinstance(holder, Iterator) and type(holder).__module__ in ("builtins", "itertools"):
        raise TypeError(ONCE.format(kind=type(holder).__name__))
    twin = copy.copy(holder)
    for name, value in getattr(twin, "__dict__", {}).items():
        if isinstance(value, torch.Generator):
            vars(twin)[name] = torch.Generator(value.device)
            vars(twin)[name].set_state(value.get_state())
        elif isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
            vars(twin)[name] = copy.deepcopy(value)
    return twin


def worker_sampler(loader: DataLoader[Any], plan: ShardPlan) -> WorkerSampler:
    """The sampler (or batch sampler) that makes ``loader`` fetch the workers' batches in turn."""
    n, seed, batches = plan.shards, plan.seed, loader.batch_sampler
    plain = batches is None or type(batches) is BatchSampler or _is_torchdatas(batches)
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    shuffles = _shuffles(sampler)
    default = isinstance(sampler, SequentialSampler) or shuffles
    size = None if batches is None else getattr(batches, "batch_size", None)
    drop_last = bool(getattr(batches, "drop_last", False))
    rounds: _Rounds
    if plan.partition is not None:
        if not (plain and default):
            custom = sampler if plain else batches
            raise ValueError(NO_PARTITION.format(what=f"the loader has a {type(custom).__name__} of its own"))
        workers = plan.world.num_workers
        partition, dataset = plan.partition, loader.dataset
        parts = plan.world.decided_by_first(
            lambda: _checked_partition(partition(dataset, workers), workers, len(dataset))  # type: ignore[arg-type]
        )
        rounds = _PartitionRounds(parts, seed, shuffle=shuffles and not plan.overfit, team=plan.world.team)
        return WorkerSampler(rounds, plan.shards_here, size, drop_last)
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        if plain:
            return WorkerSampler(_RankRounds(sampler, n), plan.shards_here, size, drop_last)
        return WorkerSampler(_RankRounds(sampler, n, batches), plan.shards_here, None, False)
    stream = derive_seed(seed, "loader", plan.loader)
    if not plan.use_distributed_sampler:
        whole: Any = sampler if batches is None else batches
        left = 0 if sized_len(whole) is None else len(whole) % n
        if left and len(whole) > n:
            rank_zero_warn(LEFT_OVER.format(left=left, workers=n))
        rounds = _ShardedRounds(whole, n, stream, wrap=False, single=True)
        return WorkerSampler(rounds, plan.shards_here, None, False)
    if not plain:
        return WorkerSampler(_ShardedRounds(batches, n, stream, wrap=not drop_last), plan.shards_here, None, False)
    if default:
        sampler = DistributedSampler(loader.dataset, 1, 0, shuffle=not plan.overfit, seed=seed)
    drops = isinstance(sampler, DistributedSampler) and sampler.drop_last
    rounds = _ShardedRounds(sampler, n, stream, wrap=not drops)
    return WorkerSampler(rounds, plan.shards_here, size, drop_last)


def _is_torchdatas(sampler: Any) -> bool:
    """Whether this is a sampler that StatefulDataLoader makes, which differs from torch's in having a state."""
    return type(sampler).__module__.startswith("torchdata.")


def _shuffles(sampler: Any) -> bool:
    """Whether this is what ``shuffle=True`` makes: every index once, in random order."""
    random = isinstance(sampler, RandomSampler) or (_is_torchdatas(sampler) and hasattr(sampler, "replacement"))
    return random and not sampler.replacement and sampler.num_samples == len(sampler.data_source)


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
