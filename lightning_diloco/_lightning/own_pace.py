"""Batches for workers that don't step together: each reads its own shard, batch by batch, when its turn comes.

A worker's k-th batch is the one that it would have in the k-th step of a run in which all step together. Nothing is
read ahead for a worker that isn't active (but where none of a process is, callbacks see the next batch of its first
worker), nothing is lost at the end of an epoch of the Trainer, and a resumed run opens every worker's shard at its
place.

Owns the readers, one per worker hosted here, each over a copy of the user's loader (with processes of its own, if the
loader has any). Does not own the places (``engine/places.py``).
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from torch.utils.data import DataLoader

from lightning_diloco._lightning.grouping import WorkerBatches
from lightning_diloco._lightning.reading import copied, read
from lightning_diloco._lightning.rounds import independent
from lightning_diloco._lightning.samplers import WorkerSampler
from lightning_diloco.engine.places import Place
from lightning_diloco.fit import ShardPlan

NO_LENGTH = (
    "Workers that don't step together read their shards one by one, in epochs whose length must be known, but the"
    " training loader (a {loader}) has no length. Give its dataset a `__len__`."
)
_ENDED = (
    "Worker {worker}'s epoch {epoch} of the training data ended after {batches} batch(es), before the length that the"
    " loader has: workers that don't step together need a length that is right, and that changes between epochs only."
    " Mend the `__len__` of the dataset."
)


class OwnPace:
    """Reads a batch of one worker at a time.

    Args:
        loader: the user's.
        plan: how it is divided, with the workers' places.
        sampler: of all workers; None: every worker reads the whole stream, and keeps its batches.
    """

    def __init__(self, loader: Any, plan: ShardPlan, sampler: WorkerSampler | None) -> None:
        self._loader, self._plan, self._sampler = loader, plan, sampler
        self._readers: dict[int, Iterator[WorkerBatches]] = {}
        self._drawn: dict[int, WorkerSampler] = {}  # epoch → the sampler as it is before that epoch
        self._latest: dict[int, tuple[Place, Any]] = {}  # worker → the place of its last batch, and the batch

    def batch(self, worker: int) -> Any:
        """The batch at the worker's place; the same object as long as the worker stays there."""
        assert self._plan.places is not None
        place = self._plan.places[worker]
        before = self._latest.get(worker)
        if before is not None and before[0] == place:
            return before[1]
        if before is None or before[0] != Place(place.epoch, place.batches - 1):
            self._readers[worker] = self._open(worker, place)
        group = next(self._readers[worker], None)
        if group is None:
            raise RuntimeError(_ENDED.format(worker=worker, epoch=place.epoch, batches=place.batches))
        self._latest[worker] = place, group.by_worker[worker]
        return self._latest[worker][1]

    def _open(self, worker: int, place: Place) -> Iterator[WorkerBatches]:
        plan, source, sampler = self._plan, self._loader, None
        if self._sampler is not None:
            sampler = self._before(place.epoch).of([plan.world.shard(worker)])
            sampler.set_epoch(place.epoch)
        if isinstance(source, DataLoader):
            source = copied(source, sampler, plan, [worker])
            if sampler is None:
                vars(source).update(dataset=independent(self._loader.dataset))
        source = independent(source)
        if sampler is None:
            _set_sampler_epoch(source, place.epoch)
        return read(source, sampler, plan, [worker], place.epoch, place.batches, alone=True)

    def _before(self, epoch: int) -> WorkerSampler:
        """The sampler before ``epoch``: one that draws from a generator of its own goes on from epoch to epoch."""
        assert self._sampler is not None
        assert self._plan.places is not None
        here = self._plan.shards_here
        latest = max(self._drawn, default=None)
        if latest is None:
            latest = 0
            self._drawn[0] = self._sampler.of(here)
        while latest < epoch:
            passed = self._drawn[latest].of(here)
            passed.set_epoch(latest)
            deque(islice(passed, sized_len(passed)) if passed.remembers else (), maxlen=0)  # reads it, as training does
            latest += 1
            self._drawn[latest] = passed
        for past in [e for e in self._drawn if e < min(self._plan.places[w].epoch for w in self._plan.workers)]:
            if past < latest:
                del self._drawn[past]
        return self._drawn[epoch]

    def close(self) -> None:
        """No batch is asked for any more: loaders' processes end."""
        self._readers.clear()
        self._latest.clear()
        self._drawn.clear()


class OwnBatches(WorkerBatches):
    """Stands for a batch of each worker, read when it is looked at."""

    def __init__(self, pace: OwnPace) -> None:
        super().__init__(_OnDemand(pace))


class _OnDemand(dict[int, Any]):
    def __init__(self, pace: OwnPace) -> None:
        super().__init__()
        self._pace = pace

    def __missing__(self, worker: int) -> Any:
        return self._pace.batch(worker)


def check_length(loader: Any, length: int | None) -> None:
    """Whether workers can read ``loader`` at their own pace.

    Raises:
        ValueError: it has no length.
    """
    if length is None:
        raise ValueError(NO_LENGTH.format(loader=type(loader).__name__))
