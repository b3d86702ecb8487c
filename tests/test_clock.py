"""Does the clock say what an event-by-event simulation says, on random clusters, and what the closed forms say?"""

import json
import math
import random
from functools import cache

import pytest
from scenarios import Scenario

from lightning_diloco.cluster.availability import Availability
from lightning_diloco.cluster.clock import Clock
from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.cluster.replay import KINDS, Replay
from lightning_diloco.cluster.schedule import Schedule

MODEL = 4_000_000  # bytes


def lan(**others) -> Cluster:
    return Cluster(**{"step_seconds": 0.1, "bandwidth_gbit_s": 0.1, "latency_ms": 10, **others})


def train(clock: Clock, steps: int, interval: int, delay: int = 0, nbytes: int = MODEL) -> Clock:
    """Every worker takes every step; a transfer of all is sent every ``interval`` steps, arrives ``delay`` later."""
    everybody = list(range(clock.num_workers))
    for step in range(1, steps + 1):
        clock.step(step, everybody)
        if step % interval == 0:
            clock.send(step, nbytes, [everybody], step, "ring")
        if step > delay and (step - delay) % interval == 0:
            clock.arrive(step - delay, everybody, step)
    return clock


# -------------------------------------------------------------------------------------------- against events

CASES = [(seed, 1 + seed % 6, 30 if seed % 3 else 5, bool(seed % 2)) for seed in range(150)]


scenario = cache(Scenario)


def assert_agrees(replay: Replay, simulated, n: int) -> None:
    for w in range(n):
        for kind in KINDS:
            assert getattr(replay.workers[w], kind) == pytest.approx(simulated.seconds[w][kind], abs=1e-9), (w, kind)
        assert replay.workers[w].seconds == pytest.approx(simulated.clocks[w], abs=1e-9)
    assert replay.seconds == pytest.approx(max(simulated.clocks), abs=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}")
def test_the_clock_is_the_event_simulation(case: tuple[int, int, int, bool]) -> None:
    seed, n, steps, presence = case
    told = scenario(seed, n, steps, presence)
    assert_agrees(told.clock._run, told.simulated("run"), n)
    assert_agrees(told.clock.data_parallel, told.simulated("parallel"), n)


@pytest.mark.parametrize("seed", range(40))
def test_the_clock_is_the_event_simulation_of_a_schedule(seed: int) -> None:
    """Workers come, go, are cut off and late as rates say; the clock is told by the schedule's answers alone."""
    rates = {"leave_rate": 0.05, "join_rate": 0.2, "drop_rate": 0.1, "late_rate": 0.1, "late_seconds": 2.0}
    availability = Availability(**rates, partition_rate=0.05, partition_steps=4, seed=seed)
    n = 2 + seed % 5
    told = Scenario(seed, n, 40, schedule=Schedule(availability, n))
    assert_agrees(told.clock._run, told.simulated("run"), n)
    assert_agrees(told.clock.data_parallel, told.simulated("parallel"), n)
    assert any(w.late for w in told.clock.workers)
    assert any(w.absent for w in told.clock.workers)


def test_the_random_runs_contain_everything() -> None:
    """Else the agreement would say less than it seems to."""
    found = dict.fromkeys(KINDS, 0.0)
    for seed, n, steps, presence in CASES:
        for worker in scenario(seed, n, steps, presence).clock.workers:
            for kind in KINDS:
                found[kind] += getattr(worker, kind)
    assert all(seconds > 100 for seconds in found.values()), found


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_missing_from_a_workers_time(seed: int) -> None:
    """Its clock, which the rules of waiting use, is the sum of what it has spent; without any tolerance."""
    clock = Scenario(seed, 5, 40, presence=True).clock
    for replay in (clock._run, clock.data_parallel):
        assert replay._now == [sum(replay._spent[kind][w] for kind in KINDS) for w in range(5)]
        for worker in replay.workers:
            assert worker.computing + worker.late + worker.waiting + worker.link + worker.absent == worker.seconds
        present = [w.seconds - w.absent for w in replay.workers]
        utilisation = sum(w.computing for w in replay.workers) / sum(present)
        assert replay.compute_utilisation == pytest.approx(utilisation, abs=1e-12)


# -------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize("interval", [1, 5, 10])
def test_equal_speeds_without_overlap_are_the_published_formula(n: int, interval: int) -> None:
    """2503.09799, Appendix A: seconds = steps · step + rounds · all-reduce, 2 S/W (1 − 1/n) + ε."""
    clock = train(Clock(lan(), n, gradient_bytes=MODEL), steps=30, interval=interval)
    all_reduce = 2 * MODEL * 8 / 1e8 * (1 - 1 / n) + 2 * (n - 1) * 0.01
    assert clock.seconds == pytest.approx(30 * 0.1 + 30 // interval * all_reduce, abs=1e-12)
    assert clock.compute_utilisation == pytest.approx(3.0 / clock.seconds, abs=1e-12)
    assert clock.data_parallel.seconds == pytest.approx(30 * 0.1 + 30 * all_reduce, abs=1e-12)
    assert clock.data_parallel.compute_utilisation == pytest.approx(0.1 / (0.1 + all_reduce), abs=1e-12)
    assert all(w.waiting == 0 for w in clock.workers)


@pytest.mark.parametrize("delay", range(10))
@pytest.mark.parametrize("gbit_s", [0.02, 0.05, 0.1, 0.5, 10.0])
def test_overlap_hides_exactly_what_fits_into_the_delay(delay: int, gbit_s: float) -> None:
    interval, rounds = 10, 6
    cluster = lan(bandwidth_gbit_s=gbit_s)
    transfer = 2 * MODEL * 8 / (gbit_s * 1e9) * (1 - 1 / 4) + 6 * 0.01
    clock = train(Clock(cluster, 4), interval * rounds + delay, interval, delay)
    hidden = min(delay * 0.1, transfer)
    assert clock.seconds == pytest.approx((interval * rounds + delay) * 0.1 + rounds * (transfer - hidden), abs=1e-12)
    assert [w.link for w in clock.workers] == pytest.approx([rounds * (transfer - hidden)] * 4, abs=1e-12)


def test_a_transfer_that_outlasts_the_round_holds_up_the_next_one_on_the_link() -> None:
    """Two workers, a step of 1 s, H = 1, a transfer of 3 s taken in two steps later: the link is the bottleneck.

    sent at 1, ends at 4; sent at 2, ends at 7; step 3 ends at 3, then waits for the first until 4: sent, ends at 10; …
    """
    clock = train(Clock(lan(step_seconds=1.0, latency_ms=0, bandwidth_gbit_s=1), 2), 3, 1, 2, nbytes=375_000_000)
    assert clock.seconds == 4.0
    clock.arrive(2, [0, 1], 3)
    assert clock.seconds == 7.0
    clock.arrive(3, [0], 3)
    assert [w.seconds for w in clock.workers] == [10.0, 7.0]
    assert [w.link for w in clock.workers] == [7.0, 4.0]


def test_whole_numbers() -> None:
    """Worker 0 takes 1 s per step, worker 1 takes 3 s; a transfer takes 2 s, and the first one 4 s.

    2 steps: clocks 2 and 6. Transfer ready at 6, ends at 10: worker 0 waits 4 s for worker 1, then both 4 s.
    2 steps: 12 and 16. Ends at 18. Worker 1 alone is late by 5 s in a step: 18 and 26; the transfer ends at 28.
    """
    cluster = Cluster(step_seconds=[1, 3], bandwidth_gbit_s=1, latency_ms=0, sync_overhead_s=1, first_sync_overhead_s=2)
    late = {(5, 1): 5.0}
    clock = Clock(cluster, 2, late=lambda step, worker: late.get((step, worker), 0.0))
    assert (clock.seconds, clock.last_step) == (0.0, 0)
    assert clock.compute_utilisation is None
    for step, active in ((1, [0, 1]), (2, [0, 1]), (3, [0, 1]), (4, [0, 1]), (5, [1])):
        clock.step(step, active)
        if step != 1 and step != 3:
            clock.send("Δ", 125_000_000, [[0, 1]], step, "ring")
            clock.arrive("Δ", [0, 1], step)
    assert [vars(w) for w in clock.workers] == [
        {"computing": 4.0, "late": 0.0, "waiting": 4.0 + 4.0 + 8.0, "link": 8.0, "absent": 0.0},
        {"computing": 15.0, "late": 5.0, "waiting": 0.0, "link": 8.0, "absent": 0.0},
    ]
    assert clock.seconds == 28.0
    assert clock.compute_utilisation == (4 + 15) / (28 + 28)


def test_only_what_a_worker_takes_in_holds_it_up() -> None:
    """Groups are as fast as their own slowest; an outsider waits for all; one that takes nothing in goes on."""
    clock = Clock(lan(step_seconds=[1, 2, 3, 4, 5], latency_ms=0, bandwidth_gbit_s=1), 5)
    clock.step(1, [0, 1, 2, 3, 4])
    clock.send("Δ", 125_000_000, [[0, 1], [2, 3]], 1, "pairs")
    clock.arrive("Δ", [0, 2, 4], 1)
    assert [w.seconds for w in clock.workers] == [3.0, 2.0, 5.0, 4.0, 5.0]
    clock.step(2, [1])
    assert clock.workers[1].seconds == 4.0


def test_a_joiner_is_absent_until_the_donors_present_and_waits_for_its_state() -> None:
    clock = Clock(lan(step_seconds=1.0, latency_ms=0, bandwidth_gbit_s=1, first_sync_overhead_s=3.0), 2)
    for step in range(1, 11):
        clock.step(step, [0])
    clock.join(1, donor=0, nbytes=250_000_000, step=11)
    assert vars(clock.workers[1]) == {"computing": 0.0, "late": 0.0, "waiting": 0.0, "link": 5.0, "absent": 10.0}
    assert clock.workers[0].seconds == 10.0  # goes on, but its link is busy until 15
    for step in range(11, 13):
        clock.step(step, [0, 1])
    clock.send("Δ", 125_000_000, [[0]], 12, "server")
    clock.arrive("Δ", [0], 12)
    assert clock.workers[0].seconds == 15.0 + 2.0
    assert clock.compute_utilisation == (12 + 2) / (17 + (17 - 10))


def test_what_is_not_known_is_an_error() -> None:
    clock = Clock(lan(), 2)
    clock.step(1, [0, 1])
    clock.send("Δ", 1, [[0, 1]], 1, "ring")
    message = "A transfer 'Δ' is under way already. Each needs a key of its own until it arrives."
    with pytest.raises(ValueError, match=f"^{message}$"):
        clock.send("Δ", 1, [[0, 1]], 1, "ring")
    with pytest.raises(ValueError, match=r"^No transfer 'g' is under way: it was not sent, or has been"):
        clock.arrive("g", [0], 1)
    with pytest.raises(RuntimeError, match=r"^This clock doesn't replay data parallelism: it was made without `g"):
        clock.data_parallel  # noqa: B018
    with pytest.raises(RuntimeError, match=r"^This clock has recorded no timeline. Make it with `record=True`\.$"):
        clock.trace("nowhere.json")
    with pytest.raises(ValueError, match="`step_seconds` has 2 numbers, but there are 3 workers"):
        Clock(lan(step_seconds=[1, 2]), 3)
    with pytest.raises(ValueError, match="`step_seconds` is 'measured', and nothing was measured yet"):
        Clock(lan(step_seconds="measured"), 2).step(1, [0])
    with pytest.raises(ValueError, match=r"^Clock: `record` \(=-1\) must be True, False, or a number of slices\.$"):
        Clock(lan(), 2, record=-1)
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(
            ValueError, match=f"^Clock: a step or a transfer takes {bad} seconds, which must be a finite number ≥ 0"
        ):
            Clock(lan(), 2, late=lambda step, worker, bad=bad: bad).step(1, [0])
    with pytest.raises(ValueError, match=r"^Clock.join: `data_parallel_bytes` is missing"):
        Clock(lan(), 2, gradient_bytes=1).join(0, 1, 1, 1)


def test_measured_seconds_may_change_during_a_run() -> None:
    measured = lan(step_seconds="measured", latency_ms=0)
    clock = Clock(measured.with_step_seconds(0.5), 2, gradient_bytes=12_500_000)
    clock.step(1, [0, 1])
    clock.use(measured.with_step_seconds(0.25))
    clock.step(2, [0, 1])
    assert clock.seconds == 0.75
    assert clock.data_parallel.seconds == 0.75 + 2 * 1.0
    clock.use(measured.with_step_seconds(0.25), gradient_bytes=25_000_000)
    clock.step(3, [0, 1])
    assert clock.data_parallel.seconds == 1.0 + 2 * 1.0 + 2.0
    clock.send("Δ", 12_500_000, [[0, 1]], 3, "ring")
    clock.arrive("Δ", [0, 1], 3)
    clock.use(lan(step_seconds=0.25, latency_ms=0, bandwidth_gbit_s=0.2))
    clock.send("Δ", 12_500_000, [[0, 1]], 3, "ring")
    clock.arrive("Δ", [0, 1], 3)
    assert clock.seconds == 1.0 + 1.0 + 0.5


# -------------------------------------------------------------------------------------------- files


def happen(clock: Clock, first: int, last: int) -> None:
    draw = random.Random(first)
    for step in range(first, last + 1):
        clock.step(step, [0, 1, 2])
        clock.send(("Δ", step), draw.randrange(10**7), [[0, 1], [2]] if step % 2 else [[0, 2]], step, "ring")
        if step > 2:
            clock.arrive(("Δ", step - 2), [0, 1, 2], step)
        if step % 5 == 0:
            clock.join(2, 0, 1000, step, 500)


@pytest.mark.parametrize("at", range(1, 12))
def test_a_resumed_clock_goes_on_bit_for_bit(at: int) -> None:
    """At any step, with transfers under way; the state is of plain values, which a file can hold."""
    cluster = lan(step_seconds=[0.1, 0.3, 0.2], jitter=0.5, first_sync_overhead_s=0.3)
    through, before, after = (Clock(cluster, 3, gradient_bytes=10**6) for _ in range(3))
    happen(before, 1, at)
    state = before.state_dict()
    as_saved = json.dumps(state)
    after.load_state_dict(state)
    assert after.last_step == at
    happen(through, 1, at)
    for clock in (through, after):
        happen(clock, at + 1, 15)
    assert after.state_dict() == through.state_dict()
    assert (after.seconds, after.workers, after.last_step) == (through.seconds, through.workers, 15)
    happen(before, at + 1, 15)
    assert before.state_dict() == through.state_dict()
    assert json.dumps(state) == as_saved  # the state shares nothing with either clock


def test_a_state_for_another_number_of_workers() -> None:
    """New workers have been absent so far; those that are gone are forgotten."""
    clock = train(Clock(lan(step_seconds=[1, 2], latency_ms=0), 2), 3, 5)
    clock.send("Δ", MODEL, [[0, 1]], 3, "ring")
    more, fewer = Clock(lan(step_seconds=[1, 2, 3], latency_ms=0), 3), Clock(lan(latency_ms=0), 1)
    more.load_state_dict(clock.state_dict())
    fewer.load_state_dict(clock.state_dict())
    assert more.workers[:2] == clock.workers
    assert vars(more.workers[2]) == {"computing": 0.0, "late": 0.0, "waiting": 0.0, "link": 0.0, "absent": 6.0}
    assert fewer.workers == clock.workers[:1]
    for resumed in (more, fewer):
        resumed.arrive("Δ", list(range(resumed.num_workers)), 3)
        assert all(w.seconds == 6.0 + 0.32 for w in resumed.workers)
        resumed.step(4, [resumed.num_workers - 1])
    with pytest.raises(ValueError, match=r"^Clock: the file's clock replays data parallelism alongside, and this one"):
        Clock(lan(), 2, gradient_bytes=1).load_state_dict(clock.state_dict())
