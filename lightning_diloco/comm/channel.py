"""Means and exchanges of tensors between workers, wherever they are hosted, and the ledger that counts their bytes.

Does not own the arithmetic of a mean (``means.py``), the choice of tensors and steps (``algorithms/``), nor the layout
of workers over processes (``world.py``). Imports nothing of Lightning.

A mean over W processes moves each tensor as a ring all-reduce does, twice: with n workers per process and P bytes, a
process sends n·P·(W−1)/W, so that each process can sum its slice of the tensor in the workers' order, and P·(W−1)/W
with the result. For n = 1 that is the ring's 2P(W−1)/W, H times less often than under DDP.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
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
    """An entry of the ledger.

    Attributes:
        local_step: local steps done at the exchange.
        what: kind of the tensors: "delta", "weights", "buffers", "inner_state", or a word of the algorithm's.
        payload_bytes: bytes that each participant sends, in one direction; the factors of a ring (2(N−1)/N) and of a
            parameter server (up and down) are not included.
    """

    local_step: int
    what: str
    payload_bytes: int


@dataclass
class Ledger:
    """Every exchange of a fit, in order. Means for evaluation are not communication and don't appear."""

    entries: list[Exchange] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Bytes that a worker has sent so far, in one direction."""
        return sum(entry.payload_bytes for entry in self.entries)


class MeanObserver(Protocol):
    """Statistics that are taken from the pieces of a mean as they pass through this process."""

    def add(self, what: str | None, name: str, start: int, rows: Sequence[Tensor], mean: Tensor) -> None:
        """Adds a piece of tensor ``name``, flattened, from element ``start`` on.

        Args:
            what: the ledger's word for the exchange.
            name: name of the tensor.
            start: first element of the piece.
            rows: the participants' values, in order; empty with ``reduction="all_reduce"`` over several processes.
            mean: their mean.
        """


class Channel:
    """Mean and exchange over all workers. Every process calls the same methods in the same order.

    Args:
        world: the processes and the workers that each hosts.
        clock: gives the number of completed local steps, for the ledger.
        ordered: sum in the workers' order, so that results don't depend on the layout; else in the order of the
            back end's all-reduce.

    Attributes:
        workers: global ids of all workers.
        observer: statistics of the present round, if not None.
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
        """The mean over workers, tensor by tensor; see :func:`~lightning_diloco.comm.means.mean_of`.

        Tensors are cut into chunks, so that memory stays bounded. Each process averages its slice of a chunk, and all
        processes gather the slices.

        Args:
            names: names of the tensors, in the same order on all processes.
            read: gives worker i's tensors; called for workers hosted here only. Shapes and dtypes are equal for all
                workers.
            workers: the participants; default all.
            weights: a weight ≥ 0 per participant, normalised to sum 1 here; default 1/N each.
            what: the ledger's word for the exchange; None for means that no real cluster would send.
            like: name → a tensor of the right shape, dtype and device; default: the tensors that ``read`` gives for the
                first worker hosted here.

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
        tensors = {w: read(w) for w in workers if w in self.world.workers}
        if like is None:
            like = next(iter(tensors.values())) if tensors else read(self.world.workers[0])
        shapes = {n: shape_of(like, n) for n in names}
        result = {n: room_for(shapes[n]) for n in names}
        readers = {w: _LatestReader(of_worker) for w, of_worker in tensors.items()}
        for segments in self._chunks(names, shapes):
            rows = {w: _row(read_piece, segments) for w, read_piece in readers.items()}
            first = shapes[segments[0][0]]
            length = sum(stop - start for _, start, stop in segments)
            width = -(-length // self.world.size)
            if self.ordered or self.world.size == 1:
                slices = self._slices_of(rows, workers, width, first)
                chunk = self._gathered(mean_of(slices, weights))
            else:
                slices = []
                chunk = self._reduced(rows, workers, weights, length, first)
            at = 0
            for name, start, stop in segments:
                result[name][start:stop] = chunk[at : at + stop - start]
                self._observe(what, name, start, at, at + stop - start, width, slices, chunk)
                at += stop - start
        if what is not None:
            self.record(what, sum(t.nbytes for t in shapes.values()))
        return {n: in_shape(result[n], shapes[n]) for n in names}

    def _chunks(self, names: Sequence[str], like: Mapping[str, Tensor]) -> Iterator[list[tuple[str, int, int]]]:
        """Segments of tensors that are averaged together. A single process sends nothing and joins no tensors."""
        size = means.CHUNK // len(self.world.workers) or 1
        if self.world.size > 1:
            return chunks(names, like, size)
        if self.world.device.type == "cpu":
            size = min(size, means.PIECE)
        return chain.from_iterable(chunks([name], like, size) for name in names)

    def _slices_of(
        self, rows: Mapping[int, Tensor], participants: Sequence[int], width: int, like: Tensor
    ) -> list[Tensor]:
        """Every participant's values of this process's slice of a chunk, in the workers' order.

        The members of a team hold the same values: each process gathers from the members with its own number.
        """
        world = self.world
        if world.size == 1:
            return list(rows.values())
        peers = [r for r in range(world.size) if r % world.team == world.member]
        # zeros at the end of the last slices, so that all slices have the same width and need no table of lengths
        padded = like.new_zeros((len(rows), width * world.size), dtype=like.dtype.to_real())
        for target, row in zip(padded, rows.values(), strict=True):
            target[: len(row)] = row
        sent = padded.view(len(rows), world.size, width)[:, peers].transpose(0, 1).reshape(-1)
        # a process that hosts no participant sends nothing, but takes part: the others wait for it in the collective
        counts = {r: sum(w in participants for w in world.hosted_by(r)) if r in peers else 0 for r in range(world.size)}
        received = padded.new_empty(sum(counts.values()) * width)
        nbytes = width * padded.itemsize
        to_receive = [counts[r] * nbytes for r in range(world.size)]
        to_send = [len(rows) * nbytes if r in peers else 0 for r in range(world.size)]
        with world.label_errors(_MEAN):
            dist.all_to_all_single(bytes_of(received), bytes_of(sent), to_receive, to_send)
        return list(received.view(-1, width))

    def _gathered(self, mean: Tensor) -> Tensor:
        """The processes' slices of a chunk, one after the other."""
        if self.world.size == 1:
            return mean
        chunk = mean.new_empty(len(mean) * self.world.size)
        with self.world.label_errors(_MEAN):
            pieces = [bytes_of(part) for part in torch.split(chunk, len(mean))]
            dist.all_gather(pieces, bytes_of(mean))  # all_gather_into_tensor has changed its name
        return chunk

    def _reduced(
        self,
        rows: Mapping[int, Tensor],
        participants: Sequence[int],
        weights: Sequence[float] | None,
        length: int,
        like: Tensor,
    ) -> Tensor:
        """The mean of a chunk by the back end's all-reduce; the members of a team add a share each."""
        total = len(participants) if weights is None else sum(weights)
        share = {w: (1 if weights is None else weights[i]) / total for i, w in enumerate(participants)}
        chunk = like.new_zeros(length, dtype=accumulator(like.dtype.to_real()))
        for worker, row in rows.items():
            chunk += row.to(chunk.dtype) * (share[worker] / self.world.team)
        with self.world.label_errors(_MEAN):
            dist.all_reduce(chunk)
        return chunk

    def _observe(
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
        """Hands the observer the piece of ``name`` in ``chunk[begin:end]`` that is in this process's slice."""
        offset = self.world.rank * width
        low, high = max(begin, offset), min(end, offset + width)
        if self.observer is not None and low < high:
            rows = [s[low - offset : high - offset] for s in slices]
            self.observer.add(what, name, start + low - begin, rows, chunk[low:high])

    @torch.no_grad()
    def copies_of(self, worker: int, names: Iterable[str], read: Read, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``worker``'s tensors, on every process.

        Args:
            worker: global id of the worker.
            names: names of the tensors, in the same order on all processes.
            read: gives the worker's tensors; called where it is hosted.
            like: name → a tensor of the right shape, dtype and device.
        """
        tensors = read(worker) if worker in self.world.workers else None
        copies = {n: torch.empty_like(like[n]) if tensors is None else tensors[n].clone() for n in names}
        self.world.broadcast(copies.values(), self.world.host(worker), f"copies of worker {worker}'s tensors")
        return copies

    def exchange(
        self, pairs: Iterable[tuple[int, int]], names: Iterable[str], read: Read, what: str = "weights"
    ) -> dict[int, dict[str, Tensor]]:
        """Each pair of workers swaps its tensors (gossip).

        Args:
            pairs: disjoint pairs of different workers, the same on all processes.
            names: names of the tensors.
            read: gives worker i's tensors; called for workers hosted here only.
            what: the ledger's word for the exchange.

        Returns:
            For every worker of a pair that is hosted here: a copy of its partner's tensors.
        """
        pairs, names, world = list(pairs), list(names), self.world
        paired = [w for pair in pairs for w in pair]
        if len(set(paired)) != len(paired) or not set(paired) <= set(self.workers):
            raise ValueError(f"`pairs` (={pairs}) must be disjoint pairs of different workers out of {self.workers}.")
        received: dict[int, dict[str, Tensor]] = {}
        # every process walks the pairs in the same order, else two processes could each wait for the other's first send
        for worker, partner in [pair for a, b in pairs for pair in ((a, b), (b, a))]:
            if worker not in world.workers:
                continue
            if partner in world.workers:
                received[worker] = {n: read(partner)[n].clone() for n in names}
                continue
            received[worker] = {n: torch.empty_like(read(worker)[n]) for n in names}
            rank = world.host(partner, world.member)
            for name in names:
                outgoing, incoming = flat(read(worker)[name]).contiguous(), flat(received[worker][name]).contiguous()
                operations = [  # both at once: with one after the other, two processes could both wait in their send
                    dist.P2POp(dist.isend, bytes_of(outgoing), rank),
                    dist.P2POp(dist.irecv, bytes_of(incoming), rank),
                ]
                with world.label_errors(f"the swap between workers {worker} and {partner}"):
                    for work in dist.batch_isend_irecv(operations):
                        work.wait()
                target = real_view(received[worker][name])
                target.copy_(incoming.view_as(target))
        if pairs:
            sent = read(world.workers[0])
            self.record(what, sum(sent[n].nbytes for n in names))
        return received

    def record(self, what: str, payload_bytes: int) -> None:
        """Enters an exchange in the ledger; algorithms that move tensors themselves call it."""
        if payload_bytes:
            self.ledger.entries.append(Exchange(self.clock(), what, payload_bytes))


class _LatestReader:
    """Reads pieces of a worker's tensors, of which the latest is kept flattened."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._name = ""
        self._read: Callable[[int, int], Tensor] | None = None

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        if self._read is None or name != self._name:
            self._name, self._read = name, reader(self._tensors, name)
        return self._read(start, stop)


def _row(read: _LatestReader, segments: Sequence[tuple[str, int, int]]) -> Tensor:
    """A worker's values of a chunk; a view where the chunk is a piece of a single tensor."""
    pieces = [read(*segment) for segment in segments]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
