"""A worker's state besides its weights: inner optimizer states, control state, scaler, gradients, random stream.

Swaps this state in and out around the worker's turn. Does not own parameters and buffers (``replicas.py``) nor the
policy for inner state at a synchronisation (``policies.py``). Imports nothing of Lightning.

"Control state" is everything in an optimizer's ``param_groups`` except the parameters: learning rates, the counters of
schedule-free optimizers, values that an overridden ``optimizer_step`` writes; and the state of LR schedulers that the
project steps itself. Changes between turns (by LR schedulers, callbacks) are adopted by all workers; changes during a
turn belong to the active worker.
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_diloco.comm.tensors import copied, tensors_in
from lightning_diloco.state.randomness import RandomStream

OptimizerState = dict[Any, Any]  # parameter → {name: tensor or Python value}, as in Optimizer.state
Control = list[dict[str, Any]]  # one dict per parameter group


class ScalerOwner(Protocol):
    """An object with the gradient scaler in use as attribute (Lightning's mixed-precision plugin)."""

    scaler: Any


def flatten_optimizers(optimizers: Sequence[Any]) -> list[Any]:
    """The optimizers and the optimizers in their attributes (SAM's base optimizer), each once, outermost first."""
    found: list[Any] = []
    queue = list(optimizers)
    while queue:
        optimizer = queue.pop(0)
        if all(optimizer is not known for known in found):
            found.append(optimizer)
            for value in vars(optimizer).values():
                several = isinstance(value, (list, tuple, dict))
                values = [value] if not several else value.values() if isinstance(value, dict) else value
                queue += [v for v in values if isinstance(v, Optimizer)]
    return found


def parameters_of(optimizer: Any) -> list[Any]:
    """The parameters of an optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def copy_state(state: OptimizerState) -> OptimizerState:
    """A copy that shares no tensor with ``state``; the keys stay the same parameter objects."""
    return defaultdict(dict, {key: copied(values) for key, values in state.items()})


_MUTABLE = (Tensor, list, dict, set)


class Groups:
    """Reads and writes an optimizer's control state; values that can change in place (tensors, lists) are copied."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def read(self) -> Control:
        return [
            {k: copied(v) if isinstance(v, _MUTABLE) else v for k, v in group.items() if k != "params"}
            for group in self._optimizer.param_groups
        ]

    def write(self, control: Control) -> None:
        for group, values in zip(self._optimizer.param_groups, control, strict=True):
            for key in group.keys() - values.keys() - {"params"}:  # entries that another worker's step() added
                del group[key]
            group.update(values)


class Schedule:
    """Reads and writes the state of a scheduler that workers step themselves."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def read(self) -> Control:
        return [copied(self._scheduler.state_dict())]

    def write(self, control: Control) -> None:
        self._scheduler.load_state_dict(copied(control[0]))


class Worker:
    """A worker's state besides its weights.

    Args:
        optimizers: the live inner optimizers, flattened; the worker starts from their present state.
        controls: the optimizers' groups, and the schedulers that workers step themselves.
        scaler_owner: holder of the gradient scaler, or None without a scaler.
        stream: the worker's random stream, or None to draw from the process's generators.
        original: use the live state and scaler objects instead of copies. The first worker of a process does, so that
            callbacks see the optimizers' original objects between turns.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        controls: Sequence["Groups | Schedule"],
        scaler_owner: ScalerOwner | None,
        stream: RandomStream | None,
        original: bool,
    ) -> None:
        self.stream = stream
        self.states = [o.state if original else copy_state(o.state) for o in optimizers]
        self.control = [c.read() for c in controls]
        scaler = None if scaler_owner is None else scaler_owner.scaler
        self.scaler = scaler if original else copy.deepcopy(scaler)
        self.gradients: dict[torch.nn.Parameter, Tensor] = {}
        self._optimizers = optimizers
        self._controls = controls
        self._scaler_owner = scaler_owner

    @contextmanager
    def turn(self, parameters: Sequence[torch.nn.Parameter], keep_gradients: bool) -> Iterator[None]:
        """The worker's state is active inside the block; torch's generators stay where the block leaves them.

        Args:
            parameters: the module's parameters; ``.grad`` is the worker's inside the block and None afterwards.
            keep_gradients: whether the worker gets its gradients back in its next turn.
        """
        self.activate()
        for p, gradient in self.gradients.items():
            p.grad = gradient
        self.gradients = {}
        try:
            if self.stream is None:
                yield
            else:
                with self.stream.loaded():
                    yield
        finally:
            # read back, since a step may have replaced the state (Optimizer.load_state_dict makes a new dict)
            self.states = [o.state for o in self._optimizers]
            self.control = [c.read() for c in self._controls]
            for p in parameters:
                if p.grad is not None:
                    if keep_gradients:
                        self.gradients[p] = p.grad
                    p.grad = None

    def follow(self, optimizers: Sequence[Any], controls: Sequence["Groups | Schedule"]) -> None:
        """Makes other optimizers live; ``states`` and ``control`` belong to these optimizers already."""
        self._optimizers, self._controls = optimizers, controls

    def activate(self) -> None:
        """Points the live optimizers and the scaler's owner to this worker's state."""
        for optimizer, state in zip(self._optimizers, self.states, strict=True):
            optimizer.state = state
        for holder, control in zip(self._controls, self.control, strict=True):
            holder.write(control)
        if self._scaler_owner is not None:
            self._scaler_owner.scaler = self.scaler

    def reset_inner_state(self, initial: Sequence[OptimizerState], only: Collection[Any] | None = None) -> None:
        """Gives the worker a fresh copy of ``initial``, the state right after ``configure_optimizers``.

        Args:
            initial: the state of each optimizer.
            only: the parameters whose state starts afresh; None: all, and what belongs to no parameter.
        """
        if only is None:
            self.states = [copy_state(state) for state in initial]
            return
        for state, fresh in zip(self.states, initial, strict=True):
            for key in [k for k in state if k in only and k not in fresh]:
                del state[key]
            state.update({k: copied(values) for k, values in fresh.items() if k in only})

    def to(self, device: torch.device) -> None:
        """Moves the inner state."""
        for state in self.states:
            for values in state.values():
                for k, v in values.items() if isinstance(values, dict) else ():
                    if isinstance(v, Tensor) and v.numel() > 1:  # torch wants step counters on the CPU
                        values[k] = v.to(device)

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the inner optimizer state and of the gradients kept between turns."""
        tensors = [v for s in self.states for values in s.values() for v in tensors_in(values)]
        return sum(t.nbytes for t in tensors), sum(g.nbytes for g in self.gradients.values() if not g.is_sparse)
