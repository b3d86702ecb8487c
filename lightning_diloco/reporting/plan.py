"""What is known about a fit when it begins: how many local steps, and how its shards are read.

Owns the values and the arithmetic of rounds. Elsewhere: asking Lightning for them (``_lightning/planning.py``), the
lines (``summary.py``), the hints (``hints.py``). Imports nothing of Lightning.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Repeated(NamedTuple):
    """A worker whose shard is read several times in every epoch.

    Attributes:
        worker: global id.
        samples: in its shard.
        longest: samples in the longest shard, to which the others are filled up.
    """

    worker: int
    samples: int
    longest: int


@dataclass(frozen=True)
class Plan:
    """A fit, as far as it is known when its training begins.

    Attributes:
        interval: H.
        done: local steps of a resumed run that are done already.
        origin: the local step from which rounds are counted.
        steps: local steps of the run in all, with those that are done; None if nobody knows.
        unknown: why nobody knows; completes "the number of local steps is unknown: …".
        at_most: whether the run may end before ``steps``.
        flushes: whether a partial round at the end is synchronised.
        repeated: the worker whose shard is read most often per epoch, if that is twice or more.
    """

    interval: int
    done: int = 0
    origin: int = 0
    steps: int | None = None
    unknown: str = ""
    at_most: bool = False
    flushes: bool = True
    repeated: Repeated | None = None

    @property
    def rounds(self) -> int | None:
        """Complete rounds of the run, those that are done included; None if unknown."""
        return None if self.steps is None else (self.steps - self.origin) // self.interval

    @property
    def partial(self) -> int:
        """Local steps of the last round, if it isn't complete; 0 if it is, or unknown."""
        return 0 if self.steps is None else (self.steps - self.origin) % self.interval

    def progress(self, step: int) -> float:
        """Part of this fit's local steps that is done after local step ``step``, from 0 to 1; their number is known."""
        assert self.steps is not None
        return (step - self.done) / max(1, self.steps - self.done)

    @property
    def synchronisations(self) -> int | None:
        """Rounds after which workers synchronise, from ``origin`` on."""
        return None if self.rounds is None else self.rounds + (self.flushes and self.partial > 0)
