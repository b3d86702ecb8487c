"""SPARTA's masks: of all or nothing, of their size, new each time, the same everywhere?"""

from pathlib import Path

import pytest
import torch
from family import STEPS, assert_same_run, several, start, train
from helpers import assert_equal
from torch import Tensor

from lightning_diloco import FP4, Diloco, PeriodicAveraging, Sparta


@pytest.mark.slow
def test_sparta_of_everything_is_the_mean_and_of_nothing_is_nothing(tmp_path: Path) -> None:
    """p = 1, k = 1: averaging in every step; p = 0: independent training. Bit for bit."""
    ours = train(tmp_path, algorithm=Sparta(1.0))
    every = train(tmp_path, algorithm=PeriodicAveraging(), interval=1)
    assert_equal([w for _, w in ours.history], [w for _, w in every.history])
    assert ours.bytes == every.bytes
    nothing = train(tmp_path, algorithm=Sparta(0.0))
    alone = train(tmp_path, interval=1000, final_sync=False)
    assert_equal([w for _, w in nothing.history], [w for _, w in alone.history])
    assert (nothing.bytes, nothing.reports) == (0, [])
    beside = train(tmp_path, algorithm=Sparta(0.0, beside=Diloco()))
    assert_same_run(beside, train(tmp_path))


def test_spartas_masks_have_their_size_and_change(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(Sparta):
        def positions(self) -> dict[str, Tensor]:
            seen.append(super().positions())
            return seen[-1]

    ours = train(tmp_path, algorithm=Watched(0.3, 2))
    assert len(seen) == len(ours.reports) == STEPS // 2
    counts = [sum(len(i) for i in index.values()) for index in seen]
    size = sum(p.numel() for p in start().parameters())
    assert sum(counts) / len(counts) / size == pytest.approx(0.3, abs=0.06)
    assert len({tuple(torch.cat(list(index.values())).tolist()) for index in seen}) == len(seen)
    assert [r.payload_bytes for r in ours.reports] == [8 * count for count in counts]


@pytest.mark.processes
@pytest.mark.slow
def test_spartas_masks_are_the_same_in_two_processes(tmp_path: Path) -> None:
    settings = {"algorithm": Sparta(0.3, 2, Diloco()), "codec": FP4()}
    (two,) = several(tmp_path, 2, [settings])
    assert_same_run(two, train(tmp_path, **settings), measured=1e-9)
