"""Who completes a local step when: workers of different speeds, each of which goes on without waiting for the others.

Owns the order of these events, and their division into the run's local steps. Links are not in it (``clock.py`` has
them): nobody waits for a transfer here. Everything is a pure function of (cluster, N, local step).

Worker i completes its k-th step at the sum of its first k step lengths, in whole femtoseconds, so that equal times are
equal. A local step of the run is as long as possible with at most one step of each worker in it: it ends just before
somebody completes a second one. Without jitter it is a step of the fastest worker; with jitter it is somewhat shorter
than the mean one. Where nobody who is there completes a step, time passes within the run's next step.
"""

import heapq
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import Any, NamedTuple

from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.cluster.replay import TICKS

_KEPT = 4  # local steps whose events are kept: who asks, asks for the present one or its neighbours


class Completion(NamedTuple):
    """A worker has completed a step of its own.

    Attributes:
        ticks: when, in femtoseconds since the beginning.
        worker: global id.
        step: the worker's own, from 1.
    """

    ticks: int
    worker: int
    step: int


class Pace:
    """The pace of N workers.

    >>> pace = Pace(Cluster(step_seconds=[0.1, 0.25], bandwidth_gbit_s=1, latency_ms=0), 2)
    >>> [[event.worker for event in pace.at(step)] for step in range(1, 6)]
    [[0], [0, 1], [0], [0], [0, 1]]
    >>> pace.budget(0, 10), pace.budget(1, 10)
    (10, 4)

    Args:
        cluster: the machines, with the seconds of a step as numbers.
        num_workers: N.
        alive: local step → the workers that are there, one at least; None: everybody, always.

    Raises:
        ValueError: the steps are to be measured, or there are numbers for another number of workers.
    """

    def __init__(
        self, cluster: Cluster, num_workers: int, alive: Callable[[int], Collection[int]] | None = None
    ) -> None:
        if isinstance(cluster.step_seconds, str):
            raise ValueError(
                f"Cluster: `step_seconds` (={cluster.step_seconds!r}) gives all workers the same speed, by how long"
                " this machine took. Where workers don't wait for each other their speeds decide who steps when: give"
                " one number, or one per worker."
            )
        cluster.check(num_workers)
        self.cluster, self.num_workers, self._alive = cluster, num_workers, alive
        self._begin()

    def at(self, step: int) -> list[Completion]:
        """What happens in local step ``step``, from 1, in the order of time; of what is simultaneous, by worker."""
        if step not in self._kept:
            if step <= self._step:
                self._begin()
            while self._step < step:
                self._advance()
        return self._kept[step]

    def budget(self, worker: int, interval: int) -> int:
        """⌊v_i / v_max · H⌋, at least 1: the steps of ``worker`` while the fastest takes ``interval`` (DyLU)."""
        seconds: Any = self.cluster.step_seconds
        lengths = [_ticks(s) for s in (seconds if isinstance(seconds, tuple) else [seconds] * self.num_workers)]
        return max(1, int(Fraction(min(lengths), lengths[worker]) * interval))

    def _begin(self) -> None:
        self._step, self._kept = 0, dict[int, list[Completion]]()
        self._queue = [self._after(0, w, 1) for w in range(self.num_workers)]
        heapq.heapify(self._queue)
        self._next = self._pop()  # popped, and in no turn yet

    def _after(self, ticks: int, worker: int, step: int) -> Completion:
        return Completion(ticks + _ticks(self.cluster.seconds_of_step(worker, step)), worker, step)

    def _advance(self) -> None:
        self._step += 1
        there = range(self.num_workers) if self._alive is None else self._alive(self._step)
        events = list[Completion]()
        while not events:
            events = [event for event in self._turn() if event.worker in there]
        self._kept[self._step] = events
        self._kept.pop(self._step - _KEPT, None)

    def _turn(self) -> list[Completion]:
        """The events until somebody would complete a second step."""
        events, seen = list[Completion](), set[int]()
        while not any(event.worker in seen for event in self._next):
            events += self._next
            seen.update(event.worker for event in self._next)
            self._next = self._pop()
        return events

    def _pop(self) -> list[Completion]:
        """The next events in the queue, all at the same time, by worker; each worker's next one takes their place."""
        found, ticks = list[Completion](), self._queue[0].ticks
        while self._queue[0].ticks == ticks:
            event = self._queue[0]
            heapq.heapreplace(self._queue, self._after(*event[:2], event.step + 1))
            found.append(event)
        return found


def _ticks(seconds: float) -> int:
    return max(1, round(seconds * TICKS))
