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
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from lightning_utilities.core.rank_zero import rank_zero_only

_FILES = {inspect.getfile(base) for base in (LightningModule, ModelHooks, LightningDataModule, Callback)}


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
_OF_THE_MODULE = ("optimizer_zero_grad", "configure_gradient_clipping")
_OF_ALL = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
_PLAIN = (Precision, DoublePrecision, HalfPrecision)  # without code of their own around backward pass and step


def transfers_in_turn(trainer: Trainer) -> bool:
    """Whether the project has a hook of its own that moves a batch to the device."""
    owners = [o for o in (trainer.lightning_module, trainer.datamodule) if o is not None]  # type: ignore[attr-defined]
    return any(does_something(owner, hook) for hook in _TRANSFER for owner in owners)


def only_moves(trainer: Trainer) -> bool:
    """Whether moving a batch to the device runs no code but Lightning's ``move_data_to_device``."""
    own = type(trainer.strategy).batch_to_device is not Strategy.batch_to_device
    return not (own or _is_profiled(trainer) or transfers_in_turn(trainer))


def unheard(trainer: Trainer) -> frozenset[str]:
    """The hooks around a worker's backward pass and step that run no code of the project's.

    Asked at every step, as above. A profiler measures every announcement, so that with one none is left out.
    """
    if _is_profiled(trainer) or type(trainer.precision_plugin) not in _PLAIN:
        return frozenset()
    module, callbacks = trainer.lightning_module, trainer.callbacks  # type: ignore[attr-defined]
    silent = [hook for hook in _OF_THE_MODULE if not does_something(module, hook)]
    silent += [h for h in _OF_ALL if not any(does_something(hearer, h) for hearer in (module, *callbacks))]
    return frozenset(silent) - ({"configure_gradient_clipping"} if trainer.gradient_clip_val else set())


def _is_profiled(trainer: Trainer) -> bool:
    return type(trainer.profiler) is not PassThroughProfiler  # type: ignore[attr-defined]


@contextmanager
def rank_of(worker: int) -> Iterator[None]:
    """Inside, ``rank_zero_only`` and all that builds on it run for worker 0 alone, as on the ranks of DDP."""
    process: int = rank_zero_only.rank  # type: ignore[attr-defined]
    rank_zero_only.rank = process or worker  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rank_zero_only.rank = process  # type: ignore[attr-defined]
