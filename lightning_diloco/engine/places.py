"""How far every worker is in the training data, where workers don't step together.

Owns the count, which every process keeps of all workers alike. Reads nothing (``_lightning/own_pace.py``). Imports
nothing of Lightning.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """A place in the data.

    Attributes:
        epoch: the worker's own: how often it has read its shard.
        batches: of that epoch, that it has trained on.
    """

    epoch: int
    batches: int


class Places:
    """The places of N workers; the first epoch has the number that the Trainer gives it.

    Args:
        num_workers: N.
    """

    def __init__(self, num_workers: int) -> None:
        self._places = [Place(0, 0)] * num_workers

    def __getitem__(self, worker: int) -> Place:
        return self._places[worker]

    def restart(self) -> None:
        """Nobody has read anything."""
        self._places = [Place(0, 0)] * len(self._places)

    def begin(self, epoch: int, length: int) -> None:
        """An epoch of the Trainer begins: the first epoch of all workers, unless somebody has read anything.

        Args:
            epoch: its number.
            length: batches of a worker's epoch, which may be fewer than in the Trainer's last one.
        """
        if set(self._places) == {Place(0, 0)}:
            self._places = [Place(epoch, 0)] * len(self._places)
        self._places = [Place(p.epoch + 1, 0) if p.batches >= length else p for p in self._places]

    def leave(self, workers: Iterable[int]) -> None:
        """``workers`` leave the rest of their epoch out."""
        for w in workers:
            self._places[w] = Place(self._places[w].epoch + 1, 0)

    def advance(self, workers: Iterable[int], length: int) -> None:
        """``workers`` have trained on a batch; an epoch has ``length`` of them."""
        for w in workers:
            epoch, batches = self._places[w]
            self._places[w] = Place(epoch, batches + 1) if batches + 1 < length else Place(epoch + 1, 0)

    def state(self) -> list[list[int]]:
        """Plain numbers, for a file."""
        return [list(place) for place in self._places]

    def load_state(self, state: Sequence[Sequence[int]]) -> None:
        """Continues from :meth:`state`."""
        self._places = [Place(*place) for place in state]
