"""Gathers a small object of every process on all of them, in two messages: to process 0, and back with all objects.

A step of several processes gathers several times (losses, moves of loops, statistics), and for some hundred bytes the
number of messages is the cost: a barrier that says who is missing and torch's ``all_gather_object`` after it take ten
times as long. Here the message to process 0 is the barrier, too. A message has a first part of fixed size, and a second
one if the object doesn't fit. Owns its messages only; when processes gather, and the words about it, are
``world.py``'s. Imports nothing of Lightning.
"""

import pickle
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HEAD = 512  # bytes of a message's first part
ROOM = HEAD - 8  # after the object's length


def gather_objects(value: Any, rank: int, size: int, number: int, group: Any, timeout: timedelta) -> list[Any]:
    """Waits until all processes have called this; returns the ``value`` of every process, by rank.

    Args:
        value: anything picklable; it passes through process 0, so large ones take long.
        rank: this process's, 0 ≤ rank < size.
        size: number of processes.
        number: how often these processes have gathered before; with different numbers they don't meet.
        group: a gloo group of all processes.
        timeout: how long a process waits for others to come, and for each part of a message, > 0. A process that is
            there before process 0 waits as long for process 0, and then as long for the rest.

    Raises:
        RuntimeError: not all came in time; process 0 knows and says which.
    """
    line = _Line(group, number, timeout)
    mine = pickle.dumps(value)
    packed: list[bytes | bytearray]
    if rank == 0:
        others = range(1, size)
        packed = [mine, *line.receive(others)]  # still packed: what can't be unpacked fails where everybody has it
        line.send(pickle.dumps(packed), others)
    else:
        try:
            line.send(mine, [0])
            packed = pickle.loads(line.receive([0])[0])
        except RuntimeError as error:
            raise RuntimeError(f"No answer from process 0, whose output may say who is missing. {error}") from None
    return [pickle.loads(data) for data in packed]


class _Line:
    """Messages between processes of a group, which have a number."""

    def __init__(self, group: Any, number: int, timeout: timedelta) -> None:
        self._how = {"group": group, "tag": number}
        self._timeout = timeout.total_seconds()

    def send(self, data: bytes, to: Sequence[int]) -> None:
        head = bytearray(len(data).to_bytes(8, "little") + data[:ROOM]).ljust(HEAD, b"\0")
        parts = [_tensor(part) for part in (head, bytearray(memoryview(data)[ROOM:])) if part]
        self._complete((r, partial(dist.isend, part, r, **self._how)) for r in to for part in parts)

    def receive(self, sources: Sequence[int]) -> list[bytearray]:
        heads = {r: bytearray(HEAD) for r in sources}
        self._complete((r, partial(dist.irecv, _tensor(head), r, **self._how)) for r, head in heads.items())
        objects = {r: bytearray(int.from_bytes(head[:8], "little")) for r, head in heads.items()}
        for r, data in objects.items():
            data[:ROOM] = heads[r][8 : 8 + len(data)]
        rests = {r: _tensor(memoryview(data)[ROOM:]) for r, data in objects.items() if len(data) > ROOM}
        self._complete((r, partial(dist.irecv, rest, r, **self._how)) for r, rest in rests.items())
        return list(objects.values())

    def _complete(self, parts: Iterable[tuple[int, Callable[[], Any]]]) -> None:
        """Begins all parts of messages, and waits for them; an error comes after that, and names all processes."""
        missing: dict[int, RuntimeError] = {}

        def attempt(rank: int, call: Callable[[], Any]) -> Any:
            try:
                return call()
            except RuntimeError as error:
                missing[rank] = error

        deadline = monotonic() + self._timeout
        for rank, work in [(rank, attempt(rank, begin)) for rank, begin in parts]:
            if rank not in missing:  # else what follows is a consequence
                left = max(deadline - monotonic(), 0.001)  # 0 would be for ever
                attempt(rank, partial(work.wait, timedelta(seconds=left)))
        if missing:
            raise RuntimeError("; ".join(f"Process {r} is missing: {missing[r]}" for r in sorted(missing)))


def _tensor(buffer: bytearray | memoryview) -> Tensor:
    """The bytes, not a copy."""
    return torch.frombuffer(buffer, dtype=torch.uint8)
