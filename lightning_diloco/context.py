"""What an algorithm may touch, and what every synchronisation does whatever the algorithm.

Owns the round clock, the diagnostics of a round, and the policies that apply at its end: buffers, frozen parameters,
inner optimizer state, non-finite workers. :meth:`SyncContext.restart` is the only place that writes replicas. Does not
own the outer step itself (``algorithms/``). Imports nothing of Lightning.
"""

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_diloco.algorithms.base import OuterStepReport
from lightning_diloco.comm import Comm, Ledger, mean_of
from lightning_diloco.inner import InnerOptimizers, average_inner_state
from lightning_diloco.outer import Outer
from lightning_diloco.replicas import Replicas, is_floating, put_buffer, same_bits

BufferPolicy = Literal["average", "first", "local"]
InnerStatePolicy = Literal["keep", "reset", "average"]
NonfinitePolicy = Literal["raise", "skip", "propagate"]


@dataclass
class _Round:
    """A synchronisation under way."""

    started: float
    bytes_before: int
    participants: list[int]
    dropped: list[int]
    drift: tuple[float, ...]
    cosine: float | None
    norm: float


class _Differences(Mapping[str, Tensor]):
    """``minuend − subtrahend``, name by name on demand: all workers' Δ_i at once would be N more models in memory."""

    def __init__(self, names: list[str], minuend: Mapping[str, Tensor], subtrahend: Mapping[str, Tensor]) -> None:
        self._names, self._minuend, self._subtrahend = names, minuend, subtrahend

    def __getitem__(self, name: str) -> Tensor:
        return self._minuend[name] - self._subtrahend[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
    def names(self) -> list[str]:
        """The trainable parameters."""
        return self.outer.names

    def due(self, tick: int) -> bool:
        """Whether the present round has had its H local steps (or, H having changed on resume, a multiple of them)."""
        return (tick - self.round_start) % self.interval == 0

    def at_rest(self) -> bool:
        """Whether every worker's trainable parameters are θ's, bit for bit: there is nothing to synchronise."""
        theta = self.outer.tensors
        return all(same_bits(self.replicas.tensors(w)[n], theta[n]) for w in self.workers for n in self.names)

    def pseudo_gradient(self, worker: int) -> Mapping[str, Tensor]:
        """Δ_i = θ − θ_i over the trainable parameters, in the parameters' dtype, each computed when asked for."""
        return _Differences(self.names, self.outer.tensors, self.replicas.tensors(worker))

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
        drift: list[float] = []
        bad: list[int] = []
        unit_sum: dict[str, Tensor] = {}
        delta_sum: dict[str, Tensor] = {}
        scale = _norm(self.outer.tensors[n] for n in self.names)
        for w in self.workers:
            delta = {n: d.to(torch.promote_types(d.dtype, torch.float32)) for n, d in self.pseudo_gradient(w).items()}
            norm = _norm(delta.values())
            drift.append(norm / scale if scale > 0 else norm)
            if not math.isfinite(norm) and self.num_workers > 1 and self.nonfinite != "propagate":
                bad.append(w)
                continue
            for n, d in delta.items():
                delta_sum[n] = delta_sum[n] + d if n in delta_sum else d
                unit = d / norm if norm > 0 else d
                unit_sum[n] = unit_sum[n] + unit if n in unit_sum else unit
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
        moving = sum(d > 0 for w, d in zip(self.workers, drift, strict=True) if w in good)
        pairs = len(good) * (len(good) - 1)
        cosine = (_norm(unit_sum.values()) ** 2 - moving) / pairs if pairs else None
        norm = _norm(delta_sum.values()) / len(good)
        self._round = _Round(started, self.ledger.total_bytes, good, bad, tuple(drift), cosine, norm)
        return good

    @torch.no_grad()
    def restart(
        self, workers: Iterable[int], names: Iterable[str], values: Mapping[str, Tensor], alpha: float = 0.0
    ) -> None:
        """Each worker's parameters become ``α·θ_i + (1−α)·values``.

        Args:
            workers: which workers.
            names: which parameters.
            values: parameter name → target, in the parameter's shape.
            alpha: weight of the local value, 0 ≤ α ≤ 1; 0 copies, so that not even a NaN of the replica survives.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` (={alpha}) must lie between 0 (take the values) and 1 (keep the replica).")
        names = list(names)
        for w in workers:
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
        self._synchronise_frozen(done.participants)
        self.synchronise_buffers(done.participants)
        self._synchronise_inner_state(done)
        self.round_start = self.local_steps
        self.outer_steps += 1
        self._round = None
        return OuterStepReport(
            step=self.local_steps,
            outer_step=self.outer_steps,
            kind=kind,
            pseudo_gradient_norm=done.norm,
            drift=done.drift,
            cosine=done.cosine,
            payload_bytes=self.ledger.total_bytes - done.bytes_before,
            participants=tuple(done.participants),
            seconds=time.perf_counter() - done.started,
        )

    def _synchronise_frozen(self, participants: list[int]) -> None:
        """Frozen parameters follow the policy of buffers: floating ones of floating buffers, others of integer ones."""
        read, frozen = self.replicas.tensors, self.replicas.layout.frozen
        held = {n: [read(w)[n] for w in self.workers] for n in frozen}
        differing = [n for n, tensors in held.items() if not all(same_bits(t, tensors[0]) for t in tensors)]
        averaged = [n for n in differing if self.buffers != "first" and is_floating(held[n][0])]
        values = self.comm.mean(averaged, read, participants, what=None)
        values |= {n: read(participants[0])[n].clone() for n in differing if n not in values}
        self.outer.assign({**{n: held[n][0] for n in frozen}, **values})
        if self.buffers != "local":
            self.comm.record("buffers", sum(held[n][0].nbytes for n in differing))
            self.restart(self.workers, differing, values)

    @torch.no_grad()
    def synchronise_buffers(self, participants: Sequence[int] | None = None) -> None:
        """Buffers follow the policy; tensors that all workers hold bit for bit are left alone and cost nothing."""
        participants = self.workers if participants is None else participants
        dropped = [w for w in self.workers if w not in participants]
        theta = self.outer.state.buffers
        states = [self.replicas.states[w].buffers for w in self.workers]
        first = self.replicas.states[participants[0]]
        sent = 0
        for (position, name), reference in list(first.named_buffers()):
            held = [s[position].get(name) for s in states]
            if all(b is not None and same_bits(b, reference) for b in held):
                value = reference
            else:
                held = [self.replicas.states[w].buffers[position].get(name) for w in participants]
                value = reference.clone() if self.buffers == "first" else common_buffer(reference, held)
                targets = self.workers if self.buffers != "local" else dropped
                for w in targets:
                    put_buffer(self.replicas.states[w].buffers[position], name, value)
                sent += reference.nbytes if self.buffers != "local" else 0
            put_buffer(theta[position], name, value)
        self.comm.record("buffers", sent)

    def _synchronise_inner_state(self, done: _Round) -> None:
        targets = self.workers if self.inner_state == "reset" else done.dropped
        for w in targets:
            self.inner.workers[w].reset_inner_state(self.inner.initial)
        if self.inner_state == "average":
            sent = average_inner_state([self.inner.workers[w].states for w in done.participants])
            self.comm.record("inner_state", sent)


def common_buffer(reference: Tensor, held: Sequence[Tensor | None]) -> Tensor:
    """What stands for several workers' values of one buffer, as a new tensor.

    Args:
        reference: the first worker's.
        held: every worker's; None where it has no such buffer.

    Returns:
        The mean, if all have a floating tensor of the same shape and dtype; else the first worker's.
    """
    alike = [b for b in held if b is not None and b.shape == reference.shape and b.dtype == reference.dtype]
    if len(alike) < len(held) or not is_floating(reference):
        return reference.clone()
    return mean_of(alike).to(reference.dtype)


def _norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all tensors together, accumulated in float64."""
    norms = [
        torch.linalg.vector_norm(torch.view_as_real(t) if t.is_complex() else t, dtype=torch.float64) for t in tensors
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
