"""The table of `python -m tests.benchmarks`: its rows divide like by like, and its parts are those of a step."""

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import in_a_process

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"tests.benchmarks.{name}")


def row(benchmark: Callable[[str], ModuleType], **values: Any) -> Any:
    given = {"name": "a step", "floor": "by hand", "ours": [3.0, 2.0, 8.0], "floors": [2.0, 2.0, 2.0], "unit": "ms"}
    return benchmark("rows").Row(**{**given, **values})


def test_a_row_is_the_median_of_the_ratios_with_least_and_most(benchmark: Any) -> None:
    """Ratios 1.5, 1 and 4, each of a repeat; the figures behind them are medians, too: 3 ms over 2 ms."""
    found = row(benchmark, goal=1.2)
    assert re.split(r"\s{2,}", str(found)) == ["a step", "1.50", "1.00 … 4.00", "≤ 1.20", "by hand: 3 / 2 ms"]
    assert found.as_json()["ratios"] == [1.5, 1.0, 4.0]
    assert "≤" not in str(row(benchmark))


def test_a_hand_written_loop_and_the_workers_train_alike(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see N batches per step, of one worker each: they do the same work."""
    workloads = benchmark("workloads")
    seen: list[tuple[int, int]] = []
    loss = workloads.Classifier.loss

    def counted(self: Any, batch: Any) -> torch.Tensor:
        seen.append((id(self.network[1].weight), len(batch[0])))
        return loss(self, batch)

    monkeypatch.setattr(workloads.Classifier, "loss", counted)
    marks = workloads.looped(workloads.mlp, workloads.images(), 3, workloads.WARM_UP + 2)
    assert len(marks) == workloads.WARM_UP + 2
    assert marks == sorted(marks)
    by_hand = [size for _, size in seen]
    assert len({weight for weight, _ in seen}) == 3
    seen.clear()
    assert workloads.fitted(workloads.mlp(), workloads.images(), workloads.local_steps(3), 2) > 0
    assert [size for _, size in seen] == by_hand == [workloads.BATCH] * 3 * (workloads.WARM_UP + 2)


@pytest.mark.slow
def test_the_rows_of_steps(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = benchmark("steps")
    monkeypatch.setattr(steps, "CASES", [replace(steps.CASES[0], steps=2, workers=2)])
    over_plain, over_loop = steps.rows(2)
    assert over_plain.floor == "2 plain Lightning steps"
    assert over_loop.floor == "hand-written loop"
    assert over_plain.ours == over_loop.ours
    assert all(len(values) == 2 and min(values) > 0 for r in (over_plain, over_loop) for values in (r.ours, r.floors))


def test_the_parts_of_a_step_are_all_met_and_the_trainer_is_left_as_it_was(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = benchmark("parts")
    monkeypatch.setattr(parts, "STEPS", 2)
    monkeypatch.setattr(parts, "WORKERS", 3)
    before = [getattr(owner, name) for owner, name, _ in parts.PARTS]
    found = parts.profile()
    assert [getattr(owner, name) for owner, name, _ in parts.PARTS] == before
    assert set(found) == {part for *_, part in parts.PARTS}
    assert min(found.values()) > 0
    assert set(parts.by_hand()) < set(found)


def test_a_part_inside_another_stops_the_others_clock(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outer from 0 to 10 with an inner from 2 to 5: seven and three."""
    parts = benchmark("parts")
    times = iter([0.0, 2.0, 5.0, 10.0])
    monkeypatch.setattr(parts.time, "process_time", lambda: next(times))
    clock = parts.Clock()
    with clock.part("outer"), clock.part("inner"):
        pass
    assert clock.steps[-1] == {"outer": 2.0 + 5.0, "inner": 3.0}


def test_a_step_is_the_fastest_tenth_after_the_warm_up(benchmark: Any) -> None:
    """Ends of steps that take 9, 9, 9, 9, and then 3, 5, …, 21: the first of ten is left out, the second taken."""
    workloads = benchmark("workloads")
    durations = [9.0] * workloads.WARM_UP + [1.0 + 2 * k for k in range(1, 11)]
    ends = [sum(durations[:k]) for k in range(len(durations) + 1)]
    assert workloads.seconds_per_step(ends) == 5.0
    assert workloads.seconds_per_step(ends[: workloads.WARM_UP + 2]) == 3.0
    assert workloads.mean_seconds([5.0, 7.0, 8.0, 14.0]) == 3.0


@pytest.mark.processes
def test_what_a_worker_holds_is_in_the_figures_of_memory(benchmark: Any, tmp_path: Path) -> None:
    """AdamW keeps two values per weight, and a counter per tensor."""
    memory = benchmark("memory")
    tiny = ("--megabytes", "0.3", "--layers", "1", "--width", "32", "--heads", "2")
    found = in_a_process(partial(memory.measure, 2, 2, 8, tiny), tmp_path)  # what it sets holds for a whole process
    assert 3 * found["model"] < found["worker"] < 3.01 * found["model"]
    for moment in ("bare", "before"):  # the process may have given memory back in between
        assert 0 < found[moment] <= found["peak"] + 2**20  # Linux counts pages in batches
    assert found["step"] > 0


def test_the_command_prints_the_table_and_keeps_it(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = benchmark("__main__")
    asked: list[int] = []

    def rows(repeats: int) -> Any:
        asked.append(repeats)
        yield row(benchmark)

    groups = {"steps": rows, "memory": rows}
    monkeypatch.setattr(command, "GROUPS", groups)
    monkeypatch.setattr(command.parts, "table", lambda: "the parts\nof a step")
    kept = tmp_path / "kept.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--repeats", "3", "--json", str(kept)])
    command.main()
    about, header, *lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in about
    assert "threads 1" in about
    assert header == benchmark("rows").HEADER
    assert lines == [str(row(benchmark))] * 2 + ["", "the parts", "of a step"]
    found = json.loads(kept.read_text())
    assert found["rows"] == [json.loads(json.dumps(row(benchmark).as_json()))] * 2
    assert found["parts"] == ["the parts", "of a step"]
    assert asked == [3, 3]
