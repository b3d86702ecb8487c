"""A brute-force simulation of workers and their links, event by event: the oracle of the clock.

Every worker runs a program, a list of operations: ``("computing", seconds)`` and ``("late", seconds)`` take time;
``("post", t)`` puts transfer t into the queue of the worker's link; ``("wait", t)`` waits until it has ended;
``("away", t, donor)`` is absent until the donor has posted t. A transfer starts when all its workers have posted it and
it is the head of all their queues; one that takes no time needs no link.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any


class EventSimulation:
    """Runs the programs to their ends; ``transfers`` maps each transfer to its workers and seconds."""

    def __init__(self, programs: Sequence[Sequence[tuple]], transfers: Mapping[Any, tuple[Sequence[int], float]]):
        self.programs, self.transfers = [deque(p) for p in programs], transfers
        self.queues: list[deque] = [deque() for _ in programs]
        self.posted: dict[Any, dict[int, float]] = defaultdict(dict)
        self.ended: set[Any] = set()
        self.blocked: dict[int, float] = {}  # worker → since when
        self.seconds = [defaultdict(float) for _ in programs]
        self.clocks = [0.0 for _ in programs]
        self.numbers = count()
        self.events: list[tuple] = [(0.0, next(self.numbers), "resume", w) for w in range(len(programs))]
        while self.events:
            time, _, what, subject = heapq.heappop(self.events)
            getattr(self, what)(subject, time)
        assert not any(self.programs), "a deadlock"

    def at(self, time: float, what: str, subject: Any) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), what, subject))

    def resume(self, w: int, time: float) -> None:
        self.clocks[w] = time
        while self.programs[w]:
            kind, subject, *donor = self.programs[w][0]
            if kind in ("computing", "late"):
                self.seconds[w][kind] += subject
                self.programs[w].popleft()
                return self.at(time + subject, "resume", w)
            if kind == "post":
                self.posted[subject][w] = time
                if self.transfers[subject][1]:
                    self.queues[w].append(subject)
                    self.start(subject, time)
                elif len(self.posted[subject]) == len(self.transfers[subject][0]):
                    self.ended.add(subject)
                self.wake(time)
            elif subject in self.ended if kind == "wait" else donor[0] in self.posted[subject]:
                since = self.blocked.pop(w, time)
                ready = min(time, max(since, *self.posted[subject].values())) if kind == "wait" else time
                self.seconds[w]["waiting" if kind == "wait" else "absent"] += ready - since
                self.seconds[w]["link"] += time - ready
            else:
                self.blocked.setdefault(w, time)
                return None
            self.programs[w].popleft()

    def start(self, t: Any, time: float) -> None:
        workers, seconds = self.transfers[t]
        if set(self.posted[t]) == set(workers) and all(self.queues[w][0] == t for w in workers):
            self.at(time + seconds, "end", t)

    def end(self, t: Any, time: float) -> None:
        self.ended.add(t)
        for w in self.transfers[t][0]:
            self.queues[w].popleft()
        for head in {self.queues[w][0] for w in self.transfers[t][0] if self.queues[w]}:
            self.start(head, time)
        self.wake(time)

    def wake(self, time: float) -> None:
        for w in list(self.blocked):
            self.at(time, "look", w)

    def look(self, w: int, time: float) -> None:
        if w in self.blocked:
            self.resume(w, time)
