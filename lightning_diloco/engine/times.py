"""Where the wall-clock time of a fit went.

Owns the sums. Does not own the time in collectives (``comm/waiting.py``). Imports nothing of Lightning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Literal

Part = Literal["inner", "outer", "evaluation"]


@dataclass(frozen=True)
class Times:
    """Wall-clock seconds of this process in the present or last fit, from the beginning of its training loop.

    Every second counts once. The sum is less than the time of the fit: fetching batches, callbacks' hooks between
    steps, and files that are saved there are in none of the four. On CUDA devices it is the host's time, which runs
    ahead of the device's. Checkpoints don't keep these numbers: a resumed fit begins at zero.

    Attributes:
        inner: the workers' turns: hooks of the module around a batch, ``training_step``, backward, optimizer steps.
        outer: the algorithm's part of a step, from the end of the turns on; also the last outer step of a fit.
        evaluation: validations, with the weights that they need and with the hooks of callbacks.
        waiting: inside collectives, waiting for other processes and for what they send. A collective in a turn, an
            outer step or a validation counts here only.
    """

    inner: float = 0.0
    outer: float = 0.0
    evaluation: float = 0.0
    waiting: float = 0.0


class Stopwatch:
    """Measures the parts of a fit. A part inside another counts as the inner part only.

    Args:
        waited: gives the seconds that this process has been in collectives, ever.
    """

    def __init__(self, waited: Callable[[], float]) -> None:
        self._waited = waited
        self._waited_first = self._waited_before = waited()
        self._spent: dict[Part, float] = {"inner": 0.0, "outer": 0.0, "evaluation": 0.0}
        self._running: list[Part] = []
        self._at = 0.0
        self._final: Times | None = None

    def part(self, part: Part) -> "_Running":
        """A context manager: the block belongs to ``part``."""
        return _Running(self, part)

    @property
    def times(self) -> Times:
        """The seconds so far, also inside a part; after :meth:`stop`: until then."""
        if self._final is not None:
            return self._final
        self._charge()
        return Times(**self._spent, waiting=self._waited() - self._waited_first)

    @property
    def inner(self) -> float:
        """Seconds of the turns that have ended."""
        return self._spent["inner"]

    def stop(self) -> None:
        """The fit has ended, and later collectives are none of its own."""
        self._final = self.times

    def begin(self, part: Part) -> None:
        """``part`` begins."""
        self._charge()
        self._running.append(part)

    def end(self) -> None:
        """The part that began last has ended."""
        self._charge()
        self._running.pop()

    def _charge(self) -> None:
        """The time since the last call, without the collectives in it, goes to the part that is running."""
        now, waited = perf_counter(), self._waited()
        if self._running:
            self._spent[self._running[-1]] += now - self._at - (waited - self._waited_before)
        self._at, self._waited_before = now, waited


class _Running:
    """A class, since turns are frequent and ``contextmanager`` costs several times as much."""

    __slots__ = ("_part", "_stopwatch")

    def __init__(self, stopwatch: Stopwatch, part: Part) -> None:
        self._stopwatch, self._part = stopwatch, part

    def __enter__(self) -> None:
        self._stopwatch.begin(self._part)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopwatch.end()
