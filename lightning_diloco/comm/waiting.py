"""The collective in which this process is blocked, and the time in collectives.

Does not own the collectives (``world.py`` and the modules that use its ``label_errors``), nor who else has arrived
(``watcher.py``). Imports nothing of Lightning.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

Among = Literal["all", "team"]


@dataclass(frozen=True)
class Blocked:
    """A collective that has begun.

    Attributes:
        among: its processes: all, or those of this process's team.
        number: how many collectives among them have begun, this one included; the same on all of them.
        where: the place in the run, in words that complete "is at …".
        began: when this process arrived, on the clock ``time.perf_counter``.
    """

    among: Among
    number: int
    where: str
    began: float


class Waiting:
    """Knows the collective in which this process is blocked, and adds up the time in collectives.

    A collective's first part is the wait for the slowest process, and no clock of a single process can tell where that
    part ends: a collective counts whole. On CUDA devices that is the host's time, which may go on while tensors are on
    their way.

    Attributes:
        seconds: wall-clock seconds of this process in collectives, since it was made.
        blocked: the collective in which this process is; None outside collectives.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.blocked: Blocked | None = None
        self._numbers: dict[Among, int] = {"all": 0, "team": 0}

    @contextmanager
    def at(self, where: str, among: Among) -> Iterator[None]:
        """The block is a collective; see :class:`Blocked`."""
        self._numbers[among] += 1
        self.blocked = blocked = Blocked(among, self._numbers[among], where, perf_counter())
        try:
            yield
        finally:
            self.seconds += perf_counter() - blocked.began
            self.blocked = None
