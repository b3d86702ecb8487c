"""Workers and links in simulated time: who computes, who waits, and for what.

Owns the rules of waiting, and the sums. How long a step or a transfer takes is the cluster's business (``cluster.py``);
what is sent, and when, is told by the clock (``clock.py``).

Every worker has a clock, and a link on which its transfers go one after the other, in the order sent. For a transfer in
a group of workers::

    ready = max over the group of the clock at sending     the last sender
    start = max(ready, when the group's links are free)     first in, first out, per link
    end   = start + seconds of the transfer

A worker that takes it in at time t waits for others from t until ``ready``, and for the link from then until ``end``:
in the queue behind other transfers, or on the wire. With overlap t is later, and less remains.

Time is counted in integers, femtoseconds: sums are exact, in any order, and the same after a resume.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_diloco.cluster.timeline import Timeline

TICKS = 10**15  # in a second


@dataclass(frozen=True)
class WorkerSeconds:
    """What a worker has spent its time on, in simulated seconds.

    Attributes:
        computing: local steps.
        late: delays that the schedule of availability has put upon it.
        waiting: for others: until the last sender of a transfer was ready.
        link: for the link: a transfer was in the queue or on the wire, and the worker had nothing else to do.
        absent: it had left the run.
    """

    computing: float
    late: float
    waiting: float
    link: float
    absent: float

    @property
    def seconds(self) -> float:
        """The worker's clock: the sum of all."""
        return self.computing + self.late + self.waiting + self.link + self.absent


KINDS = tuple(f.name for f in fields(WorkerSeconds))


@dataclass(frozen=True)
class _UnderWay:
    """A group's part of a transfer, from sending until it is taken in; times in ticks."""

    workers: tuple[int, ...]
    ready: int
    end: int


class Replay:
    """The clocks and links of N workers.

    Args:
        num_workers: N.
        timeline: records everything; None: nothing is recorded.
    """

    def __init__(self, num_workers: int, timeline: Timeline | None = None) -> None:
        self.num_workers, self._timeline = num_workers, timeline
        self._spent = {kind: [0] * num_workers for kind in KINDS}
        self._now = [0] * num_workers
        self._link_free = [0] * num_workers
        self._connected: set[int] = set()  # workers that have opened their connections
        self._under_way: dict[Hashable, list[_UnderWay]] = {}

    # ---------------------------------------------------------------------------------------- what can be read

    @property
    def workers(self) -> list[WorkerSeconds]:
        """What each worker has spent its time on."""
        return [
            WorkerSeconds(**{kind: spent[w] / TICKS for kind, spent in self._spent.items()})
            for w in range(self.num_workers)
        ]

    @property
    def seconds(self) -> float:
        """How long the run has taken so far: the clock of the worker that is furthest."""
        return max(worker.seconds for worker in self.workers)

    @property
    def compute_utilisation(self) -> float | None:
        """The fraction of their time that workers have computed, absence apart; None before the first step.

        Each worker counts with its own clock: one that is behind is not idle, it just has not been asked to wait yet.
        """
        present = sum(self._now) - sum(self._spent["absent"])
        return sum(self._spent["computing"]) / present if present else None

    # ---------------------------------------------------------------------------------------- what happens

    def spend(self, worker: int, kind: str, ticks: int, step: int) -> None:
        """``worker`` spends its next ``ticks`` on ``kind``."""
        start = self._now[worker]
        self._now[worker] = start + ticks
        self._spent[kind][worker] += ticks
        if self._timeline is not None:
            self._timeline.add(worker, kind, start, start + ticks, step)

    def send(
        self,
        key: Hashable,
        groups: Sequence[Sequence[int]],
        duration: Callable[[Sequence[int], bool], int],
        step: int,
        details: Mapping[str, Any],
    ) -> None:
        """A transfer among each of ``groups``; it is under way until it is taken in.

        What takes no time occupies no link: a worker that is alone has nobody to send to.

        Args:
            key: names it until then.
            groups: disjoint groups of workers.
            duration: gives the ticks, of (group, whether it is the first transfer for one of them, which opens its
                connections).
            step: the local step in which it is sent.
            details: for the timeline.

        Raises:
            ValueError: a transfer with this key is under way.
        """
        if key in self._under_way:
            raise ValueError(f"A transfer {key!r} is under way already. Each needs a key of its own until it arrives.")
        self._under_way[key] = []
        for group in groups:
            ticks, ready = duration(group, not self._connected.issuperset(group)), max(self._now[w] for w in group)
            start = end = ready
            if ticks:
                start = max(ready, *(self._link_free[w] for w in group))
                end = start + ticks
                for w in group:
                    self._link_free[w] = end
                self._connected.update(group)
            self._under_way[key].append(_UnderWay(tuple(group), ready, end))
            if self._timeline is not None:
                self._timeline.send(key, group, start, end, {**details, "step": step, "workers": list(group)})

    def take(self, key: Hashable, workers: Sequence[int], step: int) -> None:
        """``workers`` go on when the transfer has ended: that of their group; outsiders: that of all groups.

        Raises:
            ValueError: no transfer with this key is under way.
        """
        if key not in self._under_way:
            raise ValueError(f"No transfer {key!r} is under way: it was not sent, or has been taken in already.")
        parts = self._under_way.pop(key)
        for w in workers:
            for part in [p for p in parts if w in p.workers] or parts:
                self.spend(w, "waiting", max(0, part.ready - self._now[w]), step)
                self.spend(w, "link", max(0, part.end - self._now[w]), step)
            if self._timeline is not None:
                self._timeline.take(key, w)

    def enter(self, worker: int, donor: int, step: int) -> None:
        """``worker`` was absent until ``donor``'s present time, and has no connections."""
        self._connected.discard(worker)
        self.spend(worker, "absent", max(0, self._now[donor] - self._now[worker]), step)

    # ---------------------------------------------------------------------------------------- files

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a file. The timeline is not in it."""
        return {
            "spent": {kind: list(spent) for kind, spent in self._spent.items()},
            "link_free": list(self._link_free),
            "connected": sorted(self._connected),
            "under_way": [
                (key, [(list(p.workers), p.ready, p.end) for p in parts]) for key, parts in self._under_way.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of :meth:`state_dict`.

        With more workers than there were the new ones have been absent so far; with fewer the last ones are gone.
        """
        n = self.num_workers
        before = [sum(of_worker) for of_worker in zip(*state["spent"].values(), strict=True)]
        new = max(0, n - len(before))
        for kind, spent in state["spent"].items():
            self._spent[kind] = [*spent[:n], *[max(before) if kind == "absent" else 0] * new]
        self._now = [*before[:n], *[max(before)] * new]
        self._link_free = [*state["link_free"][:n], *[0] * new]
        self._connected = {w for w in state["connected"] if w < n}
        self._under_way = {
            key: [_UnderWay(tuple(workers), ready, end) for workers, ready, end in parts]
            for key, parts in state["under_way"]
        }
