"""The simulated machines under a run: what they are told, and what they answer.

Owns the translation of a run's events (local steps, transfers, workers that join) into those of the cluster's clock and
tally, and the measuring of steps for ``step_seconds="measured"``. Does not own the rules of simulated time, nor who is
there (``cluster/``). The clock never changes a number of the run; availability does, by the answers of ``schedule``.
Imports nothing of Lightning.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from lightning_diloco.algorithms.transfer import Transfer
from lightning_diloco.cluster.clock import Clock
from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.cluster.pace import Pace
from lightning_diloco.cluster.schedule import Attendance, Schedule
from lightning_diloco.cluster.tally import Tally

Gather = Callable[[str, Any], Sequence[Any]]  # (place in the run, this process's value) → those of all processes

_MEASURED = 1000  # worker-steps whose median is taken: the latest


class Machines:
    """The machines of N workers.

    Args:
        cluster: the description; None: there is none, and nothing is told.
        num_workers: N.
        gradient_bytes: what a worker would send per step in data parallelism, in one direction.

    Attributes:
        clock: simulated time; None without a cluster.
        schedule: who is there; None: everybody, always.
        tally: counts who took part, and what was lost.
        entered: the local step for which joins and leaves are done.
    """

    def __init__(self, cluster: Cluster | None, num_workers: int, gradient_bytes: int) -> None:
        availability = None if cluster is None else cluster.availability
        self.cluster, self.num_workers = cluster, num_workers
        self.schedule = None if availability is None else Schedule(availability, num_workers)
        self.tally, self.entered = Tally(), 0
        self._gradient_bytes = gradient_bytes
        self.clock: Clock | None = None
        late = None if self.schedule is None else self.schedule.lateness
        if cluster is not None:
            self.clock = Clock(cluster, num_workers, gradient_bytes=gradient_bytes, late=late, record=True)
        self.measures = cluster is not None and cluster.step_seconds == "measured"
        self._told = 0  # the last local step that the clock, or the list of those that are held back, knows
        self._held: list[tuple[int, list[int]]] = []  # steps that wait for how long they took
        self._spent: dict[int, float] = {}  # worker → wall-clock seconds of its turns in the present step
        self._new: list[float] = []  # worker-steps of this process since the last agreement
        self._latest: deque[float] = deque(maxlen=_MEASURED)  # of all processes, the same on all
        self._foreign: set[Any] = set()  # transfers of a file that has no clock
        self._late = late
        self._pace: Pace | None = None

    def keep_pace(self, algorithm: str) -> Pace:
        """For algorithms under which workers don't wait for each other: who steps when, with a server between them.

        The clock then makes no comparison with data parallelism, whose workers do wait.

        Raises:
            ValueError: there is no cluster, its speeds are not known beforehand, or it has no place for a server.
        """
        if self.cluster is None:
            raise ValueError(
                f"{algorithm} lets every worker step at its own speed, and nobody has said how fast they are. Use"
                " `cluster=Cluster(step_seconds=[...], bandwidth_gbit_s=..., latency_ms=...)`, with the seconds of"
                " each worker."
            )
        if self.cluster.pattern not in (None, "server"):
            raise ValueError(
                f"{algorithm} has a server between the workers, but the cluster's `pattern` (={self.cluster.pattern!r})"
                " has none. Use 'server', or None."
            )
        self._pace = Pace(self.cluster, self.num_workers, None if self.schedule is None else self.schedule.alive)
        self.cluster = replace(self.cluster, pattern="server")
        self.clock = Clock(self.cluster, self.num_workers, late=self._late, record=True)
        return self._pace

    @property
    def paced(self) -> bool:
        """Whether workers don't wait for each other."""
        return self._pace is not None

    # ---------------------------------------------------------------------------------------- who is there

    def alive(self, step: int) -> list[int]:
        """The workers that take local step ``step``."""
        return list(range(self.num_workers)) if self.schedule is None else self.schedule.alive(step)

    def attendance(self, step: int, workers: Sequence[int]) -> Attendance:
        """Who takes part in a transfer of ``workers`` that is sent in ``step``."""
        if self.schedule is None:
            everybody = tuple(workers)
            return Attendance(everybody, everybody, everybody, ())
        return self.schedule.attendance(step, workers)

    # ---------------------------------------------------------------------------------------- what happens

    def worked(self, worker: int, seconds: float) -> None:
        """A turn of ``worker`` took ``seconds`` of wall-clock time; a local step may have several."""
        if not self.measures:
            return
        self._spent[worker] = self._spent.get(worker, 0.0) + seconds

    def step(self, step: int, workers: Sequence[int]) -> None:
        """``workers`` have computed local step ``step``; it is told once, however often this is called."""
        if self.clock is None or step <= self._told:
            return
        self._told = step
        self.tally.stepped(workers)
        if self.measures:
            self._new += [seconds for w, seconds in self._spent.items() if w in workers]
            self._spent.clear()
            self._held.append((step, list(workers)))
        elif self._pace is None:
            self.clock.step(step, workers)
        else:
            self.clock.step(step, workers, {e.worker: e.step for e in self._pace.at(step)})

    def settle(self, gather: Gather) -> None:
        """Steps that were held back get their length: the median of the run's latest worker-steps.

        All processes call it together, before anything is sent and before anything is read.
        """
        if not self._held or self.clock is None or self.cluster is None:
            return
        for of_process in gather("measured steps of the simulated cluster", self._new):
            self._latest.extend(of_process)
        self._new = []
        if not self._latest:
            return
        self.clock.use(self.cluster.with_step_seconds(median(self._latest)))
        for step, workers in self._held:
            self.clock.step(step, workers)
        self._held = []

    def send(self, transfer: Transfer, attendance: Attendance, gathered: bool, returns: bool = True) -> None:
        """A transfer begins; whoever took part occupies its link, also if its values were not used.

        Args:
            transfer: with its bytes.
            attendance: who took part.
            gathered: whether every worker needs every message: packed ones, which can't be added on the way, and those
                of a robust mean.
            returns: whether workers that took part in vain return to their anchors, and lose their steps.
        """
        groups = transfer.on_links
        transfer.attendance = [len(attendance.alive), len(attendance.participating)]
        if self.clock is None or self.cluster is None:
            return
        self.tally.sent(attendance, transfer.rejected, returns)
        if not groups:
            return
        size = max(map(len, groups)) if len(groups) > 1 else None
        pattern = self.cluster.pattern_for(gathered, size)
        self.clock.send(transfer.key, transfer.nbytes, groups, transfer.sent, pattern)
        if not transfer.means:  # nobody will take it in
            workers = [w for group in groups for w in group]
            self.clock.arrive(transfer.key, workers, transfer.sent)

    def arrive(self, transfer: Transfer, workers: Sequence[int], step: int) -> None:
        """``workers`` take in a transfer, and wait for it."""
        if transfer.key in self._foreign:
            self._foreign.discard(transfer.key)
        elif self.clock is not None:
            self.clock.arrive(transfer.key, workers, step)

    def exchange(self, what: str, nbytes: int, workers: Sequence[int], step: int) -> None:
        """``workers`` exchange ``nbytes`` each beside what the algorithm has sent, and wait for it: buffers, say."""
        if self.clock is not None and self.cluster is not None and nbytes and workers:
            pattern = self.cluster.pattern_for(coded=False)
            pattern = "ring" if pattern == "pairs" else pattern  # which can't average over all
            groups = [list(workers)] if self._pace is None else [[w] for w in workers]
            self.clock.send((what, step), nbytes, groups, step, pattern)
            self.clock.arrive((what, step), workers, step)

    def join(self, worker: int, donor: int, nbytes: int, data_parallel_bytes: int, step: int) -> None:
        """``worker`` joins before local step ``step``, with ``nbytes`` from ``donor``."""
        self.tally.joined(nbytes)
        if self.clock is not None:
            self.clock.join(worker, donor, nbytes, step, data_parallel_bytes)

    def resize(self, gradient_bytes: int) -> None:
        """What data parallelism would send per step: parameters may have come, gone, or been (un)frozen."""
        if self.clock is not None and self._pace is None and gradient_bytes != self._gradient_bytes:
            self._gradient_bytes = gradient_bytes
            self.clock.use(self.clock.cluster, gradient_bytes)

    def readings(self, transfer: Transfer) -> dict[str, Any]:
        """What the report of an arrival says of the machines; nothing without a cluster."""
        if self.clock is None:
            return {}
        alive, participating = transfer.attendance
        return {
            "simulated_seconds": self.clock.seconds,
            "compute_utilisation": self.clock.compute_utilisation,
            "alive": alive,
            "participating": participating,
            "lost_steps": self.tally.lost_steps,
            "join_bytes": self.tally.join_bytes,
        }

    # ---------------------------------------------------------------------------------------- files

    def state_dict(self) -> dict[str, Any] | None:
        """Plain values for a file; None without a cluster. :meth:`settle` comes first."""
        if self.clock is None:
            return None
        return {
            "clock": self.clock.state_dict(),
            "tally": self.tally.state_dict(),
            "entered": self.entered,
            "latest": list(self._latest),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, step: int, waiting: Sequence[Transfer]) -> None:
        """Continues from a file; the clock starts at zero if the file has none.

        Args:
            state: of :meth:`state_dict`.
            step: completed local steps.
            waiting: the transfers that are under way.
        """
        self._told = self.entered = step
        if state is None or self.clock is None:
            self._foreign = {transfer.key for transfer in waiting}
            return
        self.clock.load_state_dict(state["clock"])
        self.tally.load_state_dict(state["tally"])
        self.entered = state["entered"]
        self._told = max(step, self.clock.last_step)  # a step that an error has torn was told already
        self._latest.extend(state["latest"])
