"""The division of the user's training loader into shards, by kind of loader.

==============================================  ================================================================
the user's training loader                      worker i of N reads
==============================================  ================================================================
``DataLoader``, shuffled or sequential          the shard of ``DistributedSampler(num_replicas=N, rank=i)``, which
                                                shuffles, as Lightning's DDP does (not with ``overfit_batches``)
with a custom sampler                           every N-th index of the sampler, drawn once per epoch
with a custom batch sampler                     every N-th batch of the batch sampler, drawn once per epoch
``use_distributed_sampler=False``, a stream     every N-th batch; a ragged last group is dropped; the only batch of
                                                an epoch goes to every worker
with ``partition=``                             its list of indices; shorter lists wrap to the longest
==============================================  ================================================================

Indices and batches that are sharded from a sampler are made divisible by N by repeating the first ones (unless
``drop_last``), as ``DistributedSampler`` does. Where a worker has k processes, N·k takes the place of N, and member j
of worker i's team reads shard j·N + i.

Owns the functions by which the loops and the strategy shard loaders. Elsewhere: when batches are fetched (Lightning's
fetcher).
"""

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_map, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from lightning_diloco._lightning.grouping import WorkerBatches, too_few
from lightning_diloco._lightning.loaders import FirstWorkersLoader, ShardedLoader
from lightning_diloco._lightning.own_pace import check_length
from lightning_diloco._lightning.samplers import NO_PARTITION, worker_sampler
from lightning_diloco.fit import ShardPlan
from lightning_diloco.reporting.plan import Repeated


def split_batch(batch: Any, workers: Sequence[int]) -> dict[int, Any]:
    """The batch of each worker, untouched; only the containers that a CombinedLoader made are made again."""
    if isinstance(batch, WorkerBatches):
        return {w: batch.by_worker[w] for w in workers}

    def pick(worker: int) -> Any:
        return tree_map(lambda leaf: leaf.by_worker[worker] if isinstance(leaf, WorkerBatches) else leaf, batch)

    return {w: pick(w) for w in workers}


def shard(loader: Any, plan: ShardPlan) -> ShardedLoader:
    """A loader that yields :class:`WorkerBatches` from the batches of ``loader``; its length counts local steps.

    Raises:
        ValueError: ``partition`` with a stream or a custom sampler, a wrong partition, a ``DistributedSampler`` for
            another number of replicas, or an epoch that has fewer batches than there are workers.
    """
    loader = original(loader)
    sampler = None
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        sampler = worker_sampler(loader, plan)
    elif plan.partition is not None:
        stream = f"{type(loader.dataset).__name__} is an IterableDataset" if isinstance(loader, DataLoader) else None
        stream = stream or f"the loader is a {type(loader).__name__}"
        raise ValueError(NO_PARTITION.format(problem=f"{stream}, a stream"))
    sharded = ShardedLoader(loader, plan, sampler)
    if plan.places is not None:
        check_length(loader, sized_len(sharded))
    batches = sized_len(loader)
    if batches and sized_len(sharded) == 0:
        raise too_few(batches, plan)
    return sharded


def shard_sizes(sharded: ShardedLoader) -> list[int] | None:
    """Number of samples in each worker's shard, up to a common factor; None if only reading tells."""
    return None if sharded._sampler is None else sharded._sampler.sizes(sharded._plan.world.num_workers)


def original(loader: Any) -> Any:
    """The user's loader behind a sharded loader, or the loader itself."""
    return loader._loader if type(loader) in (ShardedLoader, FirstWorkersLoader) else loader


def is_sharded(combined: CombinedLoader) -> bool:
    """Whether training reads sharded loaders; N = 1 reads the user's."""
    return any(type(loader) is ShardedLoader for loader in combined.flattened)


def repeated(combined: CombinedLoader) -> Repeated | None:
    """The worker whose shard is read most often per epoch, if that is twice or more."""
    samplers = [loader._sampler for loader in combined.flattened if type(loader) is ShardedLoader]
    found = [s.repeated for s in samplers if s is not None and s.repeated is not None]
    return max(found, key=lambda r: r.longest / r.samples, default=None)


def own_length(trainer: Trainer, combined: CombinedLoader) -> int:
    """Batches in the epoch of a worker that reads at its own pace; hooks may have changed the loader's."""
    (loader,) = combined.flattened
    return min(int(trainer.num_training_batches), len(loader))


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a sharded loader to which epoch its next ``iter()`` belongs."""
    if type(loader) is ShardedLoader:
        loader.set_epoch(epoch)


def abandon(combined: CombinedLoader) -> None:
    """Tells sharded loaders that no batch is asked for any more."""
    for loader in combined.flattened:
        if type(loader) is ShardedLoader:
            loader.abandon()


def expose_first_worker(combined: CombinedLoader) -> None:
    """Makes ``trainer.train_dataloader`` the first worker's batches; ``flattened``, which training reads, stays."""
    if is_sharded(combined):
        # new objects: a loader that referred to its view would keep its processes after a reload
        views = [FirstWorkersLoader(x) if type(x) is ShardedLoader else x for x in combined.flattened]
        combined._iterables = tree_unflatten(views, combined._spec)  # setting `flattened` would change both
