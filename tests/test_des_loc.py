"""DES-LOC: are moments averaged when they should be, and counters left alone?"""

from functools import partial
from pathlib import Path

import pytest
from family import Layers, assert_same_run, start, train

from lightning_diloco import DesLoc, PeriodicAveraging


@pytest.mark.slow
def test_des_loc_without_moments_is_periodic_averaging_bit_for_bit(tmp_path: Path) -> None:
    make = partial(Layers, "adamw")
    assert_same_run(
        train(tmp_path, algorithm=DesLoc(1000, 1000), make=make),
        train(tmp_path, algorithm=PeriodicAveraging(), make=make),
    )


@pytest.mark.slow
def test_des_loc_leaves_counters_alone_and_wants_moments(tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=DesLoc(6, 12), make=partial(Layers, "adamw"), steps=12)
    size = 8 * sum(p.numel() for p in start().parameters())
    assert ours.whats == ["exp_avg", "weights", "exp_avg", "exp_avg_sq", "weights"]
    assert ours.bytes == 5 * size
    default = train(tmp_path, algorithm=DesLoc(), make=partial(Layers, "adamw"), steps=12, interval=2)
    assert [(r.step, r.tag) for r in default.reports if r.tag] == [(6, "exp_avg"), (12, "exp_avg"), (12, "exp_avg_sq")]
    with pytest.raises(RuntimeError, match=r"^DesLoc averages the entry 'exp_avg' of the inner optimizer's state"):
        train(tmp_path, algorithm=DesLoc(2, 4), steps=2)
