"""Policies: the synchronisation of frozen parameters, buffers and inner optimizer states.

Owns the policies, and the common value of a tensor that differs between workers. Does not own when a synchronisation is
due, nor trainable parameters (``algorithms/``). Imports nothing of Lightning.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.tensors import digest
from lightning_diloco.state.optimizers import InnerOptimizers, average_inner_state
from lightning_diloco.state.outer import Outer
from lightning_diloco.state.replicas import BufferKey, Layout, ModelState, Replicas, is_floating, put_buffer

EvalWeights = Literal["average", "outer", "worker"]
BufferPolicy = Literal["average", "first", "local"]
InnerStatePolicy = Literal["keep", "reset", "average"]
NonfinitePolicy = Literal["raise", "skip", "propagate"]


@dataclass(frozen=True)
class Policies:
    """The choices that DiLoCo leaves open; see :class:`~lightning_diloco.DilocoStrategy`."""

    eval_weights: EvalWeights = "average"
    buffers: BufferPolicy = "average"
    inner_state: InnerStatePolicy = "keep"
    nonfinite: NonfinitePolicy = "raise"
    share_frozen: bool = False


@dataclass(frozen=True)
class Fingerprint:
    """A worker's tensor as other processes know it: enough to compare tensors, and to allocate memory for them."""

    shape: torch.Size
    dtype: torch.dtype
    digest: bytes


Survey = dict[int, dict[str, Fingerprint]]  # worker → name of a frozen parameter or buffer → fingerprint


class PolicyApplication:
    """Applies the policies at a synchronisation.

    Args:
        policies: the choices.
        replicas: the workers' states.
        outer: θ.
        channel: means and copies.
        inner: the inner optimizers.
    """

    def __init__(
        self, policies: Policies, replicas: Replicas, outer: Outer, channel: Channel, inner: InnerOptimizers
    ) -> None:
        self._policies = policies
        self._replicas, self._outer, self._channel, self._inner = replicas, outer, channel, inner

    def survey(self, where: str) -> Survey:
        """Every worker's frozen parameters and buffers, as fingerprints; all processes call this together.

        All processes need all fingerprints: they decide which tensors are averaged, and a process that decided
        otherwise would wait for the others in another collective.
        """
        return joined(self._channel.world.gather_all(where, self.survey_here()))

    def survey_here(self) -> Survey:
        """As :meth:`survey`, of the workers of this process."""
        layout, theta = self._replicas.layout, self._outer.state
        reference: dict[str, Tensor | None] = {n: theta.tensors[n] for n in layout.frozen}
        reference |= _named_buffers(layout, theta)
        survey: Survey = {}
        for w in self._channel.world.workers:
            tensors = {n: self._replicas.tensors(w)[n] for n in layout.frozen}
            tensors |= _named_buffers(layout, self._replicas.states[w])
            survey[w] = {
                name: Fingerprint(
                    t.shape, t.dtype, b"" if self._channel.world.num_workers == 1 else digest(t, reference.get(name))
                )
                for name, t in tensors.items()
            }
        return survey

    @torch.no_grad()
    def synchronise_frozen(
        self,
        participants: Sequence[int],
        survey: Survey,
        dropped: Sequence[int] = (),
        takers: Sequence[int] | None = None,
    ) -> None:
        """Synchronises frozen parameters by the policy of buffers, floating ones as floating buffers."""
        takers = participants if takers is None else takers
        read, frozen = self._replicas.tensors, self._replicas.layout.frozen
        theta = self._outer.tensors
        # Tensors that are equal bit for bit stay: sending them would cost bytes, and an all-reduce would round them
        # (x/3 + x/3 + x/3 may differ from x), though nobody has trained them.
        differing = [n for n in frozen if not self.same(survey, n)]
        averaged = [n for n in differing if self._policies.buffers != "first" and is_floating(theta[n])]
        values = self._channel.mean(averaged, read, participants)
        others = [n for n in differing if n not in values]
        values |= self._channel.copies_of(participants[0], others, read, like=theta)  # worker 0 may be left out
        equal = [n for n in frozen if n not in differing]
        self._outer.assign({**self._channel.common(equal, read, like=theta), **values})
        if self._policies.buffers != "local":
            self._channel.record("buffers", sum(theta[n].nbytes for n in differing))
            for w in [w for w in (*takers, *dropped) if w in self._channel.world.workers]:
                for n in differing:
                    read(w)[n].copy_(values[n])

    @torch.no_grad()
    def synchronise_buffers(
        self,
        participants: Sequence[int] | None = None,
        survey: Survey | None = None,
        dropped: Sequence[int] = (),
        takers: Sequence[int] | None = None,
    ) -> None:
        """Synchronises buffers by the policy; buffers that are equal on all workers, bit for bit, cost nothing.

        Args:
            participants: workers that contribute values; default all.
            survey: the present survey, if known.
            dropped: workers with weights that are not finite: they get the result whatever the policy.
            takers: workers that get the result; default the participants.
        """
        participants = self._channel.workers if participants is None else participants
        survey = survey or self.survey(f"the synchronisation of buffers after {self._channel.clock()} local steps")
        theta, states = self._outer.state.buffers, self._replicas.states
        common = self.common_buffers(participants, survey, first=self._policies.buffers == "first")
        takers = participants if takers is None else takers
        takers = [*takers, *dropped] if self._policies.buffers != "local" else dropped
        targets = [w for w in takers if w in self._channel.world.workers]
        for (position, name), value in common.items():
            for w in targets:
                put_buffer(states[w].buffers[position], name, value)
            put_buffer(theta[position], name, value)
        for (position, name), value in self.equal_buffers(participants[0], survey, common).items():
            put_buffer(theta[position], name, value)
        self._channel.record(
            "buffers", sum(v.nbytes for v in common.values()) if self._policies.buffers != "local" else 0
        )

    def equal_buffers(self, first: int, survey: Survey, common: Collection[BufferKey]) -> dict[BufferKey, Tensor]:
        """The buffers that are equal on all workers: without a message, where each process has the values at hand."""
        layout, leading = self._replicas.layout, survey[first]
        if self._channel.on_all_processes:
            here = self._replicas.states[self._channel.here[0]].named_buffers()
            return {
                key: value
                for key, value in here
                if key not in common and f"{layout.module_names[key[0]]}.{key[1]}" in leading
            }
        keys = {n: key for n, key in self._keys(leading).items() if key not in common}
        copies = self._channel.copies_of(first, list(keys), self._read_buffers, self._like(leading, keys))
        return {keys[n]: t for n, t in copies.items()}

    def _keys(self, leading: Mapping[str, Fingerprint]) -> dict[str, BufferKey]:
        layout = self._replicas.layout
        position = {name: i for i, name in enumerate(layout.module_names)}
        return {n: (position[n.rpartition(".")[0]], n.rpartition(".")[2]) for n in leading if n not in layout.frozen}

    def _like(self, leading: Mapping[str, Fingerprint], names: Iterable[str]) -> dict[str, Tensor]:
        """Made from fingerprints, because the workers hosted here may lack a buffer that the first participant has."""
        device = next((t.device for t in self._outer.tensors.values()), self._channel.world.device)
        return {n: torch.empty(leading[n].shape, dtype=leading[n].dtype, device=device) for n in names}

    def _read_buffers(self, worker: int) -> Mapping[str, Tensor]:
        return _named_buffers(self._replicas.layout, self._replicas.states[worker])

    def common_buffers(
        self, participants: Sequence[int], survey: Survey, first: bool = False
    ) -> dict[BufferKey, Tensor]:
        """The common values of buffers that differ between workers, as new tensors.

        That is the mean over the participants if all have a floating tensor of the same shape and dtype; otherwise, and
        with ``first``, the first participant's value. Buffers that the first participant lacks are left out.
        """
        leading = survey[participants[0]]
        keys = self._keys(leading)
        differing = [n for n in keys if not self.same(survey, n)]
        like = self._like(leading, differing)
        averaged = [
            n
            for n in differing
            if not first
            and is_floating(like[n])
            and len({_shape_and_dtype(survey[w].get(n)) for w in participants}) == 1
        ]
        values = self._channel.mean(averaged, self._read_buffers, participants, like=like)
        others = [n for n in differing if n not in values]
        values |= self._channel.copies_of(participants[0], others, self._read_buffers, like)
        return {keys[n]: values[n].to(like[n].dtype) for n in differing}  # means of half types are float32

    def same(self, survey: Survey, name: str) -> bool:
        """Whether the tensor is equal on all workers, bit for bit."""
        return len({survey[w].get(name) for w in self._channel.workers}) == 1

    @torch.no_grad()
    def synchronise_inner_state(
        self, participants: Sequence[int], dropped: Sequence[int], names: Sequence[str] | None = None
    ) -> None:
        """Synchronises inner optimizer states by the policy; dropped workers get fresh states.

        Args:
            participants: workers that take part in the mean.
            dropped: workers with weights that are not finite.
            names: the parameters whose states are meant; None: all.
        """
        parameters = self._replicas.layout.parameters
        only = None if names is None else {parameters[n] for n in names}
        targets = [*participants, *dropped] if self._policies.inner_state == "reset" else dropped
        for w in [w for w in targets if w in self._channel.world.workers]:
            self._inner.workers[w].reset_inner_state(self._inner.initial, only)
        if self._policies.inner_state == "average" and participants:
            states = {w: self._inner.workers[w].states for w in self._channel.world.workers if w in participants}
            self._channel.record("inner_state", average_inner_state(self._channel, self._inner.live, states, only=only))


def joined(surveys: Sequence[Survey]) -> Survey:
    """The surveys of several processes as one."""
    return {w: found for survey in surveys for w, found in survey.items()}


def _named_buffers(layout: Layout, state: ModelState) -> dict[str, Tensor]:
    return {f"{layout.module_names[position]}.{name}": b for (position, name), b in state.named_buffers()}


def _shape_and_dtype(tensor: Fingerprint | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype)
