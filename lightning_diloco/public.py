"""The module between turns: what everybody but the workers sees of it, and what they write into it.

Owns the module's own tensors. Between turns they hold θ, so that callbacks, loggers and checkpoints meet an ordinary
module; what others write there is found by value and becomes θ's and every replica's. Does not own θ (``outer.py``) nor
the replicas' storage (``replicas.py``). Imports nothing of Lightning.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_diloco.outer import Outer
from lightning_diloco.replicas import Layout, Replicas, put_buffer, same_bits

Buffers = list[dict[str, Tensor | None]]


class PublicModel:
    """The live module as others see it.

    Args:
        replicas: the workers' states, with the module's layout and own tensors.
        outer: θ.

    Attributes:
        transparent: the only worker's tensors stay live between turns (N = 1, plain average): nothing is swapped,
            nothing needs adopting, the run is the plain run.
    """

    def __init__(self, replicas: Replicas, outer: Outer) -> None:
        self._replicas = replicas
        self._outer = outer
        self.transparent = False
        self._remember()

    @property
    def layout(self) -> Layout:
        return self._replicas.layout

    def show(self) -> None:
        """Makes the module's own tensors live, after a turn."""
        self.layout.bind(self._replicas.own)
        self._remember()

    @torch.no_grad()
    def publish(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies a new outer model, and θ's buffers, into the module's own tensors."""
        if self.transparent:
            return
        own = self._replicas.own
        for name, tensor in parameters.items():
            own.tensors[name].copy_(tensor)
        for mine, theta in zip(own.buffers, self._outer.state.buffers, strict=True):
            for name, buffer in theta.items():
                put_buffer(mine, name, buffer)
        self._remember()

    @torch.no_grad()
    def set_transparent(self, transparent: bool) -> None:
        """Switches between the only worker's tensors and the module's own; the values stay the worker's."""
        if transparent == self.transparent:
            return
        self.transparent = transparent
        worker = self._replicas.states[self._replicas.workers[0]]
        if transparent:
            self.layout.bind(worker)
            return
        self.layout.collect(worker)
        for name, tensor in worker.tensors.items():
            self._replicas.own.tensors[name].copy_(tensor)
        for mine, theirs in zip(self._replicas.own.buffers, worker.buffers, strict=True):
            for name, buffer in theirs.items():
                put_buffer(mine, name, buffer)
        self.show()

    @torch.no_grad()
    def adopt(self, thorough: bool = False) -> bool:
        """Takes over what was written into the module between turns, tensor by tensor.

        A version counter or a pointer that moved only triggers the comparison; what counts are values, so that swapping
        weights out and in again changes nothing.

        Args:
            thorough: compare tensors without a trace of writing too (``.data.copy_`` leaves none).

        Returns:
            Whether every trainable parameter was changed, so that all replicas start from a new model.
        """
        if self.transparent:
            return False
        if self.layout.changed():
            self._follow_structure()
        own = self._replicas.own = self.layout.read()
        changed = []
        for name, trace in self._parameter_traces().items():
            if thorough or self._traces.get(name) != trace:
                theta, written = self._outer.tensors[name], own.tensors[name]
                if not same_bits(written, theta):
                    changed.append(name)
                    theta.copy_(written)
                    for w in self._replicas.workers:
                        self._replicas.tensors(w)[name].copy_(written)
        if thorough or self._buffer_traces() != self._traced_buffers:
            self.adopt_buffers(self._outer.state.buffers, own.buffers)
        self._remember()
        return set(self._outer.names) <= set(changed)

    @torch.no_grad()
    def adopt_buffers(self, before: Buffers, after: Buffers) -> None:
        """Buffers of ``after`` that differ from ``before`` become everybody's: θ's, the replicas', the module's."""
        everybody = [self._outer.state, self._replicas.own, *self._replicas.states.values()]
        for position, (old, new) in enumerate(zip(before, after, strict=True)):
            for name, value in list(new.items()):
                known = old.get(name)
                if value is not None and (known is None or not same_bits(known, value)):
                    for state in everybody:
                        put_buffer(state.buffers[position], name, value)

    def _follow_structure(self) -> None:
        """Parameters came, went, or were (un)frozen: the replicas and θ follow."""
        layout = Layout(self.layout.module, self.layout.share_frozen)
        if layout.names == self.layout.names and not self.layout.replaced():
            self.layout.signature = layout.signature
            self._outer.refresh_trainable(layout)
            return
        old = self.layout
        self._replicas.relayout(layout)
        self._outer.relayout(old, layout, self._replicas.own)
        self._traces.clear()

    def _remember(self) -> None:
        self._traces = self._parameter_traces()
        self._traced_buffers = self._buffer_traces()

    def _parameter_traces(self) -> dict[str, tuple[int, int]]:
        return {n: (p._version, p.data_ptr()) for n, p in self.layout.parameters.items()}

    def _buffer_traces(self) -> list[tuple[tuple[int, str], int, int]]:
        return [(key, b._version, b.data_ptr()) for key, b in self._replicas.own.named_buffers()]
