"""The module between turns: what gathered but the workers sees of it, and what they write into it.

Owns the module's own tensors. Between turns they hold θ, so that callbacks, loggers and checkpoints meet an ordinary
module; what others write there is found by value and becomes θ's and every replica's when the next step begins. Until
then it is pending: files and evaluations show it, and a callback that writes the old values back has changed nothing
(averaged weights are swapped in and out that way). Does not own θ (``outer.py``) nor the replicas' storage
(``replicas.py``). Imports nothing of Lightning.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_diloco.comm.tensors import bitwise_equal, digest
from lightning_diloco.state.outer import Outer
from lightning_diloco.state.replicas import BufferKey, Layout, ModelState, Replicas, put_buffer

Buffers = list[dict[str, Tensor | None]]


class LiveModule:
    """The live module as others see it.

    Args:
        replicas: the workers' states, with the module's layout and own tensors.
        outer: θ.

    Attributes:
        is_plain_run: the only worker works on the module's own tensors (N = 1, plain average): nothing is swapped,
            nothing needs to be taken over, the run is the plain run.
    """

    def __init__(self, replicas: Replicas, outer: Outer) -> None:
        self._replicas = replicas
        self._outer = outer
        self.is_plain_run = False
        self._published: dict[str, Tensor] = {}  # where an algorithm published something else than θ
        self._evaluated: dict[str | BufferKey, bytes] = {}  # digests of what the last validation saw
        self._stepped_since = False  # whether workers have stepped since that validation
        self._search = False  # whether the next look compares tensors that show no trace of writing, too
        self._remember()

    @property
    def layout(self) -> Layout:
        return self._replicas.layout

    def deactivate(self) -> None:
        """Makes the module's own tensors live, after a turn."""
        self.layout.activate(self._replicas.own)
        self._remember()

    def publish(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies an outer model, and θ's buffers, into the module's own tensors."""
        if self.is_plain_run:
            return
        theta = self._outer.tensors
        self._published = {n: t.clone() for n, t in parameters.items() if t is not theta.get(n)}
        self._replicas.own.copy_from(parameters, self._outer.state.buffers)
        self._remember()

    def set_plain(self, is_plain_run: bool) -> None:
        """Lets the only worker work on the module's own tensors, or gives it a copy of them again."""
        if is_plain_run != self.is_plain_run:
            (worker,) = self._replicas.workers
            own = self._replicas.own = self.layout.read()
            self._replicas.states[worker] = own if is_plain_run else self.layout.copy_of(own)
            self.is_plain_run = is_plain_run
            self._remember()

    def search(self) -> None:
        """The next look compares all values: ``.data.copy_`` leaves no trace of writing."""
        self._search = True

    def follow(self) -> None:
        """Follows tensors of the module that were replaced, and parameters that came, went or were (un)frozen."""
        if self.layout.changed():
            self._follow_structure()
        self._replicas.own = self.layout.read()
        if self.is_plain_run:
            self._replicas.states[self._replicas.workers[0]] = self._replicas.own

    @torch.no_grad()
    def adopt_outside_changes(self) -> None:
        """Takes over what was written into the module between turns, tensor by tensor."""
        self.follow()
        if self.is_plain_run:
            return
        for name, written in self.written().items():
            self._published.pop(name, None)
            for tensors in (self._outer.tensors, *map(self._replicas.tensors, self._replicas.workers)):
                tensors[name].copy_(written)
        if self._search or self._buffer_traces() != self._traced_buffers:
            gathered = [self._outer.state, self._replicas.own, *self._replicas.states.values()]
            self._copy_changes(self._outer.state.buffers, self._replicas.own.buffers, gathered)
        self._search = False
        self._remember()

    @torch.no_grad()
    def written(self) -> dict[str, Tensor]:
        """Parameters that others wrote into since the last turn; call :meth:`follow` before.

        A version counter or a pointer that moved only triggers the comparison; what counts are values. The weights that
        the last validation saw are no news: whoever stored them there, and writes them back later, restores the module.
        """
        found = {}
        for name, trace in self._parameter_traces().items():
            written, theta = self._replicas.own.tensors[name], self._outer.tensors[name]
            before = self._published.get(name, theta)
            if (self._search or self._traces.get(name) != trace) and not bitwise_equal(written, before):
                if self._was_evaluated(name, written):
                    self._warn_of_restore()
                    written.copy_(before)
                else:
                    found[name] = written
        return found

    def pending(self, state: ModelState) -> ModelState:
        """``state`` with what others wrote into the module since the last turn: references, for a look or a file."""
        self.follow()
        if self.is_plain_run:
            return state
        theta, own = self._outer.state.buffers, self._replicas.own.buffers
        buffers = [dict(mine) for mine in state.buffers]
        if self._search or self._buffer_traces() != self._traced_buffers:
            for position, name, value in self._changed_buffers(theta, own):
                buffers[position][name] = value
            for mine, old, new in zip(buffers, theta, own, strict=True):
                for name in old.keys() - new.keys():
                    mine.pop(name, None)
        return ModelState({**state.tensors, **self.written()}, buffers)

    @torch.no_grad()
    def begin_evaluation(self, shown: ModelState) -> None:
        """Notes the weights that a validation is about to see, but for those that a callback has just written."""
        written = self.written()
        changed = {(i, n) for i, n, _ in self._changed_buffers(self._outer.state.buffers, self._replicas.own.buffers)}
        self._evaluated = {n: digest(t, None) for n, t in shown.tensors.items() if n not in written}
        self._evaluated.update((key, digest(b, None)) for key, b in shown.named_buffers() if key not in changed)
        self._stepped_since = False

    @torch.no_grad()
    def end_evaluation(self, shown: ModelState, before: Buffers) -> None:
        """Writes into the module what a validation changed that stays, as if a callback had done so after it.

        That is buffers, and parameters that a callback had written before: it may have written the old values back.

        Args:
            shown: what the validation saw, as it left it.
            before: the buffers as it found them.
        """
        for name, written in self.written().items():
            if name in shown.tensors and not bitwise_equal(shown.tensors[name], written):
                written.copy_(shown.tensors[name])
        self._copy_changes(before, shown.buffers, [self._replicas.own])
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
        """Buffers of ``after`` that differ from ``before`` become the targets'."""
        for position, (old, new) in enumerate(zip(before, after, strict=True)):
            for name in old.keys() - new.keys():
                for state in targets:
                    state.buffers[position].pop(name, None)
        for position, name, value in list(self._changed_buffers(before, after)):
            for state in targets:
                put_buffer(state.buffers[position], name, value)

    def _changed_buffers(self, before: Buffers, after: Buffers) -> Iterator[tuple[int, str, Tensor | None]]:
        """New and changed entries of ``after``; values that the last validation saw are put back to ``before``'s."""
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
    return a is b if a is None or b is None else bitwise_equal(a, b)
