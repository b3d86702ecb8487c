"""The context of an algorithm, and the parts of a synchronisation that all algorithms share.

Owns the round clock and the diagnostics of a round. :meth:`SyncContext.restart` is the only place that writes trainable
parameters of replicas. Does not own the outer step itself (``algorithms/diloco.py``) nor the policies that apply at the
end of a round (``state/policies.py``). Imports nothing of Lightning.
"""

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_diloco.algorithms.report import (
    OuterStepReport,
    PseudoGradientStatistics,
    euclidean_norm,
    norm_and_cosine,
)
from lightning_diloco.comm.channel import Channel, Ledger
from lightning_diloco.comm.means import Differences
from lightning_diloco.comm.tensors import bitwise_equal, checksum
from lightning_diloco.state.optimizers import InnerOptimizers
from lightning_diloco.state.outer import Outer
from lightning_diloco.state.policies import Policies, PolicyApplication, joined
from lightning_diloco.state.replicas import Replicas


@dataclass
class _Round:
    """A synchronisation under way."""

    started: float
    bytes_before: int
    participants: list[int]
    dropped: list[int]
    drift: tuple[float, ...]
    statistics: PseudoGradientStatistics


@dataclass
class SyncContext:
    """The view of the engine that an algorithm works with.

    Attributes:
        replicas: the workers' states: ``replicas.tensors(i)`` is θ_i, ``replicas.slot(i, name)`` the algorithm's own.
        outer: θ and the outer optimizer.
        channel: means and exchanges, recorded in ``ledger``.
        inner: the inner optimizers, and per worker its state, gradients and random stream.
        interval: H.
        num_workers: N.
        policies: see :class:`~lightning_diloco.DilocoStrategy`.
        local_steps: completed local steps.
        round_start: ``local_steps`` when the present round began.
        outer_steps: completed synchronisations.
    """

    replicas: Replicas
    outer: Outer
    channel: Channel
    inner: InnerOptimizers
    interval: int
    num_workers: int
    policies: Policies = field(default_factory=Policies)
    local_steps: int = 0
    round_start: int = 0
    outer_steps: int = 0
    _round: _Round | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.policy_application = PolicyApplication(self.policies, self.replicas, self.outer, self.channel, self.inner)

    @property
    def ledger(self) -> Ledger:
        """What has been sent."""
        return self.channel.ledger

    @property
    def workers(self) -> list[int]:
        """Global ids of all workers."""
        return self.channel.workers

    @property
    def local_workers(self) -> list[int]:
        """Global ids of the workers hosted by this process: those whose tensors can be read and written."""
        return self.channel.world.workers

    @property
    def names(self) -> list[str]:
        """The trainable parameters."""
        return self.outer.names

    @property
    def in_round(self) -> bool:
        """Whether a synchronisation has begun and not ended."""
        return self._round is not None

    def due(self, step: int) -> bool:
        """Whether the present round has had its H local steps (or, H having changed on resume, a multiple of them)."""
        return (step - self.round_start) % self.interval == 0

    def workers_equal_outer_model(self) -> bool:
        """Whether every worker's trainable parameters are θ's, bit for bit: there is nothing to synchronise."""
        theta = self.outer.tensors
        here = all(bitwise_equal(self.replicas.tensors(w)[n], theta[n]) for w in self.local_workers for n in self.names)
        # agreed between the processes, since the flush that follows is a collective
        return all(self.channel.world.gather_all(f"the end of training after {self.local_steps} local steps", here))

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
            RuntimeError: a worker's Δ_i is not finite, N > 1, and ``nonfinite`` is "raise" (or all workers are bad);
                or the previous synchronisation is still open.
        """
        if self._round is not None:
            raise RuntimeError("`begin_round` was called twice. Close the first synchronisation with `end_round`.")
        started = time.perf_counter()
        theta, world = self.outer.tensors, self.channel.world
        norms = {w: euclidean_norm(self.pseudo_gradient(w), self.names) for w in self.local_workers}
        where = f"the synchronisation after {self.local_steps} local steps"
        # Norms, signals and a checksum travel in a single gather, because every gather waits for the slowest process.
        # Each process computes θ by itself; only the checksum tells that a process has arrived at another θ.
        gathered = world.gather_all(where, (norms, world.signals, checksum(theta) if world.size > 1 else 0))
        odd = next((r for r, theirs in enumerate(gathered) if theirs[2] != gathered[0][2]), None)
        if odd is not None:
            raise RuntimeError(
                f"Process {odd} holds another outer model θ than process 0 at {where}: something wrote different"
                " weights into the module on different processes. Callbacks and hooks must write the same everywhere."
            )
        world.learn_signals(signals for _, signals, _ in gathered)
        norms = self._joined_norms([theirs for theirs, _, _ in gathered])
        scale = euclidean_norm(theta, self.names)
        drift = tuple(norms[w] / scale if scale > 0 else norms[w] for w in self.workers)
        tolerant = self.num_workers == 1 or self.policies.nonfinite == "propagate"
        bad = [w for w in self.workers if not (tolerant or math.isfinite(norms[w]))]
        good = [w for w in self.workers if w not in bad]
        if bad and (self.policies.nonfinite == "raise" or not good):
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
        statistics = self.channel.observer = PseudoGradientStatistics(theta)
        # set last: an error above must leave no open synchronisation
        self._round = _Round(started, self.ledger.total_bytes, good, bad, drift, statistics)
        return good

    def _joined_norms(self, gathered: Sequence[Mapping[int, float]]) -> dict[int, float]:
        norms: dict[int, float] = {}
        for w, norm in (item for theirs in gathered for item in theirs.items()):
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
        if done is None:
            raise RuntimeError("`end_round` was called without `begin_round`. Open the synchronisation with it first.")
        self.channel.observer = None
        where = f"the end of the synchronisation after {self.local_steps} local steps"
        application = self.policy_application
        # before any collective of the policies: all processes must choose the same tensors for it
        gathered = self.channel.world.gather_all(where, (application.survey_here(), done.statistics.parts()))
        survey = joined([of_process for of_process, _ in gathered])
        application.synchronise_frozen(done.participants, survey)
        application.synchronise_buffers(done.participants, survey)
        application.synchronise_inner_state(done.participants, done.dropped)
        self.round_start = self.local_steps
        self.outer_steps += 1
        self._round = None
        norm, cosine = norm_and_cosine([parts for _, parts in gathered])
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
