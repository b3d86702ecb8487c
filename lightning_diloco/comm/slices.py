"""Slices of chunks on their way between processes: each process averages its own slice of every chunk.

Owns the layout of slices and their collectives. Does not own the mean (``means.py``). Imports nothing of Lightning.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_diloco.comm.means import reader
from lightning_diloco.comm.tensors import bytes_of
from lightning_diloco.comm.world import World


class LatestReader:
    """Reads pieces of a worker's tensors, of which the latest is kept flattened."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._name = ""
        self._read: Callable[[int, int], Tensor] | None = None

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        if self._read is None or name != self._name:
            self._name, self._read = name, reader(self._tensors, name)
        return self._read(start, stop)

    def joined(self, segments: Sequence[tuple[str, int, int]]) -> Tensor:
        """The values of a chunk."""
        pieces = [self(*segment) for segment in segments]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def own_part(world: World, segments: Sequence[tuple[str, int, int]], width: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, first element in the tensor, begin and end in the slice) of what lies in this process's slice."""
    offset, at = world.rank * width, 0
    for name, start, stop in segments:
        low, high = max(at, offset), min(at + stop - start, offset + width)
        if low < high:
            yield name, start + low - at, low - offset, high - offset
        at += stop - start


def slices_of(
    world: World, rows: Mapping[int, Tensor], participants: Sequence[int], width: int, like: Tensor, where: str
) -> list[Tensor]:
    """Every participant's values of this process's slice of a chunk, in the workers' order.

    The members of a team hold the same values: each process gathers from the members with its own number.
    """
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
    with world.label_errors(where):
        dist.all_to_all_single(bytes_of(received), bytes_of(sent), to_receive, to_send)
    return list(received.view(-1, width))


def gathered_slices(world: World, own: Tensor, where: str) -> Tensor:
    """The processes' slices of a chunk, one after the other."""
    chunk = own.new_empty(len(own) * world.size)
    with world.label_errors(where):
        pieces = [bytes_of(part) for part in torch.split(chunk, len(own))]
        dist.all_gather(pieces, bytes_of(own))  # all_gather_into_tensor has changed its name
    return chunk
