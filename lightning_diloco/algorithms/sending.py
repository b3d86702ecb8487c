"""How a transfer is made: who takes part, is it finite, encoding, means, bytes.

Owns the order of these steps, and what is agreed between processes on the way. Does not own the arithmetic of a mean
(``comm/``), the codecs, nor when anything is sent (the algorithms). Imports nothing of Lightning.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_diloco.algorithms.aggregating import aggregated
from lightning_diloco.algorithms.deltas import PseudoGradients
from lightning_diloco.algorithms.machines import Machines
from lightning_diloco.algorithms.measuring import SendingMeter
from lightning_diloco.algorithms.order import Order, Read
from lightning_diloco.algorithms.participation import Participation
from lightning_diloco.algorithms.transfer import Transfer
from lightning_diloco.cluster.schedule import Attendance
from lightning_diloco.codecs import Codec
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.means import shape_of
from lightning_diloco.comm.statistics import (
    MeanStatistics,
    Parts,
    all_finite,
    euclidean_norm,
)
from lightning_diloco.comm.tensors import checksum
from lightning_diloco.state.memory import Memory
from lightning_diloco.state.outer import FromMeanOfWeights, Outer
from lightning_diloco.state.policies import Policies
from lightning_diloco.state.randomness import derive_seed
from lightning_diloco.state.replicas import Replicas


@dataclass
class Sender:
    """Makes transfers.

    Attributes:
        seed: the run's seed.
        codec: what packs the tensors unless an order names another; None: nothing does.
        participation: who takes part, of those that are there; None: everybody.
        machines: the simulated machines, which may lose what is sent.
        diagnostics: whether norms, cosines and drifts are measured.
        writing: set once the state of the run has begun to change, after which an error leaves a half-done step.
        seconds: wall-clock time of sending in this step.
        meter: measures what is sent.
        before_sending: is shown the Δ_i of a transfer of Δ or weights, before they are averaged; None: nobody looks.
    """

    replicas: Replicas
    outer: Outer
    memory: Memory
    channel: Channel
    policies: Policies
    seed: int
    codec: Codec | None
    participation: Participation | None
    diagnostics: bool
    machines: Machines
    writing: bool = False
    seconds: float = 0.0
    before_sending: Callable[[PseudoGradients], None] | None = None

    def __post_init__(self) -> None:
        self.meter = SendingMeter(self.replicas, self.outer, self.channel)

    @torch.no_grad()
    def send(self, order: Order) -> Transfer:
        """The transfer of an order, with the means ready; without means if nobody takes part.

        Raises:
            RuntimeError: what a worker sends is not finite, N > 1, and ``nonfinite`` is "raise" (or all are bad).
            ValueError: a codec is to pack numbers that it can't.
        """
        started = time.perf_counter()
        chosen = self._chosen(order)
        attendance = self.machines.attendance(order.step, [w for group in chosen for w in group])
        groups = self._groups(order, chosen, attendance.committed)
        known = self._agree(order, groups)
        transfer = Transfer(
            order.names,
            groups,
            home={w: i for i, group in enumerate(groups) for w in group},
            sent=order.step,
            due=order.step + order.delay,
            tag=order.tag,
            what=order.what,
            key=order.key,
            on_links=self._groups(order, chosen, attendance.participating),
            rolled_back=list(attendance.rolled_back),
        )
        self._reject(order, transfer, [w for group in groups for w in group if not _fine(known, w)])
        self._show(order, transfer)
        while transfer.groups:
            statistics, nbytes, dense = self._average(order, transfer)
            coded = self._codec(order) is not None
            measured = self.meter.gather(order, transfer, statistics, coded) if self.diagnostics else []
            parts = [of_process for of_process, _ in measured]
            checked = self._tolerant or all(w in known for w in transfer.senders) or _all_fine(parts)
            bad = [] if checked else self._bad_workers(order, transfer)
            if not bad:
                break
            self._reject(order, transfer, bad)
        else:
            transfer.means = []
            if transfer.rolled_back and transfer.on_links:
                self._send_in_vain(order, transfer)
            self._tell(order, transfer, attendance)
            return transfer
        if self.diagnostics:
            self.meter.measure(order, transfer, known, measured)
        self.writing = True
        transfer.nbytes = nbytes if self.channel.world.num_workers > 1 else 0  # a single worker has nobody to send to
        self._record(order, transfer, nbytes, dense)
        self._tell(order, transfer, attendance)
        transfer.seconds = time.perf_counter() - started
        self.seconds += transfer.seconds
        return transfer

    def random(self, tag: str, step: int, worker: int | None = None) -> torch.Generator:
        """A generator on the CPU, seeded from (run seed, tag, step, worker)."""
        parts = ("all",) if worker is None else ("worker", worker)
        return torch.Generator().manual_seed(derive_seed(self.seed, tag, step, *parts))

    # ---------------------------------------------------------------------------------------- who takes part

    def _chosen(self, order: Order) -> list[list[int]]:
        """The workers that ``participation`` chooses, per group of the order."""
        candidates = sorted(w for group in order.groups for w in group)
        if len(set(candidates)) != len(candidates) or not set(candidates) <= set(self.channel.workers):
            raise ValueError(
                f"`workers` or `groups` (={order.groups}) must name different workers out of {self.channel.workers}."
            )
        chosen = candidates
        if self.participation is not None and not order.everybody:
            generator = self.random(f"participation of {order.stream}{order.again}", order.step)
            chosen = self.participation(order.step, candidates, generator)
        if not isinstance(chosen, Iterable) or not set(chosen) <= set(candidates) or len(set(chosen)) != len(chosen):
            raise ValueError(
                f"{self.participation!r} chose {chosen}, which must be different workers out of {candidates}."
            )
        return [sorted(w for w in group if w in chosen) for group in order.groups]

    def _groups(self, order: Order, groups: Sequence[Sequence[int]], workers: Sequence[int]) -> list[list[int]]:
        """What is left of groups with these workers alone: those that have a mean."""
        left = [[w for w in group if w in workers] for group in groups]
        return [group for group in left if group and self._has_weight(order, group)]

    def _tell(self, order: Order, transfer: Transfer, attendance: Attendance) -> None:
        """The simulated machines learn of a transfer."""
        self.machines.settle(self.channel.world.gather_all)
        self.machines.send(transfer, attendance, self._gathered(order), returns=order.of_weights)

    @staticmethod
    def _has_weight(order: Order, group: Sequence[int]) -> bool:
        """Whether the group has a mean: weights may be zero for all that are left of it."""
        if order.weights is None:
            return True
        missing = [w for w in group if w not in order.weights]
        if missing:
            raise ValueError(f"`weights` (={order.weights}) lacks worker {missing[0]}. Give each that sends a weight.")
        return any(order.weights[w] for w in group)

    def _agree(self, order: Order, groups: Sequence[Sequence[int]]) -> dict[int, float]:
        """One gather for all that processes must know before a mean; returns norms of what workers send, if needed.

        Every gather waits for the slowest process, so norms, signals and a checksum travel together. Each process
        computes θ by itself; only the checksum tells that a process has arrived at another θ. A dense mean needs no
        norms: it shows by itself whether all was finite, and the statistics have the norms of all that pass by.
        """
        codec, world = self._codec(order), self.channel.world
        if codec is not None:
            self._check_encodable(order, codec)
        sending = [w for group in groups for w in group]
        unseen = (
            codec is not None
            or order.aggregate is not None
            or world.team > 1
            or (world.size > 1 and not self.channel.ordered)
        )
        measured = self.channel.workers if self.diagnostics and order.of_weights else sending
        norms = {w: self._norm(order, w) for w in world.workers if w in measured and (unseen or w not in sending)}
        if not self.diagnostics and not unseen:
            norms = {}
        if world.size > 1:
            theta = self.outer.tensors
            shared = {n: theta[n] for n in order.names if n in theta} if order.of_weights else {}
            gathered = world.gather_all(order.where, (norms, world.signals, checksum(shared)))
            odd = next((r for r, theirs in enumerate(gathered) if theirs[2] != gathered[0][2]), None)
            if odd is not None:
                raise RuntimeError(
                    f"Process {odd} holds another outer model θ than process 0 at {order.where}: something wrote"
                    " different weights into the module on different processes. Callbacks and hooks must write the"
                    " same everywhere."
                )
            world.learn_signals(signals for _, signals, _ in gathered)
            norms = self._joined(order, [theirs for theirs, _, _ in gathered])
        return norms

    def _norm(self, order: Order, worker: int) -> float:
        """‖·‖₂ of what a worker sends, of weights their distance from θ; NaN if any isn't finite."""
        values = order.as_delta(self.outer.tensors, order.read(worker))
        norm = euclidean_norm(values, order.names) if self.diagnostics else math.inf
        if math.isfinite(norm):
            return norm
        return sys.float_info.max if all_finite(values, order.names) else math.nan  # squares may overflow

    def _joined(self, order: Order, gathered: Sequence[Mapping[int, float]]) -> dict[int, float]:
        norms: dict[int, float] = {}
        for w, norm in (item for theirs in gathered for item in theirs.items()):
            if repr(norms.setdefault(w, norm)) != repr(norm):  # of another member of its team; NaN is itself
                warnings.warn(
                    f"The processes of worker {w} hold different weights at local step {order.step}, and the"
                    " outer step mixes them. Look for random numbers in the optimizer's step, gradients that bypass"
                    " `manual_backward`, or different hardware.",
                    stacklevel=5,
                )
        return norms

    def _check_encodable(self, order: Order, codec: Codec) -> None:
        for name, like in self._shapes(order, self._first(order)[1]).items():
            dtype = like.dtype
            if not dtype.is_floating_point:
                raise ValueError(
                    f"{name!r} holds {dtype}, which {codec!r} can't pack: codecs take real floating-point tensors. Make"
                    " two real parameters of a complex one (torch.view_as_real), or use an algorithm without a codec."
                )

    def _first(self, order: Order, read: Read | None = None) -> tuple[int, Mapping[str, Tensor]]:
        """A worker hosted here and its tensors, for their shapes; parameters for what an absent one lacks."""
        here = next(iter(self.channel.here), self.channel.world.workers[0])
        tensors = (read or order.read)(here)
        lacks = not self.channel.here and any(n not in tensors for n in order.names)
        return here, self.replicas.tensors(here) if lacks else tensors

    @staticmethod
    def _shapes(order: Order, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: shape_of(tensors, n) for n in order.names}

    # ---------------------------------------------------------------------------------------- finite or not

    @property
    def _tolerant(self) -> bool:
        return self.channel.world.num_workers == 1 or self.policies.nonfinite == "propagate"

    def _bad_workers(self, order: Order, transfer: Transfer) -> list[int]:
        """Senders whose values are not finite, looked for only where a mean isn't; the same on all processes."""
        if not self.diagnostics and all(all_finite(mean, order.names) for mean in self._averages(transfer)):
            return []
        here = {w: all_finite(order.read(w), order.names) for w in self.channel.world.workers if w in transfer.senders}
        gathered = self.channel.world.gather_all(f"a check of {order.where}", here)
        return sorted({w for of_process in gathered for w, fine in of_process.items() if not fine})

    @staticmethod
    def _averages(transfer: Transfer) -> list[Mapping[str, Tensor]]:
        return [m.subtrahend if isinstance(m, FromMeanOfWeights) else m for m in transfer.means]

    def _reject(self, order: Order, transfer: Transfer, bad: Sequence[int]) -> None:
        """Takes workers out of a transfer whose values are not finite.

        Raises:
            RuntimeError: the policy doesn't permit it, or nobody would remain.
        """
        if not bad or self._tolerant:
            return
        senders, listed = transfer.senders, ", ".join(map(str, bad))
        of_weights = order.of_weights
        kind = "pseudo-gradient" if of_weights else order.what
        # who sends to a server alone may be bad alone: the others go on
        nobody = len(bad) == len(senders) and any(len(group) > 1 for group in order.groups)
        if self.policies.nonfinite == "raise" or nobody or len(bad) == len(self.channel.workers):
            where = "Its weights, or θ's, hold" if of_weights else "They hold"
            raise RuntimeError(
                f"The {kind} of worker {listed} {'is' if of_weights else 'are'} not finite at local step"
                f" {order.step} ({len(bad)} of {len(senders)} workers). {where} NaN or"
                " infinity. Lower the inner learning rate or clip gradients; `DilocoStrategy(nonfinite='skip')`"
                " leaves such workers out of a mean (one finite worker must remain), 'propagate' lets the values"
                " through."
            )
        for w in bad:
            warnings.warn(
                f"Worker {w} is left out of the outer step at local step {order.step}: its pseudo-gradient is not"
                " finite. It restarts from θ with fresh inner state."
                if of_weights
                else f"Worker {w} is left out of a mean at local step {order.step}: its {kind} are not finite.",
                stacklevel=5,
            )
        remaining = [[w for w in group if w not in bad] for group in transfer.groups]
        position = {i: k for k, i in enumerate(i for i, group in enumerate(remaining) if group)}
        transfer.home = {w: position.get(i, 0) for w, i in transfer.home.items()}
        transfer.groups = [group for group in remaining if group]
        transfer.rejected += bad

    # ---------------------------------------------------------------------------------------- means

    def _codec(self, order: Order) -> Codec | None:
        return self.codec if order.codec is None else order.codec

    def _gathered(self, order: Order) -> bool:
        """Whether every message has to reach whoever averages: there is no sum that could be formed on the way."""
        codec = self._codec(order)
        return order.aggregate is not None or (codec is not None and not codec.lossless)

    def _record(self, order: Order, transfer: Transfer, nbytes: int, dense: int) -> None:
        self.channel.part = len(transfer.senders) / len(self.channel.workers) if self.machines.paced else 1.0
        largest = max(map(len, transfer.groups))
        self.channel.record(transfer.what, nbytes, largest, dense, self._gathered(order))

    def _send_in_vain(self, order: Order, transfer: Transfer) -> None:
        """A transfer of which a part is lost, as nobody knows before its end: the bytes cross, and nothing is kept."""
        lost = replace(transfer, groups=transfer.on_links)
        plain = replace(order, aggregate=None)  # robust means remember, too, and have the same payload
        _, nbytes, dense = self._average(plain, lost, keeps=False)
        transfer.nbytes = nbytes if self.channel.world.num_workers > 1 else 0
        self._record(order, lost, nbytes, dense)

    def _average(self, order: Order, transfer: Transfer, keeps: bool = True) -> tuple[list[MeanStatistics], int, int]:
        """Puts the means into the transfer; returns what was measured, and the bytes that a worker sends, and dense.

        Args:
            order: what is sent.
            transfer: whose groups are averaged.
            keeps: whether codecs remember what they have sent.
        """
        codec, theta = self._codec(order), self.outer.tensors
        assigns = order.assigns and (codec is None or codec.lossless)
        read = self.replicas.tensors if assigns else order.read
        what = "weights" if assigns else order.what
        transfer.what, transfer.means, gathered, sent = what, [], [], 0
        here, tensors = self._first(order, read)
        known = {here: tensors}
        like = self._shapes(order, tensors)
        dense = sum(t.nbytes for t in like.values())

        def read_once(worker: int) -> Mapping[str, Tensor]:
            return known.pop(worker) if worker in known else read(worker)

        for group in transfer.groups:
            origin = theta if what == "weights" else None
            statistics = MeanStatistics(origin, self.meter.layers) if self.diagnostics else None
            given = order.weights
            weights = None if given is None else [given[w] for w in group]
            if order.aggregate is not None:
                self.writing = True  # codecs and rules remember
                mean, nbytes = aggregated(
                    order,
                    group,
                    (read_once, like, statistics),
                    (self.channel, self.memory, theta),
                    codec,
                    lambda w: self.random(f"codec of {order.stream}{order.again}", order.step, w),
                )
                nbytes = nbytes or dense
            elif codec is None:
                mean = self.channel.mean(order.names, read_once, group, weights, like, statistics)
                nbytes = dense
            else:
                self.writing = True  # from here on codecs remember what they have sent
                drawn = {w: self.random(f"codec of {order.stream}{order.again}", order.step, w) for w in group}
                mean, nbytes = self.channel.coded_mean(
                    order.names,
                    read_once,
                    codec,
                    partial(self.memory.codec if keeps else self.memory.copy_of_codec, order.stream),
                    drawn.__getitem__,
                    group,
                    weights,
                    like,
                    statistics,
                )
            transfer.means.append(FromMeanOfWeights(order.names, theta, mean) if assigns else mean)
            gathered += [] if statistics is None else [statistics]
            sent = max(sent, nbytes)
        return gathered, sent, dense

    def _show(self, order: Order, transfer: Transfer) -> None:
        """Lets a callback read every Δ_i, before they are averaged."""
        if self.before_sending is None or not order.of_weights or not transfer.groups:
            return
        deltas = PseudoGradients(
            order.step,
            order.tag,
            tuple(order.names),
            tuple(transfer.senders),
            self.channel.world,
            lambda w: order.as_delta(self.outer.tensors, order.read(w)),
        )
        with deltas.readable():
            self.before_sending(deltas)


def _all_fine(parts: Sequence[Sequence[Parts]]) -> bool:
    """Whether the squares of all means are finite, and so all that went into them."""
    of_layers = [sums for of_process in parts for of_group in of_process for sums in of_group.values()]
    squares = [square for square, _ in of_layers if square is not None]
    return bool(squares) and all(map(math.isfinite, squares))


def _fine(norms: Mapping[int, float], worker: int) -> bool:
    return math.isfinite(norms.get(worker, 0.0))
