"""Does a run under SLURM start, save itself when SLURM is about to end it, and go on as if nothing had been?"""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import loader, regression_data, trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from processes import outcomes, start
from test_processes import Project, assert_equal

from lightning_diloco import DilocoStrategy


class Warned(Project):
    """The last process is told, in the middle of worker 1's seventh step, that its time is nearly over."""

    tell = True

    def training_step(self, batch, batch_idx):
        strategy = self.trainer.strategy
        if self.tell and self.trainer.global_step == 6 and strategy.current_worker == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().training_step(batch, batch_idx)


class Unwarned(Warned):
    tell = False


def scontrol(folder: Path) -> None:
    """A stand-in for the program that puts the job into the queue again; writes down how it was called."""
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\n')
    (folder / "scontrol").chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(("size", "saved"), [(1, 7), (2, 8)])  # several processes: at the next synchronisation
def test_a_requeued_run_goes_on_bit_for_bit(size: int, saved: int, tmp_path: Path) -> None:
    def train(make: Any, folder: Path) -> Any:
        tasks = {"NTASKS": size, "NTASKS_PER_NODE": size, "NNODES": 1, "NODEID": 0, "JOB_ID": 1234, "JOB_NAME": "train"}
        rank = os.environ["LOCAL_RANK"]
        os.environ.update({f"SLURM_{k}": str(v) for k, v in tasks.items()}, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        scontrol(tmp_path / f"bin{rank}")
        L.seed_everything(5, verbose=False)
        diloco = DilocoStrategy(num_nodes=2, diloco_interval=4)
        t = trainer(diloco, devices=size, max_steps=14, max_epochs=-1, default_root_dir=folder)
        t.fit(make(), loader(regression_data(72), 4))
        assert type(t.strategy.cluster_environment) is SLURMEnvironment
        return diloco.local_steps, {w: diloco.worker_state_dict(w) for w in diloco.local_workers}

    def run(make: Any, folder: str) -> Any:
        results = outcomes(
            start(train, size, (make, tmp_path / folder), tmp_path / f"out {make} {folder}"),
            tmp_path / f"out {make} {folder}",
        )
        assert all(r is not None and r[0] == "returned" for r in results), results
        return results

    undisturbed = run(Unwarned, "undisturbed")
    assert_equal(run(Warned, "requeued"), undisturbed)  # saving disturbs nothing; SLURM would end it later
    (file,) = (tmp_path / "requeued").glob("hpc_ckpt_*.ckpt")
    assert torch.load(file, weights_only=True)["diloco"]["local_steps"] == saved
    assert (tmp_path / "bin0" / "called").read_text() == "requeue 1234\n"
    assert [p.name for p in tmp_path.glob("bin*/called")] == ["called"]
    assert_equal(run(Unwarned, "requeued"), undisturbed)  # Lightning resumes from the file by itself
