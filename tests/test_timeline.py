"""Does the trace show what the clock has counted: rows without overlap, sums, and an arrow per message?"""

import json
import os
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from scenarios import Scenario

from lightning_diloco.cluster.clock import Clock
from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.cluster.replay import KINDS

LAN = Cluster(step_seconds=[1.0, 2.0], bandwidth_gbit_s=1, latency_ms=0)
SECOND = 125_000_000  # bytes that take a second between two workers


def read(clock: Clock, path: Path) -> dict[str, Any]:
    clock.trace(path)
    return json.loads(path.read_text())


def rows(trace: dict[str, Any]) -> dict[tuple[int, int], list[tuple[int, int, str]]]:
    """Per row its slices, in ns: (start, end, name)."""
    found = defaultdict(list)
    for e in trace["traceEvents"]:
        if e["ph"] == "X":
            start = round(e["ts"] * 1000)
            found[e["pid"], e["tid"]].append((start, start + round(e["dur"] * 1000), e["name"]))
    return found


def flows(trace: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    found = defaultdict(list)
    for e in trace["traceEvents"]:
        if e["ph"] in "stf":
            found[e["id"]].append(e)
    return found


def two_rounds(**arguments: Any) -> Clock:
    clock = Clock(LAN, 2, **arguments)
    for step in range(1, 5):
        clock.step(step, [0, 1])
        if step % 2 == 0:
            clock.send(f"Δ {step}", SECOND, [[0, 1]], step, "ring")
            clock.arrive(f"Δ {step}", [0, 1], step)
    return clock


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """Computing for two steps (2 s, 4 s), a transfer of 1 s, and again."""
    trace = read(two_rounds(record=True), tmp_path / "trace.json")
    us = [{key: value for key, value in e.items() if key != "args"} for e in trace["traceEvents"] if e["ph"] == "X"]
    assert us == [
        {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start * 1e6, "dur": (end - start) * 1e6}
        for pid, tid, slices in (
            (0, 0, [("computing", 0, 2), ("waiting", 2, 4), ("link", 4, 5)]),
            (0, 1, [("computing", 0, 4), ("link", 4, 5)]),
            (1, 0, [("Δ 2", 4, 5)]),
            (1, 1, [("Δ 2", 4, 5)]),
        )
        for name, start, end in [
            *slices,
            *[(name.replace("2", "4"), start + 5, end + 5) for name, start, end in slices],
        ]
    ]
    details = [e["args"] for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 0 and e["tid"] == 0]
    assert details == [
        {"first step": first, "last step": last} for first, last in [(1, 2), (2, 2), (2, 2), (3, 4), (4, 4), (4, 4)]
    ]
    on_link = next(e["args"] for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == 1)
    assert on_link == {"bytes": SECOND, "pattern": "ring", "step": 2, "workers": [0, 1]}
    names = {(e["pid"], e["tid"], e["name"]): e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names == {
        (0, 0, "process_name"): "workers",
        (0, 0, "thread_name"): "worker 0",
        (0, 1, "thread_name"): "worker 1",
        (1, 0, "process_name"): "links",
        (1, 0, "thread_name"): "link of worker 0",
        (1, 1, "thread_name"): "link of worker 1",
    }
    arrow = [(e["ph"], e["pid"], e["tid"], e["ts"], e.get("bp")) for e in flows(trace)[0]]
    assert arrow == [("s", 0, 0, 2e6 - 0.001, None), ("t", 1, 0, 4e6, "e"), ("f", 0, 0, 5e6 - 0.001, "e")]
    assert len(flows(trace)) == 4
    assert trace["otherData"] == {"clock": "simulated seconds", "complete": True}


@pytest.mark.parametrize("seed", range(30))
def test_the_trace_is_what_the_clock_has_counted(seed: int, tmp_path: Path) -> None:
    n = 1 + seed % 5
    scenario = Scenario(seed, n, 30, presence=seed % 2 == 0, record=True)
    trace = read(scenario.clock, tmp_path / "trace.json")
    for row in rows(trace).values():
        assert row == sorted(row)
        assert all(before[1] <= after[0] for before, after in pairwise(row))
        assert all(start <= end for start, end, _ in row)
    for w, worker in enumerate(scenario.clock.workers):
        of_worker = rows(trace)[0, w]
        for kind in KINDS:
            spent = sum(end - start for start, end, name in of_worker if name == kind)
            assert spent / 1e9 == pytest.approx(getattr(worker, kind), abs=1e-9 * (1 + len(of_worker)))
        assert all(before[1] == after[0] for before, after in pairwise(of_worker))
    busy = sum(end - start for (group, _), row in rows(trace).items() for start, end, _ in row if group == 1)
    assert busy / 1e9 == pytest.approx(
        sum(seconds * len(workers) for workers, seconds in scenario.run[1].values()), abs=1e-6
    )


@pytest.mark.parametrize("seed", range(30))
def test_every_arrow_has_a_start_and_an_end_inside_slices(seed: int, tmp_path: Path) -> None:
    n = 2 + seed % 4
    trace = read(Scenario(seed, n, 30, presence=seed % 2 == 0, record=True).clock, tmp_path / "trace.json")
    slices = rows(trace)
    assert flows(trace)
    for arrow in flows(trace).values():
        assert [e["ph"] for e in arrow] in (["s", "f"], ["s", "t", "f"])
        times = [round(e["ts"] * 1000) for e in arrow]
        assert times == sorted(times)
        assert len({e["tid"] for e in arrow}) == 1
        for e, ns in zip(arrow, times, strict=True):
            assert any(start <= ns < max(end, start + 1) for start, end, _ in slices[e["pid"], e["tid"]])


def test_a_message_that_nobody_has_taken_in_ends_on_the_link(tmp_path: Path) -> None:
    """Worker 1 has done nothing yet, and takes nothing in: no arrow. The message of worker 0 is under way."""
    clock = Clock(LAN, 2, record=True)
    clock.step(1, [0])
    clock.send("Δ", SECOND, [[0, 1]], 1, "ring")
    (arrow,) = flows(read(clock, tmp_path / "trace.json")).values()
    assert [(e["ph"], e["pid"], e["tid"], e["ts"]) for e in arrow] == [
        ("s", 0, 0, 1e6 - 0.001),
        ("f", 1, 0, 2e6 - 0.001),
    ]


def test_long_rounds_are_one_slice() -> None:
    clock = Clock(LAN, 2, record=True)
    for step in range(1, 1001):
        clock.step(step, [0, 1])
    clock.send("Δ", SECOND, [[0, 1]], 1000, "ring")
    clock.arrive("Δ", [0, 1], 1000)
    assert sum(map(len, clock._timeline.rows.values())) == 2 + 1 + 2 + 2  # computing, waiting, link, on the links


def test_recording_ends_when_it_is_full(tmp_path: Path) -> None:
    """The file then has the run's beginning, and says that it has no more; the clock goes on."""
    clock, whole = two_rounds(record=6), two_rounds(record=True)
    trace = read(clock, tmp_path / "trace.json")
    assert trace["otherData"]["complete"] is False
    for row, slices in rows(trace).items():
        assert slices == rows(read(whole, tmp_path / "whole.json"))[row][: len(slices)]
    assert sum(map(len, rows(trace).values())) == 6
    assert all(len(arrow) > 1 for arrow in flows(trace).values())
    assert clock.workers == whole.workers
    assert read(two_rounds(record=14), tmp_path / "trace.json")["otherData"]["complete"] is True


def test_recording_changes_no_second() -> None:
    for seed in range(10):
        plain, recorded = (Scenario(seed, 3, 20, True, record=record).clock for record in (False, True))
        assert plain.state_dict() == recorded.state_dict()


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    path.write_text("before")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    clock = two_rounds(record=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left on device"):
            clock.trace(path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["trace.json"]
    clock.trace(str(path))
    assert json.loads(path.read_text())["traceEvents"]
    assert os.listdir(tmp_path) == ["trace.json"]
