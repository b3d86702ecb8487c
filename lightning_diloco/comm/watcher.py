"""A thread that says which processes a long wait is for.

Owns the notes of arrivals in the process group's store. No collective is added: a collective would wait, too. Does not
own where the message appears. Imports nothing of Lightning.

A process that has been blocked in a collective for a period (a tenth of ``after``) notes in the store which collective
that is: a number, the same on all processes. A process that has been blocked for ``after`` seconds reads the notes; the
processes whose last note has a lower number have not arrived. The lowest process that has arrived says so. As long as
nobody is blocked for a period, the store isn't used and the thread only looks at an attribute.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Protocol

from lightning_diloco.comm.waiting import Among, Blocked, Waiting

_PERIODS = 10  # per ``after``


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is needed; its clients may be used by several threads."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class Watcher:
    """Watches the collectives of this process, from :meth:`start` to :meth:`stop`.

    Args:
        waiting: knows the collective in which this process is blocked.
        rank: this process.
        peers: the processes among which collectives take place, in ascending order.
        store: the process group's.
        after: seconds that this process is blocked before it says so, > 0.
        say: is called with a message, in the watcher's thread.
    """

    def __init__(
        self,
        waiting: Waiting,
        rank: int,
        peers: Mapping[Among, Sequence[int]],
        store: Store,
        after: float,
        say: Callable[[str], None],
    ) -> None:
        self._waiting, self._rank, self._peers, self._store = waiting, rank, peers, store
        self._after, self._say = after, say
        self._ended = threading.Event()
        self._noted: Blocked | None = None
        self._said: Blocked | None = None
        self._thread = threading.Thread(target=self._watch, name="diloco-watcher", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, unless it is blocked in a store that doesn't answer; then the thread ends with Python."""
        self._ended.set()
        self._thread.join(2 * self._after)

    def _watch(self) -> None:
        with suppress(RuntimeError):  # the store has gone with process 0, of which the collective's own error tells
            while not self._ended.wait(self._after / _PERIODS):
                self.look()

    def look(self) -> None:
        """Notes that this process has arrived, and says who has not, if it is time."""
        blocked = self._waiting.blocked
        if blocked is None:
            return
        seconds = perf_counter() - blocked.began
        if seconds >= self._after / _PERIODS and self._noted is not blocked:
            self._store.set(self._key(blocked.among, self._rank), str(blocked.number))
            self._noted = blocked
        if seconds < self._after or self._said is blocked:
            return
        peers = self._peers[blocked.among]
        arrived = [rank for rank in peers if rank == self._rank or self._last(blocked.among, rank) >= blocked.number]
        missing = [rank for rank in peers if rank not in arrived]
        if missing and arrived[0] == self._rank and self._waiting.blocked is blocked:
            self._said = blocked
            self._say(f"waiting for {_processes(missing)} at {blocked.where} ({seconds:.0f} s)")

    def _last(self, among: Among, rank: int) -> int:
        """The number of the last collective in which ``rank`` has noted its arrival."""
        key = self._key(among, rank)
        return int(self._store.get(key)) if self._store.check([key]) else 0  # `get` waits for a key that is missing

    def _key(self, among: Among, rank: int) -> str:
        return f"lightning_diloco/arrived/{among}/{rank}"


def _processes(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]}"
    return f"processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
