"""Samplers that give each worker its indices, or its batches of indices.

Owns the choice of the sampler of a sharded DataLoader over a map-style dataset; ``data.py`` has the table of the cases.
Elsewhere: the rounds that a sampler reads (``rounds.py``), the fetching (torch).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning_diloco._lightning.grouping import left_over
from lightning_diloco._lightning.rounds import PartitionRounds, RankRounds, Rounds, ShardedRounds, checked_partition
from lightning_diloco.fit import ShardPlan
from lightning_diloco.reporting.plan import Repeated
from lightning_diloco.state.randomness import derive_seed

NO_PARTITION = (
    "`partition` shards the indices of a map-style dataset, but {problem}. Pass a DataLoader over a dataset with"
    " `__len__` and `__getitem__` and without a custom sampler, or drop `partition`."
)


class WorkerSampler(Sampler[Any]):
    """Yields the workers' batches in turn: worker a's first, worker b's first, …, worker a's second, …

    Args:
        rounds: the items.
        shards: the shards of the workers hosted here; only their items are yielded.
        batches: the user's batch sampler, whose ``batch_size`` and ``drop_last`` apply; None if an item is a batch.

    Attributes:
        drawn: number of items yielded since ``drawn`` was set to 0.
        left: number of items (batches, or samples if ``batch_size`` is given) that the last pass has dropped.
    """

    def __init__(self, rounds: Rounds, shards: Sequence[int], batches: Any = None) -> None:
        self._rounds = rounds
        self._shards = shards
        self._cut = batches
        self.skip = 0  # batches of each worker that the next iter() leaves out
        self.drawn = 0
        self.left = 0

    @property
    def batch_size(self) -> int | None:
        """Items per batch now, since hooks may change it between epochs; None if an item is a batch."""
        return None if self._cut is None else self._cut.batch_size

    @property
    def drop_last(self) -> bool:
        """Whether a short last batch is dropped."""
        return self._cut is not None and bool(self._cut.drop_last)

    def sizes(self, workers: int) -> list[int] | None:
        """Number of samples in each worker's shard, up to a common factor; None if only reading tells.

        Shards that a sampler deals out in rounds are equal: its last round is completed, or dropped.
        """
        if isinstance(self._rounds, PartitionRounds):
            return self._rounds.sizes
        return None if self._cut is None else [1] * workers

    @property
    def sampler(self) -> "WorkerSampler":
        """The sampler inside a batch sampler that repeats it without an end: loaders ask it for their length."""
        once = self._rounds.once() if isinstance(self._rounds, ShardedRounds) else None
        return self if once is None else WorkerSampler(once, self._shards, self._cut)

    def __iter__(self) -> Iterator[Any]:
        self.left = 0
        for batch in self._batches():
            self.drawn += 1
            yield batch
        self.left += self._rounds.left

    def _batches(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        size, drop_last = self.batch_size, self.drop_last
        rounds = islice(self._rounds, skip * (size or 1), None)
        if size is None:
            for items in rounds:
                yield from (items[s] for s in self._shards)
            return
        while batch := list(islice(rounds, size)):
            if len(batch) < size and drop_last:
                self.left = sum(map(len, batch))
                return
            yield from ([items[s] for items in batch] for s in self._shards)

    def __len__(self) -> int:
        rounds, size = len(self._rounds), self.batch_size or 1
        return (rounds // size if self.drop_last else math.ceil(rounds / size)) * len(self._shards)

    def set_epoch(self, epoch: int) -> None:
        self._rounds.set_epoch(epoch)

    @property
    def repeated(self) -> Repeated | None:
        """The worker whose shard is read most often per epoch, if that is twice or more; of a partition only."""
        return self._rounds.repeated if isinstance(self._rounds, PartitionRounds) else None

    @property
    def remembers(self) -> bool:
        """Whether an epoch's draws may depend on those of the epochs before."""
        return isinstance(self._rounds, ShardedRounds) and self._rounds.remembers

    def of(self, shards: Sequence[int]) -> "WorkerSampler":
        """A sampler of these shards' batches only, which leaves this sampler and the user's alone."""
        return WorkerSampler(self._rounds.copied(), shards, self._cut)


class FirstWorkersSampler:
    """The user's sampler or batch sampler in hooks; iterating over it gives the first worker's items.

    Args:
        original: the user's object, which has all other attributes and methods.
        sampler: the sampler of all workers.
        shards: the first worker's.
    """

    _original: Any
    _sampler: WorkerSampler
    _shards: Sequence[int]

    def __init__(self, original: Any, sampler: WorkerSampler, shards: Sequence[int]) -> None:
        vars(self).update(_original=original, _sampler=sampler, _shards=shards)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """``isinstance`` answers as for the user's object."""
        return type(self._original)

    def __reduce__(self) -> Any:
        """``__class__`` would mislead ``pickle``."""
        return FirstWorkersSampler, (self._original, self._sampler, self._shards)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python protocols
            raise AttributeError(name)
        return getattr(vars(self)["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._sampler.of(self._shards))

    def __len__(self) -> int:
        return len(self._sampler.of(self._shards))


def worker_sampler(loader: DataLoader[Any], plan: ShardPlan) -> WorkerSampler:
    """The sampler (or batch sampler) that makes ``loader`` fetch the workers' batches in turn."""
    n, seed, batches = plan.shards, plan.seed, loader.batch_sampler
    plain = batches is None or type(batches) is BatchSampler or _is_torchdatas(batches)
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    shuffles = _shuffles(sampler)
    default = isinstance(sampler, SequentialSampler) or shuffles
    drop_last = bool(getattr(batches, "drop_last", False))
    rounds: Rounds
    if plan.partition is not None:
        if not (plain and default):
            custom = sampler if plain else batches
            raise ValueError(NO_PARTITION.format(problem=f"the loader has a custom {type(custom).__name__}"))
        workers = plan.world.num_workers
        partition, dataset = plan.partition, loader.dataset
        parts = plan.world.decided_by_first(
            lambda: checked_partition(partition(dataset, workers), workers, len(dataset))  # type: ignore[arg-type]
        )
        rounds = PartitionRounds(parts, seed, shuffle=shuffles and not plan.overfit, team=plan.world.team)
        return WorkerSampler(rounds, plan.shards_here, batches)
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        if plain:
            return WorkerSampler(RankRounds(sampler, n), plan.shards_here, batches)
        return WorkerSampler(RankRounds(sampler, n, batches), plan.shards_here)
    stream = derive_seed(seed, "loader", plan.loader)
    if not plan.use_distributed_sampler:
        whole: Any = sampler if batches is None else batches
        left = 0 if sized_len(whole) is None else len(whole) % n
        if left and len(whole) > n:
            rank_zero_warn(left_over(left, n, plan))
        rounds = ShardedRounds(whole, n, stream, wrap=False, single=True)
        return WorkerSampler(rounds, plan.shards_here)
    if not plain:
        return WorkerSampler(ShardedRounds(batches, n, stream, wrap=not drop_last), plan.shards_here)
    if default:
        sampler = DistributedSampler(loader.dataset, 1, 0, shuffle=not plan.overfit, seed=seed)
    drops = isinstance(sampler, DistributedSampler) and sampler.drop_last
    rounds = ShardedRounds(sampler, n, stream, wrap=not drops)
    return WorkerSampler(rounds, plan.shards_here, batches)


def _is_torchdatas(sampler: Any) -> bool:
    """Whether this is a sampler that StatefulDataLoader makes, which differs from torch's in having a state."""
    return type(sampler).__module__.startswith("torchdata.")


def _shuffles(sampler: Any) -> bool:
    """Whether ``shuffle=True`` has made the sampler: every index once, in random order."""
    random = isinstance(sampler, RandomSampler) or (_is_torchdatas(sampler) and hasattr(sampler, "replacement"))
    return random and not sampler.replacement and sampler.num_samples == len(sampler.data_source)
