"""Rounds: an item per shard, where an item is an index of the dataset or a batch of indices.

Owns how a sampler, a user's ``DistributedSampler`` or a partition becomes rounds. Elsewhere: which of the three a
loader gets (``samplers.py``).
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
from torch.utils.data import DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning_diloco.reporting.plan import Repeated
from lightning_diloco.state.randomness import RandomStream, derive_seed

ONCE = (
    "The training data come from a {iterator}, which can be read only once: `trainer.train_dataloader` would take"
    " batches away from the training. Pass an object whose `__iter__` starts again."
)
_NESTED = 3  # a sampler in a batch sampler in a batch sampler that repeats it


class Rounds(Protocol):
    """An item per shard and round.

    Attributes:
        left: number of items that the last pass has dropped because they made no complete round.
    """

    left: int

    def __iter__(self) -> Iterator[Sequence[Any]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...
    def copied(self) -> "Rounds": ...


class ShardedRounds:
    """Item j of a sampler goes to shard j mod n.

    The sampler's draws from torch's generator depend on (seed, epoch) only.

    Args:
        base: a sampler or batch sampler, drawn once per epoch.
        shards: n.
        seed: the run's seed.
        wrap: complete the last round with the first items, else drop it.
        single: without ``wrap``, an epoch of a single item gives that item to every shard.
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
        sampler = self._base
        for _ in range(_NESTED):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "sampler", None)

    def copied(self) -> "ShardedRounds":
        twin = copy.copy(self)
        twin._base = holder = independent(self._base)
        for _ in range(_NESTED):
            if isinstance(getattr(holder, "sampler", None), Sampler):
                holder.sampler = holder = independent(holder.sampler)
        return twin

    @property
    def remembers(self) -> bool:
        """Whether the sampler may have a state beyond the epoch: torch's own without a generator has none."""
        plain = type(self._base) in (DistributedSampler, SequentialSampler)
        return not plain and not (type(self._base) is RandomSampler and self._base.generator is None)

    def once(self) -> "ShardedRounds | None":
        """The rounds of the sampler inside, where the sampler has no length: it may repeat the other without an end."""
        inside = getattr(self._base, "sampler", None)
        if sized_len(self._base) is not None or inside is None:
            return None
        twin = copy.copy(self)
        twin._base = inside
        return twin


class RankRounds:
    """A copy of a user's DistributedSampler per shard, with the shard as rank.

    Args:
        sampler: the user's DistributedSampler.
        shards: their number.
        batches: the user's batch sampler around ``sampler``, copied too; None: items are indices.

    Raises:
        ValueError: the sampler was made for another number of replicas.
    """

    left = 0

    def __init__(self, sampler: DistributedSampler[Any], shards: int, batches: Any = None) -> None:
        if sampler.num_replicas != shards:
            raise ValueError(
                f"The training loader has a DistributedSampler with `num_replicas` (={sampler.num_replicas}), but the"
                f" data is read in {shards} shards (workers × processes per worker). Use `num_replicas={shards}`, or"
                " leave the sampler out: every worker gets its shard by itself."
            )
        self._samplers = [copy.copy(sampler) for _ in range(shards)]
        for rank, copied in enumerate(self._samplers):
            copied.rank = rank
        self._items: list[Any] = (
            [copy.copy(batches) for _ in range(shards)] if batches is not None else [*self._samplers]
        )
        for item, copied in zip(self._items, self._samplers, strict=True):
            if batches is not None:
                item.sampler = copied
        pairs = [(sampler, self._samplers)] + ([] if batches is None else [(batches, self._items)])
        self._followed = [(x, dict(getattr(x, "__dict__", {})), copies) for x, copies in pairs]

    def __iter__(self) -> Iterator[Sequence[Any]]:
        self._follow()
        return zip(*self._items, strict=True)

    def __len__(self) -> int:
        self._follow()
        return len(self._items[0])

    def _follow(self) -> None:
        """Hands on which attributes of the user's objects have been set, as hooks do that change batches' sizes."""
        for original, known, copies in self._followed:
            for name, value in getattr(original, "__dict__", {}).items():
                if name not in ("epoch", "rank", "sampler") and known.get(name, known) is not value:
                    for copied in copies:
                        setattr(copied, name, value)
            known.update(getattr(original, "__dict__", {}))

    def set_epoch(self, epoch: int) -> None:
        for sampler in self._samplers:
            sampler.set_epoch(epoch)

    def copied(self) -> "RankRounds":
        self._follow()
        twin = copy.copy(self)
        twin._items = [independent(item) for item in self._items]
        twin._followed = []
        return twin


class PartitionRounds:
    """The partition's list of each worker; shorter lists wrap to the length of the longest.

    If asked, lists are shuffled per epoch by (seed, epoch, worker). The members of a worker's team take the entries of
    its list in turn.
    """

    left = 0

    def __init__(self, parts: Sequence[Sequence[int]], seed: int, shuffle: bool, team: int = 1) -> None:
        self._parts = parts
        self._team = team
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0

    def __iter__(self) -> Iterator[Sequence[int]]:
        parts = [self._order(worker, part) for worker, part in enumerate(self._parts)]
        for r in range(len(self)):
            yield [part[(r * self._team + j) % len(part)] for j in range(self._team) for part in parts]

    def _order(self, worker: int, part: Sequence[int]) -> Sequence[int]:
        if not self._shuffle:
            return part
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "partition", self._epoch, worker))
        return [part[j] for j in torch.randperm(len(part), generator=generator).tolist()]

    @property
    def sizes(self) -> list[int]:
        """Number of indices in each worker's list."""
        return [len(part) for part in self._parts]

    def __len__(self) -> int:
        return math.ceil(max(map(len, self._parts)) / self._team)

    @property
    def repeated(self) -> Repeated | None:
        """The worker whose list is read most often per epoch, if that is twice or more."""
        sizes = [len(part) for part in self._parts]
        least, longest = min(sizes), max(sizes)
        return Repeated(sizes.index(least), least, longest) if longest >= 2 * least else None

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def copied(self) -> "PartitionRounds":
        return self


def checked_partition(returned: Any, num_workers: int, size: int) -> list[list[int]]:
    """The lists that the user's function returned, as Python numbers.

    Raises:
        ValueError: the lists don't give each worker at least one index of the dataset.
    """
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


def independent(holder: Any) -> Any:
    """A shallow copy, in which random generators are copies, too.

    Raises:
        TypeError: it can't be copied since it is read only once.
    """
    if isinstance(holder, Iterator) and type(holder).__module__ in ("builtins", "itertools"):
        raise TypeError(ONCE.format(iterator=type(holder).__name__))
    twin = copy.copy(holder)
    for name, value in getattr(twin, "__dict__", {}).items():
        if isinstance(value, torch.Generator):
            vars(twin)[name] = torch.Generator(value.device)
            vars(twin)[name].set_state(value.get_state())
        elif isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
            vars(twin)[name] = copy.deepcopy(value)
    return twin
