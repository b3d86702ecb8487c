"""Does every process get the objects of all, whatever their sizes, and learn in time which process is missing?"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import outcomes, run, start

from lightning_diloco.comm.objects import ROOM, gather_objects

pytestmark = pytest.mark.processes

SIZES = [0, 1, ROOM // 4, ROOM, 100_000]
PICKLED = 60  # bytes that pickling adds at most, to a bytes object in a tuple


def connected(rounds: Callable[[int, Any], Any], size: int) -> Any:
    """What ``rounds`` returns, given this process's rank and a group."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    dist.barrier()
    return rounds(rank, dist.group.WORLD)


@pytest.mark.parametrize("size", [2, 3])
def test_objects_of_any_size_arrive_by_rank_and_in_order(size: int, tmp_path: Path) -> None:
    def rounds(rank: int, group: Any) -> list[Any]:
        long = [[s] * size for s in SIZES] + [[100_000 if r == w else 1 for r in range(size)] for w in range(size)]
        around = [[s] * size for s in range(ROOM - PICKLED, ROOM + 1)]  # one of them fills a message
        return [
            gather_objects((k, bytes([rank]) * sizes[rank]), rank, size, k, group, timedelta(seconds=60))
            for k, sizes in enumerate(long + around)
        ]

    of_processes = run(connected, size, rounds, size, out=tmp_path)
    first = of_processes[0]
    assert all(gathered == first for gathered in of_processes)
    for k, gathered in enumerate(first):
        assert [(number, set(value)) for number, value in gathered] == [
            (k, {r} if value else set()) for r, (_, value) in enumerate(gathered)
        ]
    lengths = [[len(value) for _, value in gathered] for gathered in first]
    assert lengths[: len(SIZES)] == [[s] * size for s in SIZES]
    longest = [max(of_round) for of_round in lengths[len(SIZES) :]]
    assert longest == [100_000] * size + [*range(ROOM - PICKLED, ROOM + 1)]


def test_nobody_goes_on_before_the_last_has_come(tmp_path: Path) -> None:
    def rounds(rank: int, group: Any) -> tuple[float, float]:
        time.sleep(0.2 * rank)
        came = time.monotonic()
        gather_objects(None, rank, 3, 0, group, timedelta(seconds=60))
        return came, time.monotonic()

    times = run(connected, 3, rounds, 3, out=tmp_path)
    assert max(came for came, _ in times) <= min(went for _, went in times)


def test_who_comes_before_process_0_waits_as_long_as_it_does(tmp_path: Path) -> None:
    def rounds(rank: int, group: Any) -> list[Any]:
        time.sleep((4.5, 0, 9)[rank])  # the last comes later after the first than the timeout
        return gather_objects(rank, rank, 3, 0, group, timedelta(seconds=8))

    assert run(connected, 3, rounds, 3, out=tmp_path) == [[0, 1, 2]] * 3


def test_processes_at_different_numbers_get_nothing(tmp_path: Path) -> None:
    """One has left a gathering by an error of its own, and goes on."""

    def rounds(rank: int, group: Any) -> list[Any]:
        return gather_objects(rank, rank, 2, rank, group, timedelta(seconds=1))

    results = outcomes(start(connected, 2, (rounds, 2), tmp_path), tmp_path)
    assert [kind for kind, _ in results] == ["raised", "raised"]  # type: ignore[misc]


def test_the_first_error_is_told_of_a_message_in_two_parts(tmp_path: Path) -> None:
    def rounds(rank: int, group: Any) -> Any:
        if rank == 0:
            time.sleep(300)
        return gather_objects(bytes(10 * ROOM), rank, 2, 0, group, timedelta(seconds=1))

    children = start(connected, 2, (rounds, 2), tmp_path)
    children[1].join(120)
    assert not children[1].is_alive()
    children[0].kill()
    outcome = outcomes(children, tmp_path)[1]
    assert outcome is not None
    assert "Process 0 is missing: " in outcome[1]
    assert "Timed out waiting" in outcome[1]


@pytest.mark.parametrize("missing", [(1, 2), (2, 3), (1, 3)])
def test_process_0_names_all_that_do_not_come(missing: tuple[int, ...], tmp_path: Path) -> None:
    def rounds(rank: int, group: Any) -> Any:
        if rank in missing:
            if rank == 3:
                os._exit(7)  # others that are missing hang
            time.sleep(300)
        return gather_objects(None, rank, 4, 0, group, timedelta(seconds=4))

    children = start(connected, 4, (rounds, 4), tmp_path)
    begun = time.monotonic()
    children[0].join(120)
    assert time.monotonic() - begun < 60
    for rank in missing:
        children[rank].kill()
    results = outcomes(children, tmp_path)
    said = str(results[0])
    assert [r for r in range(1, 4) if f"Process {r} is missing: " in said] == list(missing)
    there = [results[r] for r in range(1, 4) if r not in missing]
    assert there
    for outcome in there:
        assert outcome is not None
        assert outcome[1].startswith("RuntimeError: No answer from process 0, whose output may say who is missing")


def test_a_missing_process_0_is_named(tmp_path: Path) -> None:
    def rounds(rank: int, group: Any) -> Any:
        if rank == 0:
            time.sleep(300)
        return gather_objects(None, rank, 2, 0, group, timedelta(seconds=1))

    children = start(connected, 2, (rounds, 2), tmp_path)
    children[1].join(120)
    assert not children[1].is_alive()
    children[0].kill()
    results = outcomes(children, tmp_path)
    assert results[1] is not None
    assert "RuntimeError: No answer from process 0, " in results[1][1]
    assert "Process 0 is missing: " in results[1][1]
