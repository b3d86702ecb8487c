"""The project's hooks, and the rank under which they write to loggers and the terminal.

Owns two questions: whether calling a hook has an effect, and the meaning of "rank zero" in a worker's turn. Private
because Lightning's ``is_overridden`` looks through decorators and misses hooks that were put on the instance, and
because its rank-zero decorators read an attribute of a function.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.hooks import ModelHooks
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


@contextmanager
def rank_of(worker: int) -> Iterator[None]:
    """Inside, ``rank_zero_only`` and all that builds on it run for worker 0 alone, as on the ranks of DDP."""
    process: int = rank_zero_only.rank  # type: ignore[attr-defined]
    rank_zero_only.rank = process or worker  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rank_zero_only.rank = process  # type: ignore[attr-defined]
