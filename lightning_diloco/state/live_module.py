"""The live module between turns, and outside changes: values that callbacks and the user write into it.

Between turns the live module holds θ, so that callbacks, loggers and checkpoints see an ordinary module. An outside
change is found by value, and adopted by θ and every replica when the next step begins. Until then the change is
pending: files and evaluations contain it, and a callback that restores the previous values has changed nothing
(callbacks swap averaged weights in and out that way). Does not own θ (``outer.py``) nor the replicas' storage
(``replicas.py``). Imports nothing of Lightning.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_diloco.comm.tensors import bitwise_equal, digest
from lightning_diloco.state.outer import Outer
from lightning_diloco.state.replicas import BufferKey, Layout, ModelState, Replicas, put_buffer

Buffers = list[dict[str, Tensor | None]]


class Follower(Protocol):
    """Tensors that belong to parameters and follow outside changes of them."""

    def rebase(self, written: Mapping[str, Tensor]) -> None:
        """Parameter name → the new value of a parameter that was changed."""

    def relayout(self, old: Layout, layout: Layout) -> None:
        """Parameters came, went, were renamed, reshaped or (un)frozen."""


class LiveModule:
    """The live module between turns.

    Args:
        replicas: the workers' replicas, with the module's layout and its state between turns.
        outer: θ.
        followers: what else belongs to the parameters: anchors, memories, transfers under way.

    Attributes:
        is_plain_run: N = 1 with a plain average: the replica is the module's state, so nothing is swapped or adopted.
    """

    def __init__(self, replicas: Replicas, outer: Outer, followers: Sequence[Follower] = ()) -> None:
        self._replicas = replicas
        self._outer = outer
        self._followers = followers
        self.is_plain_run = False
        self._published: dict[str, Tensor] = {}  # published values other than θ's
        self._evaluated: dict[str | BufferKey, bytes] = {}  # digests of the last validation's weights
        self._stepped_since = False  # whether workers have stepped since the last validation
        self._search = False  # whether the next comparison includes tensors without a trace of writing
        self._remember()

    @property
    def layout(self) -> Layout:
        return self._replicas.layout

    def deactivate(self) -> None:
        """Puts the module's state back into the live module, after a turn."""
        self.layout.activate(self._replicas.module_state)
        self._remember()

    def publish(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies parameters (those of the outer model that have changed), and θ's buffers, into the live module."""
        if self.is_plain_run:
            return
        theta = self._outer.tensors
        for name, tensor in parameters.items():
            if tensor is theta.get(name):
                self._published.pop(name, None)
            else:
                self._published[name] = tensor.clone()
        self._replicas.module_state.copy_from(parameters, self._outer.state.buffers)
        self._remember()

    def set_plain_run(self, is_plain_run: bool) -> None:
        """Makes the only worker's replica the module's state itself, or a copy of the module's state."""
        if is_plain_run != self.is_plain_run:
            (worker,) = self._replicas.workers
            state = self._replicas.module_state = self.layout.read()
            self._replicas.states[worker] = state if is_plain_run else self.layout.copy_of(state)
            self.is_plain_run = is_plain_run
            self._remember()

    def search(self) -> None:
        """Lets the next comparison read all values: ``.data.copy_`` leaves no trace of writing."""
        self._search = True

    def follow(self) -> None:
        """Follows tensors of the module that were replaced, and parameters that came, went or were (un)frozen."""
        if self.layout.changed():
            self._follow_structure()
        self._replicas.module_state = self.layout.read()
        if self.is_plain_run:
            self._replicas.states[self._replicas.workers[0]] = self._replicas.module_state

    @torch.no_grad()
    def adopt_outside_changes(self) -> None:
        """Writes outside changes into θ and all replicas, tensor by tensor.

        Whole tensors are adopted: a replica loses its local steps' changes of such a tensor.
        """
        self.follow()
        if self.is_plain_run:
            return
        changed = self.written()
        for name, written in changed.items():
            self._published.pop(name, None)
            for tensors in (self._outer.tensors, *map(self._replicas.tensors, self._replicas.workers)):
                tensors[name].copy_(written)
        if changed:
            for follower in self._followers:
                follower.rebase(changed)
        if self._search or self._buffer_traces() != self._traced_buffers:
            states = [self._outer.state, self._replicas.module_state, *self._replicas.states.values()]
            self._copy_changes(self._outer.state.buffers, self._replicas.module_state.buffers, states)
        self._search = False
        self._remember()

    @torch.no_grad()
    def written(self) -> dict[str, Tensor]:
        """Outside changes of parameters since the last turn; call :meth:`follow` before."""
        found = {}
        for name, trace in self._parameter_traces().items():
            written, theta = self._replicas.module_state.tensors[name], self._outer.tensors[name]
            before = self._published.get(name, theta)
            # A moved version counter or pointer only triggers the comparison of values: a callback that swaps weights
            # in and out moves the counter and changes nothing, and comparing all values at every step would be slow.
            if (self._search or self._traces.get(name) != trace) and not bitwise_equal(written, before):
                # During validation the module shows the mean, not θ. A callback that saved the weights then and loads
                # them now means to restore the module, not to replace every replica by the mean.
                if self._was_evaluated(name, written):
                    self._warn_of_restore()
                    written.copy_(before)
                else:
                    found[name] = written
        return found

    def pending(self, state: ModelState) -> ModelState:
        """``state`` with outside changes that are not adopted yet: references, for an evaluation or a file."""
        self.follow()
        if self.is_plain_run:
            return state
        theta, written = self._outer.state.buffers, self._replicas.module_state.buffers
        buffers = [dict(submodule) for submodule in state.buffers]
        if self._search or self._buffer_traces() != self._traced_buffers:
            for position, name, value in self._changed_buffers(theta, written):
                buffers[position][name] = value
            for submodule, old, new in zip(buffers, theta, written, strict=True):
                for name in old.keys() - new.keys():
                    submodule.pop(name, None)
        return ModelState({**state.tensors, **self.written()}, buffers)

    @torch.no_grad()
    def begin_evaluation(self, evaluated: ModelState) -> None:
        """Notes the weights that a validation is about to see, but for those that a callback has just written."""
        written = self.written()
        changed = {
            (i, n) for i, n, _ in self._changed_buffers(self._outer.state.buffers, self._replicas.module_state.buffers)
        }
        self._evaluated = {n: digest(t, None) for n, t in evaluated.tensors.items() if n not in written}
        self._evaluated.update((key, digest(b, None)) for key, b in evaluated.named_buffers() if key not in changed)
        self._stepped_since = False

    @torch.no_grad()
    def end_evaluation(self, evaluated: ModelState, before: Buffers) -> None:
        """Writes a validation's lasting changes into the module, as if a callback had done so after the validation.

        Buffers last, and parameters that a callback had written before: it may have written the old values back.

        Args:
            evaluated: the state that the validation saw, as the validation left it.
            before: the buffers as the validation found them.
        """
        for name, written in self.written().items():
            if name in evaluated.tensors and not bitwise_equal(evaluated.tensors[name], written):
                written.copy_(evaluated.tensors[name])
        self._copy_changes(before, evaluated.buffers, [self._replicas.module_state])
        self.search()

    def note_steps(self) -> None:
        """Workers have stepped."""
        self._stepped_since = True

    def _warn_of_restore(self) -> None:
        if self._stepped_since:
            self._stepped_since = False
            warnings.warn(
                "The weights that the last validation saw were written into the module some steps after it. That counts"
                " as putting back weights that were swapped out, and changes nothing. To go back to those weights,"
                " resume from a checkpoint: `trainer.fit(..., ckpt_path=...)`.",
                stacklevel=2,
            )

    def _was_evaluated(self, key: str | BufferKey, value: Tensor) -> bool:
        return key in self._evaluated and digest(value, None) == self._evaluated[key]

    def _copy_changes(self, before: Buffers, after: Buffers, targets: Sequence[ModelState]) -> None:
        """Writes buffers of ``after`` that differ from ``before`` into the targets, and removes missing ones."""
        for position, (old, new) in enumerate(zip(before, after, strict=True)):
            for name in old.keys() - new.keys():
                for state in targets:
                    state.buffers[position].pop(name, None)
        for position, name, value in list(self._changed_buffers(before, after)):
            for state in targets:
                put_buffer(state.buffers[position], name, value)

    def _changed_buffers(self, before: Buffers, after: Buffers) -> Iterator[tuple[int, str, Tensor | None]]:
        """New and changed entries of ``after``; values of the last validation are set back to those of ``before``."""
        for position, (old, new) in enumerate(zip(before, after, strict=True)):
            for name, value in list(new.items()):
                if name in old and _same(old[name], value):
                    continue
                known = old.get(name)
                if known is not None and value is not None and self._was_evaluated((position, name), value):
                    put_buffer(new, name, known)
                else:
                    yield position, name, value

    def _follow_structure(self) -> None:
        """Fits the replicas and θ to parameters or submodules that came, went, were reshaped or (un)frozen."""
        old, layout = self.layout, self.layout.renewed()
        self._replicas.relayout(layout)
        self._outer.relayout(old, layout, self._replicas.module_state)
        for follower in self._followers:
            follower.relayout(old, layout)
        theta = self._outer.tensors
        self._published = {n: t for n, t in self._published.items() if n in theta and t.shape == theta[n].shape}
        self._traces.clear()

    def _remember(self) -> None:
        self._traces = self._parameter_traces()
        self._traced_buffers = self._buffer_traces()

    def _parameter_traces(self) -> dict[str, tuple[int, int]]:
        return {n: (p._version, p.data_ptr()) for n, p in self.layout.parameters.items()}

    def _buffer_traces(self) -> list[tuple[tuple[int, str], int, int]]:
        return [(key, b._version, b.data_ptr()) for key, b in self._replicas.module_state.named_buffers()]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else bitwise_equal(a, b)
