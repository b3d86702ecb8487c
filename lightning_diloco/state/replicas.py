"""The replicas of the workers. At most a single replica is active: its tensors are in the live module.

Owns the storage: parameters of a :class:`ModelState` share no storage, as in a module, so that ``torch.save`` of a part
writes that part only. Activating a state swaps pointers, never values. Does not own a worker's optimizer state
(``worker.py``), the outer model (``outer.py``), nor when workers synchronise (``algorithms/``). Imports nothing of
Lightning.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torchmetrics import Metric

from lightning_diloco.comm.tensors import bitwise_equal

BufferKey = tuple[int, str]  # (position of the submodule in Layout.modules, name of its buffer)


class ModelState:
    """The values of the replicated parameters and the buffers of a module.

    Attributes:
        tensors: parameter name → tensor of the parameter's shape, stride and dtype.
        buffers: for each submodule, in the layout's order, the dict that is its ``_buffers`` while the state is active.
            So buffers that a forward reassigns or registers are in the right state without further work.
    """

    def __init__(self, tensors: dict[str, Tensor], buffers: list[dict[str, Tensor | None]]) -> None:
        self.tensors = tensors
        self.buffers = buffers

    def named_buffers(self) -> Iterator[tuple[BufferKey, Tensor]]:
        for position, submodule in enumerate(self.buffers):
            for name, buffer in submodule.items():
                if buffer is not None:
                    yield (position, name), buffer

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor], buffers: list[dict[str, Tensor | None]]) -> None:
        """Copies values, in place where shapes allow; equal tensors are not written to."""
        for name, tensor in tensors.items():
            if not bitwise_equal(self.tensors[name], tensor):
                self.tensors[name].copy_(tensor)
        for target, source in zip(self.buffers, buffers, strict=True):
            for name, buffer in source.items():
                put_buffer(target, name, buffer)

    def to(self, device: torch.device) -> None:
        """Moves the values."""
        self.tensors = {name: t.to(device) for name, t in self.tensors.items()}
        for submodule in self.buffers:
            submodule.update({name: b.to(device) for name, b in submodule.items() if b is not None})

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the parameters and of the buffers."""
        return sum(t.nbytes for t in self.tensors.values()), sum(b.nbytes for _, b in self.named_buffers())


class Layout:
    """The parameters and submodules of ``module`` that are replicated, by name and in a fixed order.

    Tied parameters appear once, under their first name. Buffers of torchmetrics' metrics are left out: all workers
    update the same metric object.

    Args:
        module: the module; ``checks.py`` lists modules that can't be replicated.
        share_frozen: leave parameters without ``requires_grad`` out: all workers use the module's tensor.
        suspended: ids of parameters that lack ``requires_grad`` only for a while.

    Attributes:
        parameters: name → replicated parameter of the live module.
        everything: all parameters of the module, shared ones too.
        modules, module_names: submodules whose buffers are replicated.
    """

    def __init__(self, module: nn.Module, share_frozen: bool = False, suspended: set[int] | None = None) -> None:
        self.module = module
        self.share_frozen = share_frozen
        self._required: list[bool] = []
        self._suspended: set[int] = suspended or set()  # parameters that a worker's turn left without requires_grad
        self.parameters: dict[str, nn.Parameter] = {
            name: p for name, p in module.named_parameters() if self._requires_grad(p) or not share_frozen
        }
        self.everything = list(module.parameters())
        self.signature = self._signature()
        self._tree = list(module.modules())
        self._known_members = self._members()
        metrics = {id(child) for m in module.modules() if isinstance(m, Metric) for child in m.modules()}
        named = [
            (name, m)
            for name, m in module.named_modules()
            if id(m) not in metrics and not any(isinstance(b, UninitializedBuffer) for b in m._buffers.values())
        ]
        self.module_names = [name for name, _ in named]
        self.modules = [m for _, m in named]

    def renewed(self) -> "Layout":
        """A layout of the module as it is now."""
        return Layout(self.module, self.share_frozen, self._suspended)

    @property
    def names(self) -> list[str]:
        return list(self.parameters)

    @property
    def trainable(self) -> list[str]:
        """Parameters that require a gradient, or did until a worker's step turned that off for a while (as GANs do)."""
        return [name for name, p in self.parameters.items() if self._requires_grad(p)]

    @property
    def frozen(self) -> list[str]:
        return [name for name, p in self.parameters.items() if not self._requires_grad(p)]

    def changed(self) -> bool:
        """Whether parameters or submodules came, went, were reshaped or (un)frozen since this layout was made."""
        return self._signature() != self.signature

    def replaced(self) -> bool:
        """Whether parameters came, went or were replaced since this layout was made."""
        if self._members() == self._known_members:
            return False  # asked after every turn, and several times as fast as the walk through the module
        return [id(p) for p in self.module.parameters()] != [id(p) for p in self.everything]

    def _members(self) -> list[int]:
        """Ids of the parameters and submodules of all modules that were there when this layout was made."""
        return [id(x) for m in self._tree for members in (m._parameters, m._modules) for x in members.values()]

    def begin_turn(self) -> None:
        """Before a worker's turn: notes which parameters require a gradient."""
        self._required = [p.requires_grad for p in self.everything]

    def end_turn(self) -> bool:
        """After a worker's turn: parameters that the turn froze still count as trainable (GANs toggle the flag).

        Returns:
            Whether the turn has frozen or unfrozen parameters.
        """
        required = [p.requires_grad for p in self.everything]
        if self._suspended or required != self._required:
            before = {id(p) for p, was in zip(self.everything, self._required, strict=True) if was}
            now = {id(p) for p, is_now in zip(self.everything, required, strict=True) if is_now}
            self._suspended = (self._suspended | before) - now
        return required != self._required

    def _requires_grad(self, p: nn.Parameter) -> bool:
        return p.requires_grad or id(p) in self._suspended

    def _signature(self) -> list[Any]:
        found: list[Any] = []
        for module in self.module.modules():
            found.append(id(module))
            found += [
                (id(p), self._requires_grad(p), p.shape, p.dtype) for p in module._parameters.values() if p is not None
            ]
        return found

    def read(self) -> ModelState:
        """The tensors that are in the live module now: references, not copies."""
        return ModelState({n: p.data for n, p in self.parameters.items()}, [m._buffers for m in self.modules])

    def activate(self, state: ModelState) -> None:
        """Puts the tensors of ``state`` into the live module, by pointer."""
        for name, p in self.parameters.items():
            p.data = state.tensors[name]
        for module, buffers in zip(self.modules, state.buffers, strict=True):
            module.__dict__["_buffers"] = buffers

    @contextmanager
    def activated(self, state: ModelState) -> Iterator[None]:
        """``state`` is active inside the block; afterwards the previous state is active again."""
        before = self.read()
        self.activate(state)
        try:
            yield
        finally:
            self.activate(before)

    def collect(self, state: ModelState) -> None:
        """After ``state`` was active: copies parameters whose ``.data`` now points to another tensor into ``state``."""
        for name, p in self.parameters.items():
            tensor = state.tensors[name]
            if p.data_ptr() != tensor.data_ptr():
                if p.shape != tensor.shape or p.dtype != tensor.dtype:
                    raise RuntimeError(
                        f"Parameter {name!r} changed from {tuple(tensor.shape)} {tensor.dtype} to {tuple(p.shape)}"
                        f" {p.dtype} inside a worker's step. Change a parameter's shape between steps, for all"
                        " workers at once (for example in `Callback.on_train_batch_start`)."
                    )
                with torch.no_grad():
                    tensor.copy_(p.data)

    def previous_names(self, old: "Layout") -> dict[str, str]:
        """New name → name in ``old``, for parameters in both layouts (pruning and parametrizations rename them)."""
        known = {id(p): name for name, p in old.parameters.items()}
        return {name: known[id(p)] for name, p in self.parameters.items() if id(p) in known}

    def carried(self, old: "Layout", state: ModelState, default: ModelState) -> ModelState:
        """``state``, made for ``old``, in this layout: references; missing tensors come from ``default``."""
        tensors = dict(default.tensors)
        for name, before in self.previous_names(old).items():
            if (
                state.tensors[before].shape == tensors[name].shape
                and state.tensors[before].dtype == tensors[name].dtype
            ):
                tensors[name] = state.tensors[before]
        had = {id(m): buffers for m, buffers in zip(old.modules, state.buffers, strict=True)}
        merged = [{**new, **had.get(id(m), {})} for m, new in zip(self.modules, default.buffers, strict=True)]
        return ModelState(tensors, merged)

    def copy_of(self, source: ModelState) -> ModelState:
        """A new state with the values of ``source``, each parameter in a new storage."""
        # a clone keeps the strides of a dense original (channels_last); with others, kernels may round differently
        tensors = {n: source.tensors[n].detach().clone() for n in self.parameters}
        return ModelState(tensors, copy_buffers(source.buffers))


class Replicas:
    """The replicas of this process's workers, and the state of the live module between turns.

    Args:
        layout: the layout of the module; every worker starts from the module's present values.
        workers: global ids of the workers hosted here, ascending.

    Attributes:
        module_state: the tensors that are in the live module while no replica is active.
        states: worker → replica.
    """

    def __init__(self, layout: Layout, workers: Iterable[int]) -> None:
        self.layout = layout
        self.module_state = layout.read()
        self.states = {w: layout.copy_of(self.module_state) for w in workers}

    @property
    def workers(self) -> list[int]:
        return list(self.states)

    def to(self, device: torch.device) -> None:
        for state in self.states.values():
            state.to(device)

    def tensors(self, worker: int) -> Mapping[str, Tensor]:
        """Parameter name → tensor of ``worker``; writing to it changes the replica."""
        return self.states[worker].tensors

    def relayout(self, layout: Layout) -> None:
        """Changes to ``layout`` after parameters came, went or were (un)frozen; replicas keep remaining values."""
        present = layout.read()
        self.states = {w: layout.copy_of(layout.carried(self.layout, old, present)) for w, old in self.states.items()}
        self.layout, self.module_state = layout, present


def copy_buffers(buffers: list[dict[str, Tensor | None]]) -> list[dict[str, Tensor | None]]:
    """Clones; buffers that are the same tensor, or views of the same storage, stay so among the clones."""
    originals = {id(b): b for submodule in buffers for b in submodule.values() if b is not None}
    views = Counter(b.untyped_storage().data_ptr() for b in originals.values())
    storages: dict[int, torch.UntypedStorage] = {}
    clones: dict[int, Tensor] = {}
    for key, b in originals.items():
        storage = b.untyped_storage()
        if views[storage.data_ptr()] == 1 or b.numel() == 0:
            clones[key] = b.detach().clone()
        else:
            copied = storages.setdefault(storage.data_ptr(), storage.clone())  # type: ignore[no-untyped-call]
            clones[key] = torch.empty_like(b, memory_format=torch.contiguous_format).set_(
                copied, b.storage_offset(), b.shape, b.stride()
            )
    return [{name: None if b is None else clones[id(b)] for name, b in submodule.items()} for submodule in buffers]


def put_buffer(buffers: dict[str, Tensor | None], name: str, value: Tensor | None) -> None:
    """Sets ``buffers[name]`` to the value of ``value``: in place if shape and dtype allow, else to a clone."""
    present = buffers.get(name)
    if value is None:
        buffers[name] = None
    elif present is not None and present.shape == value.shape and present.dtype == value.dtype:
        present.copy_(value)
    else:
        buffers[name] = value.detach().clone()


def is_floating(tensor: Tensor) -> bool:
    """Whether ``tensor`` can be averaged: floating or complex."""
    return tensor.is_floating_point() or tensor.is_complex()
