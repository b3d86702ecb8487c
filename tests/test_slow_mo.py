"""SlowMo at a constant learning rate: is it a heavy ball?"""

from pathlib import Path

import pytest
from family import TOLERANCE, difference, train

from lightning_diloco import PeriodicAveraging, SlowMo


@pytest.mark.slow
def test_slow_momentum_is_a_heavy_ball_at_a_constant_rate(tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=SlowMo(0.6, 0.9))
    ball = train(tmp_path, outer_optimizer_kwargs={"lr": 0.9, "momentum": 0.6})
    for (theta, _), (expected, _) in zip(ours.history, ball.history, strict=True):
        assert difference(theta, expected) <= TOLERANCE
    mean, plain = train(tmp_path, algorithm=SlowMo(0.0)), train(tmp_path, algorithm=PeriodicAveraging())
    assert difference(mean.module, plain.module) <= TOLERANCE
