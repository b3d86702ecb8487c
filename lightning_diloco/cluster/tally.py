"""What unreliable machines have cost a run: transfers without everybody, local steps that were lost, bytes of joins.

Owns the sums. Who is there and who takes part is ``schedule.py``'s business.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_diloco.cluster.schedule import Attendance


@dataclass
class Tally:
    """The sums of a run so far.

    A worker's local steps are *unsent* until a transfer in which it took part is committed. They are lost when it
    leaves, and when such a transfer fails and it returns to its anchor. With several transfers per round (streaming)
    the last one counts.

    Attributes:
        transfers: how many were asked for.
        failed: how many were rolled back.
        alive: workers that were there, summed over transfers.
        participating: those that took part.
        committed: those whose part was in the mean.
        lost_steps: local steps that never reached the others, of all workers.
        joins: how often a worker has joined.
        join_bytes: bytes that joiners have received.
        unsent: worker → its unsent local steps.
    """

    transfers: int = 0
    failed: int = 0
    alive: int = 0
    participating: int = 0
    committed: int = 0
    lost_steps: int = 0
    joins: int = 0
    join_bytes: int = 0
    unsent: dict[int, int] = field(default_factory=dict)

    def stepped(self, workers: Iterable[int]) -> None:
        """``workers`` have taken a local step."""
        for w in workers:
            self.unsent[w] = self.unsent.get(w, 0) + 1

    def sent(self, attendance: Attendance, rejected: Iterable[int] = (), returns: bool = True) -> None:
        """A transfer was sent, or would have been if anybody's part had counted.

        Args:
            attendance: who took part.
            rejected: workers that were left out because their values were not finite: not committed, and what they had
                done is lost.
            returns: whether those that took part in vain return to their anchors, and lose what they have done.
        """
        rejected = set(rejected)
        committed = [w for w in attendance.committed if w not in rejected]
        self.transfers += 1
        self.failed += bool(attendance.rolled_back)
        self.alive += len(attendance.alive)
        self.participating += len(attendance.participating)
        self.committed += len(committed)
        for w in committed:
            self.unsent[w] = 0
        self._lose([*(attendance.rolled_back if returns else ()), *rejected])

    def left(self, workers: Iterable[int]) -> None:
        """``workers`` have left the run."""
        self._lose(workers)

    def joined(self, nbytes: int) -> None:
        """A worker has joined, and received its state."""
        self.joins += 1
        self.join_bytes += nbytes

    def _lose(self, workers: Iterable[int]) -> None:
        for w in workers:
            self.lost_steps += self.unsent.pop(w, 0)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"unsent": dict(self.unsent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of :meth:`state_dict`."""
        for name, value in {**state, "unsent": dict(state["unsent"])}.items():
            setattr(self, name, value)
