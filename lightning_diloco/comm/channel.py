"""Means of tensors over workers, wherever they are hosted, dense or coded; and the ledger's clock.

Does not own the arithmetic of a mean (``means.py``, ``decoded.py``), the transport of payloads (``payloads.py``), the
choice of tensors and steps (``algorithms/``), nor the layout of workers over processes (``world.py``). Imports nothing
of Lightning.

A mean over W processes moves each tensor as a ring all-reduce does, twice: with n workers per process and P bytes, a
process sends n·P·(W−1)/W, so that each process can sum its slice of the tensor in the workers' order, and P·(W−1)/W
with the result. For n = 1 that is the ring's 2P(W−1)/W, H times less often than under DDP. With a codec each process
sends its workers' payloads to every other, n·C·(W−1) for C bytes of payload, and decodes all of them: a payload can't
be cut into slices.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_diloco.codecs.base import Codec, Payload, payload_bytes
from lightning_diloco.comm import means
from lightning_diloco.comm.decoded import DecodedMean
from lightning_diloco.comm.ledger import Ledger, LedgerEntry
from lightning_diloco.comm.means import (
    PieceMeans,
    Row,
    accumulator,
    chunks,
    in_shape,
    joined_names,
    joined_rows,
    room_for,
    shape_of,
)
from lightning_diloco.comm.payloads import gathered
from lightning_diloco.comm.slices import LatestReader, gathered_slices, own_part, slices_of
from lightning_diloco.comm.statistics import MeanStatistics
from lightning_diloco.comm.world import World

_MEAN = "a mean over workers"
_HELD = 0.05  # decoded elements in memory beside the result of a coded mean, over the elements of that result

Read = Callable[[int], Mapping[str, Tensor]]  # worker → named tensors


class Channel:
    """Means over workers. Every process calls the same methods in the same order.

    Args:
        world: the processes and the workers that each hosts.
        clock: gives the number of completed local steps, for the ledger.
        ordered: sum in the workers' order, so that results don't depend on the layout; else in the order of the
            back end's all-reduce.

    Attributes:
        workers: global ids of the workers that are there: all, unless the engine says otherwise; ascending.
        ledger: what was sent, as far as it was recorded.
        weights: worker → weight > 0 in every mean that names none; None: equal weights.
        part: the part of the workers that send what is recorded now: 1, unless they send at different times.
    """

    def __init__(self, world: World, clock: Callable[[], int], ordered: bool = True) -> None:
        self.world = world
        self.workers = list(range(world.num_workers))
        self.ledger = Ledger()
        self.weights: Mapping[int, float] | None = None
        self.part = 1.0
        self.clock = clock
        self.ordered = ordered

    @property
    def here(self) -> list[int]:
        """Those of ``workers`` that this process hosts; there may be none."""
        return [w for w in self.world.workers if w in self.workers]

    @property
    def on_all_processes(self) -> bool:
        """Whether every process hosts one of ``workers``."""
        hosts = {self.world.host(w, member) for w in self.workers for member in range(self.world.team)}
        return len(hosts) == self.world.size

    def common(self, names: Sequence[str], read: Read, like: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors that all workers hold alike: a worker's of this process, or sent to where there is none.

        All processes call it together.

        Args:
            names: names of the tensors, in the same order on all processes.
            read: gives worker i's tensors.
            like: name → a tensor of the right shape, dtype and device.
        """
        if self.on_all_processes:
            return {n: t for n, t in read(self.here[0]).items() if n in names}
        return self.copies_of(self.workers[0], names, read, like)

    @torch.no_grad()
    def mean(
        self,
        names: Iterable[str],
        read: Read,
        workers: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        like: Mapping[str, Tensor] | None = None,
        statistics: MeanStatistics | None = None,
    ) -> dict[str, Tensor]:
        """The mean over workers, tensor by tensor; see :func:`~lightning_diloco.comm.means.mean_of`.

        Tensors are cut into pieces, so that memory stays bounded. Over several processes each process averages its
        slice of a chunk, and all processes gather the slices. Records nothing: see :meth:`record`.

        Args:
            names: names of the tensors, in the same order on all processes.
            read: gives worker i's tensors; called once for each participant hosted here. Shapes and dtypes are equal
                for all workers.
            workers: the participants; default all that are there.
            weights: a weight ≥ 0 per participant, normalised to sum 1 here; default: the channel's ``weights``.
            like: name → a tensor of the right shape, dtype and device; default: the tensors that ``read`` gives for the
                first worker hosted here.
            statistics: measures what passes through this process.

        Returns:
            New tensors of the inputs' shapes; half types come back as float32, in which they are accumulated.
        """
        names = list(names)
        workers, weights = self._participants(workers, weights)
        tensors, shapes = self._tensors_of(names, read, workers, like)
        if self.world.size == 1:
            return self._mean_here(names, tensors, shapes, weights, statistics)
        result = {n: room_for(shapes[n]) for n in names}
        readers = {w: LatestReader(of_worker) for w, of_worker in tensors.items()}
        for segments in chunks(names, shapes, means.CHUNK // len(self.world.workers) or 1):
            rows = {w: read_piece.joined(segments) for w, read_piece in readers.items()}
            first = shapes[segments[0][0]]
            length = sum(stop - start for _, start, stop in segments)
            width = -(-length // self.world.size)
            if self.ordered:
                slices = slices_of(self.world, rows, workers, width, first, _MEAN)
                chunk = self._averaged(slices, weights, own_part(self.world, segments, width), statistics)
            else:
                chunk = self._reduced(rows, workers, weights, length, first)
                if statistics is not None:
                    for name, start, low, high in own_part(self.world, segments, width):
                        part = chunk[self.world.rank * width :][low:high]
                        statistics.add_square(name, statistics.square_of(name, start, part))
            at = 0
            for name, start, stop in segments:
                result[name][start:stop] = chunk[at : at + stop - start]
                at += stop - start
        return {n: in_shape(result[n], shapes[n]) for n in names}

    @torch.no_grad()
    def coded_mean(
        self,
        names: Iterable[str],
        read: Read,
        codec: Codec,
        memories: Callable[[int, str], dict[str, Tensor]],
        generators: Callable[[int], torch.Generator],
        workers: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        like: Mapping[str, Tensor] | None = None,
        statistics: MeanStatistics | None = None,
    ) -> tuple[dict[str, Tensor], int]:
        """The mean of what each worker's payload decodes to; the arithmetic is that of :meth:`mean`.

        Tensor by tensor every participant hosted here encodes; over several processes the payloads themselves are
        gathered, and every process decodes and averages all of them. Records nothing: see :meth:`record`.

        Args:
            names: as for :meth:`mean`; a participant encodes in this order.
            read: as for :meth:`mean`.
            codec: encodes and decodes.
            memories: (worker, name) → what the codec keeps of that tensor from call to call.
            generators: worker → its random numbers, the same on all processes of a team.
            workers: as for :meth:`mean`.
            weights: as for :meth:`mean`.
            like: as for :meth:`mean`.
            statistics: measures the decoded values and their mean.

        Returns:
            New tensors of the inputs' shapes in the dtype of decoded ones (float32, or float64 for float64); and the
            bytes that a participant has sent, of the one that sent most.
        """
        names = list(names)
        workers, weights = self._participants(workers, weights)
        tensors, shapes = self._tensors_of(names, read, workers, like)
        drawn_from = {w: generators(w) for w in tensors}
        sent = dict.fromkeys(workers, 0)
        decoded = DecodedMean(codec, len(workers), weights)
        most = int((1 + _HELD) * sum(t.numel() for t in shapes.values()))  # of the result and beside it
        result: dict[str, Tensor] = {}
        for group in self._groups(names, shapes, len(workers)):
            here: dict[int, list[Payload]] = {w: [] for w in tensors}
            for name in group:
                for w, of_worker in tensors.items():
                    here[w].append(codec.encode(of_worker[name], memories(w, name), drawn_from[w]))
            payloads = gathered(self.world, here, shapes[group[0]].device, _MEAN)
            for i, name in enumerate(group):
                of_tensor = [payloads[w][i] for w in workers]
                for w, payload in zip(workers, of_tensor, strict=True):
                    sent[w] += payload_bytes(payload)
                size = shapes[name].numel()
                most -= size
                part = (size * self.world.rank // self.world.size, size * (self.world.rank + 1) // self.world.size)
                result[name] = decoded.of(name, of_tensor, shapes[name], statistics, part, most)
        return result, max(sent.values())

    def _participants(
        self, workers: Sequence[int] | None, weights: Sequence[float] | None
    ) -> tuple[list[int], list[float] | None]:
        """The participants in ascending order, with their weights."""
        workers = self.workers if workers is None else list(workers)
        if weights is None:
            workers = sorted(workers)
            return workers, None if self.weights is None else [self.weights[w] for w in workers]
        if len(weights) != len(workers) or min(weights) < 0 or not sum(weights):
            raise ValueError(
                f"`weights` (={list(weights)}) must hold one number ≥ 0 for each of the {len(workers)} participants"
                " and not only zeros."
            )
        return sorted(workers), [weight for _, weight in sorted(zip(workers, weights, strict=True))]

    def _tensors_of(
        self, names: Sequence[str], read: Read, workers: Sequence[int], like: Mapping[str, Tensor] | None
    ) -> tuple[dict[int, Mapping[str, Tensor]], dict[str, Tensor]]:
        """The tensors of participants hosted here, and the shapes of all tensors."""
        tensors = {w: read(w) for w in workers if w in self.world.workers}
        if like is None:
            like = next(iter(tensors.values())) if tensors else read(self.world.workers[0])
        return tensors, {n: shape_of(like, n) for n in names}

    def _mean_here(
        self,
        names: Sequence[str],
        tensors: Mapping[int, Mapping[str, Tensor]],
        shapes: Mapping[str, Tensor],
        weights: Sequence[float] | None,
        statistics: MeanStatistics | None,
    ) -> dict[str, Tensor]:
        """The mean over workers of this process."""
        of_kind: dict[tuple[torch.dtype, torch.device], PieceMeans] = {}
        means_of: dict[str, Tensor] = {}
        by_layer = () if statistics is None else (statistics.layer_of,)
        for group in joined_names(names, shapes, *by_layer):
            like = shapes[group[0]]
            kind = like.dtype, like.device
            if kind not in of_kind:
                of_kind[kind] = PieceMeans(len(tensors), weights, *kind)
            rooms = [room_for(shapes[n]) for n in group]
            mean = rooms[0] if len(group) == 1 else torch.cat(rooms)
            of_kind[kind].take(joined_rows(list(tensors.values()), group), mean, tuple(group), 0, statistics)
            of_group = [mean] if len(group) == 1 else torch.split(mean, [len(room) for room in rooms])
            means_of |= {n: in_shape(m, shapes[n]) for n, m in zip(group, of_group, strict=True)}
        return {n: means_of[n] for n in names}

    def _groups(self, names: Sequence[str], shapes: Mapping[str, Tensor], workers: int) -> Iterator[list[str]]:
        """Tensors whose payloads are sent together, in order: one by one in a single process."""
        group: list[str] = []
        free = most = means.CHUNK // workers if self.world.size > 1 else 0
        for name in names:
            if group and (shapes[name].numel() > free or shapes[name].device != shapes[group[0]].device):
                yield group
                group, free = [], most
            group.append(name)
            free -= shapes[name].numel()
        if group:
            yield group

    def _averaged(
        self,
        slices: Sequence[Tensor],
        weights: Sequence[float] | None,
        parts: Iterable[tuple[str, int, int, int]],
        statistics: MeanStatistics | None,
    ) -> Tensor:
        """The mean of a chunk: of this process's slice from ``slices``, of the others' slices gathered."""
        like = slices[0]
        mean = like.new_zeros(len(like), dtype=accumulator(like.dtype))
        of_pieces = PieceMeans(len(slices), weights, like.dtype, like.device)
        for name, start, low, high in parts:
            of_pieces.take([Row(row[low:high]) for row in slices], mean[low:high], name, start, statistics)
        return gathered_slices(self.world, mean, _MEAN)

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

    def record(
        self,
        what: str,
        payload_bytes: int,
        participants: int | None = None,
        dense_bytes: int | None = None,
        gathered: bool = False,
    ) -> None:
        """Enters in the ledger what each participant has sent, unless it is nothing; one worker sends to nobody.

        Args:
            what: kind of the tensors.
            payload_bytes: bytes that a participant sends.
            participants: how many workers had a share in the mean; default all.
            dense_bytes: bytes of the mean; default as many as of the payload.
            gathered: whether every message had to reach whoever averages.
        """
        if payload_bytes and self.world.num_workers > 1:
            count = self.world.num_workers if participants is None else participants
            dense = payload_bytes if dense_bytes is None else dense_bytes
            self.ledger.add(LedgerEntry(self.clock(), what, payload_bytes, count, dense, gathered, self.part))
