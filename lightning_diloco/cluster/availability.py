"""Who is there: machines that leave, join, lose a transfer, are late, or can't reach each other.

Owns the description and its checks: written down event by event, drawn from rates, or both, each kind of event in one
way. What it means for a run, step by step, is in ``schedule.py``. Nothing of it is a random state: a schedule follows
from the description alone, so that every process, and a run that is resumed, sees the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, get_args

from lightning_diloco.cluster import inputs

EventKind = Literal["leave", "join", "drop", "late", "partition"]
JoinerState = Literal["fresh", "donor"]
OnFailure = Literal["survivors", "rollback"]

_FIELDS: dict[EventKind, tuple[set[str], set[str]]] = {  # what each kind must have, and may have
    "leave": ({"worker"}, set()),
    "join": ({"worker"}, set()),
    "drop": ({"worker"}, {"until"}),
    "late": ({"worker", "seconds"}, {"until"}),
    "partition": ({"groups"}, {"until"}),
}


@dataclass(frozen=True, repr=False)
class Event:
    """Something that happens to the machines.

    Args:
        kind: "leave": ``worker`` does not take local step ``step``, nor any until it joins. "join": it takes ``step``
            again; a worker whose first event is a join was absent from the beginning. "drop": its part in transfers
            that are sent in ``step`` is lost. "late": it stands still for ``seconds`` in ``step``. "partition": only
            workers of the same group reach each other.
        step: the local step, from 1; of a join from 2.
        worker: global id. For all but partitions.
        until: the last local step, for drop, late and partition; None: ``step`` alone.
        seconds: for late, > 0.
        groups: for partition: every worker in one of them.

    Raises:
        ValueError: a field is missing, out of bounds, or one that this kind doesn't have.
    """

    kind: EventKind
    step: int
    worker: int | None = None
    until: int | None = None
    seconds: float | None = None
    groups: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise ValueError(
                f"Availability: `kind` (={self.kind!r}) of an event must be one of"
                f" {', '.join(map(repr, get_args(EventKind)))}."
            )
        needed, allowed = _FIELDS[self.kind]
        given = {f.name for f in fields(self) if getattr(self, f.name) is not None} - {"kind", "step"}
        if missing := sorted(needed - given):
            raise ValueError(f"Availability: the event {self!r} lacks {_listed(missing)}.")
        if extra := sorted(given - needed - allowed):
            raise ValueError(
                f"Availability: the event {self!r} has {_listed(extra)}, which has no meaning for {self.kind!r}."
            )
        where = f"Availability, {self.kind}"
        values: dict[str, Any] = {"step": inputs.count(where, "step", self.step, 2 if self.kind == "join" else 1)}
        if self.worker is not None:
            values["worker"] = inputs.count(where, "worker", self.worker, 0)
        if self.until is not None:
            values["until"] = inputs.count(where, "until", self.until, self.step)
        if self.seconds is not None:
            values["seconds"] = inputs.number(where, "seconds", self.seconds)
        if self.groups is not None:
            values["groups"] = tuple(tuple(inputs.count(where, "groups", w, 0) for w in g) for g in self.groups)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return _repr(self)

    @property
    def last(self) -> int:
        """The last local step of something that lasts."""
        return self.step if self.until is None else self.until


@dataclass(frozen=True, repr=False)
class Availability:
    """When the simulated machines are there, and what a run does about it.

    >>> Availability(events=[{"kind": "leave", "step": 100, "worker": 2}, {"kind": "join", "step": 250, "worker": 2}])
    Availability(events=(Event(kind='leave', step=100, worker=2), Event(kind='join', step=250, worker=2)))

    Args:
        events: what happens, as :class:`Event` or a mapping of its fields.
        leave_rate: probability that a worker that is there leaves before a step, drawn for each worker and step. The
            last one that is there stays.
        join_rate: probability that a worker that has left comes back before a step; 0: never.
        drop_rate: probability that a worker's part in the transfers of a step is lost.
        late_rate: probability that a worker stands still for ``late_seconds`` in a step.
        late_seconds: > 0.
        partition_rate: probability that a partition begins before a step, when there is none. It has two sides, drawn
            for each worker.
        partition_steps: local steps that a partition lasts, ≥ 1.
        seed: of what is drawn.
        joiner: inner optimizer state of a worker that joins: "fresh", or a copy of the "donor"'s. Its weights are the
            outer model's.
        keep_state: whether a worker that comes back has its own inner optimizer state as it left, on a disk of its own;
            ``joiner`` is then for workers that were not there before. Its weights are the outer model's all the same:
            local steps that it had not sent are lost.
        on_failure: when a part of a transfer is lost ("drop"). "survivors": the mean is over the others, and the
            worker whose part was lost keeps its weights and goes on. "rollback", torchft's rule: nothing is committed;
            all that took part return to their anchors, and the data of the round is spent.

    Raises:
        ValueError: a value is out of bounds or has no effect, the events contradict each other, or a kind of event is
            written down and drawn.
    """

    events: Sequence[Event | Mapping[str, Any]] = ()
    leave_rate: float = 0.0
    join_rate: float = 0.0
    drop_rate: float = 0.0
    late_rate: float = 0.0
    late_seconds: float | None = None
    partition_rate: float = 0.0
    partition_steps: int | None = None
    seed: int = 0
    joiner: JoinerState = "fresh"
    keep_state: bool = False
    on_failure: OnFailure = "survivors"

    def __post_init__(self) -> None:
        events = sorted((_event(e) for e in self.events), key=lambda e: (e.step, e.kind == "join"))
        values: dict[str, Any] = {"events": tuple(events), "seed": inputs.count("Availability", "seed", self.seed, 0)}
        for name in ("leave_rate", "join_rate", "drop_rate", "late_rate", "partition_rate"):
            values[name] = _rate(name, getattr(self, name))
        for name, rate in (("late_seconds", self.late_rate), ("partition_steps", self.partition_rate)):
            if (getattr(self, name) is None) != (not rate):
                raise ValueError(
                    f"Availability: `{name}` (={getattr(self, name)!r}) and `{name.split('_')[0]}_rate` (={rate!r}) go"
                    " together: give both or none."
                )
        if self.late_seconds is not None:
            values["late_seconds"] = inputs.number("Availability", "late_seconds", self.late_seconds)
        if self.partition_steps is not None:
            values["partition_steps"] = inputs.count("Availability", "partition_steps", self.partition_steps)
        if self.join_rate and not self.leave_rate:
            raise ValueError(
                f"Availability: `join_rate` (={self.join_rate!r}) has no effect without `leave_rate`: nobody leaves."
            )
        for name, choices in (("joiner", JoinerState), ("on_failure", OnFailure)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"Availability: `{name}` (={getattr(self, name)!r}) must be"
                    f" {' or '.join(map(repr, get_args(choices)))}."
                )
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_kinds(events)
        _check_presence(events)
        _check_partitions(events)

    def __repr__(self) -> str:
        return _repr(self)

    def _check_kinds(self, events: Sequence[Event]) -> None:
        drawn = {
            "leave": self.leave_rate,
            "join": self.leave_rate,
            "drop": self.drop_rate,
            "late": self.late_rate,
            "partition": self.partition_rate,
        }
        for e in events:
            if drawn[e.kind]:
                name = "leave_rate" if e.kind == "join" else f"{e.kind}_rate"
                raise ValueError(
                    f"Availability: {e!r} is written down, and `{name}` (={drawn[e.kind]!r}) draws the same kind of"
                    " event. Use one of them."
                )

    def check(self, num_workers: int) -> None:
        """Whether the events name workers that exist, and every partition has a place for each.

        Raises:
            ValueError: they don't.
        """
        for e in self.listed:
            if e.worker is not None and e.worker >= num_workers:
                raise ValueError(
                    f"Availability: there is no worker {e.worker} for {e!r}; with `num_nodes` (={num_workers}) the"
                    f" workers are 0 to {num_workers - 1}."
                )
            if e.groups is not None and sorted(w for g in e.groups for w in g) != list(range(num_workers)):
                raise ValueError(
                    f"Availability: the groups of {e!r} must have each of the workers 0 to {num_workers - 1} once."
                )

    @property
    def listed(self) -> list[Event]:
        """The events, by step."""
        return [e for e in self.events if isinstance(e, Event)]

    def of_kind(self, kind: EventKind) -> list[Event]:
        """The events of a kind, by step."""
        return [e for e in self.listed if e.kind == kind]

    def join_bytes(
        self, *, weights: int, inner_state: int, anchor: int, outer_state: int, returning: bool = False
    ) -> int:
        """Bytes that a joiner receives: of the model five times, for AdamW with a donor's state and outer momentum.

        Args:
            weights: bytes of θ_i.
            inner_state: bytes of a worker's inner optimizer state; moved if the joiner takes a donor's.
            anchor: bytes of the value from which it measures Δ_i.
            outer_state: bytes of the outer optimizer's state, which every worker has.
            returning: whether it has been there before.
        """
        own = self.keep_state and returning
        return weights + anchor + outer_state + (inner_state if self.joiner == "donor" and not own else 0)


# -------------------------------------------------------------------------------------------- checks


def _event(given: Event | Mapping[str, Any]) -> Event:
    if isinstance(given, Event):
        return given
    if not isinstance(given, Mapping) or not {"kind", "step"} <= set(given) <= {f.name for f in fields(Event)}:
        raise ValueError(
            f"Availability: {given!r} is no event. An event has `kind` and `step`, and by its kind `worker`, `until`,"
            " `seconds` or `groups`, like {'kind': 'leave', 'step': 100, 'worker': 2}."
        )
    return Event(**given)


def _check_presence(events: Sequence[Event]) -> None:
    last: dict[int, Event] = {}
    for e in events:
        if e.kind in ("leave", "join") and e.worker is not None:
            before = last.get(e.worker)
            if before and before.kind == e.kind:
                there = "there already" if e.kind == "join" else "not there"
                raise ValueError(f"Availability: {e!r} can't happen: worker {e.worker} is {there} since {before!r}.")
            if before and before.step == e.step:
                raise ValueError(
                    f"Availability: {before!r} and {e!r} are at the same step. Let a step at least lie between them."
                )
            last[e.worker] = e


def _check_partitions(events: Sequence[Event]) -> None:
    partitions = [e for e in events if e.kind == "partition"]
    for before, after in pairwise(partitions):
        if after.step <= before.last:
            raise ValueError(
                f"Availability: the partitions {before!r} and {after!r} overlap. Write one with the groups of both, for"
                " the steps that they share."
            )


def _rate(name: str, value: Any) -> float:
    rate = inputs.number("Availability", name, value, "not negative")
    if rate > 1:
        raise ValueError(f"Availability: `{name}` (={value!r}) must be a probability from 0 to 1.")
    return rate


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _repr(value: Any) -> str:
    said = [f for f in fields(value) if getattr(value, f.name) != f.default]
    return f"{type(value).__name__}({', '.join(f'{f.name}={getattr(value, f.name)!r}' for f in said)})"
