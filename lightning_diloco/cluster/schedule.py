"""The availability of N workers, step by step: who is there, who takes part, what fails.

Owns the meaning of an :class:`~lightning_diloco.cluster.availability.Availability` for transfers and joins; who is
there at all is found in ``presence.py``. Everything is a pure function of (description, N, local step, worker): the
answers don't depend on what was asked before, nor on who asks.

A transfer that is sent in local step t, from the workers that an algorithm wants to send::

    alive          those that take step t
    participating  those that reach more than half of all that are alive: at most one side of a partition (if every
                   side moved θ, there would be two of them)
    committed      those whose part is in the mean: without those whose part is lost; under "rollback" none if any is

Workers that are alive but not committed keep their weights and go on, as in DiLoCo's dropped communication; under
"rollback" those that took part in vain return to their anchors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_diloco.cluster.availability import Availability
from lightning_diloco.cluster.presence import Partitions, Presence, uniform


@dataclass(frozen=True)
class Attendance:
    """Who takes part in a transfer; ascending global ids.

    Attributes:
        alive: those of the workers asked for that are there.
        participating: those that took part.
        committed: those whose part is in the mean.
        rolled_back: those that took part in vain, and return to their anchors.
    """

    alive: tuple[int, ...]
    participating: tuple[int, ...]
    committed: tuple[int, ...]
    rolled_back: tuple[int, ...]


class Schedule:
    """Answers for N workers.

    >>> events = [{"kind": "leave", "step": 3, "worker": 1}, {"kind": "drop", "step": 4, "worker": 0}]
    >>> schedule = Schedule(Availability(events), num_workers=3)
    >>> schedule.alive(2), schedule.alive(3), schedule.leaves(3)
    ([0, 1, 2], [0, 2], [1])
    >>> schedule.participants(3, [0, 1, 2]), schedule.participants(4, [0, 1, 2])
    ([0, 2], [2])

    Args:
        availability: the description.
        num_workers: N.

    Raises:
        ValueError: the description names workers that don't exist, or has nobody left at some step.
    """

    def __init__(self, availability: Availability, num_workers: int) -> None:
        availability.check(num_workers)
        self.availability, self.num_workers = availability, num_workers
        self._drops = availability.of_kind("drop")
        self._lates = availability.of_kind("late")
        self._partitions = Partitions(availability, num_workers)
        self._presence = Presence(availability, num_workers, self._partitions)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.availability!r}, {self.num_workers})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made from the description: the answers follow from it."""
        return type(self), (self.availability, self.num_workers)

    # ---------------------------------------------------------------------------------------- presence

    def alive(self, step: int) -> list[int]:
        """The workers that take local step ``step``, from 1; at least one."""
        return list(self._presence.at(step).alive)

    def leaves(self, step: int) -> list[int]:
        """Those that have taken the step before, and don't take ``step``."""
        now = self._presence.at(step)
        return list(now.leaves) if now.step == step else []

    def joins(self, step: int) -> list[int]:
        """Those that take ``step``, and have not taken the step before; they join before it."""
        now = self._presence.at(step)
        return list(now.joins) if now.step == step else []

    def donor(self, step: int, worker: int) -> int:
        """The worker that gives its state to ``worker``, which joins before ``step``.

        The first that has taken the step before and takes ``step``, on the joiner's side of a partition.

        Raises:
            ValueError: ``worker`` doesn't join before ``step``.
        """
        self._check_joins(step, worker)
        side = self._partitions.side(step, worker)
        return next(w for w in self.alive(step) if w in side and w not in self.joins(step))

    def joiners_state(self, step: int, worker: int) -> Literal["fresh", "donor", "own"]:
        """The inner optimizer state with which ``worker`` joins before ``step``; "own": as it left.

        Raises:
            ValueError: ``worker`` doesn't join before ``step``.
        """
        own = self.availability.keep_state and self.returns(step, worker)
        return "own" if own else self.availability.joiner

    def returns(self, step: int, worker: int) -> bool:
        """Whether ``worker``, which joins before ``step``, has been there before.

        Raises:
            ValueError: ``worker`` doesn't join before ``step``.
        """
        self._check_joins(step, worker)
        return worker in self._presence.at(step).returning

    def _check_joins(self, step: int, worker: int) -> None:
        if worker not in self.joins(step):
            raise ValueError(f"Worker {worker} doesn't join before local step {step}; {self.joins(step)} do.")

    # ---------------------------------------------------------------------------------------- steps and transfers

    def lateness(self, step: int, worker: int) -> float:
        """Seconds that ``worker`` stands still in ``step``."""
        a = self.availability
        if a.late_seconds is not None:
            return a.late_seconds if uniform(a.seed, "late", step, worker) < a.late_rate else 0.0
        return sum(e.seconds or 0.0 for e in self._lates if e.worker == worker and e.step <= step <= e.last)

    def sides(self, step: int) -> list[list[int]]:
        """The workers that are alive in groups that reach each other; one group without a partition."""
        alive = self.alive(step)
        sides = [[w for w in side if w in alive] for side in self._partitions.at(step)]
        return [side for side in sides if side]

    def dropped(self, step: int, worker: int) -> bool:
        """Whether the worker's part in transfers sent in ``step`` is lost."""
        a = self.availability
        if a.drop_rate:
            return uniform(a.seed, "drop", step, worker) < a.drop_rate
        return any(e.worker == worker and e.step <= step <= e.last for e in self._drops)

    def attendance(self, step: int, workers: Sequence[int]) -> Attendance:
        """Who takes part in a transfer of ``workers`` that is sent in ``step``."""
        present = self.alive(step)
        majority = next((side for side in self.sides(step) if 2 * len(side) > len(present)), [])
        participating = tuple(w for w in workers if w in majority)
        lost = [w for w in participating if self.dropped(step, w)]
        failed = bool(lost) and self.availability.on_failure == "rollback"
        return Attendance(
            alive=tuple(w for w in workers if w in present),
            participating=participating,
            committed=() if failed else tuple(w for w in participating if w not in lost),
            rolled_back=participating if failed else (),
        )

    def participants(self, step: int, workers: Sequence[int]) -> list[int]:
        """Those of ``workers`` whose part in a transfer that is sent in ``step`` counts; none: nothing is sent."""
        return list(self.attendance(step, workers).committed)

    def __call__(self, step: int, workers: Sequence[int], generator: Any = None) -> list[int]:
        """:meth:`participants`, as ``Participation`` has it; nothing is drawn from the generator."""
        return self.participants(step, workers)
