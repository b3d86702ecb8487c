"""Checks during training that parameters are trained by the optimizers of ``configure_optimizers``.

A known optimizer is an optimizer of ``configure_optimizers``: its steps are counted, and each worker has a state of it.
The steps of any other optimizer would not be counted, and all workers would share its state. Changes nothing. Imports
nothing of Lightning.
"""

from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_diloco.comm.tensors import bitwise_equal
from lightning_diloco.state.replicas import Layout, ModelState

_WAY_OUT = (
    "Local steps are counted, and inner states kept per worker, for these optimizers only: return the optimizer from"
    " `configure_optimizers` and step it as Lightning does (with manual optimization: `self.optimizers().step()`)."
)


class StepGuard:
    """Compares parameters around a worker's turn until a known optimizer of theirs has stepped.

    An ordinary fit compares around the first turn only.
    """

    def __init__(self) -> None:
        self._stepped: dict[int, Any] = {}  # id → known optimizer that has stepped
        self._layout: Layout | None = None
        self._unproven: list[str] = []  # trainable parameters of no stepped optimizer
        self._before: dict[str, Tensor] = {}
        self._moved: dict[str, str] = {}  # parameter → error, if its optimizer doesn't step in this batch
        self._foreign: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # unknown optimizer → turn of its latest step

    def stepped(self, optimizer: Any) -> None:
        """A known optimizer has stepped: its parameters need no more comparison."""
        if id(optimizer) not in self._stepped:
            self._stepped[id(optimizer)] = optimizer
            self._layout = None

    def replaced(self) -> None:
        """The training loop has other optimizers from now on."""
        self._stepped.clear()
        self._layout = None

    @torch.no_grad()
    def begin_turn(self, layout: Layout, state: ModelState, theta: Mapping[str, Tensor]) -> None:
        """Before a worker's turn.

        Args:
            layout: the module's layout.
            state: the worker's replica.
            theta: θ, the reference where the replica equals it; the replica's other tensors are cloned.
        """
        if self._unproven or self._layout is not layout:
            proven = _parameter_ids(self._stepped.values())
            self._layout = layout
            self._unproven = [n for n in layout.trainable if id(layout.parameters[n]) not in proven]
        values = ((n, state.tensors[n]) for n in self._unproven)
        self._before = {n: theta[n] if bitwise_equal(t, theta[n]) else t.clone() for n, t in values}

    @torch.no_grad()
    def end_turn(self, layout: Layout, state: ModelState, known: Collection[Any], where: str) -> None:
        """After a worker's turn.

        Args:
            layout: the module's layout.
            state: the worker's replica.
            known: the optimizers that Lightning steps.
            where: the turn, in words that complete "moved in …".

        Raises:
            RuntimeError: a trainable parameter has moved that is in no known optimizer.
        """
        if not self._before:
            return
        proven, optimized = _parameter_ids(self._stepped.values()), _parameter_ids(known)
        for name, before in self._before.items():
            key = id(layout.parameters[name])
            if key in proven or bitwise_equal(state.tensors[name], before):
                continue
            message = (
                f"Parameter {name!r} moved in {where}, but no optimizer of `configure_optimizers` that trains it has"
                f" stepped. {_WAY_OUT} If the parameter is not trained by gradients (an EMA teacher, a codebook), set"
                " `requires_grad_(False)` on it."
            )
            if key not in optimized:
                raise RuntimeError(message)
            # an optimizer that has the parameter may step after this turn: end_batch decides
            self._moved.setdefault(name, message)
        self._before = {}

    def end_batch(self, layout: Layout, waiting: Collection[Any] = ()) -> None:
        """After a batch, or an epoch.

        Args:
            layout: the module's layout.
            waiting: parameters with a gradient kept for later: their optimizer may step in a later batch.

        Raises:
            RuntimeError: a parameter has moved although no known optimizer of it has ever stepped.
        """
        if not self._moved:
            return
        fine = _parameter_ids(self._stepped.values()) | {id(p) for p in waiting}
        for name, message in self._moved.items():
            if name in layout.parameters and id(layout.parameters[name]) not in fine:
                raise RuntimeError(message)
        if not waiting:
            self._moved.clear()

    def foreign_step(self, optimizer: Any, layout: Layout, turn: Any) -> None:
        """An optimizer that is not known has stepped in a worker's turn (``turn``: worker and step).

        An optimizer that is made anew for every turn, as in meta-learning, is allowed.

        Raises:
            RuntimeError: the optimizer trains parameters of the module, and has stepped in another turn, too.
        """
        if not _parameter_ids([optimizer]) & {id(p) for p in layout.everything}:
            return
        if self._foreign.setdefault(optimizer, turn) != turn:
            raise RuntimeError(
                f"{type(optimizer).__name__} steps parameters of {type(layout.module).__name__} in the turns of several"
                " workers, which would share the optimizer's state, but `configure_optimizers` doesn't return this"
                f" optimizer. {_WAY_OUT}"
            )


def _parameter_ids(optimizers: Collection[Any]) -> set[int]:
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
