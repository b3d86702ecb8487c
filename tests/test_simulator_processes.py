"""Does the simulator give the same statistics over two processes?"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_equal, regression_data
from processes import run
from torch import nn

from lightning_diloco import DilocoSimulator

pytestmark = pytest.mark.processes


def numbers(stats: Any) -> dict[str, float]:
    return {key: -1.0 if value is None else value for key, value in asdict(stats).items()}


def test_the_simulator_gives_the_same_statistics_over_two_processes(tmp_path: Path) -> None:
    def simulate(size: int, path: str | None = None) -> tuple[list[Any], dict[str, Any]]:
        stats: list[Any] = []
        data = regression_data(70, dtype=torch.float64)
        simulator = DilocoSimulator(
            model_cls=nn.Linear,
            model_kwargs={"in_features": 3, "out_features": 1, "dtype": torch.float64},
            train_dataset=data,
            eval_dataset=data,
            loss_fn=nn.functional.mse_loss,
            num_nodes=4,
            diloco_interval=3,
            batch_size=2,
            num_epochs=2,
            train_loss_hook=stats.append,
            eval_loss_hook=stats.append,
            ckpt_interval=2,
            save_dir=str(tmp_path / str(size)),
            seed=1,
            trainer_kwargs={"accelerator": "cpu", "devices": size, "enable_progress_bar": False},
        )
        simulator.train(ckpt_path=path)
        return stats, {k: v.clone() for k, v in simulator.model.state_dict().items()}

    (one,), two = run(simulate, 1, 1, out=tmp_path / "a"), run(simulate, 2, 2, out=tmp_path / "b")
    assert two[1][0] == []  # hooks run on the first process
    assert [type(s) for s in one[0]] == [type(s) for s in two[0][0]]
    for mine, theirs in zip(one[0], two[0][0], strict=True):
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-12)
    for _, state in two:
        assert_equal(state, one[1])
    resumed = run(simulate, 2, 2, str(tmp_path / "1" / "step=000006.ckpt"), out=tmp_path / "c")
    assert_equal(resumed[0][1], one[1])
    after = [s for s in one[0] if s.local_step > 6]
    for mine, theirs in zip(after, resumed[0][0], strict=True):
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-12)


def test_a_hook_of_the_simulator_stops_all_processes(tmp_path: Path) -> None:
    def simulate() -> tuple[int, int]:
        def hook(stats: Any) -> None:
            simulator.trainer.should_stop = stats.local_step == 4

        simulator = DilocoSimulator(
            model_cls=nn.Linear,
            model_kwargs={"in_features": 3, "out_features": 1},
            train_dataset=regression_data(70),
            loss_fn=nn.functional.mse_loss,
            num_nodes=2,
            diloco_interval=3,
            batch_size=2,
            train_loss_hook=hook,
            trainer_kwargs={"accelerator": "cpu", "devices": 2, "enable_progress_bar": False},
        )
        simulator.train()
        return simulator.strategy.local_steps, simulator.strategy.outer_steps

    assert run(simulate, 2, out=tmp_path) == [(4, 2)] * 2
