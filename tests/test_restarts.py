"""Does ``torchrun --max-restarts`` bring a run to its undisturbed end when its processes are killed?"""

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from helpers import assert_equal, loader, regression_data, trainer
from processes import in_a_process
from projects import Project
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

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


def train(kills: bool) -> list[Any]:
    """What every process runs: it resumes from the last file, if there is one."""
    L.seed_everything(5, verbose=False)
    module, strategy = Project(), DilocoStrategy(num_nodes=4, diloco_interval=5)
    t = trainer(strategy, devices=2, max_steps=18, max_epochs=-1, callbacks=[Interrupted(kills)])
    t.fit(module, loader(regression_data(60), 3), ckpt_path="last.ckpt" if Path("last.ckpt").exists() else None)
    return [
        module.state_dict(),
        [strategy.worker_state_dict(w) for w in strategy.local_workers],
        strategy.outer_optimizer.state_dict(),
        [strategy.local_steps, strategy.outer_steps, strategy.ledger.total_bytes],
    ]


def under_torchrun(kills: bool) -> list[Any]:
    """The agent of ``torchrun`` with these options; it forks the processes, as a new Python takes long to import."""
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node", "2"]
    options += ["--max-restarts", "2", "--monitor-interval", "0.1", __file__]
    config, _, _ = config_from_args(get_args_parser().parse_args(options))
    results = elastic_launch(replace(config, start_method="fork", run_id=str(kills)), train)(kills)
    return [results[rank] for rank in range(2)]


@pytest.mark.filterwarnings("ignore:It is recommended to use .* when logging on epoch level in distributed")
def test_killed_processes_are_restarted_and_the_run_ends_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for kills in (True, False):
        folder = tmp_path / str(kills)
        folder.mkdir()
        monkeypatch.chdir(folder)
        results.append(in_a_process(partial(under_torchrun, kills), tmp_path / f"{kills} results"))
    assert sorted(path.name for path in tmp_path.glob("*/killed*")) == ["killed 0", "killed 1"]
    assert not list(tmp_path.glob("False/killed*"))
    assert_equal(*results)
