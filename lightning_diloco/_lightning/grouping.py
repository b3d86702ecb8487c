"""Consecutive batches of a loader become groups with a batch of each worker.

Owns :class:`WorkerBatches` and the errors about epochs that make no group. Elsewhere: which batches a loader fetches
(``samplers.py``, ``reading.py``).
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_diloco.fit import ShardPlan

TOO_FEW = (
    "An epoch of the training data has {number}, but there are {readers}, and each needs a batch of its own. Use fewer"
    " workers (`num_nodes`), a smaller `batch_size`, more data, or no `drop_last`."
)


class WorkerBatches:
    """A batch per worker hosted here. A leaf for functions that walk nested collections."""

    def __init__(self, by_worker: dict[int, Any]) -> None:
        self.by_worker = by_worker


def too_few(number: int, plan: ShardPlan, unit: str = "batch(es)") -> ValueError:
    """The error for an epoch in which some worker would have no batch."""
    return ValueError(TOO_FEW.format(number=f"{number} {unit}", readers=_readers(plan.shards, plan)))


def left_over(number: int, size: int, plan: ShardPlan) -> str:
    """The warning for batches at the end of an epoch that make no group of ``size``."""
    return f"The last {number} batch(es) of an epoch don't suffice for {_readers(size, plan)} and are dropped."


def _readers(shards: int, plan: ShardPlan) -> str:
    team = f" of {plan.world.team} processes each" if plan.world.team > 1 else ""
    return f"{shards // plan.world.team} workers{team}"


def group_by_place(batches: Iterator[Any], plan: ShardPlan, workers: Sequence[int]) -> Iterator[WorkerBatches]:
    """Batch j is for shard j mod the number of shards."""
    return grouped(batches, plan, plan.shards, [plan.world.shard(w) for w in workers], workers)


def grouped(
    batches: Iterator[Any], plan: ShardPlan, size: int, places: Sequence[int], workers: Sequence[int]
) -> Iterator[WorkerBatches]:
    """Groups of ``size`` consecutive batches, of which those at ``places`` go to ``workers``.

    Raises:
        ValueError: the epoch has fewer batches than ``size``, but more than 1. A single batch goes to every worker.
    """
    complete = False
    while group := list(islice(batches, size)):
        if len(group) < size and complete:
            rank_zero_warn(left_over(len(group), size, plan))
            return
        if 1 < len(group) < size:
            raise too_few(len(group), plan)
        complete = True
        if len(group) < size:  # copies, because a worker may change its batch
            yield WorkerBatches({w: copy.deepcopy(group[0]) if i else group[0] for i, w in enumerate(workers)})
        else:
            yield WorkerBatches({w: group[place] for w, place in zip(workers, places, strict=True)})
