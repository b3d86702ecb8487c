"""Who is there, who takes part, what is lost: as a schedule written down says, and as rates say on average?"""

import pickle
import random
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from lightning_diloco.cluster.availability import Availability, Event
from lightning_diloco.cluster.schedule import Attendance, Schedule
from lightning_diloco.cluster.tally import Tally

RATES = {
    "leave_rate": 0.05,
    "join_rate": 0.2,
    "drop_rate": 0.1,
    "late_rate": 0.1,
    "late_seconds": 2.5,
    "partition_rate": 0.05,
    "partition_steps": 4,
    "seed": 7,
}


def event(kind: str, step: int, worker: int | None = None, **others: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, **({} if worker is None else {"worker": worker}), **others}


def schedule(*events: dict[str, Any], n: int = 4, **others: Any) -> Schedule:
    return Schedule(Availability(events, **others), n)


# -------------------------------------------------------------------------------------------- written down


def test_a_schedule_by_hand() -> None:
    """Worker 2 is away in steps 3 to 5, worker 3 comes in step 5, worker 0 goes for good after step 6."""
    s = schedule(event("leave", 3, 2), event("join", 6, 2), event("join", 5, 3), event("leave", 7, 0))
    assert [s.alive(t) for t in range(1, 9)] == [
        [0, 1, 2], [0, 1, 2], [0, 1], [0, 1], [0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [1, 2, 3],
    ]  # fmt: skip
    assert [s.leaves(t) for t in range(1, 9)] == [[], [], [2], [], [], [], [0], []]
    assert [s.joins(t) for t in range(1, 9)] == [[], [], [], [], [3], [2], [], []]
    assert (s.donor(5, 3), s.donor(6, 2)) == (0, 0)
    assert (s.returns(5, 3), s.returns(6, 2)) == (False, True)
    with pytest.raises(ValueError, match=r"^Worker 1 doesn't join before local step 6; \[2\] do\.$"):
        s.donor(6, 1)


def test_a_donor_was_there_and_stays() -> None:
    """Worker 0 leaves when 2 joins: 1 gives the state. In step 9 worker 0 joins, and can't give its own to worker 2."""
    s = schedule(
        event("leave", 4, 0), event("join", 4, 2), event("leave", 6, 2), event("join", 9, 0), event("join", 9, 2), n=3
    )
    assert (s.donor(4, 2), s.donor(9, 0), s.donor(9, 2)) == (1, 1, 1)


def test_lost_parts_and_late_workers_by_hand() -> None:
    s = schedule(
        event("drop", 2, 1), event("drop", 4, 1, until=6), event("drop", 5, 0), event("leave", 5, 3),
        event("late", 3, 2, seconds=1.5), event("late", 3, 2, until=4, seconds=1),
    )  # fmt: skip
    assert [s.participants(t, [0, 1, 2, 3]) for t in range(1, 8)] == [
        [0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3], [0, 2, 3], [2], [0, 2], [0, 1, 2],
    ]  # fmt: skip
    assert s.participants(5, [0, 1, 3]) == []
    assert [[s.lateness(t, w) for w in range(3)] for t in (2, 3, 4, 5)] == [
        [0, 0, 0],
        [0, 0, 2.5],
        [0, 0, 1],
        [0, 0, 0],
    ]
    assert s(4, [0, 1], None) == [0]  # a Participation, by its call


def test_the_majority_of_a_partition_goes_on() -> None:
    """Three of five move θ; with one of them gone 2 against 2 have no majority, and nobody does."""
    s = schedule(
        event("partition", 3, until=6, groups=[[0, 4], [1, 2, 3]]), event("leave", 5, 3), event("drop", 4, 1), n=5
    )
    assert [s.participants(t, range(5)) for t in (2, 3, 4, 5, 6, 7)] == [
        [0, 1, 2, 3, 4], [1, 2, 3], [2, 3], [], [], [0, 1, 2, 4],
    ]  # fmt: skip
    assert [s.sides(t) for t in (2, 3, 5)] == [[[0, 1, 2, 3, 4]], [[0, 4], [1, 2, 3]], [[0, 4], [1, 2]]]
    assert s.participants(3, [0, 1, 4]) == [1]
    assert s.attendance(4, range(5)) == Attendance((0, 1, 2, 3, 4), (1, 2, 3), (2, 3), ())
    s = schedule(event("partition", 3, groups=[[0, 1], [2, 3, 4]]), *[event("leave", 2, w) for w in (3, 4)], n=5)
    assert s.participants(3, range(5)) == [0, 1]  # two of the three that are left


def test_a_joiner_waits_until_it_reaches_somebody() -> None:
    s = schedule(event("leave", 2, 3), event("join", 4, 3), event("partition", 3, until=5, groups=[[0, 1, 2], [3]]))
    assert [3 in s.alive(t) for t in range(1, 8)] == [True, False, False, False, False, True, True]
    assert s.joins(6) == [3]
    s = schedule(event("leave", 2, 3), event("join", 4, 3), event("partition", 3, until=5, groups=[[0, 1], [2, 3]]))
    assert (s.joins(4), s.donor(4, 3)) == ([3], 2)


def test_the_last_one_stays_until_somebody_has_joined() -> None:
    """Worker 0 should go before step 5, when worker 1 is up again, but can't reach it before step 7."""
    s = schedule(
        event("leave", 2, 1), event("partition", 3, until=6, groups=[[0], [1]]), event("join", 4, 1),
        event("leave", 5, 0), n=2,
    )  # fmt: skip
    assert [s.alive(t) for t in range(1, 10)] == [[0, 1], *[[0]] * 5, [0, 1], [1], [1]]
    assert (s.joins(7), s.donor(7, 1), s.leaves(8)) == ([1], 0, [0])


def test_a_failed_transfer_sends_all_that_took_part_back() -> None:
    events = event("drop", 2, 1), event("partition", 3, groups=[[0, 1], [2, 3]]), event("leave", 4, 0)
    survivors, rollback = schedule(*events), schedule(*events, on_failure="rollback")
    everybody = (0, 1, 2, 3)
    assert survivors.attendance(2, everybody) == Attendance(everybody, everybody, (0, 2, 3), ())
    assert rollback.attendance(2, everybody) == Attendance(everybody, everybody, (), everybody)
    assert rollback.attendance(2, [0, 2]) == Attendance((0, 2), (0, 2), (0, 2), ())
    for s in (survivors, rollback):
        assert s.attendance(1, everybody) == Attendance(everybody, everybody, everybody, ())
        assert s.attendance(3, everybody) == Attendance(everybody, (), (), ())  # no majority: nobody begins
        assert s.attendance(4, everybody) == Attendance((1, 2, 3), (1, 2, 3), (1, 2, 3), ())  # left before it began


def test_states_of_joiners() -> None:
    events = event("join", 3, 2), event("leave", 4, 1), event("join", 8, 1)
    fresh, donor = schedule(*events), schedule(*events, joiner="donor")
    kept = schedule(*events, joiner="donor", keep_state=True)
    states = [(s.joiners_state(3, 2), s.joiners_state(8, 1)) for s in (fresh, donor, kept)]
    assert states == [("fresh", "fresh"), ("donor", "donor"), ("donor", "own")]
    sizes = {"weights": 1000, "inner_state": 2010, "anchor": 1000, "outer_state": 1000}
    moved = [[s.availability.join_bytes(**sizes, returning=r) for r in (False, True)] for s in (fresh, donor, kept)]
    assert moved == [[3000, 3000], [5010, 5010], [5010, 3000]]


def brute_force(events: list[dict[str, Any]], n: int, steps: int) -> list[set[int]]:
    """Who is there, step by step, from the words of the description alone; [] if nobody would be left."""
    by_step = sorted(events, key=lambda e: e["step"])
    first = {w: next((e["kind"] for e in by_step if e.get("worker") == w), "") for w in range(n)}
    up = {w for w in range(n) if first[w] != "join"}
    there = [set(up)]
    for step in range(1, steps + 1):
        now = [e for e in events if e["step"] <= step <= e.get("until", e["step"])]
        up -= {e["worker"] for e in now if e["kind"] == "leave"}
        if not up:
            return []
        up |= {e["worker"] for e in now if e["kind"] == "join"}
        groups = next((e["groups"] for e in now if e["kind"] == "partition"), [list(range(n))])
        stay = there[-1] & up
        if not stay:
            stay = {sorted(there[-1])[0]}
        come = {w for w in up - there[-1] if any(w in g and d in g for g in groups for d in stay)}
        there.append(stay | come)
    return there


@pytest.mark.parametrize("seed", range(100))
def test_presence_is_what_the_description_says(seed: int) -> None:
    """With many departures, returns and partitions, asked for in any order."""
    draw, n, steps = random.Random(seed), 1 + seed % 5, 40
    events: list[dict[str, Any]] = []
    for w in range(n):
        kind = draw.choice(["leave", "leave", "join"])
        for step in sorted(draw.sample(range(2, steps), draw.randrange(6))):
            events.append(event(kind, step, w))
            kind = {"leave": "join", "join": "leave"}[kind]
    cuts = sorted(draw.sample(range(1, steps), 6))
    for start, end in zip(cuts[::2], cuts[1::2], strict=True):
        side = [w for w in range(n) if draw.random() < 0.5]
        groups = [g for g in (side, [w for w in range(n) if w not in side]) if g]
        events.append(event("partition", start, until=end - 1, groups=groups))
    draw.shuffle(events)
    expected = brute_force(events, n, steps)
    if not expected:
        with pytest.raises(ValueError, match="nobody"):
            schedule(*events, n=n)
        return
    s = schedule(*events, n=n)
    asked = draw.sample(range(1, steps + 1), steps)
    assert {t: set(s.alive(t)) for t in asked} == {t: expected[t] for t in asked}
    for t in asked:
        assert set(s.joins(t)) == expected[t] - expected[t - 1]
        assert set(s.leaves(t)) == expected[t - 1] - expected[t]
        for w in s.joins(t):
            assert s.donor(t, w) in expected[t] & expected[t - 1]
            assert s.returns(t, w) == any(w in before for before in expected[:t])


# -------------------------------------------------------------------------------------------- drawn


def test_rates_are_rates() -> None:
    """Over 20,000 worker-steps each within four standard deviations; none of the kinds depends on another."""
    n, steps = 4, 5_000
    s = Schedule(Availability(**{**RATES, "partition_rate": 0.0, "partition_steps": None}), n)
    there = [set(range(n)), *[set(s.alive(t)) for t in range(1, steps + 1)]]

    def near(hits: int, of: int, rate: float) -> bool:
        return abs(hits - of * rate) < 4 * (of * rate * (1 - rate)) ** 0.5

    could_leave = [len(a) for a, b in pairwise(there[1:]) if len(a) > 1]
    left = sum(len(a - b) for a, b in pairwise(there[1:]) if len(a) > 1)
    assert near(left, sum(could_leave), 0.05)
    joined = sum(len(b - a) for a, b in pairwise(there[1:]))
    assert near(joined, sum(n - len(a) for a in there[1:-1]), 0.2)
    asked = [(t, w) for t in range(1, steps + 1) for w in range(n)]
    dropped, late = [{(t, w) for t, w in asked if ask(t, w)} for ask in (s.dropped, s.lateness)]
    assert near(len(dropped), len(asked), 0.1)
    assert near(len(late), len(asked), 0.1)
    assert near(len(dropped & late), len(asked), 0.01)
    assert near(len([1 for t, w in dropped if (t + 1, w) in dropped]), len(dropped), 0.1)
    assert near(len([1 for t, w in dropped if (t, (w + 1) % n) in dropped]), len(dropped), 0.1)
    assert {s.lateness(t, w) for t, w in late} == {2.5}
    alone = [t for t in range(1, steps) if len(there[t]) == 1]
    assert all(there[t] for t in range(steps + 1))
    assert alone  # it happens that the last one has to stay


def test_drawn_partitions() -> None:
    n, steps = 5, 20_000
    s = Schedule(Availability(partition_rate=0.02, partition_steps=6, seed=1), n)
    sides = [s.sides(t) for t in range(1, steps + 1)]
    cut = [len(x) == 2 for x in sides]
    assert all(sorted(w for side in x for w in side) == list(range(n)) for x in sides)
    begins = [t for t in range(steps) if cut[t] and (t == 0 or sides[t] != sides[t - 1])]
    free = cut.count(False) + len(begins)  # steps before which one could begin
    assert abs(len(begins) - 0.02 * free) < 4 * (0.02 * free) ** 0.5
    assert all(sides[t : t + 6] == [sides[t]] * len(sides[t : t + 6]) for t in begins)
    assert sum(cut) in range(6 * (len(begins) - 1), 6 * len(begins) + 1)
    for w in range(n):
        away = sum(w in sides[t][1] for t in begins)
        assert abs(away - len(begins) / 2) < 4 * (len(begins) / 4) ** 0.5
    assert Schedule(Availability(partition_rate=1.0, partition_steps=2), 1).sides(5) == [[0]]
    always = Schedule(Availability(partition_rate=1.0, partition_steps=2), 2)
    assert all(sorted(always.sides(t)) == [[0], [1]] for t in range(1, 50))


def answers(s: Schedule, step: int) -> list[Any]:
    joins = [(w, s.donor(step, w), s.joiners_state(step, w)) for w in s.joins(step)]
    late = [s.lateness(step, w) for w in range(s.num_workers)]
    return [s.alive(step), s.leaves(step), joins, late, s.attendance(step, range(s.num_workers)), s.sides(step)]


@pytest.mark.parametrize("seed", range(5))
def test_answers_do_not_depend_on_what_was_asked_before(seed: int) -> None:
    """As for a process that resumes in the middle of an outage, or asks for other workers' steps first."""
    availability = Availability(**{**RATES, "seed": seed}, joiner="donor", on_failure="rollback")
    in_order = Schedule(availability, 4)
    expected = {t: answers(in_order, t) for t in range(1, 201)}
    shuffled, steps = Schedule(pickle.loads(pickle.dumps(availability)), 4), list(expected)
    random.Random(seed).shuffle(steps)
    assert {t: answers(shuffled, t) for t in steps} == expected
    assert {t: answers(Schedule(availability, 4), t) for t in (200, 77, 3)} == {t: expected[t] for t in (200, 77, 3)}
    assert any(len(set(map(str, column))) > 1 for column in zip(*expected.values(), strict=True))
    other = Schedule(replace(availability, seed=seed + 100), 4)
    for i in (0, 2, 3, 4, 5):  # presence, joins, lateness, attendance, partitions
        assert [e[i] for e in expected.values()] != [answers(other, t)[i] for t in expected]


def test_extreme_rates() -> None:
    gone = Schedule(Availability(leave_rate=1.0), 3)
    assert [gone.alive(t) for t in (1, 2, 3, 1000)] == [[0, 1, 2], [0], [0], [0]]
    assert Schedule(Availability(drop_rate=1.0), 2).participants(1, [0, 1]) == []
    quiet = Schedule(Availability(), 3)
    assert answers(quiet, 10) == [[0, 1, 2], [], [], [0.0] * 3, Attendance(*[(0, 1, 2)] * 3, ()), [[0, 1, 2]]]
    turns = Schedule(Availability(leave_rate=1.0, join_rate=1.0), 2)  # both would go in turns: one always has to stay
    assert all(turns.alive(t) for t in range(1, 100))


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([event("sleep", 1, 0)], "`kind` (='sleep') of an event must be one of 'leave', 'join', 'drop', 'late',"),
        ([{"step": 1}], "{'step': 1} is no event. An event has `kind` and `step`, and by its kind `worker`, `until`,"),
        ([event("leave", 1, 0, worekr=1)], "is no event. An event has `kind` and `step`"),
        ([("leave", 1)], "('leave', 1) is no event."),
        ([event("leave", 1)], "the event Event(kind='leave', step=1) lacks `worker`."),
        ([event("late", 1)], "the event Event(kind='late', step=1) lacks `seconds` and `worker`."),
        ([event("leave", 1, 0, until=3)], "has `until`, which has no meaning for 'leave'."),
        ([event("leave", 0, 0)], "Availability, leave: `step` (=0) must be an integer ≥ 1."),
        ([event("join", 1, 0)], "Availability, join: `step` (=1) must be an integer ≥ 2."),
        ([event("drop", 5, 0, until=4)], "Availability, drop: `until` (=4) must be an integer ≥ 5."),
        ([event("drop", 5, -1)], "Availability, drop: `worker` (=-1) must be an integer ≥ 0."),
        ([event("late", 5, 0, seconds=0)], "Availability, late: `seconds` (=0) must be a finite number > 0."),
        ([event("leave", 3, 1), event("leave", 5, 1)], "can't happen: worker 1 is not there since Event(kind='leave',"),
        ([event("join", 5, 1), event("join", 7, 1)], "can't happen: worker 1 is there already since Event(kind='join'"),
        ([event("leave", 5, 1), event("join", 5, 1)], "are at the same step. Let a step at least lie between them."),
        (
            [event("partition", 1, until=4, groups=[[0], [1, 2]]), event("partition", 4, groups=[[0, 1], [2]])],
            "overlap. Write one with the groups of both, for the steps that they share.",
        ),
        ([event("partition", 1, groups=[[0], [1]])], "must have each of the workers 0 to 2 once."),
        ([event("partition", 1, groups=[[0, 1], [1, 2]])], "must have each of the workers 0 to 2 once."),
        ([event("drop", 1, 3)], "there is no worker 3 for Event(kind='drop', step=1, worker=3); with `num_nodes` (=3)"),
        ([event("leave", 2, w) for w in range(3)], "Event(kind='leave', step=2, worker=2) leaves nobody. A run needs"),
        (
            [event("join", 5, 1), event("leave", 5, 0), event("leave", 5, 2)],
            "Event(kind='leave', step=5, worker=2) leaves nobody.",
        ),
        ([event("join", 2, w) for w in range(3)], "all workers join later, so that nobody is there to begin with."),
        ({"drop_rate": 1.5}, "`drop_rate` (=1.5) must be a probability from 0 to 1."),
        ({"leave_rate": -0.1}, "`leave_rate` (=-0.1) must be a finite number ≥ 0."),
        ({"late_rate": 0.1}, "`late_seconds` (=None) and `late_rate` (=0.1) go together: give both or none."),
        ({"partition_steps": 3}, "`partition_steps` (=3) and `partition_rate` (=0.0) go together: give both or none."),
        ({"late_rate": 0.1, "late_seconds": 0}, "`late_seconds` (=0) must be a finite number > 0."),
        ({"partition_rate": 0.1, "partition_steps": 0}, "`partition_steps` (=0) must be an integer ≥ 1."),
        ({"join_rate": 0.1}, "`join_rate` (=0.1) has no effect without `leave_rate`: nobody leaves."),
        ({"joiner": "average"}, "`joiner` (='average') must be 'fresh' or 'donor'."),
        ({"on_failure": "stop"}, "`on_failure` (='stop') must be 'survivors' or 'rollback'."),
        ({"seed": -1}, "`seed` (=-1) must be an integer ≥ 0."),
        (
            {"events": [event("join", 5, 1)], "leave_rate": 0.1},
            "Event(kind='join', step=5, worker=1) is written down, and `leave_rate` (=0.1) draws the same kind of",
        ),
        ({"events": [event("drop", 5, 1)], "drop_rate": 0.1}, "and `drop_rate` (=0.1) draws the same kind of event."),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Schedule(Availability(**(arguments if isinstance(arguments, dict) else {"events": arguments})), 3)
    assert str(caught.value).startswith("Availability")


def test_kinds_may_be_written_down_and_drawn_each_in_its_own_way() -> None:
    s = schedule(event("leave", 5, 1), drop_rate=0.5, seed=2)
    assert s.alive(5) == [0, 2, 3]
    assert 0 < sum(s.dropped(t, 0) for t in range(1, 101)) < 100


def test_descriptions_from_yaml_and_their_words() -> None:
    """Equal however they were given and ordered; the text makes an equal one, without what is the default."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--availability", type=Availability)
    text = """
availability:
  events:
    - {kind: partition, step: 5, until: 8, groups: [[0, 1], [2]]}
    - {kind: leave, step: 3, worker: 2}
    - {kind: late, step: 4, worker: 1, seconds: 2}
  drop_rate: 0.25
  seed: 3
  joiner: donor
"""
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the latter in older versions
    parsed = instantiate(parser.parse_string(text)).availability
    events = [
        event("late", 4, 1, seconds=2.0),
        Event("leave", 3, 2),
        event("partition", 5, until=8, groups=((0, 1), (2,))),
    ]
    written = Availability(events, drop_rate=0.25, seed=3, joiner="donor")
    assert parsed == written
    assert repr(written) == (
        "Availability(events=(Event(kind='leave', step=3, worker=2), Event(kind='late', step=4, worker=1, seconds=2.0),"
        " Event(kind='partition', step=5, until=8, groups=((0, 1), (2,)))), drop_rate=0.25, seed=3, joiner='donor')"
    )
    assert eval(repr(written)) == written
    assert repr(Availability()) == "Availability()"
    assert hash(parsed) == hash(written)


# -------------------------------------------------------------------------------------------- what was lost


def test_a_tally_by_hand() -> None:
    tally = Tally()
    for _ in range(10):
        tally.stepped([0, 1, 2])
    tally.sent(Attendance((0, 1, 2), (0, 1), (0,), ()))  # worker 2 unreachable, the part of worker 1 lost
    tally.stepped([0, 1, 2])
    assert tally.unsent == {0: 1, 1: 11, 2: 11}
    tally.left([2])
    assert tally.lost_steps == 11
    tally.sent(Attendance((0, 1), (0, 1), (), (0, 1)))
    assert (tally.lost_steps, tally.failed) == (23, 1)
    tally.joined(5000)
    tally.stepped([0, 1, 2])
    tally.sent(Attendance((0, 1, 2), (0, 1, 2), (0, 1, 2), ()), rejected=[1])
    assert tally.lost_steps == 24
    tally.left([0])  # has nothing that was not sent
    counts = (tally.transfers, tally.alive, tally.participating, tally.committed, tally.lost_steps)
    assert counts == (3, 3 + 2 + 3, 2 + 2 + 3, 1 + 0 + 2, 24)
    assert (tally.joins, tally.join_bytes) == (1, 5000)


def test_a_tally_goes_on_from_a_file() -> None:
    before, after = Tally(), Tally()
    before.stepped([0, 1])
    state = before.state_dict()
    after.load_state_dict(state)
    before.stepped([0])
    assert after.unsent == {0: 1, 1: 1}
    after.stepped([0])
    assert (after, state["unsent"]) == (before, {0: 1, 1: 1})
