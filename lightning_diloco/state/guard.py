"""Training that would be lost: parameters that no known optimizer moves, and optimizers that nobody told Lightning of.

Owns the two checks. Steps are counted, and inner states kept per worker, by the optimizers of ``configure_optimizers``;
with any other optimizer no step would be counted, and all workers would share the optimizer's state. Changes nothing.
Imports nothing of Lightning.
"""

from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_diloco.comm.tensors import bitwise_equal
from lightning_diloco.state.replicas import Layout, ModelState

_WAY_OUT = (
    "Workers count steps and keep their states by the optimizers of `configure_optimizers`: return the optimizer there"
    " and step it as Lightning does (with manual optimization: `self.optimizers().step()`)."
)


class StepGuard:
    """Compares parameters around a worker's turn, as long as no known optimizer that holds them has stepped.

    That is the first turn of an ordinary fit; from then on nothing is compared.
    """

    def __init__(self) -> None:
        self._stepped: dict[int, Any] = {}  # id → known optimizer that has stepped
        self._layout: Layout | None = None
        self._unproven: list[str] = []  # trainable parameters that none of them holds
        self._before: dict[str, Tensor] = {}
        self._moved: dict[str, str] = {}  # parameter → error, where its optimizer may still be about to step
        self._foreign: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # unknown optimizer → turn of its latest step

    def stepped(self, optimizer: Any) -> None:
        """A known optimizer stepped: its parameters are in good hands."""
        if id(optimizer) not in self._stepped:
            self._stepped[id(optimizer)] = optimizer
            self._layout = None

    def replaced(self) -> None:
        """The optimizers are others from now on."""
        self._stepped.clear()
        self._layout = None

    @torch.no_grad()
    def begin_turn(self, layout: Layout, state: ModelState, theta: Mapping[str, Tensor]) -> None:
        """Before a worker's turn.

        Args:
            layout: the module's layout.
            state: the worker's replica.
            theta: θ, which is compared with where the replica equals it; other tensors are cloned.
        """
        if self._unproven or self._layout is not layout:
            held = _held(self._stepped.values())
            self._layout = layout
            self._unproven = [n for n in layout.trainable if id(layout.parameters[n]) not in held]
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
            RuntimeError: a trainable parameter has moved that no known optimizer holds.
        """
        if not self._before:
            return
        proven, held = _held(self._stepped.values()), _held(known)
        for name, before in self._before.items():
            key = id(layout.parameters[name])
            if key in proven or bitwise_equal(state.tensors[name], before):
                continue
            message = (
                f"Parameter {name!r} moved in {where}, but no optimizer that Lightning knows holds it and has stepped."
                f" {_WAY_OUT} If it is no gradient that moves it (an EMA teacher, a codebook), set"
                " `requires_grad_(False)` on it."
            )
            if key not in held:
                raise RuntimeError(message)
            self._moved.setdefault(name, message)
        self._before = {}

    def end_batch(self, layout: Layout, waiting: Collection[Any] = ()) -> None:
        """After a batch, or an epoch.

        Args:
            layout: the module's layout.
            waiting: parameters whose gradient is kept: their optimizer may step in a later batch.

        Raises:
            RuntimeError: a parameter has moved although none of the known optimizers that hold it has ever stepped.
        """
        if not self._moved:
            return
        fine = _held(self._stepped.values()) | {id(p) for p in waiting}
        for name, message in self._moved.items():
            if name in layout.parameters and id(layout.parameters[name]) not in fine:
                raise RuntimeError(message)
        if not waiting:
            self._moved.clear()

    def foreign_step(self, optimizer: Any, layout: Layout, turn: Any) -> None:
        """An optimizer that Lightning doesn't know stepped in a worker's turn (``turn``: which worker and step).

        One that is made anew for every turn, as in meta-learning, is the project's business.

        Raises:
            RuntimeError: it holds parameters of the module, and did so in another turn, too.
        """
        if not _held([optimizer]) & {id(p) for p in layout.everything}:
            return
        if self._foreign.setdefault(optimizer, turn) != turn:
            raise RuntimeError(
                f"{type(optimizer).__name__} steps parameters of {type(layout.module).__name__} in the turns of several"
                f" workers, which would share its state, but `configure_optimizers` doesn't return it. {_WAY_OUT}"
            )


def _held(optimizers: Collection[Any]) -> set[int]:
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
