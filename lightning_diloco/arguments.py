"""Checks of the strategy's arguments, and their plain values to compare and save.

Every error names the value, the rule and the fix. Imports nothing of Lightning.
"""

import hashlib
import inspect
import json
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import timedelta
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

from lightning_diloco.algorithms import Participation, SyncAlgorithm
from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.codecs import Codec
from lightning_diloco.engine.file_format import AVAILABILITY, GROUPING, SPEEDS, WEIGHTS
from lightning_diloco.state.outer import OuterFactory, trial_optimizer

Reduction = Literal["auto", "ordered", "all_reduce"]
StartMethod = Literal["popen", "spawn", "fork"]


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
        elif cls is torch.optim.SGD and "lr" not in kwargs:
            raise ValueError(
                f"`outer_optimizer_kwargs` (={kwargs!r}) must name `lr` for torch.optim.SGD: a dict replaces the"
                " defaults wholly, and with torch's own lr of 0.001 θ would hardly move. Add it, as in {'lr': 0.7,"
                " 'momentum': 0.9, 'nesterov': True}, or pass None for the algorithm's defaults."
            )
        factory = partial(cls, **kwargs)
    try:
        trial_optimizer(factory)
    except Exception as error:
        raise ValueError(
            f"The outer optimizer can't be built: `outer_optimizer_cls` (={name}) with `outer_optimizer_kwargs`"
            f" (={kwargs!r}) fails with: {error}"
        ) from error
    return factory


def configured(
    algorithm: SyncAlgorithm,
    factory: OuterFactory,
    codec: Codec | None,
    participation: Participation | None,
    weights: str,
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """What a run must be resumed with, as plain values: all that decides its numbers, of these arguments.

    The outer optimizer's arguments include its defaults, so that naming a default makes no difference.
    """
    optimizer = trial_optimizer(factory)
    given = factory.keywords if isinstance(factory, partial) else {}
    return {
        "algorithm": class_name(type(algorithm)),
        "arguments of the algorithm": plain_value(_arguments_of(algorithm)),
        "outer_optimizer_cls": class_name(type(optimizer)),
        "outer_optimizer_kwargs": plain_value({**given, **optimizer.defaults}),
        "codec": plain_value(codec or algorithm.codec),
        "participation": plain_value(participation),
        WEIGHTS: weights,
        AVAILABILITY: str(None if cluster is None else cluster.availability),
        SPEEDS: str(None if cluster is None or not algorithm.chooses_workers else _speeds(cluster)),
    }


def _speeds(cluster: Cluster) -> str:
    jitter = f", jitter {cluster.jitter} of seed {cluster.seed}" if cluster.jitter else ""
    return f"{cluster.step_seconds} seconds per step{jitter}"


def logged_settings(settings: Mapping[str, Any], partition: Any) -> dict[str, float | str]:
    """The strategy's arguments as hyperparameters: flat names and plain values, the same names in every run.

    TensorBoard takes the columns of a table of runs from one of them.

    Args:
        settings: arguments by name, with what :func:`configured` gives.
        partition: the strategy's.
    """
    kwargs = dict(settings["outer_optimizer_kwargs"])
    main = {
        "algorithm": f"{settings['algorithm']}({_listed(settings['arguments of the algorithm'])})",
        "codec": str(settings["codec"]),
        "diloco_interval": settings["diloco_interval"],
        "num_nodes": settings["num_nodes"],
        "outer_lr": kwargs.get("lr", "None"),
        "outer_momentum": kwargs.get("momentum", "None"),
        "outer_optimizer_cls": settings["outer_optimizer_cls"],
        "outer_optimizer_kwargs": _listed(kwargs),
        "participation": str(settings["participation"]),
        "partition": str(plain_value(partition)),
    }
    # under a name that comes late in the alphabet: TensorBoard shows the first five columns
    of_cluster = (AVAILABILITY, SPEEDS)  # which is there, too
    settings = {name: value for name, value in settings.items() if name not in of_cluster}
    others = {"policies/cluster": str(settings.get("cluster"))} | {
        f"policies/{name}": str(value) if isinstance(value, bool) else value
        for name, value in settings.items()
        if name not in main and isinstance(value, (bool, int, float, str))
    }
    return {f"diloco/{name}": value for name, value in (main | others).items()}


def _listed(arguments: Any) -> str:
    """Arguments as in a call."""
    return ", ".join(f"{k}={v!r}" for k, v in arguments.items()) if isinstance(arguments, dict) else str(arguments)


def configured_groups(optimizer: Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Any]:
    """The same for the parameter groups of an outer optimizer that has just been made.

    Args:
        optimizer: the outer optimizer.
        parameters: θ's parameters by name.
    """
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    group_of = {id(p): f"group {i}" for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    grouping = {name: group_of[id(p)] for name, p in parameters.items() if id(p) in group_of}
    return {
        "groups of the outer optimizer": {f"group {i}": plain_value(group) for i, group in enumerate(groups)},
        GROUPING: grouping if len(groups) > 1 else {},
    }


def _arguments_of(algorithm: SyncAlgorithm) -> dict[str, Any]:
    """The attributes named like the constructor's parameters; all attributes if a parameter has none."""
    attributes = {k: v for k, v in vars(algorithm).items() if k != "ctx"}
    parameters = inspect.signature(type(algorithm).__init__).parameters.values()
    names = [p.name for p in list(parameters)[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found = {n: key for n in names for key in (n, f"_{n}") if key in attributes}
    return {n: attributes[key] for n, key in found.items()} if len(found) == len(names) else attributes


def plain_value(value: Any, depth: int = 6) -> Any:
    """``value`` as numbers, strings, lists and dicts, which are the same in every process and load from any file.

    Objects deeper than ``depth`` count by their class, and so do random generators: their state is the run's.

    >>> plain_value({"lr": torch.tensor(0.5), "cls": torch.optim.SGD, "betas": (0.9, 0.95)})
    {'lr': 0.5, 'cls': 'SGD', 'betas': [0.9, 0.95]}
    """
    try:
        return _plain_value(value, depth)
    except Exception:  # the objects are the user's, and any question to them may raise
        return class_name(type(value))


def _plain_value(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # without a subclass, which files may refuse to load
    if isinstance(value, (Integral, Real)):  # numpy's, too
        number = int(value) if isinstance(value, Integral) else float(value)
        return number if number == number else "nan"  # which equals itself
    if isinstance(getattr(value, "__qualname__", None), str):
        return class_name(value)
    if not depth or isinstance(value, (torch.Generator, random.Random)):
        return class_name(type(value))
    if hasattr(value, "tolist"):  # tensors and arrays
        try:
            items = value.tolist()
        except Exception:  # those without plain data: meta and sparse tensors
            return _without_addresses(repr(value))
        return plain_value(items, depth - 1 + getattr(value, "ndim", 0))
    if isinstance(value, (list, tuple)):
        return [plain_value(v, depth - 1) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain_value(v, depth - 1) for v in value), key=repr)
    if isinstance(value, Mapping):
        return {str(plain_value(k, depth - 1)): plain_value(v, depth - 1) for k, v in value.items()}
    if isinstance(value, partial):
        return plain_value([value.func, value.args, value.keywords], depth)
    text = repr(value)
    plain = _without_addresses(text)
    hidden = [f.name for f in fields(value) if not f.repr] if is_dataclass(value) else []
    if hidden:  # large ones, such as a label per sample, count by their hash
        shown = json.dumps([plain_value(getattr(value, name), depth) for name in hidden])
        return f"{plain} with {', '.join(hidden)} {hashlib.sha256(shown.encode()).hexdigest()[:16]}"
    if plain == text:
        return text
    if hasattr(value, "__dict__"):
        return {"class": class_name(type(value)), **plain_value(vars(value), depth)}
    name = class_name(type(value))
    return name if plain.endswith(f"{type(value).__qualname__} object>") else plain


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text, flags=re.IGNORECASE)  # numpy's are in upper case


def class_name(value: Any) -> str:
    """A class's or function's name with its module, unless that is torch's or ours; ``__main__`` is the script."""
    module = getattr(value, "__module__", None)
    if not isinstance(module, str) or module.split(".")[0] in ("torch", "lightning_diloco", "builtins"):
        return str(value.__qualname__)
    return f"{'__main__' if module == '__mp_main__' else module}.{value.__qualname__}"  # the latter: started processes


def arguments_that_differ(cls: Callable[..., Any], given: Mapping[str, Any], always: Sequence[str] = ()) -> str:
    """Arguments as in a call of ``cls``, without those that have their default; ``always`` are shown in any case.

    >>> arguments_that_differ(torch.optim.SGD, {"lr": 0.7, "momentum": 0, "nesterov": True}, always=["momentum"])
    'lr=0.7, momentum=0, nesterov=True'
    """
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    shown = {n: v for n, v in given.items() if n in always or (v is not defaults[n] and v != defaults[n])}
    return ", ".join(f"{name}={_in_a_call(value)}" for name, value in shown.items())


def _in_a_call(value: Any) -> str:
    """An object in a few words: a name for classes and functions, the size for what is large."""
    if isinstance(getattr(value, "__qualname__", None), str):
        return class_name(value)
    text = _without_addresses(repr(value))
    return text if len(text) <= 60 else f"<{type(value).__name__}>"


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


def check_choice(name: str, value: Any, choices: Any) -> None:
    """One of the values of ``choices``, a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(map(repr, get_args(choices)))}.")


def check_instance(name: str, value: Any, cls: type, example: str) -> None:
    """An object of a class, or None."""
    if value is not None and not isinstance(value, cls):
        raise ValueError(f"`{name}` (={value!r}) must be an instance of {cls.__name__}, like {example}, or None.")


def check_bool(name: str, value: Any) -> bool:
    """True or False, also numpy's; no other value."""
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
        check_choice("start_method", start_method, StartMethod)
