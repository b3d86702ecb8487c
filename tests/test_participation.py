"""Who takes part in a transfer, and what becomes of the others?"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from family import (
    INNER,
    INTERVAL,
    WORKERS,
    Layers,
    Run,
    Save,
    assert_agrees,
    assert_same_run,
    batches_of,
    several,
    start,
    train,
)
from helpers import Net, assert_equal, assert_same, differs, regression_data, slow_but
from lightning.fabric.utilities.exceptions import MisconfigurationException
from oracles import Oracle, by_row

from lightning_diloco import DropOut, Participation, StreamingDiloco, Table

NESTEROV = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
MEAN = partial(torch.optim.SGD, lr=1.0)
ERRORS = (ValueError, MisconfigurationException)


def participants(run: Run) -> list[tuple[int, tuple[int, ...]]]:
    return [(r.step, r.participants) for r in run.reports]


def often(folder: Path, steps: int = 12, **settings: Any) -> Run:
    """A round every second step."""
    return train(folder, interval=2, steps=steps, **{"participation": DropOut(0.4), **settings})


@dataclass(frozen=True)
class Alternate(Participation):
    """Even workers after even rounds, odd ones after odd rounds."""

    interval: int

    def __call__(self, step: int, workers: Sequence[int], generator: torch.Generator) -> list[int]:
        return [w for w in workers if w % 2 == step // self.interval % 2]


# ------------------------------------------------------------------------------------------------- against the oracle

ROWS: dict[str, tuple[Participation, Callable[[int, int], Sequence[int] | None]]] = {
    "table": (Table({6: [0, 2], 12: [1], 19: [3, 0]}), by_row({6: [0, 2], 12: [1], 19: [0, 3]})),
    "nobody at times": (Table({6: [], 18: []}), by_row({6: [], 18: []})),
    "a flush without anybody": (Table({19: []}), by_row({19: []})),
    "one's own": (Alternate(6), lambda step, _: [w for w in range(WORKERS) if w % 2 == step // 6 % 2]),
}


@pytest.mark.parametrize("outer", slow_but(["nesterov"], ["nesterov", "mean"]))
@pytest.mark.parametrize("name", slow_but({"table"}, ROWS))
def test_the_mean_is_over_those_who_take_part(name: str, outer: str, tmp_path: Path) -> None:
    participation, rows = ROWS[name]
    given = {"outer_optimizer_kwargs": {"lr": 1.0}} if outer == "mean" else {}
    ours = train(tmp_path, participation=participation, make=partial(Layers, "adamw"), **given)
    make_outer = MEAN if outer == "mean" else NESTEROV
    twin = Oracle(start(), WORKERS, Layers.loss, INNER["adamw"], make_outer, INTERVAL, participants=rows)
    assert_agrees(ours, twin.train(batches_of(WORKERS)).flush())


@pytest.mark.parametrize("delay", slow_but([1], [0, 1, 4]))
def test_streaming_with_a_table(delay: int, tmp_path: Path) -> None:
    rows = {6: [0, 2], 9: [], 12: [1], 15: [0, 1, 3]}
    algorithm = StreamingDiloco(1, delay=delay, alpha=0.5)
    ours = train(tmp_path, participation=Table(rows), algorithm=algorithm)
    outer = partial(torch.optim.SGD, lr=0.4, momentum=0.9, nesterov=True)
    form: dict[str, Any] = {"delay": delay, "alpha": 0.5, "participants": by_row(rows)}
    twin = Oracle(start(), WORKERS, Layers.loss, INNER["sgd"], outer, INTERVAL, **form)
    assert_agrees(ours, twin.train(batches_of(WORKERS)).flush())


# ------------------------------------------------------------------------------------------- what a lost transfer means


def test_who_is_left_out_keeps_its_weights(tmp_path: Path) -> None:
    ours = train(tmp_path, steps=8, participation=Table({6: [0, 3]}), final_sync=False)
    alone = train(tmp_path, steps=8, interval=1000, final_sync=False)
    theta, workers = ours.history[5]
    for w in (0, 3):
        assert_same(workers[w], theta)
    for t in range(8):
        for w in (1, 2):
            assert_same(ours.history[t][1][w], alone.history[t][1][w])
    assert participants(ours) == [(6, (0, 3))]
    assert differs(theta, alone.history[5][0])
    assert ours.bytes == sum(p.numel() for p in start().parameters()) * 8  # of a worker that takes part


@pytest.mark.filterwarnings("ignore:The fit ends with the model that it began with")
@pytest.mark.parametrize("participation", [DropOut(1.0), Table({t: [] for t in range(1, 13)})], ids=["p = 1", "table"])
def test_where_all_are_left_out_nothing_is_sent(participation: Participation, tmp_path: Path) -> None:
    ours = often(tmp_path, participation=participation)
    alone = train(tmp_path, steps=12, interval=1000, final_sync=False)
    assert_same_run(ours, alone)
    assert ours.reports == []
    assert ours.bytes == 0
    assert ours.steps == (12, 0)


@pytest.mark.slow
def test_nobody_left_out_is_everybody_bit_for_bit(tmp_path: Path) -> None:
    """Drawing for it touches no other random number, either: the module has Dropout, and the data are shuffled."""
    settings: dict[str, Any] = {
        "data": regression_data(96),
        "options": {"precision": "32-true"},
        "make": lambda: Net(batch_norm=True, dropout=0.3),
    }
    plain = often(tmp_path, participation=None, **settings)
    assert_same_run(often(tmp_path, participation=DropOut(0.0), **settings), plain)
    assert_same_run(often(tmp_path, participation=Table({}), **settings), plain)
    assert_same_run(often(tmp_path, participation=Table({2: [3, 2, 1, 0]}), **settings), plain)
    assert {r.participants for r in plain.reports} == {(0, 1, 2, 3)}


def test_buffers_are_those_of_who_takes_part(tmp_path: Path) -> None:
    """BatchNorm's statistics of workers that are left out stay their own."""
    settings: dict[str, Any] = {
        "data": regression_data(96),
        "options": {"precision": "32-true"},
        "make": lambda: Net(batch_norm=True),
        "steps": 6,
        "final_sync": False,
    }
    ours = train(tmp_path, participation=Table({6: [0, 3]}), **settings)
    alone = train(tmp_path, interval=1000, **settings)
    theta, workers = ours.history[5]
    before = [alone.history[5][1][w]["net.1.running_mean"] for w in range(WORKERS)]
    torch.testing.assert_close(theta["net.1.running_mean"], (before[0] + before[3]) / 2)
    assert torch.equal(workers[0]["net.1.running_mean"], theta["net.1.running_mean"])
    for w in (1, 2):
        assert_same(workers[w], alone.history[5][1][w])


# ------------------------------------------------------------------------------------------------------------- draws


def draws(p: float, count: int, seed: int = 0) -> list[list[int]]:
    workers = list(range(WORKERS))
    return [DropOut(p)(t, workers, torch.Generator().manual_seed(seed * count + t)) for t in range(1, count + 1)]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_each_worker_is_dropped_with_probability_p(p: float) -> None:
    count = 2000
    rows = draws(p, count)
    assert all(row == sorted(set(row)) and set(row) <= set(range(WORKERS)) for row in rows)
    present = torch.tensor([[w in row for w in range(WORKERS)] for row in rows], dtype=torch.float64)
    bound = 4 * math.sqrt(p * (1 - p) / count)
    assert (present.mean(0) - (1 - p)).abs().max() <= bound
    # and independently of the others
    for a, b in itertools.combinations(range(WORKERS), 2):
        both, chance = float((present[:, a] * present[:, b]).mean()), (1 - p) ** 2
        assert abs(both - chance) <= 4 * math.sqrt(chance * (1 - chance) / count)


def test_a_draw_is_the_generators(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    assert draws(0.5, 50) == draws(0.5, 50)
    assert draws(0.5, 50) != draws(0.5, 50, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_run_draws_by_its_seed(tmp_path: Path) -> None:
    first, again, other = (often(tmp_path, steps=24, seed=seed) for seed in (5, 5, 6))
    assert_same_run(first, again)
    assert participants(first) != participants(other)
    rows = [row for _, row in participants(first)]
    assert len({*rows}) > 4  # not the same draw in every round
    assert 20 <= sum(map(len, rows)) <= 38  # of 12 · 4, 28.8 expected


def test_fragments_that_are_sent_together_draw_for_themselves(tmp_path: Path) -> None:
    """A flush sends all fragments in the same step."""
    rows: list[tuple[tuple[int, ...], ...]] = []
    for seed in range(3):
        algorithm = StreamingDiloco(4, delay=0)
        ours = train(tmp_path, steps=5, participation=DropOut(0.5), algorithm=algorithm, seed=seed)
        assert {(r.step, r.kind) for r in ours.reports} <= {(5, "flush")}
        rows.append(tuple(r.participants for r in ours.reports))
    assert any(len({*row}) > 1 for row in rows)


@pytest.mark.slow
def test_draws_go_on_after_a_resume(tmp_path: Path) -> None:
    whole = often(tmp_path, steps=16, callbacks=[Save([5, 6], tmp_path)])
    for step in (5, 6):
        resumed = often(tmp_path, steps=16, seed=77, resume=tmp_path / f"{step}.ckpt")
        assert participants(resumed) == [row for row in participants(whole) if row[0] > step]
        assert_equal(resumed.history, whole.history[step:])


@pytest.mark.processes
@pytest.mark.parametrize("size", slow_but([2], [2, 4]))
def test_draws_are_the_same_in_every_layout(size: int, tmp_path: Path) -> None:
    """Also where a process hosts no participant."""
    settings: list[dict[str, Any]] = [
        {"interval": 2, "steps": 12, "participation": participation}
        for participation in (DropOut(0.4), Table({2: [0], 4: [3], 6: [], 8: [1, 2]}), Alternate(2))
    ]
    for setting, ours in zip(settings, several(tmp_path, size, settings), strict=True):
        assert_same_run(ours, train(tmp_path, **setting), measured=1e-9)


# --------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf, "half", None, True, [0.5]])
def test_a_wrong_probability_is_named(p: Any) -> None:
    with pytest.raises(ValueError, match=r"DropOut: `p` \(="):
        DropOut(p)


@pytest.mark.parametrize(
    "rows",
    [
        {0: [0]},
        {-6: [0]},
        {1.5: [0]},
        {True: [0]},
        {"six": [0]},
        {6: 0},
        {6: [-1]},
        {6: [0.5]},
        {6: ["0"]},
        {6: [True]},
        {6: [1, 1]},
        {6: None},
        [[0, 1]],
        None,
    ],
    ids=repr,
)
def test_a_wrong_table_is_named(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"Table: `rows`"):
        Table(rows)


@pytest.mark.parametrize("step", slow_but([6], [6, 600]))
def test_a_row_with_a_worker_that_does_not_exist_is_named(step: int, tmp_path: Path) -> None:
    """At the start, not when its time has come."""
    with pytest.raises(ERRORS, match=r"`rows`.*4"):
        train(tmp_path, steps=1, participation=Table({step: [0, 4]}))


@pytest.mark.parametrize("participation", ["half", 0.5, DropOut], ids=str)
def test_what_is_no_participation_is_named(participation: Any, tmp_path: Path) -> None:
    with pytest.raises(ERRORS, match="`participation`"):
        train(tmp_path, steps=1, participation=participation)


@dataclass(frozen=True)
class Says(Participation):
    answer: Any

    def __call__(self, step: int, workers: Sequence[int], generator: torch.Generator) -> list[int]:
        return list(self.answer)


@pytest.mark.parametrize("answer", [(7,), (-1,), (1, 1), (0.5,)], ids=str)
def test_an_answer_that_names_no_worker_is_an_error(answer: Any, tmp_path: Path) -> None:
    with pytest.raises((*ERRORS, RuntimeError), match="Says"):
        train(tmp_path, steps=6, participation=Says(answer))


def test_the_order_of_an_answer_does_not_matter(tmp_path: Path) -> None:
    ours = train(tmp_path, participation=Says((3, 0, 2)))
    assert_same_run(
        ours, train(tmp_path, participation=Table({6: [0, 2, 3], 12: [0, 2, 3], 18: [3, 2, 0], 19: [2, 0, 3]}))
    )
    assert {r.participants for r in ours.reports} == {(0, 2, 3)}


def test_participations_are_values() -> None:
    """Runs are compared and saved by them."""
    assert DropOut(0.4) == DropOut(0.4) != DropOut(0.5)
    assert Table({6: [0, 1]}) == Table({6: [0, 1]}) != Table({6: [0]})
    assert repr(DropOut(0.4)) == "DropOut(p=0.4)"
    assert eval(repr(Table({6: [0, 1], 9: []}))) == Table({6: [0, 1], 9: []})
