"""Checks before training starts: modules and optimizers that can't have a replica per worker.

Changes nothing. Imports nothing of Lightning.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_diloco.state.replicas import Layout
from lightning_diloco.state.worker import flatten_optimizers, parameters_of


def refuse_unswappable(module: nn.Module) -> None:
    """Refuses parameters without a shape, and TorchScript."""
    for name, p in module.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ValueError(
                f"Parameter {name!r} of {type(module).__name__} is uninitialised (a lazy module that has not seen"
                " data). Workers need its shape before training starts: run one batch through the module in"
                " `configure_model` or `setup`."
            )
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise ValueError(
                f"Submodule {name!r} of {type(module).__name__} is TorchScript, whose weights can't be swapped per"
                " worker. Use the Python module, or `torch.compile` it."
            )


def refuse_untrainable(module: nn.Module) -> None:
    """Refuses a module without a trainable parameter."""
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} has no parameter with `requires_grad`, so there is nothing to synchronise."
            " Unfreeze a parameter before training starts."
        )


def refuse_foreign_tensors(module: nn.Module, optimizers: Sequence[Any]) -> None:
    """Refuses optimizers of tensors that are no parameters: all workers would share them, and step them N times."""
    known = {id(p) for p in module.parameters()}
    for optimizer in flatten_optimizers(optimizers):
        for p in parameters_of(optimizer):
            if p.requires_grad and id(p) not in known:
                raise ValueError(
                    f"{type(optimizer).__name__} trains a tensor of shape {tuple(p.shape)} that is no parameter of"
                    f" {type(module).__name__}, so workers can't have replicas of it. Register the tensor"
                    " (`self.name = nn.Parameter(...)`), or its module as a submodule."
                )


def refuse_overlaps(layout: Layout) -> None:
    """Refuses a parameter that shares memory with another tensor of the module: in replicas they would be separate."""
    spans = [(name, p.data) for name, p in layout.parameters.items()]
    spans += [
        (f"{module}.{name}".lstrip("."), b)
        for module, buffers in zip(layout.module_names, layout.read().buffers, strict=True)
        for name, b in buffers.items()
        if b is not None
    ]
    used = [(t.data_ptr(), t.data_ptr() + _extent(t), name) for name, t in spans if t.numel()]
    parameters = set(layout.parameters)
    for (_, end, name), (other_start, _, other) in pairwise(sorted(used)):
        if other_start < end and {name, other} & parameters:
            raise ValueError(
                f"{name!r} and {other!r} of {type(layout.module).__name__} share memory, which replicas can't,"
                " since each has separate tensors. To tie parameters, assign the same nn.Parameter object to both"
                " names; otherwise `clone()` a tensor."
            )


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.element_size()
