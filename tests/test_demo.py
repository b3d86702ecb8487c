"""Are the signs that DeMo makes of gradients left as they are? (Its oracle is in test_variants.py.)"""

from pathlib import Path
from typing import Any

import pytest
import torch
from family import Layers, difference, start, train
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_diloco import DeMo


@pytest.mark.slow
def test_every_step_has_the_length_of_the_learning_rate(tmp_path: Path) -> None:
    """lr 0.05 by its sign for every weight, clipped before or not."""
    for clip in (None, 0.01):
        ours = train(tmp_path, algorithm=DeMo(clip=clip, chunk=4, k=16), make=Plain, steps=3)
        before = start().state_dict()
        for _, workers in ours.history:
            for name, value in workers[2].items():
                moved = (value - before[name]).abs()
                torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=0, atol=1e-12)
            before = workers[2]
        assert max(difference(workers[0], workers[3]) for _, workers in ours.history) == 0


class Plain(Layers):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_the_trainer_may_not_clip_signs(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"^`gradient_clip_val` \(=0.5\) of the Trainer would"):
        train(tmp_path, algorithm=DeMo(), options={"gradient_clip_val": 0.5}, steps=1)
