"""NoLoCo's gossip: who meets whom, what is sent, and what does it reduce to?"""

from pathlib import Path

import pytest
import torch
from cases import Pairs
from family import INTERVAL, TOLERANCE, WORKERS, Breaks, difference, start, train
from helpers import assert_equal

from lightning_diloco import FP4, DropOut, NoLoCo, Table


@pytest.mark.slow
def test_gossip_among_all_is_diloco_with_a_heavy_ball(tmp_path: Path) -> None:
    """As long as all φ are equal, which they then stay: the pull is 0."""
    ours = train(tmp_path, algorithm=NoLoCo(0.6, 0.8, 0.7, group=WORKERS))
    ball = train(tmp_path, outer_optimizer_kwargs={"lr": 0.6, "momentum": 0.8})
    for (_, mine), (_, theirs) in zip(ours.history, ball.history, strict=True):
        for w in range(WORKERS):
            assert difference(mine[w], theirs[w]) <= TOLERANCE
    assert difference(ours.module, ball.module) <= TOLERANCE


@pytest.mark.parametrize("num_workers", [4, 5])
def test_pairs_are_disjoint_and_change_and_an_odd_worker_waits(num_workers: int, tmp_path: Path) -> None:
    seen: list[list[list[int]]] = []

    class Watched(NoLoCo):
        def groups(self) -> list[list[int]]:
            seen.append(super().groups())
            return seen[-1]

    ours = train(tmp_path, num_workers, algorithm=Watched(), interval=1, steps=12, final_sync=False)
    assert len(seen) == 12
    for groups, (_, workers), before in zip(seen, ours.history, [None, *ours.history], strict=False):
        members = [w for group in groups for w in group]
        assert len(set(members)) == len(members) == num_workers // 2 * 2
        assert [len(group) for group in groups] == [2] * (num_workers // 2)
        assert before is None or len(workers) == num_workers
    partners = {tuple(sorted(group)) for groups in seen for group in groups}
    assert len(partners) > num_workers  # of six, or ten, possible pairs
    size = 8 * sum(p.numel() for p in start().parameters())
    assert ours.bytes == 12 * 2 * size  # φ and Δ
    if num_workers == 5:
        waiting = {w for groups in seen for w in range(5) if w not in [m for g in groups for m in g]}
        assert len(waiting) > 1
        alone = train(tmp_path, num_workers, interval=1000, steps=12, final_sync=False)
        first = next(w for w in range(5) if w not in [m for g in seen[0] for m in g])
        assert_equal(ours.history[0][1][first], alone.history[0][1][first])


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
def test_gossip_survives_a_worker_that_is_not_finite(tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=Pairs(), make=Breaks, nonfinite="skip", participation=Table({12: [1, 2, 3]}))
    assert [r.participants for r in ours.reports[:4]] == [(0, 2, 3)] * 2 + [(2, 3)] * 2
    assert all(torch.isfinite(t).all() for t in ours.history[INTERVAL - 1][1][1].values())
    assert all(torch.isfinite(t).all() for t in ours.module.values())


@pytest.mark.slow
def test_slow_weights_reach_whom_delta_has_reached_uncoded(tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=NoLoCo(), participation=DropOut(0.4), codec=FP4(), interval=2)
    assert len(ours.reports) >= 12
    size = 8 * sum(p.numel() for p in start().parameters())
    for delta, slow in zip(ours.reports[::2], ours.reports[1::2], strict=True):
        assert (delta.step, delta.participants) == (slow.step, slow.participants)
        assert delta.payload_bytes < size / 8 < size == slow.payload_bytes
    assert len({len(r.participants) for r in ours.reports}) > 1
