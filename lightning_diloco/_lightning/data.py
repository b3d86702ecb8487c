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
``drop_last``), as ``DistributedSampler`` does. Where a worker has k processes, N·k takes the place of N, and member j
of worker i's team reads what is number j·N + i's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector, _get_distributed_sampler
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_diloco._lightning.reclassed import Reclassed
from lightning_diloco._lightning.samplers import LEFT_OVER, NO_PARTITION, Dealing, WorkerSampler, worker_sampler
from lightning_diloco.randomness import derive_seed

if TYPE_CHECKING:
    from lightning_diloco._lightning.process import ProcessStrategy


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
            raise ValueError(NO_PARTITION.format(what=f"the loader is a {type(loader).__name__}, a stream"))
        return _DealtIterable(loader, dealing)
    kind = type(f"Dealt{type(loader).__name__}", (_DealtDataLoader, type(loader)), {})
    dealt: Any = object.__new__(kind)
    state = _Dealt(loader, dealing, torch.Generator())
    # the user's attributes, without DataLoader.__setattr__, which guards some; the generator is our own because
    # otherwise each iter() would draw from the global one
    vars(dealt).update(vars(loader), _dealt=state, _iterator=None, generator=state.generator)
    if not isinstance(loader.dataset, IterableDataset):
        state.sampler = worker_sampler(loader, dealing)
        vars(dealt)["sampler" if loader.batch_sampler is None else "batch_sampler"] = state.sampler
    elif dealing.partition is not None:
        raise ValueError(NO_PARTITION.format(what=f"{type(loader.dataset).__name__} is an IterableDataset, a stream"))
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


# -------------------------------------------------------------------------------------------- loaders


@dataclass
class _Dealt:
    """What a dealt DataLoader remembers."""

    loader: DataLoader[Any]
    dealing: Dealing
    generator: torch.Generator
    sampler: "WorkerSampler | None" = None
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
        groups = _grouped(super().__iter__(), dealing.shards, dealing.parts, dealing.workers)  # type: ignore[misc]
        return islice(groups, skip, None)

    def __len__(self) -> int:
        length: int = super().__len__()  # type: ignore[misc]
        dealing = self._dealt.dealing
        return length // (dealing.shards if self._dealt.sampler is None else len(dealing.workers))

    def state_dict(self) -> dict[str, int]:
        """Makes Lightning see a loader that can resume; the position itself comes from the training loop's progress."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next ``iter()`` is of ``state["epoch"]`` and leaves out what each worker had ``consumed`` of it."""
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
        dealing = self._dealing
        return islice(_grouped(iter(self.loader), dealing.shards, dealing.parts, dealing.workers), skip, None)

    def state_dict(self) -> dict[str, int]:
        """As a dealt DataLoader's."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """As a dealt DataLoader's."""
        self._skip = _position(self, state)

    def __len__(self) -> int:
        return len(self.loader) // self._dealing.shards  # type: ignore[arg-type]


def _position(loader: Any, state: dict[str, int]) -> int:
    """Batches that a loader had handed out in its present pass after ``consumed`` steps; short ones are cycled."""
    length = sized_len(loader)
    consumed = state["consumed"]
    return consumed if length is None or consumed <= length or not state["cycles"] else consumed % length


def _grouped(
    batches: Iterator[Any], size: int, picks: Sequence[int], workers: Sequence[int]
) -> Iterator[WorkerBatches]:
    """Groups of ``size`` consecutive batches, of which those at ``picks`` go to ``workers``."""
    while group := list(islice(batches, size)):
        if len(group) < size:
            rank_zero_warn(LEFT_OVER.format(left=len(group), workers=size))
            return
        yield WorkerBatches({w: group[p] for w, p in zip(workers, picks, strict=True)})


# -------------------------------------------------------------------------------------------- what is not dealt


class DilocoDataConnector(Reclassed, _DataConnector):
    """Gives each process its part of what isn't dealt to workers: Lightning asks a parallel strategy for the ranks."""

    @override
    def _requires_distributed_sampler(self, dataloader: DataLoader[Any]) -> bool:
        strategy: ProcessStrategy = self.trainer.strategy  # type: ignore[assignment]
        return not strategy.deals_training_data and super()._requires_distributed_sampler(dataloader)

    @override
    def _resolve_sampler(self, dataloader: DataLoader[Any], shuffle: bool, mode: Any = None) -> Any:
        if not self._requires_distributed_sampler(dataloader):
            return dataloader.sampler
        return _get_distributed_sampler(
            dataloader,
            shuffle,
            mode=mode,
            overfit_batches=self.trainer.overfit_batches,  # type: ignore[attr-defined]
            num_replicas=self.trainer.world_size,
            rank=self.trainer.global_rank,
        )
