"""What an algorithm may touch, and what every synchronisation does whatever the algorithm.

Owns the round clock, the diagnostics of a round, and the policies that apply at its end: buffers, frozen parameters,
inner optimizer state, non-finite workers. :meth:`SyncContext.restart` is the only place that writes replicas. Does not
own the outer step itself (``algorithms/``). Imports nothing of Lightning.
"""

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_diloco.algorithms.base import OuterStepReport
from lightning_diloco.bits import checksum, digest, same_bits
from lightning_diloco.comm import Comm, Ledger
from lightning_diloco.inner import InnerOptimizers, average_inner_state
from lightning_diloco.likeness import Likeness, euclidean_norm, likeness_of
from lightning_diloco.means import Differences
from lightning_diloco.outer import Outer
from lightning_diloco.replicas import BufferKey, Layout, ModelState, Replicas, is_floating, put_buffer

BufferPolicy = Literal["average", "first", "local"]
InnerStatePolicy = Literal["keep", "reset", "average"]
NonfinitePolicy = Literal["raise", "skip", "propagate"]


@dataclass(frozen=True)
class Held:
    """What a worker holds under a name: as much as others need to know to compare, and to make room for it."""

    shape: torch.Size
    dtype: torch.dtype
    digest: bytes


Survey = dict[int, dict[str, Held]]  # worker → name of a frozen parameter or buffer → what it holds


@dataclass
class _Round:
    """A synchronisation under way."""

    started: float
    bytes_before: int
    participants: list[int]
    dropped: list[int]
    drift: tuple[float, ...]
    likeness: Likeness


@dataclass
class SyncContext:
    """The view of the engine that an algorithm works with.

    Attributes:
        replicas: the workers' states: ``replicas.tensors(i)`` is θ_i, ``replicas.slot(i, name)`` the algorithm's own.
        outer: θ and the outer optimizer.
        comm: means and exchanges, recorded in ``ledger``.
        inner: the inner optimizers, and per worker its state, gradients and random stream.
        interval: H.
        num_workers: N.
        buffers, inner_state, nonfinite: policies, see :class:`~lightning_diloco.DilocoStrategy`.
        local_steps: completed local steps.
        round_start: ``local_steps`` when the present round began.
        outer_steps: completed synchronisations.
    """

    replicas: Replicas
    outer: Outer
    comm: Comm
    inner: InnerOptimizers
    interval: int
    num_workers: int
    buffers: BufferPolicy = "average"
    inner_state: InnerStatePolicy = "keep"
    nonfinite: NonfinitePolicy = "raise"
    local_steps: int = 0
    round_start: int = 0
    outer_steps: int = 0
    _round: _Round | None = field(default=None, repr=False)

    @property
    def ledger(self) -> Ledger:
        """What has been sent."""
        return self.comm.ledger

    @property
    def workers(self) -> list[int]:
        """Global ids of all workers."""
        return self.comm.workers

    @property
    def local_workers(self) -> list[int]:
        """Global ids of the workers hosted by this process: those whose tensors can be read and written."""
        return self.comm.world.workers

    @property
    def names(self) -> list[str]:
        """The trainable parameters."""
        return self.outer.names

    @property
    def in_round(self) -> bool:
        """Whether a synchronisation has begun and not ended."""
        return self._round is not None

    def due(self, tick: int) -> bool:
        """Whether the present round has had its H local steps (or, H having changed on resume, a multiple of them)."""
        return (tick - self.round_start) % self.interval == 0

    def at_rest(self) -> bool:
        """Whether every worker's trainable parameters are θ's, bit for bit: there is nothing to synchronise."""
        theta = self.outer.tensors
        here = all(same_bits(self.replicas.tensors(w)[n], theta[n]) for w in self.local_workers for n in self.names)
        return all(self.comm.world.meet(f"the end of training after {self.local_steps} local steps", here))

    def pseudo_gradient(self, worker: int) -> Mapping[str, Tensor]:
        """Δ_i = θ − θ_i over the trainable parameters, in the parameters' dtype, each computed when asked for."""
        return Differences(self.names, self.outer.tensors, self.replicas.tensors(worker))

    def gradients(self, worker: int) -> dict[str, Tensor]:
        """With ``needs_gradients``, in ``before_inner_step``: worker i's gradients; write to them in place."""
        kept = self.inner.workers[worker].gradients
        return {n: kept[p] for n, p in self.replicas.layout.parameters.items() if p in kept}

    @torch.no_grad()
    def begin_round(self) -> list[int]:
        """Opens a synchronisation: measures the workers and returns those that take part.

        Raises:
            RuntimeError: a worker's Δ_i is not finite, N > 1, and ``nonfinite`` is "raise" (or all workers are bad).
        """
        started = time.perf_counter()
        theta, world = self.outer.tensors, self.comm.world
        norms = {w: euclidean_norm(self.pseudo_gradient(w).values()) for w in self.local_workers}
        where = f"the synchronisation after {self.local_steps} local steps"
        everybody = world.meet(where, (norms, world.signals, checksum(theta) if world.size > 1 else 0))
        odd = next((r for r, theirs in enumerate(everybody) if theirs[2] != everybody[0][2]), None)
        if odd is not None:
            raise RuntimeError(
                f"Process {odd} holds another outer model θ than process 0 at {where}: something wrote different"
                " weights into the module on different processes. Callbacks and hooks must write the same everywhere."
            )
        world.known_signals = set().union(*(signals for _, signals, _ in everybody))
        norms = self._joined_norms([theirs for theirs, _, _ in everybody])
        scale = euclidean_norm(theta[n] for n in self.names)
        drift = tuple(norms[w] / scale if scale > 0 else norms[w] for w in self.workers)
        tolerant = self.num_workers == 1 or self.nonfinite == "propagate"
        bad = [w for w in self.workers if not (tolerant or math.isfinite(norms[w]))]
        good = [w for w in self.workers if w not in bad]
        if bad and (self.nonfinite == "raise" or not good):
            raise RuntimeError(
                f"The pseudo-gradient of worker {', '.join(map(str, bad))} is not finite at local step"
                f" {self.local_steps} ({len(bad)} of {self.num_workers} workers). Its weights, or θ's, hold NaN or"
                " infinity. Lower the inner learning rate or clip gradients; `DilocoStrategy(nonfinite='skip')`"
                " leaves such workers out of a mean (one finite worker must remain), 'propagate' lets the values"
                " through."
            )
        for w in bad:
            warnings.warn(
                f"Worker {w} is left out of the outer step at local step {self.local_steps}: its pseudo-gradient is not"
                " finite. It restarts from θ with fresh inner state.",
                stacklevel=2,
            )
        likeness = self.comm.observer = Likeness(theta)
        self._round = _Round(started, self.ledger.total_bytes, good, bad, drift, likeness)
        return good

    def _joined_norms(self, everybody: Sequence[Mapping[int, float]]) -> dict[int, float]:
        norms: dict[int, float] = {}
        for w, norm in (item for theirs in everybody for item in theirs.items()):
            if repr(norms.setdefault(w, norm)) != repr(norm):  # of another member of its team; NaN is itself
                warnings.warn(
                    f"The processes of worker {w} hold different weights at local step {self.local_steps}, and the"
                    " outer step mixes them. Look for random numbers in the optimizer's step, gradients that bypass"
                    " `manual_backward`, or different hardware.",
                    stacklevel=3,
                )
        return norms

    @torch.no_grad()
    def restart(
        self, workers: Iterable[int], names: Iterable[str], values: Mapping[str, Tensor], alpha: float = 0.0
    ) -> None:
        """Each worker's parameters become ``α·θ_i + (1−α)·values``.

        Args:
            workers: which workers; those hosted elsewhere are left to their process.
            names: which parameters.
            values: parameter name → target, in the parameter's shape.
            alpha: weight of the local value, 0 ≤ α ≤ 1; 0 copies, so that not even a NaN of the replica survives.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` (={alpha}) must lie between 0 (take the values) and 1 (keep the replica).")
        names = list(names)
        for w in [w for w in workers if w in self.local_workers]:
            replica = self.replicas.tensors(w)
            for n in names:
                if alpha == 0:
                    replica[n].copy_(values[n])
                else:
                    replica[n].mul_(alpha).add_(values[n], alpha=1 - alpha)

    @torch.no_grad()
    def end_round(self, kind: str = "round") -> OuterStepReport:
        """Closes a synchronisation: applies the policies for buffers, inner state and dropped workers."""
        done = self._round
        assert done is not None, "end_round() without begin_round()"
        self.comm.observer = None
        where = f"the end of the synchronisation after {self.local_steps} local steps"
        everybody = self.comm.world.meet(where, (self._survey(), done.likeness.parts()))
        held = _joined([survey for survey, _ in everybody])
        self._synchronise_frozen(done.participants, held)
        self.synchronise_buffers(done.participants, held)
        self._synchronise_inner_state(done)
        self.round_start = self.local_steps
        self.outer_steps += 1
        self._round = None
        norm, cosine = likeness_of([parts for _, parts in everybody])
        return OuterStepReport(
            step=self.local_steps,
            outer_step=self.outer_steps,
            kind=kind,
            pseudo_gradient_norm=norm,
            drift=done.drift,
            cosine=cosine,
            payload_bytes=self.ledger.total_bytes - done.bytes_before,
            participants=tuple(done.participants),
            seconds=time.perf_counter() - done.started,
        )

    # ---------------------------------------------------------------------------------------- frozen, buffers, state

    def survey(self, where: str) -> Survey:
        """What every worker holds in its frozen parameters and buffers; all processes ask together."""
        return _joined(self.comm.world.meet(where, self._survey()))

    def _survey(self) -> Survey:
        layout, theta = self.replicas.layout, self.outer.state
        reference: dict[str, Tensor | None] = {n: theta.tensors[n] for n in layout.frozen}
        reference |= _named_buffers(layout, theta)
        survey: Survey = {}
        for w in self.local_workers:
            tensors = {n: self.replicas.tensors(w)[n] for n in layout.frozen}
            tensors |= _named_buffers(layout, self.replicas.states[w])
            survey[w] = {
                name: Held(t.shape, t.dtype, b"" if self.num_workers == 1 else digest(t, reference.get(name)))
                for name, t in tensors.items()
            }
        return survey

    def _synchronise_frozen(self, participants: list[int], held: Survey) -> None:
        """Frozen parameters follow the policy of buffers: floating ones of floating buffers, others of integer ones."""
        read, frozen = self.replicas.tensors, self.replicas.layout.frozen
        here = read(self.local_workers[0])
        differing = [n for n in frozen if not self.same(held, n)]
        averaged = [n for n in differing if self.buffers != "first" and is_floating(here[n])]
        values = self.comm.mean(averaged, read, participants, what=None)
        others = [n for n in differing if n not in values]
        values |= self.comm.copies_of(participants[0], others, read, like=here)
        self.outer.assign({**{n: here[n] for n in frozen}, **values})
        if self.buffers != "local":
            self.comm.record("buffers", sum(here[n].nbytes for n in differing))
            self.restart(self.workers, differing, values)

    @torch.no_grad()
    def synchronise_buffers(self, participants: Sequence[int] | None = None, held: Survey | None = None) -> None:
        """Buffers follow the policy; tensors that all workers hold bit for bit are left alone and cost nothing.

        Args:
            participants: whose values count; default all workers'. The others get the result whatever the policy.
            held: what every worker holds, if known.
        """
        participants = self.workers if participants is None else participants
        held = held or self.survey(f"the synchronisation of buffers after {self.local_steps} local steps")
        dropped = [w for w in self.workers if w not in participants]
        theta, states = self.outer.state.buffers, self.replicas.states
        common = self.common_buffers(participants, held, first=self.buffers == "first")
        targets = [w for w in (self.workers if self.buffers != "local" else dropped) if w in self.local_workers]
        for (position, name), value in common.items():
            for w in targets:
                put_buffer(states[w].buffers[position], name, value)
            put_buffer(theta[position], name, value)
        for (position, name), value in states[self.local_workers[0]].named_buffers():
            full = f"{self.replicas.layout.module_names[position]}.{name}"
            if (position, name) not in common and full in held[participants[0]]:
                put_buffer(theta[position], name, value)
        self.comm.record("buffers", sum(v.nbytes for v in common.values()) if self.buffers != "local" else 0)

    def common_buffers(self, participants: Sequence[int], held: Survey, first: bool = False) -> dict[BufferKey, Tensor]:
        """What stands for buffers of which workers hold different values, as new tensors.

        The mean over the participants, if all have a floating tensor of the same shape and dtype; else, and with
        ``first``, the first participant's. Buffers that the first participant lacks are left out.
        """
        layout = self.replicas.layout
        device = next((t.device for t in self.outer.tensors.values()), self.comm.world.device)
        leading = held[participants[0]]
        position = {name: i for i, name in enumerate(layout.module_names)}
        keys = {n: (position[n.rpartition(".")[0]], n.rpartition(".")[2]) for n in leading if n not in layout.frozen}
        differing = [n for n in keys if not self.same(held, n)]
        like = {n: torch.empty(leading[n].shape, dtype=leading[n].dtype, device=device) for n in differing}
        averaged = [
            n
            for n in differing
            if not first and is_floating(like[n]) and len({_kind(held[w].get(n)) for w in participants}) == 1
        ]

        def read(worker: int) -> Mapping[str, Tensor]:
            return _named_buffers(layout, self.replicas.states[worker])

        values = self.comm.mean(averaged, read, participants, what=None, like=like)
        values |= self.comm.copies_of(participants[0], [n for n in differing if n not in values], read, like)
        return {keys[n]: values[n].to(like[n].dtype) for n in differing}

    def same(self, held: Survey, name: str) -> bool:
        """Whether all workers hold the same under a name, bit for bit."""
        return len({held[w].get(name) for w in self.workers}) == 1

    def _synchronise_inner_state(self, done: _Round) -> None:
        targets = self.workers if self.inner_state == "reset" else done.dropped
        for w in [w for w in targets if w in self.local_workers]:
            self.inner.workers[w].reset_inner_state(self.inner.initial)
        if self.inner_state == "average":
            states = {w: self.inner.workers[w].states for w in self.local_workers if w in done.participants}
            self.comm.record("inner_state", average_inner_state(self.comm, self.inner.live, states))


def _joined(surveys: Sequence[Survey]) -> Survey:
    return {w: held for survey in surveys for w, held in survey.items()}


def _named_buffers(layout: Layout, state: ModelState) -> dict[str, Tensor]:
    return {f"{layout.module_names[position]}.{name}": b for (position, name), b in state.named_buffers()}


def _kind(held: Held | None) -> Any:
    return None if held is None else (held.shape, held.dtype)
