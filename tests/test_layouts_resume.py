"""Does a file of any layout of processes resume on any other?"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_equal, loader, regression_data, trainer
from layouts import LAYOUTS, Project, joined, layout, train
from processes import run

from lightning_diloco import DilocoStrategy

pytestmark = [pytest.mark.processes, pytest.mark.slow]


class Save(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [4, 6, 11])
def test_a_file_of_any_layout_resumes_on_any_other(step: int, tmp_path: Path) -> None:
    """On a synchronisation, in mid-round, and at an epoch's end in mid-round."""
    torch.manual_seed(0)
    whole = layout(tmp_path, 1)

    def interrupted(size: int, path: Path) -> None:
        L.seed_everything(5, verbose=False)
        t = trainer(
            DilocoStrategy(num_nodes=4, diloco_interval=4),
            devices=size,
            max_steps=step,
            callbacks=[Save(step, path)],
            max_epochs=3,
            val_check_interval=3,
            default_root_dir=tmp_path,
        )
        t.fit(Project(), loader(regression_data(72), 4), loader(regression_data(40, seed=9), 2, shuffle=False))

    def resumed(size: int, folder: Path, path: Path) -> dict[str, Any]:
        return train(folder, size, resume=path)

    for size in LAYOUTS:
        path = tmp_path / f"{size}.ckpt"
        run(interrupted, size, size, path, out=tmp_path / f"from{size}")
    for source in LAYOUTS:
        for target in LAYOUTS:
            folder = tmp_path / f"{source} to {target}"
            folder.mkdir()
            result = joined(run(resumed, target, target, folder, tmp_path / f"{source}.ckpt", out=folder / "results"))
            for key in ("workers", "inner", "theta", "outer", "module", "bytes"):
                assert_equal(result[key], whole[key], f"{source} to {target}: {key}")
            assert_equal(result["steps"], whole["steps"][step:], f"{source} to {target}")


@pytest.mark.parametrize("step", [3, 4])
def test_teams_resume_where_they_were(step: int, tmp_path: Path) -> None:
    """With a random stream per process, and in the middle of an accumulation."""
    setting: dict[str, Any] = {
        "strategy": {"num_nodes": 2, "diloco_interval": 4},
        "accumulate_grad_batches": 2,
        "batch": 2,
        "max_steps": 9,
    }

    def resumed(path: Path) -> dict[str, Any]:
        return train(tmp_path, 4, resume=path, **setting)

    class SaveInWindow(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0 and batch_idx == 2 * step:
                trainer.save_checkpoint(tmp_path / "window.ckpt")

    whole = layout(tmp_path, 4, more=lambda: [SaveInWindow()], **setting)
    again = joined(run(resumed, 4, tmp_path / "window.ckpt", out=tmp_path / "resumed"))
    for key in ("workers", "inner", "theta", "outer", "bytes"):
        assert_equal(again[key], whole[key], key)
    state = torch.load(tmp_path / "window.ckpt", weights_only=True)["diloco"]
    assert [[m.keys() for m in state["workers"][w]["team"]] for w in range(2)] == [[{"random", "gradients"}]] * 2
    random = [m["random"]["cpu"] for w in range(2) for m in (state["workers"][w], *state["workers"][w]["team"])]
    assert len({tuple(r.tolist()) for r in random}) == 4
    with pytest.warns(
        UserWarning, match=r"^Resuming workers of 2 processes each with 1: the batch of a worker is now 1"
    ):
        train(tmp_path, 1, resume=tmp_path / "window.ckpt", **setting)
