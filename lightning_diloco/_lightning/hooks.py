"""The project's hooks, and the rank under which they write to loggers and the terminal.

Owns two questions: whether calling a hook has an effect, and the meaning of "rank zero" in a worker's turn. Lightning
pays for every hook that it announces to the module and to each callback, and the workers would pay N times for it: a
tiny model spends more time on announcements than on its forward pass. So hooks without effect are not announced.
Private because Lightning's ``is_overridden`` looks through decorators and misses hooks that were put on the instance,
and because its rank-zero decorators read an attribute of a function.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.hooks import ModelHooks
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.strategies import Strategy
from lightning_utilities.core.rank_zero import rank_zero_only

_HOLDERS = (LightningModule, ModelHooks, LightningDataModule, Callback)
_SILENT = (Precision, Strategy, Profiler, PassThroughProfiler)  # what their methods do is known
_FILES = {inspect.getfile(base) for base in (*_HOLDERS, *_SILENT)}


def does_something(owner: Any, hook: str) -> bool:
    """Whether calling ``owner.hook`` runs other code than the method of Lightning's base classes.

    The file of the code decides, so that a patched base class and a wrapper on the instance count as the project's.
    """
    called = getattr(owner, hook)
    if not isinstance(called, MethodType) or not isinstance(called.__func__, FunctionType):
        return True
    return called.__func__.__code__.co_filename not in _FILES


def looks_at_gradients(trainer: Trainer) -> bool:
    """Whether the project may look at gradients between a worker's turns, so that they must be kept.

    Asked at every step: hooks may be put on the module, and callbacks attached, at any time.
    """
    module = trainer.lightning_module
    looking = ("on_before_zero_grad", "optimizer_zero_grad", "on_train_batch_start", "on_train_batch_end")
    return (
        not module.automatic_optimization
        or any(does_something(module, hook) for hook in looking)
        or any(does_something(callback, "on_before_zero_grad") for callback in trainer.callbacks)  # type: ignore[attr-defined]
    )


_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def transfers_in_turn(trainer: Trainer) -> bool:
    """Whether the project has a hook of its own that moves a batch to the device."""
    owners = [o for o in (trainer.lightning_module, trainer.datamodule) if o is not None]  # type: ignore[attr-defined]
    return any(does_something(owner, hook) for hook in _TRANSFER for owner in owners)


def only_moves(trainer: Trainer) -> bool:
    """Whether moving a batch to the device runs no code but Lightning's ``move_data_to_device``."""
    own = does_something(trainer.strategy, "batch_to_device")
    return not (own or is_profiled(trainer) or transfers_in_turn(trainer))


def reaches_nobody(trainer: Trainer, *hooks: str) -> bool:
    """Whether announcing hooks to the module and the callbacks runs no code of the project's.

    Asked each time, since hooks may be put on the module, and callbacks attached, whenever a project likes. A profiler
    measures every announcement.
    """
    hearers = (trainer.lightning_module, *trainer.callbacks)  # type: ignore[attr-defined]
    return not is_profiled(trainer) and not any(does_something(h, hook) for hook in hooks for h in hearers)


def clips_nothing(trainer: Trainer) -> bool:
    """Whether the gradients are left as they are before a step, and no code of the project's is asked."""
    module = trainer.lightning_module
    own = does_something(module, "configure_gradient_clipping") or does_something(module, "clip_gradients")
    return not (own or trainer.gradient_clip_val)


def is_plain(trainer: Trainer, *methods: str) -> bool:
    """Whether these methods of the precision plugin are those that only announce hooks."""
    return not any(does_something(trainer.precision_plugin, method) for method in methods)


def is_profiled(trainer: Trainer) -> bool:
    """Whether a profiler measures what is announced."""
    profiler = trainer.profiler  # type: ignore[attr-defined]
    # Lightning's is decorated: its code is contextlib's
    own = getattr(profiler.profile, "__func__", None) is not Profiler.profile
    return own or does_something(profiler, "start") or does_something(profiler, "stop")


@contextmanager
def rank_of(worker: int) -> Iterator[None]:
    """Inside, ``rank_zero_only`` and all that builds on it run for worker 0 alone, as on the ranks of DDP."""
    process: int = rank_zero_only.rank  # type: ignore[attr-defined]
    rank_zero_only.rank = process or worker  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rank_zero_only.rank = process  # type: ignore[attr-defined]
