"""Does ``torchrun --max-restarts`` bring a run to its undisturbed end when its processes are killed?"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import assert_equal, loader, regression_data, trainer
from projects import Project

from lightning_diloco import DilocoStrategy

pytestmark = [pytest.mark.processes, pytest.mark.slow]

KILLS = {0: (1, 7), 1: (0, 14)}  # attempt → (process, after which local step it dies)


class Interrupted(L.Callback):
    """Writes a file every third step, and kills a process in the middle of a round and of two files."""

    def __init__(self, kills: bool) -> None:
        self.kills = kills

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % 3 == 0:
            trainer.save_checkpoint("last.ckpt")
        rank, step = KILLS.get(int(os.environ["TORCHELASTIC_RESTART_COUNT"]), (-1, -1))
        if self.kills and (trainer.global_rank, trainer.global_step) == (rank, step):
            Path(f"killed {os.environ['TORCHELASTIC_RESTART_COUNT']}").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(kills: bool) -> None:
    """The script that every process runs: it resumes from the last file, if there is one."""
    L.seed_everything(5, verbose=False)
    module, strategy = Project(), DilocoStrategy(num_nodes=4, diloco_interval=5)
    t = trainer(strategy, devices=2, max_steps=18, max_epochs=-1, callbacks=[Interrupted(kills)])
    t.fit(module, loader(regression_data(60), 3), ckpt_path="last.ckpt" if Path("last.ckpt").exists() else None)
    result = {
        "module": module.state_dict(),
        "workers": [strategy.worker_state_dict(w) for w in strategy.local_workers],
        "outer": strategy.outer_optimizer.state_dict(),
        "steps": [strategy.local_steps, strategy.outer_steps, strategy.ledger.total_bytes],
    }
    torch.save(result, f"result{t.global_rank}.pt")


def under_torchrun(folder: Path, kills: bool) -> list[dict]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--monitor-interval", "0.1"]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [*command, __file__, str(int(kills))],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        timeout=600,
    )
    return [torch.load(folder / f"result{rank}.pt") for rank in range(2)]


def test_killed_processes_are_restarted_and_the_run_ends_as_if_undisturbed(tmp_path: Path) -> None:
    killed, undisturbed = under_torchrun(tmp_path / "killed", True), under_torchrun(tmp_path / "undisturbed", False)
    assert (tmp_path / "killed" / "killed 0").exists()
    assert (tmp_path / "killed" / "killed 1").exists()
    assert not list((tmp_path / "undisturbed").glob("killed*"))
    for mine, theirs in zip(killed, undisturbed, strict=True):
        assert_equal(mine, theirs)


if __name__ == "__main__":
    train(sys.argv[1] == "1")
