"""A pass over the user's loader: the shallow copy that training reads, and the groups of batches that it yields.

Owns the order of reading and the source of a loader's random draws. The user's loader stays untouched. Elsewhere:
which samples a worker gets (``samplers.py``).

Loaders are read in order, with ``DataLoader(in_order=False)`` too, which permits but doesn't ask for another order: the
place of a batch gives its worker. Batches of a loader class with a custom ``__iter__`` are traced (``tracing.py``).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader

from lightning_diloco._lightning.grouping import WorkerBatches, group_by_place, grouped, too_few
from lightning_diloco._lightning.samplers import WorkerSampler
from lightning_diloco._lightning.tracing import Trace, has_custom_iter, traced
from lightning_diloco.fit import ShardPlan
from lightning_diloco.state.randomness import RandomStream, derive_seed


def copied(loader: Any, sampler: WorkerSampler | None, plan: ShardPlan, workers: Sequence[int]) -> Any:
    """A copy of a DataLoader that reads with ``sampler``.

    The user's attributes are set without ``DataLoader.__setattr__``, which guards some. The generator is a new object
    because otherwise each ``iter()`` would draw from the global generator. Batches must come in order: the place of a
    batch gives its worker, and the point where a resumed epoch goes on.
    """
    changed: dict[str, Any] = {"_iterator": None, "generator": torch.Generator(), "in_order": True}
    cls = type(loader)
    if sampler is not None:
        changed["sampler" if loader.batch_sampler is None else "batch_sampler"] = sampler
        if has_custom_iter(loader):
            changed["_trace"] = Trace(cls.__name__, workers, sampler, plan)
            cls = traced(cls)
    copy = object.__new__(cls)
    vars(copy).update(vars(loader), **changed)
    if "_trace" in changed:
        _forget_iterators(copy)
    return copy


def _forget_iterators(copy: Any) -> None:
    """Makes each pass begin with new iterators of torch's where ``__init__`` has made them for all passes.

    They read the user's sampler, not the workers'. Such loaders stop after ``len``, and their batch sampler repeats
    itself; where ``len`` isn't the length of a repetition, passes continue each other, and the loader is a stream.
    """
    names = vars(copy).setdefault("diloco_kept_iterators", [])
    names += [name for name, value in vars(copy).items() if hasattr(value, "_sampler_iter")]
    length = sized_len(copy)
    if length is None or length != sized_len(copy._trace.sampler.sampler):
        names.clear()
    vars(copy).update(dict.fromkeys(names))
    if names:
        vars(copy).update(persistent_workers=copy.num_workers > 0)


def read(
    source: Any,
    sampler: WorkerSampler | None,
    plan: ShardPlan,
    workers: Sequence[int],
    epoch: int,
    skip: int = 0,
    alone: bool = False,
) -> Iterator[WorkerBatches]:
    """A pass over ``source`` without its first ``skip`` local steps.

    Torch's loaders with a sampler skip by index. Other sources are read from the start, because only reading tells
    their order. Their draws from torch's generator come from (seed, loader, epoch): a source yields the same batches
    again after a resume, and the training's draws don't depend on the source's. With ``alone``, a source that serves a
    single one of the workers, its loader's processes draw other numbers than those of the others' sources.
    """
    if isinstance(source, DataLoader):
        assert source.generator is not None
        own = [plan.world.shard(w) for w in workers] if alone else []
        source.generator.manual_seed(derive_seed(plan.seed, "loader", epoch, *own))
    trace: Trace | None = getattr(source, "_trace", None) if isinstance(source, DataLoader) else None
    if sampler is not None and trace is None:
        sampler.skip = skip
        groups = grouped(iter(source), plan, len(workers), range(len(workers)), workers)
        return groups if skip else _at_least_one(groups, sampler, plan)
    stream = RandomStream(derive_seed(plan.seed, "stream", plan.loader, epoch))
    if trace is not None:
        trace.start()
        with stream.active():
            vars(source).update({name: DataLoader.__iter__(source) for name in source.diloco_kept_iterators})
    batches = _drawing_from(stream, source)
    return islice(group_by_place(batches, plan, workers) if trace is None else trace.group(batches), skip, None)


def _at_least_one(groups: Iterator[WorkerBatches], sampler: WorkerSampler, plan: ShardPlan) -> Iterator[WorkerBatches]:
    """The groups.

    Raises:
        ValueError: there are none, because a sampler without a length had too few items for a complete group.
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
        batches = iter(source)  # before the first batch is asked for, so that loader processes start early

    def read_all() -> Iterator[Any]:
        while True:
            with stream.active():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    return read_all()
