"""GPA: is it Nesterov in every step where it should be, and does it resume?"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from family import TOLERANCE, Layers, Save, difference, train
from helpers import assert_equal, regression_data

from lightning_diloco import GPA


@pytest.mark.slow
def test_averaging_as_fast_as_the_gradient_point_is_nesterov_every_step(tmp_path: Path) -> None:
    """μ_x = μ_y = μ: where gradients are taken moves as DiLoCo's single worker with H = 1, lr 1 − μ and momentum μ."""
    for inner in ("sgd", "adamw"):
        settings: dict[str, Any] = {"num_workers": 1, "make": partial(Layers, inner)}
        ours = train(tmp_path, algorithm=GPA(0.8, 0.8), eval_weights="outer", **settings)
        outer = {"lr": 1 - 0.8, "momentum": 0.8, "nesterov": True}
        snoo = train(tmp_path, interval=1, outer_optimizer_kwargs=outer, **settings)
        for (_, mine), (_, theirs) in zip(ours.history, snoo.history, strict=True):
            assert difference(mine[0], theirs[0]) <= TOLERANCE
        assert (ours.bytes, ours.reports) == (0, [])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_gpa_resumes(tmp_path: Path) -> None:
    """From the end of an epoch, which has four steps."""
    settings: dict[str, Any] = {
        **{"algorithm": GPA(0.9), "eval_weights": "outer", "num_workers": 1, "steps": 11},
        "data": regression_data(16, dtype=torch.float64),
    }
    whole = train(tmp_path, **settings, callbacks=[Save([4], tmp_path)])
    resumed = train(tmp_path, **settings, resume=tmp_path / "4.ckpt", seed=99)
    assert_equal(resumed.history, whole.history[4:])
    assert_equal(resumed.module, whole.module)
