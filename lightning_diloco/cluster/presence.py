"""Which workers are there, and which reach each other: found step by step from a description, drawn where it has rates.

Owns the drawing. What follows for transfers and joins is in ``schedule.py``.
"""

import hashlib
import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from lightning_diloco.cluster.availability import Availability


def uniform(seed: int, what: str, *numbers: int) -> float:
    """A number from (0, 1), a pure function of the arguments."""
    digest = hashlib.blake2b(repr((seed, what, *numbers)).encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52


def duration(rate: float, seed: int, what: str, *numbers: int) -> float:
    """Steps until something happens that happens in each with probability ``rate``: 1, 2, …; never if it is 0."""
    if rate in (0.0, 1.0):
        return 1 if rate else math.inf
    return 1 + math.floor(math.log(uniform(seed, what, *numbers)) / math.log1p(-rate))


@dataclass(frozen=True)
class _Partition:
    first: int
    last: int
    sides: tuple[tuple[int, ...], ...]


class Partitions:
    """The partitions, one after the other, drawn up to the step that is asked for."""

    def __init__(self, availability: Availability, num_workers: int) -> None:
        self._all = (tuple(range(num_workers)),)
        self._undrawn = self._drawn(availability, num_workers)
        events = availability.of_kind("partition")
        self.found = [_Partition(e.step, e.last, tuple(map(tuple, e.groups or ()))) for e in events]
        self._next = next(self._undrawn, None)

    @staticmethod
    def _drawn(a: Availability, num_workers: int) -> Iterator[_Partition]:
        last = 0
        for k in count():
            gap = duration(a.partition_rate, a.seed, "partition", k)
            if gap == math.inf or a.partition_steps is None or num_workers == 1:
                return
            first, last = last + int(gap), last + int(gap) + a.partition_steps - 1
            away = {w for w in range(num_workers) if uniform(a.seed, "side", k, w) < 0.5}
            if len(away) in (0, num_workers):
                away = {int(uniform(a.seed, "alone", k) * num_workers)}
            sides = (w for w in range(num_workers) if w not in away), (w for w in range(num_workers) if w in away)
            yield _Partition(first, last, tuple(map(tuple, sides)))

    def find(self, step: int) -> None:
        """Draws all that begin up to ``step``."""
        while self._next is not None and self._next.first <= step:
            self.found.append(self._next)
            self._next = next(self._undrawn, None)

    def at(self, step: int) -> tuple[tuple[int, ...], ...]:
        """The groups of workers that reach each other."""
        self.find(step)
        i = bisect_right(self.found, step, key=lambda p: p.first)
        return self.found[i - 1].sides if i and step <= self.found[i - 1].last else self._all

    def side(self, step: int, worker: int) -> tuple[int, ...]:
        """The workers that ``worker`` reaches, itself too."""
        return next(side for side in self.at(step) if worker in side)


@dataclass(frozen=True)
class _Change:
    """Who is there from a step on, until the next change."""

    step: int
    alive: tuple[int, ...]
    leaves: tuple[int, ...] = ()
    joins: tuple[int, ...] = ()
    returning: frozenset[int] = frozenset()  # the joiners that have been there before


class Presence:
    """Who is there, found change by change, up to the step that is asked for.

    What is written down or drawn says who is *up*. A worker that comes up joins as soon as it reaches a worker that is
    there, and the last worker that is there stays until somebody has joined.
    """

    def __init__(self, availability: Availability, num_workers: int, partitions: Partitions) -> None:
        self._partitions, self._partitions_seen = partitions, 0
        events = [e for e in availability.listed if e.kind in ("leave", "join")]
        first = {e.worker: e.kind for e in reversed(events)}
        self._up = {w for w in range(num_workers) if first.get(w) != "join"}
        _check_somebody_is_left(availability, self._up)
        drawn = (_drawn_toggles(availability, w) for w in range(num_workers))
        self._toggles = heapq.merge([(e.step, e.worker) for e in events], *drawn)  # when a worker goes up or down
        self._toggle: Any = next(self._toggles, None)
        self._other: list[int] = []  # steps at which the same workers up may make other workers alive
        self._been_there = set(self._up)
        self._changes = [_Change(0, tuple(sorted(self._up)))]

    def at(self, step: int) -> _Change:
        """The last change up to ``step``."""
        self._find(step)
        return self._changes[bisect_right(self._changes, step, key=lambda c: c.step) - 1]

    def _find(self, step: int) -> None:
        self._partitions.find(step)
        for p in self._partitions.found[self._partitions_seen :]:
            self._other += [p.first, p.last + 1]
        self._partitions_seen = len(self._partitions.found)
        heapq.heapify(self._other)
        while (now := self._next_step()) is not None and now <= step:
            while self._toggle is not None and self._toggle[0] == now:
                self._up ^= {self._toggle[1]}
                self._toggle = next(self._toggles, None)
            while self._other and self._other[0] == now:
                heapq.heappop(self._other)
            if self._change(now):
                heapq.heappush(self._other, now + 1)

    def _next_step(self) -> int | None:
        return min([*self._other[:1], *(self._toggle or ())[:1]], default=None)

    def _change(self, step: int) -> bool:
        before = set(self._changes[-1].alive)
        staying = before & self._up or {min(before)}
        joining = {w for w in self._up - before if staying.intersection(self._partitions.side(step, w))}
        alive = staying | joining
        if alive == before:
            return False
        returning = frozenset(joining & self._been_there)
        there, gone, joined = (tuple(sorted(workers)) for workers in (alive, before - alive, joining))
        self._changes.append(_Change(step, there, gone, joined, returning))
        self._been_there |= alive
        return True


def _check_somebody_is_left(availability: Availability, up: set[int]) -> None:
    present = set(up)
    if not present:
        raise ValueError("Availability: all workers join later, so that nobody is there to begin with.")
    for e in availability.listed:  # at the same step, those that leave do so before others join
        if e.kind in ("leave", "join"):
            present ^= {e.worker if e.worker is not None else -1}
            if not present:
                raise ValueError(f"Availability: {e!r} leaves nobody. A run needs one worker at least.")


def _drawn_toggles(a: Availability, worker: int) -> Iterator[tuple[int, int]]:
    step = 1.0
    for k in count():
        for what, rate in (("leave", a.leave_rate), ("join", a.join_rate)):
            step += duration(rate, a.seed, what, k, worker)
            if step == math.inf:
                return
            yield int(step), worker
