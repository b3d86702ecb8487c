"""Does a run that is killed again and again, and restarted from its last file, end as the undisturbed run?"""

import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_equal, loader, regression_data, trainer
from projects import Project

from lightning_diloco import DilocoStrategy

pytestmark = pytest.mark.processes

KILLS = 20


LONGEST = 40  # events before a life ends, of 600: the steps of three workers, and the write after them


FORK = multiprocessing.get_context("fork")


OTHER_FILE_SYSTEM = "/dev/shm"


class Fails(Project):
    """Counts the steps of the workers. After event ``last`` worker 1 raises, or waits for a signal that is late."""

    def __init__(self, count: Any, how: str, last: float) -> None:
        super().__init__()
        self.count, self.how, self.last = count, how, last

    def training_step(self, batch, batch_idx):
        self.count.value += 1
        if self.count.value > self.last and self.trainer.strategy.current_worker == 1:
            if self.how == "exception":
                raise ValueError("worker 1 is ill")
            while self.count.value > self.last + 20 and not self.trainer.received_sigterm:
                time.sleep(0.01)
        return super().training_step(batch, batch_idx)


class Save(L.Callback):
    """Writes the same file after every batch, and counts: a kill has every chance to hit a write."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.count.value += 1
        trainer.save_checkpoint("last.ckpt")


def train(count: Any, how: str, last: float) -> None:
    if os.path.isdir(OTHER_FILE_SYSTEM):
        tempfile.tempdir = OTHER_FILE_SYSTEM
    L.seed_everything(5, verbose=False)
    module, strategy = Fails(count, how, last), DilocoStrategy(num_nodes=3, diloco_interval=4)
    t = trainer(strategy, max_epochs=30, callbacks=[Save()])
    path = "last.ckpt" if Path("last.ckpt").exists() else None
    t.fit(module, loader(regression_data(45), 3), ckpt_path=path)
    inner = strategy._engine.context.inner.workers.values()
    result = {
        "module": module.state_dict(),
        "workers": [strategy.worker_state_dict(w) for w in range(3)],
        "inner": [[list(s.values()) for s in w.states] for w in inner],
        "outer": strategy.outer_optimizer.state_dict(),
        "steps": [strategy.local_steps, strategy.outer_steps],
    }
    torch.save(result, "result.pt")


def run(how: str, rng: random.Random) -> bool:
    """One life of the run, counted in events, since a machine may be slow; whether it came to its end."""
    count, last = FORK.Value("i", lock=False), rng.randrange(LONGEST)
    child: Any = FORK.Process(target=train, args=(count, how, last if how else float("inf")), daemon=True)
    child.start()
    if how in ("SIGKILL", "SIGTERM"):
        deadline = time.monotonic() + 120
        while child.is_alive() and count.value < last and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))  # anywhere in a step, or in the write after it
        if child.is_alive():
            os.kill(child.pid, getattr(signal, how))
    child.join(120)
    assert not child.is_alive()
    return child.exitcode == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as here:
        here.chdir(tmp_path_factory.mktemp("undisturbed"))
        assert run("", random.Random(7))
        return torch.load("result.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "exception"])
def test_a_run_that_dies_again_and_again_ends_as_if_undisturbed(how: str, undisturbed: Any) -> None:
    rng = random.Random(7)
    steps = [0]
    for _ in range(KILLS):
        run(how, rng)
        if Path("last.ckpt").exists():
            steps.append(torch.load("last.ckpt", weights_only=True)["diloco"]["local_steps"])
    assert steps == sorted(steps), "a restart never loses what a file holds"
    assert len(set(steps)) > KILLS // 2, "the lives are long enough to get on"
    assert run("", rng)
    result = torch.load("result.pt", weights_only=True)
    assert repr(result["steps"]) == repr(undisturbed["steps"]) == "[150, 38]"
    assert_equal(result, undisturbed)
    assert sorted(p.name for p in Path().iterdir()) == ["last.ckpt", "result.pt"], "no leftovers of kills"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: Any) -> None:
    from lightning_diloco._lightning.io import AtomicCheckpointIO

    io, path = AtomicCheckpointIO(), tmp_path / "x.ckpt"
    io.save_checkpoint({"value": 1}, path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        io.save_checkpoint({"value": 2}, path)
    assert torch.load(path, weights_only=True) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
