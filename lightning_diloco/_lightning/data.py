"""One loader serves all workers: who gets which samples.

Owns the plan of indices, batches and streams to workers. Does not own when batches are fetched (Lightning's fetcher)
nor the user's loader, which stays untouched: what is changed is a shallow copy of it.

==============================================  ================================================================
the user's training loader                      worker i of N reads
==============================================  ================================================================
``DataLoader``, shuffled or sequential          the shard of ``DistributedSampler(num_replicas=N, rank=i)``, which
                                                shuffles, as Lightning's DDP does (not with ``overfit_batches``)
its own sampler                                 every N-th index of the sampler, drawn once per epoch
its own batch sampler                           every N-th batch of the batch sampler, drawn once per epoch
``use_distributed_sampler=False``, a stream     every N-th batch; a ragged last group is dropped; if an epoch is one
                                                batch, every worker gets it
with ``partition=``                             its list of indices; shorter lists wrap to the longest
==============================================  ================================================================

Indices and batches that are sharded from a sampler are made divisible by N by repeating the first ones (unless
``drop_last``), as ``DistributedSampler`` does. Where a worker has k processes, N·k takes the place of N, and member j
of worker i's team reads what is number j·N + i's.

Loaders are read in order, with ``DataLoader(in_order=False)`` too, which permits but doesn't ask for another order: the
place of a batch says whose it is. A loader class with an ``__iter__`` of its own may leave out or reorder batches; then
fetched batches are recognised among those that it yields, and if it never asks its sampler, it is a stream.
"""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_diloco._lightning.samplers import (
    LEFT_OVER,
    NO_PARTITION,
    WorkerSampler,
    independent,
    too_few,
    worker_sampler,
)
from lightning_diloco.fit import ShardPlan
from lightning_diloco.state.randomness import RandomStream, derive_seed

if TYPE_CHECKING:
    pass

UNCLEAR = (
    "The `__iter__` of {loader} fetched {fetched} batch(es) of an epoch and yielded {yielded}, {unclear} of them new"
    " objects: it can't be told from whose data they are, and workers may have read each other's. Yield the fetched"
    " batches themselves, or change batches in the dataset or in `collate_fn`."
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


class WorkerBatches:
    """What a sharded loader yields: one batch per worker hosted here. A leaf for everything that walks collections."""

    def __init__(self, by_worker: dict[int, Any]) -> None:
        self.by_worker = by_worker


def split_batch(batch: Any, workers: Sequence[int]) -> dict[int, Any]:
    """The batch of each worker, untouched; only the containers that a CombinedLoader made are made again."""
    if isinstance(batch, WorkerBatches):
        return batch.by_worker

    def pick(worker: int) -> Any:
        return tree_map(lambda leaf: leaf.by_worker[worker] if isinstance(leaf, WorkerBatches) else leaf, batch)

    return {w: pick(w) for w in workers}


def shard(loader: Any, plan: ShardPlan) -> "ShardedLoader":
    """A loader that yields :class:`WorkerBatches` from what ``loader`` yields; its length counts local steps.

    Raises:
        ValueError: ``partition`` with a stream or a sampler of its own, a wrong partition, a ``DistributedSampler``
            for another number of replicas, or an epoch that has fewer batches than there are workers.
    """
    loader = original(loader)
    sampler = None
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        sampler = worker_sampler(loader, plan)
    elif plan.partition is not None:
        stream = f"{type(loader.dataset).__name__} is an IterableDataset" if isinstance(loader, DataLoader) else None
        stream = stream or f"the loader is a {type(loader).__name__}"
        raise ValueError(NO_PARTITION.format(what=f"{stream}, a stream"))
    sharded = ShardedLoader(loader, plan, sampler)
    batches = sized_len(loader)
    if batches and sized_len(sharded) == 0:
        raise too_few(batches, plan)
    return sharded


def original(loader: Any) -> Any:
    """The user's loader behind a sharded one, or the loader itself."""
    return loader._loader if type(loader) in (ShardedLoader, FirstWorkersLoader) else loader


def is_sharded(combined: CombinedLoader) -> bool:
    """Whether training reads sharded loaders; N = 1 reads the user's."""
    return any(type(loader) is ShardedLoader for loader in combined.flattened)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a sharded loader which epoch its next ``iter()`` belongs to."""
    if type(loader) is ShardedLoader:
        loader.set_epoch(epoch)


def show_first_workers(combined: CombinedLoader) -> None:
    """Makes ``trainer.train_dataloader`` the first worker's batches; ``flattened``, which training reads, stays."""
    if is_sharded(combined):
        # new objects: a loader that referred to its view would keep its processes after a reload
        views = [FirstWorkersLoader(x) if type(x) is ShardedLoader else x for x in combined.flattened]
        combined._iterables = tree_unflatten(views, combined._spec)


# -------------------------------------------------------------------------------------------- loaders


@dataclass
class _Place:
    """Where in the data the next ``iter()`` starts."""

    epoch: int = 0
    skip: int = 0  # batches of each worker that a checkpoint had consumed


class ShardedLoader:
    """Yields one batch per worker hosted here and local step. Other attributes are those of a copy of the loader."""

    _loader: Any
    _plan: ShardPlan
    _sampler: "WorkerSampler | None"
    _source: Any
    _place: _Place

    def __init__(self, loader: Any, plan: ShardPlan, sampler: "WorkerSampler | None") -> None:
        source = _copied(loader, sampler, plan) if isinstance(loader, DataLoader) else loader
        vars(self).update(_loader=loader, _plan=plan, _sampler=sampler, _source=source, _place=_Place())

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Lightning gives its advice about loaders to DataLoaders only."""
        return type(self._loader)

    def __reduce__(self) -> Any:
        """``__class__`` would mislead ``pickle``."""
        return ShardedLoader, (self._loader, self._plan, self._sampler), {"_place": self._place}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of Python's that the loader may have, but this hasn't
            raise AttributeError(name)
        return getattr(vars(self)["_source"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._source, name, value)

    def __iter__(self) -> Iterator[WorkerBatches]:
        skip, self._place.skip = self._place.skip, 0
        return _read(self._source, self._sampler, self._plan, self._plan.workers, self._place.epoch, skip)

    def __len__(self) -> int:
        batches, plan = len(self._source), self._plan
        everybodys = self._sampler is None or (_iterates_itself(self._loader) and batches == len(self._loader))
        if everybodys:
            return 1 if batches == 1 else batches // plan.shards
        return batches // len(plan.workers)

    @property
    def sampler(self) -> "ShardedLoader":
        """What Lightning calls ``set_epoch`` on."""
        return self

    @property
    def batch_sampler(self) -> None:
        """Nothing more to call ``set_epoch`` on."""

    def set_epoch(self, epoch: int) -> None:
        self._place.epoch = epoch
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        else:
            _set_sampler_epoch(self._loader, epoch)

    def state_dict(self) -> dict[str, int]:
        """Makes Lightning see a loader that can resume; the position itself comes from the training loop's progress."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next ``iter()`` is of ``state["epoch"]`` and leaves out what each worker had ``consumed`` of it."""
        self.set_epoch(state["epoch"])
        self._place.skip = _position(self, state)


class FirstWorkersLoader:
    """``trainer.train_dataloader`` in hooks: the first worker's batches, and the attributes of the user's loader.

    Reading it leaves the training's position, samplers and random numbers alone.
    """

    _dealt: ShardedLoader

    def __init__(self, sharded: ShardedLoader) -> None:
        vars(self).update(_dealt=sharded)

    @property
    def _loader(self) -> Any:
        return self._dealt._loader

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """``isinstance`` says what it says of the user's loader."""
        return type(self._loader)

    def __reduce__(self) -> Any:
        """As for a sharded loader."""
        return FirstWorkersLoader, (self._dealt,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        sharded = vars(self)["_dealt"]
        if sharded._sampler is not None and vars(sharded._source).get(name) is sharded._sampler:
            return sharded._sampler.of(sharded._plan.shards_here[:1])
        return getattr(sharded._source, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)
        if self._dealt._source is not self._loader:
            setattr(self._dealt._source, name, value)

    def __len__(self) -> int:
        return len(self._dealt)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return repr(self._loader)

    def __iter__(self) -> Iterator[Any]:
        sharded, plan = self._dealt, self._dealt._plan
        first, loader = plan.workers[:1], sharded._loader
        sampler, source = sharded._sampler, independent(sharded._source)
        if isinstance(loader, DataLoader):
            sampler = None if sampler is None else sampler.of(plan.shards_here[:1])
            source = _copied(source, sampler, plan, first)
            vars(source).update(persistent_workers=False)
            if sampler is None:
                vars(source).update(dataset=independent(loader.dataset))
        stream = RandomStream(derive_seed(plan.seed, "train_dataloader", plan.loader, sharded._place.epoch))
        with isolate_rng(), stream.active():
            groups = _read(source, sampler, plan, first, sharded._place.epoch)
        while True:
            with isolate_rng(), stream.active():
                group = next(groups, None)
            if group is None:
                return
            yield group.by_worker[first[0]]


def _position(loader: Any, state: dict[str, int]) -> int:
    """Batches that a loader had handed out in its present pass after ``consumed`` steps; short ones are cycled."""
    length = sized_len(loader)
    consumed = state["consumed"]
    return consumed if length is None or consumed <= length or not state["cycles"] else consumed % length


def _copied(loader: Any, sampler: "WorkerSampler | None", plan: ShardPlan, workers: Sequence[int] | None = None) -> Any:
    """A copy of a DataLoader that reads with ``sampler``.

    The user's attributes are set without ``DataLoader.__setattr__``, which guards some. The generator is a new one
    because otherwise each ``iter()`` would draw from the global one. Batches must come in order: their place says whose
    they are, and where a resumed epoch goes on.
    """
    changed: dict[str, Any] = {"_iterator": None, "generator": torch.Generator(), "in_order": True}
    kind = type(loader)
    if sampler is not None:
        changed["sampler" if loader.batch_sampler is None else "batch_sampler"] = sampler
        if _iterates_itself(loader):
            changed["_notes"] = _Notes(kind.__name__, plan.workers if workers is None else workers, sampler, plan)
            kind = kind if issubclass(kind, _NotingLoader) else type(kind.__name__, (_NotingLoader, kind), {})
    copied = object.__new__(kind)
    vars(copied).update(vars(loader), **changed)
    return copied


# -------------------------------------------------------------------------------------------- reading


def _read(
    source: Any, sampler: "WorkerSampler | None", plan: ShardPlan, workers: Sequence[int], epoch: int, skip: int = 0
) -> Iterator[WorkerBatches]:
    """One pass over ``source``, whose first ``skip`` local steps are left out.

    Torch's loaders with a sampler skip by index. Other sources are read from the start: only they know what comes
    where. What those draw from torch's generator meanwhile comes from (seed, loader, epoch), so that they yield the
    same again, and training draws the same whatever they draw.
    """
    if isinstance(source, DataLoader):
        assert source.generator is not None
        source.generator.manual_seed(derive_seed(plan.seed, "loader", epoch))
    notes: _Notes | None = getattr(source, "_notes", None) if isinstance(source, DataLoader) else None
    if sampler is not None and notes is None:
        sampler.skip = skip
        groups = _in_turn(iter(source), plan, len(workers), range(len(workers)), workers)
        return groups if skip else _at_least_one(groups, sampler, plan)
    if notes is not None:
        notes.start()
    batches = _drawing_from(RandomStream(derive_seed(plan.seed, "stream", plan.loader, epoch)), source)
    return islice(_by_place(batches, plan, workers) if notes is None else notes.read(batches), skip, None)


def _at_least_one(groups: Iterator[WorkerBatches], sampler: WorkerSampler, plan: ShardPlan) -> Iterator[WorkerBatches]:
    """The groups.

    Raises:
        ValueError: there is none, because the sampler, whose length nobody knew before, had too few for a whole one.
    """
    first = next(groups, None)
    if first is not None:
        yield first
        yield from groups
    elif sampler.left:
        raise too_few(sampler.left, plan, "batch(es)" if sampler.batch_size is None else "sample(s)")


def _drawing_from(stream: RandomStream, source: Iterable[Any]) -> Iterator[Any]:
    """The batches of ``source``, which draws from ``stream``."""
    with stream.active():
        batches = iter(source)  # at once, so that loader processes start early

    def read() -> Iterator[Any]:
        while True:
            with stream.active():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    return read()


def _by_place(batches: Iterator[Any], plan: ShardPlan, workers: Sequence[int]) -> Iterator[WorkerBatches]:
    """Batch j is for shard j mod the number of shards."""
    return _in_turn(batches, plan, plan.shards, [plan.world.shard(w) for w in workers], workers)


def _in_turn(
    batches: Iterator[Any], plan: ShardPlan, size: int, picks: Sequence[int], workers: Sequence[int]
) -> Iterator[WorkerBatches]:
    """Groups of ``size`` consecutive batches, of which those at ``picks`` go to ``workers``.

    Raises:
        ValueError: there are fewer batches than ``size``, and more than one. A single one is given to every worker.
    """
    complete = False
    while group := list(islice(batches, size)):
        if len(group) < size and complete:
            rank_zero_warn(LEFT_OVER.format(left=len(group), workers=size))
            return
        if 1 < len(group) < size:
            raise too_few(len(group), plan)
        complete = True
        if len(group) < size:  # copies, because a worker may change its batch
            yield WorkerBatches({w: copy.deepcopy(group[0]) if i else group[0] for i, w in enumerate(workers)})
        else:
            yield WorkerBatches({w: group[p] for w, p in zip(workers, picks, strict=True)})


def _iterates_itself(loader: DataLoader[Any]) -> bool:
    """Whether the loader's class has an ``__iter__`` that isn't torch's."""
    definers = [next(c for c in type(loader).__mro__ if name in vars(c)) for name in ("__iter__", "_get_iterator")]
    return any(c.__module__.split(".")[0] not in ("torch", "torchdata") for c in definers)


class _Notes:
    """Whose the batches are that the ``__iter__`` of a user's DataLoader yields, which may leave out or reorder some.

    Fetched batches are known again by themselves, or by the tensors in them. New objects are taken for the fetched
    batches in the order of these.

    Args:
        loader: the name of the loader's class.
        workers: whose batches the sampler yields in turn.
        sampler: the loader's.
        plan: how the data is sharded.
    """

    def __init__(self, loader: str, workers: Sequence[int], sampler: "WorkerSampler", plan: ShardPlan) -> None:
        self._loader, self._workers, self._sampler, self._plan = loader, workers, sampler, plan
        self.start()

    def start(self) -> None:
        """A pass begins."""
        self._owners: Any = WeakIdKeyDictionary()  # what was fetched → its worker, None where it belongs to several
        self._waiting: deque[int] = deque()  # the workers of the batches that were fetched and not yielded, in order
        self._fetches = False  # by torch's iterators, else by asking the sampler
        self._fetched = self._fetched_before = self._yielded = self._unclear = 0
        self._sampler.drawn = 0

    def fetch(self, place: int, batch: Any) -> None:
        """Torch's iterator has fetched ``batch``, its ``place``-th."""
        worker = self._workers[place % len(self._workers)]
        self._fetches = True
        self._fetched += 1
        self._waiting.append(worker)
        for leaf in _recognisable(batch):
            self._owners[leaf] = worker if self._owners.get(leaf, worker) == worker else None

    def read(self, batches: Iterator[Any]) -> Iterator[WorkerBatches]:
        """One batch of each worker as soon as there is one."""
        first = list(islice(batches, 1))
        if first and not self._fetched and not self._sampler.drawn:
            if self._plan.partition is not None:
                what = f"the `__iter__` of {self._loader} doesn't ask the loader's sampler"
                raise ValueError(NO_PARTITION.format(what=what))
            yield from _by_place(chain(first, batches), self._plan, self._workers)
            return
        queues: dict[int, deque[Any]] = {w: deque() for w in self._workers}
        counts = dict.fromkeys(self._workers, 0)
        complete = False
        for batch in chain(first, batches):
            worker = self._owner(batch, counts)
            counts[worker] += 1
            queues[worker].append(batch)
            if all(queues.values()):
                complete = True
                yield WorkerBatches({w: queue.popleft() for w, queue in queues.items()})
        if first and not complete:
            raise too_few(self._yielded, self._plan)
        self._report(counts, sum(map(len, queues.values())))

    def _owner(self, batch: Any, counts: Mapping[int, int]) -> int:
        if not self._fetches:
            drawn = range(self._fetched, self._sampler.drawn)
            self._waiting.extend(self._workers[j % len(self._workers)] for j in drawn)
            self._fetched = self._sampler.drawn
        since, self._fetched_before = self._fetched - self._fetched_before, self._fetched
        self._yielded += 1
        owners = {self._owners.get(leaf) for leaf in _recognisable(batch)} - {None}
        if len(owners) == 1:
            worker: int = owners.pop()
            if worker in self._waiting:
                self._waiting.remove(worker)
            return worker
        if self._plan.partition is not None and (owners or since != 1):
            raise ValueError(UNCLEAR_PARTITION.format(number=self._yielded, loader=self._loader, fetched=since))
        self._unclear += 1
        return self._waiting.popleft() if self._waiting else min(counts, key=counts.__getitem__)

    def _report(self, counts: Mapping[int, int], left: int) -> None:
        if self._unclear and self._fetched != self._yielded:
            rank_zero_warn(
                UNCLEAR.format(loader=self._loader, fetched=self._fetched, yielded=self._yielded, unclear=self._unclear)
            )
        elif left:
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
    """The parts of a batch by which it can be known again: objects that can be referred to weakly."""
    return [leaf for leaf in tree_leaves(batch) if type(leaf).__weakrefoffset__]


class _NotingLoader(DataLoader[Any]):
    """Mixed in before a DataLoader class that has an ``__iter__`` of its own: notes what torch's iterators fetch.

    ``_get_iterator`` is where all of torch's ways to iterate come by, whatever the user's ``__iter__`` calls.
    """

    _notes: _Notes

    @override
    def _get_iterator(self) -> Any:
        iterator: Any = super()._get_iterator()
        if type(iterator).__module__.split(".")[0] in ("torch", "torchdata"):
            iterator.__class__ = type(type(iterator).__name__, (_NotingIterator, type(iterator)), {})
            iterator._notes = self._notes
        return iterator


class _NotingIterator:
    """Mixed in before the class of one of torch's iterators."""

    _notes: _Notes
    _place = 0

    def __next__(self) -> Any:
        batch = super().__next__()  # type: ignore[misc]
        self._notes.fetch(self._place, batch)
        self._place += 1
        return batch

    def _reset(self, *args: Any, **kwargs: Any) -> None:
        self._place = 0
        super()._reset(*args, **kwargs)  # type: ignore[misc]
