"""The loader that training reads, which serves all workers, and the loader that hooks see, which is the first worker's.

Owns the position in an epoch, and the surface on which Lightning and projects find the user's loader again. Elsewhere:
the reading (``reading.py``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_diloco._lightning.grouping import WorkerBatches
from lightning_diloco._lightning.own_pace import OwnBatches, OwnPace
from lightning_diloco._lightning.reading import copied, read
from lightning_diloco._lightning.rounds import independent
from lightning_diloco._lightning.samplers import FirstWorkersSampler, WorkerSampler
from lightning_diloco._lightning.tracing import has_custom_iter
from lightning_diloco.fit import ShardPlan
from lightning_diloco.state.randomness import RandomStream, derive_seed


class _Pass(Iterator[WorkerBatches]):
    """A pass over a loader. A copy, as of a Trainer in a hook, is at its end: generators can't be copied."""

    def __init__(self, groups: Iterator[WorkerBatches]) -> None:
        self._groups = groups

    @override
    def __next__(self) -> WorkerBatches:
        return next(self._groups)

    @override
    def __reduce__(self) -> Any:
        return _Pass, (iter(()),)


@dataclass
class _Place:
    """The place in the data at which the next ``iter()`` starts."""

    epoch: int = 0
    skip: int = 0  # batches of each worker that a checkpoint had consumed
    cycles: bool = False  # whether the loader had perhaps begun again before that


class ShardedLoader:
    """Yields a batch per worker hosted here and local step. Other attributes are those of a copy of the loader."""

    _loader: Any
    _plan: ShardPlan
    _sampler: WorkerSampler | None
    _source: Any
    _place: _Place
    _pace: OwnPace | None

    def __init__(self, loader: Any, plan: ShardPlan, sampler: WorkerSampler | None) -> None:
        source = copied(loader, sampler, plan, plan.workers) if isinstance(loader, DataLoader) else loader
        # not by assignment: this class hands every assignment on to the source
        pace = None if plan.places is None else OwnPace(loader, plan, sampler)
        vars(self).update(_loader=loader, _plan=plan, _sampler=sampler, _source=source, _place=_Place(), _pace=pace)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Lightning gives its advice about loaders to DataLoaders only."""
        return type(self._loader)

    @override
    def __reduce__(self) -> Any:
        """``__class__`` would mislead ``pickle``."""
        return ShardedLoader, (self._loader, self._plan, self._sampler), {"_place": self._place}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python protocols that the user's loader may have, but this class hasn't
            raise AttributeError(name)
        return getattr(vars(self)["_source"], name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._source, name, value)

    def __iter__(self) -> Iterator[WorkerBatches]:
        skip, self._place.skip = self._place.skip, 0
        if self._pace is not None:
            pace = self._pace
            return _Pass(OwnBatches(pace) for _ in range(len(self) - skip))
        return _Pass(self._cycled(skip) if skip and self._place.cycles else self._read(skip))

    def _read(self, skip: int) -> Iterator[WorkerBatches]:
        return read(self._source, self._sampler, self._plan, self._plan.workers, self._place.epoch, skip)

    def _cycled(self, skip: int) -> Iterator[WorkerBatches]:
        """The pass without its first ``skip`` local steps; where it has fewer, none, and the next pass goes on.

        A CombinedLoader ends an epoch when each of its loaders has come to an end once.
        """
        by_index = self._sampler is not None and not has_custom_iter(self._loader)
        length = sized_len(self) if by_index else None  # else only reading tells
        if length is None:
            groups, length = self._read(0), 0
            while length < skip and next(groups, None) is not None:
                length += 1
        else:
            groups = self._read(skip) if skip <= length else iter(())
        if length and skip > length:
            self._place.skip = skip % length
        yield from groups

    def __len__(self) -> int:
        batches, plan = len(self._source), self._plan
        reads_all_shards = self._sampler is None or (has_custom_iter(self._loader) and batches == len(self._loader))
        if reads_all_shards:
            return 1 if batches == 1 else batches // plan.shards
        return batches // len(plan.workers)

    @property
    def sampler(self) -> "ShardedLoader":
        """The object on which Lightning calls ``set_epoch``."""
        return self

    @property
    def batch_sampler(self) -> None:
        """None, since Lightning would call its sampler's ``set_epoch``, too."""

    def set_epoch(self, epoch: int) -> None:
        self._place.epoch = epoch
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        else:
            _set_sampler_epoch(self._loader, epoch)

    def abandon(self) -> None:
        """The last pass is over."""
        if self._pace is not None:
            self._pace.close()
        trace = getattr(self._source, "__dict__", {}).get("_trace")
        if trace is not None:
            trace.abandon()

    def state_dict(self) -> dict[str, int]:
        """Makes Lightning see a loader that can resume; the position itself comes from the training loop's progress."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next ``iter()`` is of ``state["epoch"]`` and leaves out the batches that each worker had ``consumed``."""
        self.set_epoch(state["epoch"])
        self._place.skip, self._place.cycles = state["consumed"], state["cycles"] and state["loaders"] > 1


class FirstWorkersLoader:
    """``trainer.train_dataloader`` in hooks: the first worker's batches, and the attributes of the user's loader.

    Reading it leaves the training's position, samplers and random numbers alone.
    """

    _sharded: ShardedLoader

    def __init__(self, sharded: ShardedLoader) -> None:
        vars(self).update(_sharded=sharded)

    @property
    def _loader(self) -> Any:
        return self._sharded._loader

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """``isinstance`` answers as for the user's loader."""
        return type(self._loader)

    @override
    def __reduce__(self) -> Any:
        """As :class:`ShardedLoader`'s."""
        return FirstWorkersLoader, (self._sharded,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        sharded = vars(self)["_sharded"]
        if sharded._sampler is not None and vars(sharded._source).get(name) is sharded._sampler:
            return FirstWorkersSampler(getattr(sharded._loader, name), sharded._sampler, sharded._plan.shards_here[:1])
        return getattr(sharded._source, name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)
        if self._sharded._source is not self._loader:
            setattr(self._sharded._source, name, value)

    def __len__(self) -> int:
        return len(self._sharded)

    def __bool__(self) -> bool:
        return True

    @override
    def __repr__(self) -> str:
        return repr(self._loader)

    def __iter__(self) -> Iterator[Any]:
        sharded, plan = self._sharded, self._sharded._plan
        first, loader = plan.workers[:1], sharded._loader
        sampler, source = sharded._sampler, sharded._source
        if isinstance(loader, DataLoader):
            sampler = None if sampler is None else sampler.of(plan.shards_here[:1])
            source = copied(source, sampler, plan, first)
        source = independent(source)
        if isinstance(loader, DataLoader):
            vars(source).update(persistent_workers=False)
            if sampler is None:
                vars(source).update(dataset=independent(loader.dataset))
        stream = RandomStream(derive_seed(plan.seed, "train_dataloader", plan.loader, sharded._place.epoch))
        with isolate_rng(), stream.active():
            groups = read(source, sampler, plan, first, sharded._place.epoch)
        while True:
            with isolate_rng(), stream.active():
                group = next(groups, None)
            if group is None:
                return
            yield group.by_worker[first[0]]
