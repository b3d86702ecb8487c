"""The timeline of a simulated run, as a Chrome trace that Perfetto (https://ui.perfetto.dev) opens.

Owns the recorded slices and messages, and the file. Knows nothing of how long anything takes (``replay.py``).

The file has one row per worker (computing, waiting, …), one row per link (transfers on the wire), and an arrow per
message: from the worker that sends it, over its link, to when the worker takes in what arrived.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKERS, LINKS = 0, 1  # the two groups of rows, in Chrome's words: processes
TICKS_PER_NS = 10**6  # the clock counts femtoseconds; a trace has microseconds with three decimals
_GROUPS = {WORKERS: ("workers", "worker"), LINKS: ("links", "link of worker")}


@dataclass
class Slice:
    """Something that lasted, in a row.

    Attributes:
        kind: what it was.
        start: ticks.
        end: ticks.
        details: shown when the slice is clicked.
    """

    kind: str
    start: int
    end: int
    details: dict[str, Any]


@dataclass
class Message:
    """A worker's part in a transfer: the points of its arrow, each (group of rows, worker, the slice it is in)."""

    points: list[tuple[int, int, Slice]]


@dataclass
class Timeline:
    """Records what workers and links do.

    Args:
        num_workers: N.
        limit: slices that are recorded, about 0.5 kB each in memory. When so many are there, recording ends, between
            two slices; the file then has the beginning of the run, and says so in ``otherData``.

    Consecutive slices of computing are one slice, from one transfer to the next: a transfer adds at most four slices
    per worker, whatever the number of local steps.
    """

    num_workers: int
    limit: int
    full: bool = False
    rows: dict[tuple[int, int], list[Slice]] = field(default_factory=dict)
    messages: dict[tuple[Any, int], Message] = field(default_factory=dict)  # (transfer, worker) → under way
    arrived: list[Message] = field(default_factory=list)
    _count: int = 0
    _cut: set[int] = field(default_factory=set)  # workers that have sent something since their last slice

    def add(self, worker: int, kind: str, start: int, end: int, step: int) -> None:
        """``worker`` has spent the time from ``start`` to ``end`` on ``kind``, in local step ``step``."""
        row = self.rows.setdefault((WORKERS, worker), [])
        last = row[-1] if row else None
        if self.full or start == end:
            return
        if last and last.kind == kind and worker not in self._cut:
            last.end, last.details["last step"] = end, step
        elif self._has_room():
            row.append(Slice(kind, start, end, {"first step": step, "last step": step}))
            self._cut.discard(worker)

    def send(self, transfer: Any, workers: Sequence[int], start: int, end: int, details: Mapping[str, Any]) -> None:
        """A transfer occupies the links of ``workers`` from ``start`` to ``end``; each has sent its part."""
        if start == end:
            return
        for w in workers:
            if not self._has_room():
                return
            on_link = Slice(str(transfer), start, end, dict(details))
            self.rows.setdefault((LINKS, w), []).append(on_link)
            row = self.rows.get((WORKERS, w))
            origin = [(WORKERS, w, row[-1])] if row else []
            self.messages[transfer, w] = Message([*origin, (LINKS, w, on_link)])
            self._cut.add(w)

    def take(self, transfer: Any, worker: int) -> None:
        """``worker`` has taken in what arrived, at the end of its last slice."""
        message = self.messages.pop((transfer, worker), None)
        if message is None:  # sent by others, or after recording had ended
            return
        row = self.rows.get((WORKERS, worker))
        if row:
            message.points.append((WORKERS, worker, row[-1]))
            self._cut.add(worker)
        self.arrived.append(message)

    def _has_room(self) -> bool:
        self.full = self.full or self._count >= self.limit
        self._count += not self.full
        return not self.full

    # ---------------------------------------------------------------------------------------- the file

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace; a file that is there already is replaced as a whole, or stays as it was."""
        target = Path(path)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with unfinished.open("w") as file:
                json.dump(self.chrome_trace(), file, separators=(",", ":"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)

    def chrome_trace(self) -> dict[str, Any]:
        """The trace in Chrome's format, of plain types."""
        events: list[dict[str, Any]] = []
        for group, (name, of_row) in _GROUPS.items():
            events.append(_event("M", group, 0, name="process_name", args={"name": name}))
            for w in range(self.num_workers):
                events.append(_event("M", group, w, name="thread_name", args={"name": f"{of_row} {w}"}))
                for s in self.rows.get((group, w), []):
                    start, end = _ns(s.start), _ns(s.end)
                    span = {"ts": start / 1000, "dur": (end - start) / 1000}
                    events.append(_event("X", group, w, name=s.kind, args=s.details, **span))
        for number, message in enumerate([*self.arrived, *self.messages.values()]):
            events += _arrow(number, message.points)
        return {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"clock": "simulated seconds", "complete": not self.full},
        }


def _arrow(number: int, points: Sequence[tuple[int, int, Slice]]) -> list[dict[str, Any]]:
    """Start, steps and end of a flow; a message that nobody has taken in ends on the link."""
    events: list[dict[str, Any]] = []
    if len(points) < 2:
        return events  # sent by a worker that has done nothing so far, and not taken in
    for i, (group, worker, inside) in enumerate(points):
        phase = "s" if i == 0 else "f" if i == len(points) - 1 else "t"
        start, end = _ns(inside.start), _ns(inside.end)
        ts = start if group == LINKS and phase == "t" else max(start, end - 1)  # inside a slice: at its end is outside
        common = {"name": "message", "cat": "message", "id": number, "ts": ts / 1000}
        events.append(_event(phase, group, worker, **common, **({} if phase == "s" else {"bp": "e"})))
    return events


def _event(phase: str, group: int, worker: int, **others: Any) -> dict[str, Any]:
    return {"ph": phase, "pid": group, "tid": worker, **others}


def _ns(ticks: int) -> int:
    return ticks // TICKS_PER_NS
