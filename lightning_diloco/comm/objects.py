"""Gathers a small object of every process on all of them, in two messages: to process 0, and back with all objects.

A step of several processes gathers several times (losses, moves of loops, statistics), and for some hundred bytes the
number of messages is the cost: a barrier that says who is missing and torch's ``all_gather_object`` after it take ten
times as long. Here the message to process 0 is the barrier, too. Owns its messages only; when processes gather, and
the words about it, are ``world.py``'s. Imports nothing of Lightning.
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

HEAD = 512  # bytes of a message's first part, which has a fixed size; the rest, if any, follows in a second one
ROOM = HEAD - 8  # after the length


def gather_objects(value: Any, rank: int, size: int, group: Any, timeout: timedelta) -> list[Any]:
    """Waits until all processes have called this; returns the ``value`` of every process, by rank.

    Args:
        value: anything picklable; it passes through process 0, so large ones take long.
        rank: this process's in ``group``.
        size: number of processes.
        group: a gloo group of all processes.
        timeout: how long a process waits for the others, > 0.

    Raises:
        RuntimeError: not all came in time; on process 0 it names every process that did not.
    """
    deadline = monotonic() + timeout.total_seconds()
    mine = pickle.dumps(value)
    if rank > 0:
        try:
            _send(mine, [0], group, deadline)
            (together,) = _receive([0], group, deadline)
        except RuntimeError as error:
            raise RuntimeError(
                f"No answer from process 0, whose output says which process is missing. {error}"
            ) from None
        packed = pickle.loads(together)
    else:
        others = range(1, size)
        packed = [mine, *_receive(others, group, deadline)]
        _send(pickle.dumps(packed), others, group, deadline)
    return [pickle.loads(data) for data in packed]


def _send(data: bytes, to: Sequence[int], group: Any, deadline: float) -> None:
    head = bytearray(len(data).to_bytes(8, "little") + data[:ROOM]).ljust(HEAD, b"\0")
    parts = [_tensor(part) for part in (head, bytearray(data[ROOM:])) if part]
    _complete(((r, partial(dist.isend, part, r, group=group)) for r in to for part in parts), deadline)


def _receive(sources: Sequence[int], group: Any, deadline: float) -> list[bytes]:
    heads = {r: bytearray(HEAD) for r in sources}
    _complete(((r, partial(dist.irecv, _tensor(head), r, group=group)) for r, head in heads.items()), deadline)
    lengths = {r: int.from_bytes(head[:8], "little") for r, head in heads.items()}
    rests = {r: bytearray(length - ROOM) for r, length in lengths.items() if length > ROOM}
    _complete(((r, partial(dist.irecv, _tensor(rest), r, group=group)) for r, rest in rests.items()), deadline)
    return [bytes(head[8 : 8 + lengths[r]] + rests.get(r, b"")) for r, head in heads.items()]


def _tensor(buffer: bytearray) -> Tensor:
    """The bytes, not a copy."""
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _complete(messages: Iterable[tuple[int, Callable[[], Any]]], deadline: float) -> None:
    """Begins all messages, and waits for their ends; an error comes after all were waited for, with all processes."""
    missing: dict[int, RuntimeError] = {}

    def attempt(rank: int, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            missing[rank] = error

    for rank, work in [(rank, attempt(rank, begin)) for rank, begin in messages]:
        if work is not None:  # 0 seconds would be torch's own timeout
            attempt(rank, partial(work.wait, timedelta(seconds=max(deadline - monotonic(), 0.001))))
    if missing:
        raise RuntimeError("; ".join(f"Process {r} is missing: {missing[r]}" for r in sorted(missing)))
