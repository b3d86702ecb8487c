"""What crosses between workers, and the ledger that counts it.

Owns the way of an exchange over processes, and its byte count. Does not own its arithmetic (``means.py``), what is
exchanged or when (``algorithms/``), nor who hosts whom (``world.py``). Imports nothing of Lightning.

A mean over W processes moves each tensor as a ring all-reduce does, twice, whatever ``ordered``: with n workers per
process and P bytes, a process sends n·P·(W−1)/W so that each process can sum its slice of the tensor in the workers'
order, and P·(W−1)/W with the result. For n = 1 that is the ring's 2P(W−1)/W, and H times less often than DDP.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_diloco.comm import means
from lightning_diloco.comm.means import accumulator, chunks, in_shape, mean_of, reader, room_for, shape_of
from lightning_diloco.comm.tensors import bytes_of, flat, real_view
from lightning_diloco.comm.world import World

_MEAN = "a mean over workers"

Read = Callable[[int], Mapping[str, Tensor]]  # worker → named tensors


@dataclass(frozen=True)
class Exchange:
    """One entry of the ledger.

    Attributes:
        local_step: local steps done when it happened.
        what: what was sent: "delta", "weights", "buffers", "inner_state", or an algorithm's own word.
        payload_bytes: bytes that each participant sends, in one direction; factors of a ring (2(N−1)/N) or of a
            parameter server (up and down) are not in it.
    """

    local_step: int
    what: str
    payload_bytes: int


@dataclass
class Ledger:
    """Every exchange of a fit, in order. Evaluation means are not communication and don't appear."""

    entries: list[Exchange] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Bytes that one worker has sent so far, one direction."""
        return sum(entry.payload_bytes for entry in self.entries)


class MeanObserver(Protocol):
    """Whoever looks at what is averaged, piece by piece, as it passes through this process."""

    def add(self, what: str | None, name: str, start: int, rows: Sequence[Tensor], mean: Tensor) -> None:
        """A piece of tensor ``name``, flattened, from element ``start`` on.

        Args:
            what: the ledger's word for the exchange.
            name: which tensor.
            start: where the piece begins.
            rows: the participants' values, in order; none with ``reduction="all_reduce"`` over several processes.
            mean: their mean.
        """


class Channel:
    """Mean and exchange over all workers, wherever they are hosted. Every process calls the same methods in step.

    Args:
        world: which workers are hosted here, and how to reach the others.
        clock: gives the number of completed local steps, for the ledger.
        ordered: sum in the workers' order, so that results don't depend on the layout; else in the order of the
            back end's all-reduce.

    Attributes:
        workers: global ids of all workers.
        observer: told what is averaged, if not None.
    """

    def __init__(self, world: World, clock: Callable[[], int], ordered: bool = True) -> None:
        self.world = world
        self.workers = list(range(world.num_workers))
        self.ledger = Ledger()
        self.clock = clock
        self.ordered = ordered
        self.observer: MeanObserver | None = None

    def mean(
        self,
        names: Iterable[str],
        read: Read,
        workers: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        what: str | None = "delta",
        like: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The mean over workers, tensor by tensor; see :func:`mean_of`.

        Args:
            names: which tensors, in the same order on all processes.
            read: gives worker i's tensors; called for workers hosted here only. All workers' have the same shapes and
                dtypes.
            workers: who takes part; default all.
            weights: one weight ≥ 0 per participant, normalised to sum 1 here; default 1/N each.
            what: what the ledger calls it; None for means that no real cluster would send.
            like: name → a tensor of the right shape, dtype and device; default: what ``read`` gives for the first
                worker hosted here.

        Returns:
            New tensors of the inputs' shapes; half types come back as float32, in which they are accumulated.
        """
        workers, names = self.workers if workers is None else list(workers), list(names)
        if weights is not None and (len(weights) != len(workers) or min(weights) < 0 or not sum(weights)):
            raise ValueError(
                f"`weights` (={list(weights)}) must hold one number ≥ 0 for each of the {len(workers)} participants"
                " and not only zeros."
            )
        if weights is not None:
            weights = [weight for _, weight in sorted(zip(workers, weights, strict=True))]
        workers = sorted(workers)
        held = {w: read(w) for w in workers if w in self.world.workers}
        if like is None:
            like = next(iter(held.values())) if held else read(self.world.workers[0])
        shapes = {n: shape_of(like, n) for n in names}
        if self.world.size == 1:
            result = self._mean_here(names, list(held.values()), weights, what, shapes)
        else:
            result = self._mean_over_processes(names, held, workers, weights, what, shapes)
        sent = sum(t.nbytes for t in shapes.values())
        if what is not None:
            self.record(what, sent)
        return result

    def _mean_here(
        self,
        names: Sequence[str],
        held: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float] | None,
        what: str | None,
        like: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """In chunks, so that memory stays bounded."""
        result = {n: room_for(like[n]) for n in names}
        for n in names:
            readers = [reader(tensors, n) for tensors in held]
            for ((_, start, stop),) in chunks([n], like, means.CHUNK // len(held) or 1):
                pieces = [read(start, stop) for read in readers]
                mean = result[n][start:stop].copy_(mean_of(pieces, weights))
                if self.observer is not None:
                    self.observer.add(what, n, start, pieces, mean)
        return {n: in_shape(result[n], like[n]) for n in names}

    def _mean_over_processes(
        self,
        names: Sequence[str],
        held: Mapping[int, Mapping[str, Tensor]],
        participants: Sequence[int],
        weights: Sequence[float] | None,
        what: str | None,
        like: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """In chunks, so that memory stays bounded; each process averages its slice of a chunk and hands it round."""
        world = self.world
        total = len(participants) if weights is None else sum(weights)
        shares = {w: (1 if weights is None else weights[i]) / total for i, w in enumerate(participants)}
        result = {n: room_for(like[n]) for n in names}
        latest: dict[int, tuple[str, Callable[[int, int], Tensor]]] = {}

        def piece(worker: int, name: str, start: int, stop: int) -> Tensor:
            if latest.get(worker, ("",))[0] != name:
                latest[worker] = name, reader(held[worker], name)
            return latest[worker][1](start, stop)

        for segments in chunks(names, like, means.CHUNK // len(world.workers) or 1):
            kind = like[segments[0][0]]
            width = -(-sum(stop - start for _, start, stop in segments) // world.size)
            rows = torch.zeros(len(held), width * world.size, dtype=kind.dtype.to_real(), device=kind.device)
            for row, worker in zip(rows, held, strict=True):
                at = 0
                for name, start, stop in segments:
                    row[at : at + stop - start] = piece(worker, name, start, stop)
                    at += stop - start
            if self.ordered:
                slices = self._slices_of(rows, participants, width)
                own = mean_of(slices, weights)
                chunk = own.new_empty(width * world.size)
                with world.label_errors(_MEAN):
                    pieces = [bytes_of(part) for part in torch.split(chunk, width)]
                    dist.all_gather(pieces, bytes_of(own))  # all_gather_into_tensor has changed its name
            else:
                slices = []
                chunk = rows.new_zeros(width * world.size, dtype=accumulator(rows.dtype))
                for row, worker in zip(rows, held, strict=True):
                    chunk += row.to(chunk.dtype) * (shares[worker] / world.team)
                with world.label_errors(_MEAN):
                    dist.all_reduce(chunk)
            at = 0
            for name, start, stop in segments:
                result[name][start:stop] = chunk[at : at + stop - start]
                self._show(what, name, start, at, at + stop - start, width, slices, chunk)
                at += stop - start
        return {n: in_shape(result[n], like[n]) for n in names}

    def _slices_of(self, rows: Tensor, participants: Sequence[int], width: int) -> list[Tensor]:
        """Every participant's values of this process's slice, in order. Members of a team do their own slices each."""
        world = self.world
        mates = [r for r in range(world.size) if r % world.team == world.member]
        sent = rows.view(len(rows), world.size, width)[:, mates].transpose(0, 1).reshape(-1)
        counts = {r: sum(w in participants for w in world.hosted_by(r)) if r in mates else 0 for r in range(world.size)}
        received = rows.new_empty(sum(counts.values()) * width)
        nbytes = width * rows.itemsize
        to_receive = [counts[r] * nbytes for r in range(world.size)]
        to_send = [len(rows) * nbytes if r in mates else 0 for r in range(world.size)]
        with world.label_errors(_MEAN):
            dist.all_to_all_single(bytes_of(received), bytes_of(sent), to_receive, to_send)
        return list(received.view(-1, width))

    def _show(
        self,
        what: str | None,
        name: str,
        start: int,
        begin: int,
        end: int,
        width: int,
        slices: Sequence[Tensor],
        chunk: Tensor,
    ) -> None:
        """Shows the observer what of ``chunk[begin:end]`` (of ``name``, from ``start`` on) is this process's slice."""
        low, high = max(begin, self.world.rank * width), min(end, (self.world.rank + 1) * width)
        if self.observer is not None and low < high:
            offset = self.world.rank * width
            rows = [s[low - offset : high - offset] for s in slices]
            self.observer.add(what, name, start + low - begin, rows, chunk[low:high])

    @torch.no_grad()
    def copies_of(self, worker: int, names: Iterable[str], read: Read, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``worker``'s tensors, on every process.

        Args:
            worker: whose.
            names: which tensors, in the same order on all processes.
            read: gives the worker's tensors; called where it is hosted.
            like: name → a tensor of the right shape, dtype and device.
        """
        held = read(worker) if worker in self.world.workers else None
        copies = {n: torch.empty_like(like[n]) if held is None else held[n].clone() for n in names}
        self.world.broadcast(copies.values(), self.world.host(worker), f"copies of worker {worker}'s tensors")
        return copies

    def exchange(
        self, pairs: Iterable[tuple[int, int]], names: Iterable[str], read: Read, what: str = "weights"
    ) -> dict[int, dict[str, Tensor]]:
        """Each pair of workers swaps its tensors (gossip).

        Args:
            pairs: disjoint pairs of different workers, the same on all processes.
            names: which tensors.
            read: gives worker i's tensors; called for workers hosted here only.
            what: what the ledger calls it.

        Returns:
            For every worker of a pair that is hosted here: a copy of its partner's tensors.
        """
        pairs, names, world = list(pairs), list(names), self.world
        paired = [w for pair in pairs for w in pair]
        if len(set(paired)) != len(paired) or not set(paired) <= set(self.workers):
            raise ValueError(f"`pairs` (={pairs}) must be disjoint pairs of different workers out of {self.workers}.")
        received: dict[int, dict[str, Tensor]] = {}
        for own, partner in [pair for a, b in pairs for pair in ((a, b), (b, a))]:  # all processes pair after pair
            if own not in world.workers:
                continue
            if partner in world.workers:
                received[own] = {n: read(partner)[n].clone() for n in names}
                continue
            received[own] = {n: torch.empty_like(read(own)[n]) for n in names}
            rank = world.host(partner, world.member)
            for name in names:
                outgoing, incoming = flat(read(own)[name]).contiguous(), flat(received[own][name]).contiguous()
                operations = [
                    dist.P2POp(dist.isend, bytes_of(outgoing), rank),
                    dist.P2POp(dist.irecv, bytes_of(incoming), rank),
                ]
                with world.label_errors(f"the swap between workers {own} and {partner}"):
                    for work in dist.batch_isend_irecv(operations):
                        work.wait()
                target = real_view(received[own][name])
                target.copy_(incoming.view_as(target))
        if pairs:
            mine = read(world.workers[0])
            self.record(what, sum(mine[n].nbytes for n in names))
        return received

    def record(self, what: str, payload_bytes: int) -> None:
        """Enters an exchange in the ledger; algorithms that move tensors themselves call it."""
        if payload_bytes:
            self.ledger.entries.append(Exchange(self.clock(), what, payload_bytes))
