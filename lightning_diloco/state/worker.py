"""What a worker owns besides its weights: inner optimizer state, control state, gradient scaler, gradients, random
stream.

Owns these per worker and swaps them in and out around the worker's turn. Does not own parameters and buffers
(``replicas.py``) nor the decision what happens to inner state at a synchronisation (``engine.py``). Imports nothing of
Lightning.

"Control state" is everything in an optimizer's ``param_groups`` except the parameters: learning rates, the counters of
schedule-free optimizers, values that an overridden ``optimizer_step`` writes; and the state of LR schedulers that the
project steps itself. What is written there between turns (LR schedulers, callbacks) is meant for all workers; what is
written during a turn belongs to that worker.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_diloco.state.randomness import RandomStream

OptimizerState = dict[Any, Any]  # parameter → {name: tensor or Python value}, as in Optimizer.state
Control = list[dict[str, Any]]  # one dict per parameter group


class ScalerOwner(Protocol):
    """Whatever holds the gradient scaler in use (Lightning's mixed-precision plugin)."""

    scaler: Any


def flatten_optimizers(optimizers: Sequence[Any]) -> list[Any]:
    """The optimizers and those in their attributes (SAM's base optimizer, lists), each once, outermost first."""
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


def copy_state(state: OptimizerState) -> OptimizerState:
    """A copy that shares no tensor with ``state``; the keys stay the same parameter objects."""
    cloned: OptimizerState = defaultdict(dict)
    for key, values in state.items():
        cloned[key] = (
            {k: _copy_value(v) for k, v in values.items()} if isinstance(values, dict) else _copy_value(values)
        )
    return cloned


def _copy_value(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


_MUTABLE = (Tensor, list, dict, set)


class Groups:
    """The control state of an optimizer; what can be changed in place (tensors, lists) is copied."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def read(self) -> Control:
        return [
            {k: _copy_value(v) if isinstance(v, _MUTABLE) else v for k, v in group.items() if k != "params"}
            for group in self._optimizer.param_groups
        ]

    def write(self, control: Control) -> None:
        for group, values in zip(self._optimizer.param_groups, control, strict=True):
            for key in group.keys() - values.keys() - {"params"}:  # what another worker's step() added
                del group[key]
            group.update(values)


class Schedule:
    """The state of a scheduler that workers step themselves."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def read(self) -> Control:
        return [copy.deepcopy(self._scheduler.state_dict())]

    def write(self, control: Control) -> None:
        self._scheduler.load_state_dict(copy.deepcopy(control[0]))


class Worker:
    """One worker's belongings besides its weights.

    Args:
        index: global id.
        optimizers: the live inner optimizers, flattened; their present state is what the worker starts from.
        controls: what has control state: the optimizers' groups, and schedulers.
        scaler_owner: holder of the gradient scaler, or None without one.
        stream: the worker's random stream, or None to draw from the process's own.
        original: take the live state and scaler objects themselves instead of copies (one worker per process does, so
            that what gathered else sees between turns is an ordinary optimizer).
    """

    def __init__(
        self,
        index: int,
        optimizers: Sequence[Any],
        controls: Sequence["Groups | Schedule"],
        scaler_owner: ScalerOwner | None,
        stream: RandomStream | None,
        original: bool,
    ) -> None:
        self.index = index
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
        """The worker's belongings are live inside the block.

        Args:
            parameters: the module's parameters, whose ``.grad`` is the worker's inside the block and None afterwards.
            keep_gradients: whether the worker finds its gradients again at its next turn.
        """
        self.activate()
        for p, gradient in self.gradients.items():
            p.grad = gradient
        self.gradients = {}
        try:
            if self.stream is None:
                yield
            else:
                with self.stream.active():
                    yield
        finally:
            self.states = [o.state for o in self._optimizers]
            self.control = [c.read() for c in self._controls]
            for p in parameters:
                if p.grad is not None:
                    if keep_gradients:
                        self.gradients[p] = p.grad
                    p.grad = None

    def follow(self, optimizers: Sequence[Any], controls: Sequence["Groups | Schedule"]) -> None:
        """Other optimizers are live from now on; ``states`` and ``control`` are theirs already."""
        self._optimizers, self._controls = optimizers, controls

    def activate(self) -> None:
        """Points the live optimizers and the scaler's owner to this worker's state."""
        for optimizer, state in zip(self._optimizers, self.states, strict=True):
            optimizer.state = state
        for holder, control in zip(self._controls, self.control, strict=True):
            holder.write(control)
        if self._scaler_owner is not None:
            self._scaler_owner.scaler = self.scaler

    def reset_inner_state(self, initial: Sequence[OptimizerState]) -> None:
        """Gives the worker a fresh copy of ``initial``, the state right after ``configure_optimizers``."""
        self.states = [copy_state(state) for state in initial]

    def to(self, device: torch.device) -> None:
        """Moves the inner state."""
        for state in self.states:
            for values in state.values():
                for k, v in values.items() if isinstance(values, dict) else ():
                    if isinstance(v, Tensor) and v.numel() > 1:
                        values[k] = v.to(device)

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the inner optimizer state and of the gradients kept between turns."""
        tensors = [v for s in self.states for values in s.values() for v in _tensors_in(values)]
        return sum(t.nbytes for t in tensors), sum(g.nbytes for g in self.gradients.values() if not g.is_sparse)


def _tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for v in values.values():
            yield from _tensors_in(v)
    elif isinstance(values, (list, tuple)):
        for v in values:
            yield from _tensors_in(v)
