"""The clock of a simulated cluster: how long the run would have taken, told step by step while it runs.

Owns the translation of what a run does (steps, transfers, joins) into seconds, by means of the cluster. Does not own
the rules of waiting (``replay.py``), nor how long a step or a transfer takes (``cluster.py``). The clock never changes
a number of the run.

Data parallelism on the same cluster is replayed alongside: the same workers take the same steps, and all-reduce their
gradients in each. Availability other than absence and lateness doesn't touch it: no all-reduce of it is lost.
"""

import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.cluster.patterns import Pattern
from lightning_diloco.cluster.replay import TICKS, Replay, WorkerSeconds
from lightning_diloco.cluster.timeline import Timeline

_SLICES = 100_000  # that `record=True` keeps


class Clock:
    """Simulated time of N workers.

    >>> clock = Clock(Cluster(step_seconds=0.1, bandwidth_gbit_s=1, latency_ms=0), 2, gradient_bytes=12_500_000)
    >>> for step in range(1, 11):
    ...     clock.step(step, [0, 1])
    >>> clock.send("round 1", 12_500_000, [[0, 1]], step=10, pattern="ring")
    >>> clock.arrive("round 1", [0, 1], step=10)
    >>> clock.seconds, clock.data_parallel.seconds
    (1.1, 2.0)

    Args:
        cluster: the machines.
        num_workers: N.
        gradient_bytes: what a worker sends per step in data parallelism, in one direction; None: that comparison is not
            made.
        late: seconds by which (step, worker) is late: the ``lateness`` of a schedule. None: nobody is ever late.
        record: whether a timeline is recorded, for :meth:`trace`; a number: at most so many slices; True: 100,000.

    Attributes:
        cluster: the machines.
        last_step: the last local step that was told, so that a step that an error interrupts is told once.

    Raises:
        ValueError: the cluster has numbers for another number of workers; or ``record`` is no number of slices.
    """

    def __init__(
        self,
        cluster: Cluster,
        num_workers: int,
        *,
        gradient_bytes: int | None = None,
        late: Callable[[int, int], float] | None = None,
        record: bool | int = False,
    ) -> None:
        limit = _SLICES if record is True else record
        if not isinstance(limit, int) or limit < 0:
            raise ValueError(f"Clock: `record` (={record!r}) must be True, False, or a number of slices.")
        self._timeline = Timeline(num_workers, limit) if limit else None
        self._run = Replay(num_workers, self._timeline)
        self._parallel = None if gradient_bytes is None else Replay(num_workers)
        self._gradient_bytes, self._late = gradient_bytes, late
        self._durations: dict[Any, int] = {}  # of transfers: the same ones come in every round
        self.num_workers, self.last_step = num_workers, 0
        self.use(cluster)

    def use(self, cluster: Cluster, gradient_bytes: int | None = None) -> None:
        """From here on, seconds are those of another cluster: with other measured steps, for example.

        Args:
            cluster: the machines.
            gradient_bytes: the new size of the gradients, when parameters were frozen or unfrozen; None: as before.

        Raises:
            ValueError: the cluster has numbers for another number of workers.
        """
        cluster.check(self.num_workers)
        self.cluster = cluster
        self._gradient_bytes = self._gradient_bytes if gradient_bytes is None else gradient_bytes
        self._durations.clear()

    # ---------------------------------------------------------------------------------------- what happens

    def step(self, step: int, workers: Sequence[int], own: Mapping[int, int] | None = None) -> None:
        """``workers`` compute local step ``step``, from 1; the others don't move.

        Args:
            step: the run's.
            workers: global ids.
            own: worker → which of its own steps it is, for the jitter; None: ``step`` for all.
        """
        replays, self.last_step = self._replays, step
        for w in workers:
            computing = _ticks(self.cluster.seconds_of_step(w, step if own is None else own[w]))
            late = 0 if self._late is None else _ticks(self._late(step, w))
            for replay in replays:
                replay.spend(w, "computing", computing, step)
                if late:
                    replay.spend(w, "late", late, step)
        if self._parallel is not None and workers:
            pattern = self.cluster.pattern_for(coded=False)
            pattern = "ring" if pattern == "pairs" else pattern  # which can't average over all
            self._send(self._parallel, "gradients", cast(int, self._gradient_bytes), [workers], step, pattern)
            self._parallel.take("gradients", workers, step)

    def send(self, key: Hashable, nbytes: int, groups: Sequence[Sequence[int]], step: int, pattern: Pattern) -> None:
        """A transfer: within each group the workers exchange ``nbytes`` each; it is under way until it arrives.

        Args:
            key: names the transfer until it arrives; plain values, since files contain it.
            nbytes: payload of a participant in one direction, as in the ledger.
            groups: disjoint groups of workers.
            step: the local step in which it is sent.
            pattern: how it crosses the links; see ``Cluster.pattern_for``.

        Raises:
            ValueError: a transfer with this key is under way.
        """
        self._send(self._run, key, nbytes, groups, step, pattern)

    def arrive(self, key: Hashable, workers: Sequence[int], step: int) -> None:
        """``workers`` take in a transfer, and wait for what has not arrived: without overlap for all of it.

        Args:
            key: the transfer's. It is forgotten then: all that take it in must be named at once.
            workers: those that go on with what has arrived. One that sent nothing waits for all groups.
            step: the local step in which it is taken in.

        Raises:
            ValueError: no transfer with this key is under way.
        """
        self._run.take(key, workers, step)

    def join(self, worker: int, donor: int, nbytes: int, step: int, data_parallel_bytes: int | None = None) -> None:
        """``worker`` enters the run before local step ``step``: it was absent until now, and waits for its state.

        The donor goes on meanwhile; its link is occupied. The joiner opens its connections anew.

        Args:
            worker: the joiner.
            donor: the worker that it gets the state from; "now" is the donor's present time.
            nbytes: of that state.
            step: the first local step that it is to take.
            data_parallel_bytes: what a joiner moves in data parallelism, which has no outer state.

        Raises:
            ValueError: ``data_parallel_bytes`` is missing.
        """
        if self._parallel is not None and data_parallel_bytes is None:
            raise ValueError("Clock.join: `data_parallel_bytes` is missing, with data parallelism replayed alongside.")
        for replay, moved in ((self._run, nbytes), (self._parallel, data_parallel_bytes)):
            if replay is not None and moved is not None:
                replay.enter(worker, donor, step)
                self._send(replay, ("join", worker), moved, [[donor, worker]], step, "pairs")
                replay.take(("join", worker), [worker], step)

    def _send(
        self,
        replay: Replay,
        key: Hashable,
        nbytes: int,
        groups: Sequence[Sequence[int]],
        step: int,
        pattern: Pattern,
    ) -> None:
        def duration(group: Sequence[int], first: bool) -> int:
            arguments = nbytes, tuple(group), pattern, first
            if arguments not in self._durations:
                if len(self._durations) >= 1000:
                    self._durations.clear()
                self._durations[arguments] = _ticks(self.cluster.transfer_seconds(nbytes, group, pattern, first))
            return self._durations[arguments]

        replay.send(key, groups, duration, step, {"bytes": nbytes, "pattern": pattern})

    # ---------------------------------------------------------------------------------------- what can be read

    @property
    def seconds(self) -> float:
        """How long the run has taken so far: the clock of the worker that is furthest."""
        return self._run.seconds

    @property
    def compute_utilisation(self) -> float | None:
        """The fraction of their time that workers have computed, absence apart; None before the first step."""
        return self._run.compute_utilisation

    @property
    def workers(self) -> list[WorkerSeconds]:
        """Per worker, what it has spent its time on; its ``seconds`` are the sum."""
        return self._run.workers

    @property
    def compares(self) -> bool:
        """Whether data parallelism is replayed alongside."""
        return self._parallel is not None

    @property
    def data_parallel(self) -> Replay:
        """The same readings for data parallelism: ``seconds``, ``compute_utilisation``, ``workers``.

        Raises:
            RuntimeError: nobody has said how large the gradients are.
        """
        if self._parallel is None:
            raise RuntimeError(
                "This clock doesn't replay data parallelism: it was made without `gradient_bytes`, or for workers that"
                " don't wait for each other."
            )
        return self._parallel

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the timeline since the fit began (or was resumed), as a Chrome trace for https://ui.perfetto.dev.

        Raises:
            RuntimeError: the clock doesn't record.
        """
        if self._timeline is None:
            raise RuntimeError("This clock has recorded no timeline. Make it with `record=True`.")
        self._timeline.write(path)

    # ---------------------------------------------------------------------------------------- files

    @property
    def _replays(self) -> list[Replay]:
        return [self._run] if self._parallel is None else [self._run, self._parallel]

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a file. The timeline is not in it."""
        return {"last_step": self.last_step, "replays": [replay.state_dict() for replay in self._replays]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of :meth:`state_dict`; for other numbers of workers see :class:`Replay`.

        Raises:
            ValueError: only one of the two clocks replays data parallelism.
        """
        if len(state["replays"]) != len(self._replays):
            raise ValueError(
                "Clock: the file's clock replays data parallelism alongside, and this one doesn't, or the reverse. Give"
                " `gradient_bytes` to both or to none."
            )
        self.last_step = state["last_step"]
        for replay, of_replay in zip(self._replays, state["replays"], strict=True):
            replay.load_state_dict(of_replay)


def _ticks(seconds: float) -> int:
    if not 0 <= seconds < math.inf:
        raise ValueError(f"Clock: a step or a transfer takes {seconds} seconds, which must be a finite number ≥ 0.")
    return round(seconds * TICKS)
