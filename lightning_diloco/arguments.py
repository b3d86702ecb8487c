"""Checks of the strategy's arguments: what was given, the rule, the fix.

Owns messages only. Imports nothing of Lightning.
"""

import operator
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_diloco.algorithms import SyncAlgorithm
from lightning_diloco.outer import OuterFactory, trial_optimizer


def outer_factory(
    cls: type[Optimizer] | Callable[..., Optimizer], kwargs: Mapping[str, Any] | None, algorithm: SyncAlgorithm
) -> OuterFactory:
    """What builds the outer optimizer from ``outer_optimizer_cls`` and ``outer_optimizer_kwargs``, tried out once."""
    name = getattr(cls, "__name__", repr(cls))
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"`outer_optimizer_kwargs` (={kwargs!r}) must be a dict or None.")
    if algorithm.outer_defaults is None and (kwargs is not None or cls is not torch.optim.SGD):
        raise ValueError(
            f"{type(algorithm).__name__} has no outer optimizer, but `outer_optimizer_cls` (={name}) or"
            f" `outer_optimizer_kwargs` (={kwargs!r}) were given. Leave both out."
        )
    if not isinstance(cls, type):
        if not callable(cls):
            raise ValueError(
                f"`outer_optimizer_cls` (={cls!r}) must be a torch.optim.Optimizer class, or a callable that makes"
                " one from a list of parameters."
            )
        if kwargs is not None:
            raise ValueError(
                f"`outer_optimizer_kwargs` (={kwargs!r}) can't be combined with a callable `outer_optimizer_cls`"
                f" (={name}), which has its arguments already. Pass None, or the optimizer's class."
            )
        factory: OuterFactory = cls
    elif not issubclass(cls, Optimizer):
        raise ValueError(
            f"`outer_optimizer_cls` (={name}) must be a torch.optim.Optimizer class, or a callable that makes one"
            " from a list of parameters."
        )
    else:
        if kwargs is None:
            kwargs = (algorithm.outer_defaults or {"lr": 1.0}) if cls is torch.optim.SGD else {}
        factory = partial(cls, **kwargs)
    try:
        trial_optimizer(factory)
    except Exception as error:
        raise ValueError(
            f"The outer optimizer can't be built: `outer_optimizer_cls` (={name}) with `outer_optimizer_kwargs`"
            f" (={kwargs!r}) fails with: {error}"
        ) from error
    return factory


def as_integer(value: Any) -> int | None:
    """``value`` as a Python integer, whichever library's it is; None for booleans and for all that isn't integral."""
    if _is_boolean(value):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        return None


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool"


def check_count(name: str, value: Any, meaning: str) -> int:
    """An integer ≥ 1."""
    count = as_integer(value)
    if count is None or count < 1:
        raise ValueError(f"`{name}` (={value!r}) must be an integer ≥ 1: the number of {meaning}.")
    return count


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(map(repr, choices))}.")


def check_bool(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one."""
    if not _is_boolean(value) or getattr(value, "shape", None):
        raise ValueError(f"`{name}` (={value!r}) must be True or False.")
    return bool(value)


def check_processes(backend: Any, timeout: Any, start_method: Any) -> None:
    """What only several processes need."""
    if backend is not None and (not isinstance(backend, str) or not backend):
        raise ValueError(
            f"`process_group_backend` (={backend!r}) must be the name of a back end, like 'gloo', or None."
        )
    if timeout is not None and (not isinstance(timeout, timedelta) or timeout <= timedelta(0)):
        raise ValueError(f"`timeout` (={timeout!r}) must be a positive datetime.timedelta, or None.")
    if start_method is not None:
        check_choice("start_method", start_method, ("popen", "spawn", "fork"))
