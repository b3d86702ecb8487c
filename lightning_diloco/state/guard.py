"""Checks during training that parameters are trained by the optimizers of ``configure_optimizers``.

A known optimizer is an optimizer of ``configure_optimizers``: its steps are counted, and each worker has a state of it.
The steps of any other optimizer would not be counted, and all workers would share its state. Changes nothing. Imports
nothing of Lightning.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_diloco.comm.tensors import bitwise_equal, tensors_in
from lightning_diloco.state.replicas import Layout, ModelState
from lightning_diloco.state.worker import parameters_of

_WAY_OUT = (
    "Local steps are counted, and inner states kept per worker, for these optimizers only: return the optimizer from"
    " `configure_optimizers` and step it as Lightning does (with manual optimization: `self.optimizers().step()`)."
)


class StepGuard:
    """Compares parameters around a worker's turn until a known optimizer of theirs has stepped.

    That is the first turn of an ordinary fit; from then on nothing is compared. A parameter that never had a gradient
    may move: target networks, averages of weights and codebooks are written by hand.
    """

    def __init__(self) -> None:
        self._stepped: dict[int, Any] = {}  # id → known optimizer that has stepped
        self._layout: Layout | None = None
        self._unproven: list[str] = []  # trainable parameters that none of them holds
        self._had_gradient: set[int] = set()  # ids of unproven parameters
        self._watches: list[RemovableHandle] = []
        self._before: dict[str, Tensor] = {}
        self._moved: dict[str, str] = {}  # parameter → error, where its optimizer may still be about to step
        self._written: str | None = None  # error about a parameter that moved without a gradient
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

    def close(self) -> None:
        """Training is over."""
        for watch in self._watches:
            watch.remove()
        self._watches = []

    def begin_turn(self, layout: Layout, state: ModelState, theta: Mapping[str, Tensor]) -> None:
        """Before a worker's turn.

        Args:
            layout: the module's layout.
            state: the worker's replica.
            theta: θ, the reference where the replica equals it; the replica's other tensors are cloned.
        """
        if self._unproven or self._layout is not layout:
            proven = _parameter_ids(self._stepped.values())
            unproven = [n for n in layout.trainable if id(layout.parameters[n]) not in proven]
            if self._layout is not layout or unproven != self._unproven:
                self._layout, self._unproven = layout, unproven
                self._watch([layout.parameters[n] for n in unproven])
        if not self._unproven:
            self._before = {}
            return
        with torch.no_grad():
            values = ((n, state.tensors[n]) for n in self._unproven)
            self._before = {n: theta[n] if bitwise_equal(t, theta[n]) else t.clone() for n, t in values}

    def _watch(self, parameters: Iterable[Tensor]) -> None:
        """Notes which parameters get a gradient: an optimizer may have cleared it when the turn is over."""
        self.close()
        for p in parameters:
            if p.requires_grad:
                key = id(p)
                note = partial(self._note_gradient, key)
                self._watches.append(p.register_post_accumulate_grad_hook(note))  # type: ignore[no-untyped-call]

    def _note_gradient(self, key: int, _: Tensor) -> None:
        self._had_gradient.add(key)

    def end_turn(self, layout: Layout, state: ModelState, known: Collection[Any], where: str) -> None:
        """After a worker's turn.

        Args:
            layout: the module's layout.
            state: the worker's replica.
            known: the optimizers that Lightning steps.
            where: the turn, in words that complete "moved in …".

        Raises:
            RuntimeError: a parameter that had a gradient has moved, and no known optimizer holds it; or one has moved
                and there is no known optimizer.
        """
        if self._before:
            self._compare(layout, state, known, where)
            self._before = {}

    @torch.no_grad()
    def _compare(self, layout: Layout, state: ModelState, known: Collection[Any], where: str) -> None:
        proven, steppable = _parameter_ids(self._stepped.values()), _parameter_ids(known)
        for name, before in self._before.items():
            key = id(layout.parameters[name])
            if key in proven or bitwise_equal(state.tensors[name], before):
                continue
            message = (
                f"Parameter {name!r} moved in {where}, but no optimizer of `configure_optimizers` that trains it has"
                f" stepped. {_WAY_OUT} If the parameter is not trained by gradients (an EMA teacher, a codebook), set"
                " `requires_grad_(False)` on it."
            )
            trained = key in self._had_gradient
            if not known or (trained and key not in steppable):
                raise RuntimeError(message)
            if trained:
                self._moved.setdefault(name, message)
            else:
                self._written = self._written or message

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

    def end_epoch(self, layout: Layout) -> None:
        """After an epoch.

        Raises:
            RuntimeError: as :meth:`end_batch`; or parameters have moved, and no known optimizer has ever stepped.
        """
        self.end_batch(layout)
        if self._written is not None and not self._stepped:
            raise RuntimeError(self._written)
        self._written = None

    def foreign_step(self, optimizer: Any, layout: Layout, turn: Any) -> None:
        """An optimizer that Lightning doesn't know stepped in a worker's turn.

        An optimizer that is made anew for every turn, as in meta-learning, or that keeps no state, is the project's
        business.

        Args:
            optimizer: the unknown optimizer.
            layout: the module's layout.
            turn: which worker's, at which step.

        Raises:
            RuntimeError: it has stepped parameters of the module in another turn, too, and keeps state.
        """
        if not any(optimizer.state.values()):
            return
        if not _parameter_ids([optimizer]) & {id(p) for p in layout.everything}:
            return
        if self._foreign.setdefault(optimizer, turn) != turn:
            raise RuntimeError(
                f"{type(optimizer).__name__} steps parameters of {type(layout.module).__name__} in the turns of several"
                " workers, which would share its state, but it is none of the optimizers that `configure_optimizers`"
                f" returns. {_WAY_OUT} Or make the optimizer anew in every step."
            )


class AttributeGuard:
    """Finds optimizers that keep state in attributes, which the workers of a process would share.

    Workers swap ``Optimizer.state`` and ``param_groups``. Tensors elsewhere (``self.slow_weights = [...]``) are found
    when a step changes them.
    """

    def __init__(self) -> None:
        self._before: list[dict[str, Any]] = []

    def begin_turn(self, optimizers: Sequence[Any]) -> None:
        """Before a worker's turn."""
        self._before = [_attribute_traces(o) for o in optimizers]

    def end_turn(self, optimizers: Sequence[Any]) -> None:
        """After a worker's turn.

        Raises:
            RuntimeError: a tensor in an attribute has changed.
        """
        for optimizer, before in zip(optimizers, self._before, strict=False):
            for name, traces in _attribute_traces(optimizer).items():
                if before.get(name) != traces:
                    raise RuntimeError(
                        f"{type(optimizer).__name__} keeps tensors that its step changes in its attribute `{name}`,"
                        " which all workers of a process would share. Keep them in `state`, as torch's optimizers do:"
                        " there each worker has its own."
                    )


_BASE_ATTRIBUTES = {*vars(torch.optim.SGD([torch.zeros(1)], lr=1.0)), "_zero_grad_profile_name"}


def _attribute_traces(optimizer: Any) -> dict[str, list[tuple[int, int]]]:
    """Attribute → (identity, version) of each tensor in it that is no parameter."""
    further = {n: v for n, v in vars(optimizer).items() if n not in _BASE_ATTRIBUTES and isinstance(v, _HOLDERS)}
    if not further:
        return {}
    parameters = _parameter_ids([optimizer])
    return {
        name: [(id(t), t._version) for t in tensors_in(value) if id(t) not in parameters]
        for name, value in further.items()
    }


_HOLDERS = (Tensor, list, tuple, dict)


def _parameter_ids(optimizers: Collection[Any]) -> set[int]:
    return {id(p) for o in optimizers for p in parameters_of(o)}
