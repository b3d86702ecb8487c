"""Groups of one worker, and of all: are they DiLoCo and periodic averaging?"""

from pathlib import Path

import pytest
from family import TOLERANCE, WORKERS, difference, start, train
from helpers import assert_equal

from lightning_diloco import Hierarchical, PeriodicAveraging


@pytest.mark.slow
def test_a_group_of_one_is_diloco_and_of_all_periodic_averaging(tmp_path: Path) -> None:
    alone = train(tmp_path, algorithm=Hierarchical(2, WORKERS))
    plain = train(tmp_path)
    assert_equal(alone.history, plain.history)
    together = train(tmp_path, algorithm=Hierarchical(2, 1), outer_optimizer_kwargs={"lr": 1.0})
    every = train(tmp_path, algorithm=PeriodicAveraging(), interval=2)
    for (_, mine), (_, theirs) in zip(together.history, every.history, strict=True):
        for w in range(WORKERS):
            assert difference(mine[w], theirs[w]) <= TOLERANCE
    size = 8 * sum(p.numel() for p in start().parameters())
    assert together.bytes == every.bytes == 10 * size
