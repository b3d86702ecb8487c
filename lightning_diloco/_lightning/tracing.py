"""Traces the batches that a DataLoader's custom ``__iter__`` yields back to the workers for which they were fetched.

A loader class with a custom ``__iter__`` may leave out, reorder or replace batches, so the place of a batch no longer
gives its worker. Owns the observation of torch's iterators and the assignment of yielded batches to workers.

Private because only ``DataLoader._get_iterator`` is on the path of every way to iterate, whatever ``__iter__`` calls.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_diloco._lightning.grouping import WorkerBatches, group_by_place, too_few
from lightning_diloco._lightning.samplers import NO_PARTITION, WorkerSampler
from lightning_diloco.fit import ShardPlan

UNCLEAR = (
    "The `__iter__` of {loader} fetched {fetched} batch(es) of an epoch and yielded {yielded}, {unclear} of them new"
    " objects: it can't be told to which worker they belong, and workers may have read each other's data. Yield the"
    " fetched batches themselves, or change batches in the dataset or in `collate_fn`."
)
UNEVEN = (
    "The `__iter__` of {loader} fetched {fetched} batch(es) of an epoch, but yielded {counts} for the workers"
    " {workers}. A local step takes one batch of each, so the last {left} batch(es) are dropped."
)
UNCLEAR_PARTITION = (
    "With `partition` every batch must belong to one worker, but batch {number} that the `__iter__` of {loader} yields"
    " is a new object made after fetching {fetched} batch(es) since the last one. Yield the fetched batches themselves,"
    " change batches in the dataset or in `collate_fn`, or drop `partition`."
)


def has_custom_iter(loader: DataLoader[Any]) -> bool:
    """Whether the loader's class has an ``__iter__`` that isn't torch's."""
    definers = [next(c for c in type(loader).__mro__ if name in vars(c)) for name in ("__iter__", "_get_iterator")]
    return any(c.__module__.split(".")[0] not in ("torch", "torchdata") for c in definers)


def traced(cls: type) -> type:
    """The loader class ``cls``, with iterators that report each fetched batch to the loader's ``_trace``."""
    return cls if issubclass(cls, _TracedLoader) else type(cls.__name__, (_TracedLoader, cls), {})


class Trace:
    """The worker of each batch that a custom ``__iter__`` yields.

    A fetched batch is recognised by its identity, or by that of the tensors in it. New objects count as the fetched
    batches in the order of fetching. Reading one batch ahead, as loaders do that copy to a device meanwhile, keeps
    that order.

    Args:
        loader: the name of the loader's class.
        workers: the workers in the order in which the sampler yields their batches.
        sampler: the loader's sampler.
        plan: how the data is sharded.
    """

    def __init__(self, loader: str, workers: Sequence[int], sampler: WorkerSampler, plan: ShardPlan) -> None:
        self._loader, self._workers, self.sampler, self._plan = loader, workers, sampler, plan
        self._begin()

    def start(self) -> None:
        """A pass begins."""
        self.abandon()
        self._begin()

    def _begin(self) -> None:
        self._worker_of: Any = WeakIdKeyDictionary()  # fetched tensor → its worker, None if several workers have it
        self._waiting: deque[int] = deque()  # workers of the batches that were fetched and not yet yielded, in order
        self._observed = False  # whether torch's iterators report what they fetch; else the sampler's count tells
        self._fetched = self._fetched_before = self._yielded = self._unclear = 0
        self._disordered = False  # whether a new object may be of another batch than the next in order
        self.sampler.drawn = 0

    def fetch(self, place: int, batch: Any) -> None:
        """Torch's iterator has fetched ``batch``, its ``place``-th."""
        worker = self._workers[place % len(self._workers)]
        self._observed = True
        self._fetched += 1
        self._waiting.append(worker)
        for leaf in _recognisable(batch):
            self._worker_of[leaf] = worker if self._worker_of.get(leaf, worker) == worker else None

    def group(self, batches: Iterator[Any]) -> Iterator[WorkerBatches]:
        """Yields a batch of each worker as soon as every worker has a batch."""
        first = list(islice(batches, 1))
        if first and not self._fetched and not self.sampler.drawn:
            if self._plan.partition is not None:
                problem = f"the `__iter__` of {self._loader} doesn't ask the loader's sampler"
                raise ValueError(NO_PARTITION.format(problem=problem))
            yield from group_by_place(chain(first, batches), self._plan, self._workers)
            return
        queues: dict[int, deque[Any]] = {w: deque() for w in self._workers}
        counts = dict.fromkeys(self._workers, 0)
        complete = False
        for batch in chain(first, batches):
            worker = self._assign(batch, counts)
            counts[worker] += 1
            queues[worker].append(batch)
            if all(queues.values()):
                complete = True
                yield WorkerBatches({w: queue.popleft() for w, queue in queues.items()})
        if first and not complete:
            raise too_few(self._yielded, self._plan)
        if self._unclear and (self._disordered or self._fetched != self._yielded):
            self._disordered = True
            self.abandon()
        else:
            self._report_left(counts, sum(map(len, queues.values())))

    def _assign(self, batch: Any, counts: Mapping[int, int]) -> int:
        if not self._observed:
            drawn = range(self._fetched, self.sampler.drawn)
            self._waiting.extend(self._workers[j % len(self._workers)] for j in drawn)
            self._fetched = self.sampler.drawn
        since, self._fetched_before = self._fetched - self._fetched_before, self._fetched
        self._yielded += 1
        workers = {self._worker_of.get(leaf) for leaf in _recognisable(batch)} - {None}
        if len(workers) == 1:
            worker: int = workers.pop()
            if worker in self._waiting:
                self._waiting.remove(worker)
            return worker
        if self._plan.partition is not None and (workers or since != 1):
            raise ValueError(UNCLEAR_PARTITION.format(number=self._yielded, loader=self._loader, fetched=since))
        self._unclear += 1
        skipped = since > 1 and self._yielded > 1
        self._disordered |= self._observed and (not 1 <= len(self._waiting) <= 2 or skipped)
        return self._waiting.popleft() if self._waiting else min(counts, key=counts.__getitem__)

    def abandon(self) -> None:
        """The pass is over, also where its source isn't: Lightning stops after ``len`` batches."""
        if self._disordered:
            self._disordered = False
            rank_zero_warn(
                UNCLEAR.format(loader=self._loader, fetched=self._fetched, yielded=self._yielded, unclear=self._unclear)
            )

    def _report_left(self, counts: Mapping[int, int], left: int) -> None:
        if left:
            rank_zero_warn(
                UNEVEN.format(
                    loader=self._loader,
                    fetched=self._fetched,
                    counts=", ".join(map(str, counts.values())),
                    workers=", ".join(map(str, counts)),
                    left=left,
                )
            )


def _recognisable(batch: Any) -> list[Any]:
    """The parts of a batch that have an identity: objects that can be referred to weakly."""
    return [leaf for leaf in tree_leaves(batch) if type(leaf).__weakrefoffset__]


class _TracedLoader(DataLoader[Any]):
    """Mixed in before a DataLoader class with a custom ``__iter__``."""

    _trace: Trace

    @override
    def _get_iterator(self) -> Any:
        iterator: Any = super()._get_iterator()
        if type(iterator).__module__.split(".")[0] in ("torch", "torchdata"):
            iterator.__class__ = type(type(iterator).__name__, (_TracedIterator, type(iterator)), {})
            iterator._trace = self._trace
        return iterator


class _TracedIterator:
    """Mixed in before the class of an iterator of torch's."""

    _trace: Trace
    _place = 0

    def __next__(self) -> Any:
        batch = super().__next__()  # type: ignore[misc]
        self._trace.fetch(self._place, batch)
        self._place += 1
        return batch

    def _reset(self, *args: Any, **kwargs: Any) -> None:
        self._place = 0  # persistent loader processes keep their iterator for the next epoch
        super()._reset(*args, **kwargs)  # type: ignore[misc]
