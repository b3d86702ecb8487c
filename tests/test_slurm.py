"""Does a run under SLURM start, save itself when SLURM is about to end it, and go on as if nothing had been?"""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_equal, loader, regression_data, trainer
from layouts import Project
from lightning.pytorch.plugins.environments import SLURMEnvironment
from processes import outcomes, start

from lightning_diloco import DilocoStrategy

pytestmark = pytest.mark.processes


class Warned(Project):
    """The last process is told that its time is nearly over."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.steps = when, []

    def tell(self, when: str, step: int) -> None:
        if self.when == when and self.trainer.global_step == step and self.trainer.is_last:
            self.when = "told"
            os.kill(os.getpid(), signal.SIGUSR1)

    def training_step(self, batch, batch_idx):
        self.steps.append(self.trainer.global_step)
        if self.trainer.strategy.current_worker in (0, 1, None):
            self.tell("in a turn", 6)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.tell("in a validation", 6)
        return super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.tell("after the last step", 14)

    def on_train_end(self):
        self.tell("at the end", 14)


def scontrol(folder: Path) -> None:
    """A stand-in for the program that puts the job into the queue again; writes down how it was called."""
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\n')
    (folder / "scontrol").chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("workers", "size", "when", "saved"),
    [
        (2, 1, "in a turn", 7),
        (2, 2, "in a turn", 8),  # several processes: at the next synchronisation
        (2, 1, "in a validation", 6),
        (2, 2, "in a validation", 8),
        (2, 1, "after the last step", 14),
        (2, 2, "after the last step", 14),
        (2, 1, "at the end", 14),
        (2, 2, "at the end", None),  # too late for several processes, and of no use
        (1, 1, "in a turn", 7),  # plainly averaged: the plain run
    ],
)
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")  # of N = 1
def test_a_requeued_run_goes_on(workers: int, size: int, when: str, saved: int | None, tmp_path: Path) -> None:
    """Bit for bit, with N > 1."""

    def train(when: str, folder: Path) -> Any:
        tasks = {"NTASKS": size, "NTASKS_PER_NODE": size, "NNODES": 1, "NODEID": 0, "JOB_ID": 1234, "JOB_NAME": "train"}
        rank = os.environ["LOCAL_RANK"]
        os.environ.update({f"SLURM_{k}": str(v) for k, v in tasks.items()}, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        scontrol(tmp_path / f"bin{rank}")
        L.seed_everything(5, verbose=False)
        diloco = DilocoStrategy(num_nodes=workers, diloco_interval=4, outer_optimizer_kwargs={"lr": 1.0})
        t = trainer(
            diloco, devices=size, max_steps=14, max_epochs=-1, default_root_dir=folder, val_check_interval=3,
            check_val_every_n_epoch=None,
        )  # fmt: skip
        t.is_last = int(rank) == size - 1
        module = Warned(when)
        t.fit(module, loader(regression_data(72), 4), loader(regression_data(12), shuffle=False))
        assert type(t.strategy.cluster_environment) is SLURMEnvironment
        trained = diloco.local_workers if module.steps else []
        return {w: diloco.worker_state_dict(w) for w in trained}, module.steps[:1]

    def run(when: str, folder: str) -> Any:
        out = tmp_path / f"out {when} {folder}"
        results = outcomes(start(train, size, (when, tmp_path / folder), out), out)
        assert all(r is not None and r[0] == "returned" for r in results), results
        return [r[1] for r in results if r is not None]

    undisturbed = run("never", "undisturbed")
    assert_equal(run(when, "requeued"), undisturbed)  # saving disturbs nothing; SLURM would end it later
    files = list((tmp_path / "requeued").glob("hpc_ckpt_*.ckpt"))
    assert len(files) == (saved is not None)
    if not files:
        return
    assert torch.load(files[0], weights_only=True)["global_step"] == saved
    assert (tmp_path / "bin0" / "called").read_text() == "requeue 1234\n"
    assert [p.name for p in tmp_path.glob("bin*/called")] == ["called"]
    resumed = run("never", "requeued")  # Lightning resumes from the file by itself
    assert [steps for _, steps in resumed] == [[saved] if saved < 14 else []] * size
    if workers > 1 and saved < 14:
        assert_equal([w for w, _ in resumed], [w for w, _ in undisturbed])
