"""The module between turns: what everybody but the workers sees of it, and what they write into it.

Owns the module's own tensors. Between turns they hold θ, so that callbacks, loggers and checkpoints meet an ordinary
module; what others write there is found by value and becomes θ's and every replica's. Does not own θ (``outer.py``) nor
the replicas' storage (``replicas.py``). Imports nothing of Lightning.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_diloco.bits import same_bits
from lightning_diloco.outer import Outer
from lightning_diloco.replicas import Layout, Replicas, put_buffer

Buffers = list[dict[str, Tensor | None]]


class PublicModel:
    """The live module as others see it.

    Args:
        replicas: the workers' states, with the module's layout and own tensors.
        outer: θ.

    Attributes:
        transparent: the only worker works on the module's own tensors (N = 1, plain average): nothing is swapped,
            nothing needs to be taken over, the run is the plain run.
    """

    def __init__(self, replicas: Replicas, outer: Outer) -> None:
        self._replicas = replicas
        self._outer = outer
        self.transparent = False
        self._published: dict[str, Tensor] = {}  # where an algorithm published something else than θ
        self._remember()

    @property
    def layout(self) -> Layout:
        return self._replicas.layout

    def show(self) -> None:
        """Makes the module's own tensors live, after a turn."""
        self.layout.bind(self._replicas.own)
        self._remember()

    def publish(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies an outer model, and θ's buffers, into the module's own tensors."""
        if self.transparent:
            return
        theta = self._outer.tensors
        self._published = {n: t.clone() for n, t in parameters.items() if t is not theta.get(n)}
        self._replicas.own.copy_from(parameters, self._outer.state.buffers)
        self._remember()

    def set_transparent(self, transparent: bool) -> None:
        """Lets the only worker work on the module's own tensors, or gives it a copy of them again."""
        if transparent != self.transparent:
            (worker,) = self._replicas.workers
            own = self._replicas.own = self.layout.read()
            self._replicas.states[worker] = own if transparent else self.layout.copy_of(own)
            self.transparent = transparent
            self._remember()

    @torch.no_grad()
    def take_over(self, thorough: bool = False) -> None:
        """Takes over what was written into the module between turns, tensor by tensor.

        A version counter or a pointer that moved only triggers the comparison; what counts are values, so that swapping
        weights out and in again changes nothing.

        Args:
            thorough: compare tensors without a trace of writing too (``.data.copy_`` leaves none).
        """
        if self.layout.changed():
            self._follow_structure()
        own = self._replicas.own = self.layout.read()
        if self.transparent:
            self._replicas.states[self._replicas.workers[0]] = own
            return
        for name, trace in self._parameter_traces().items():
            written, theta = own.tensors[name], self._outer.tensors[name]
            suspect = thorough or self._traces.get(name) != trace
            if suspect and not same_bits(written, self._published.get(name, theta)):
                self._published.pop(name, None)
                for tensors in (self._outer.tensors, *map(self._replicas.tensors, self._replicas.workers)):
                    tensors[name].copy_(written)
        if thorough or self._buffer_traces() != self._traced_buffers:
            self.take_over_buffers(self._outer.state.buffers, own.buffers)
        self._remember()

    @torch.no_grad()
    def take_over_buffers(self, before: Buffers, after: Buffers) -> None:
        """Buffers of ``after`` that differ from ``before`` become everybody's: θ's, the replicas', the module's."""
        everybody = [self._outer.state, self._replicas.own, *self._replicas.states.values()]
        for position, (old, new) in enumerate(zip(before, after, strict=True)):
            for name in old.keys() - new.keys():
                for state in everybody:
                    state.buffers[position].pop(name, None)
            for name, value in list(new.items()):
                if name not in old or not _same(old[name], value):
                    for state in everybody:
                        put_buffer(state.buffers[position], name, value)

    def _follow_structure(self) -> None:
        """Parameters or submodules came, went, were reshaped or (un)frozen: the replicas and θ follow."""
        old, layout = self.layout, self.layout.renewed()
        self._replicas.relayout(layout)
        self._outer.relayout(old, layout, self._replicas.own)
        theta = self._outer.tensors
        kept = {n: t for n, t in self._published.items() if n in theta and t.shape == theta[n].shape}
        self._published = kept
        self._traces.clear()

    def _remember(self) -> None:
        self._traces = self._parameter_traces()
        self._traced_buffers = self._buffer_traces()

    def _parameter_traces(self) -> dict[str, tuple[int, int]]:
        return {n: (p._version, p.data_ptr()) for n, p in self.layout.parameters.items()}

    def _buffer_traces(self) -> list[tuple[tuple[int, str], int, int]]:
        return [(key, b._version, b.data_ptr()) for key, b in self._replicas.own.named_buffers()]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else same_bits(a, b)
