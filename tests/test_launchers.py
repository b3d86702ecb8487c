"""Do the ways to start several processes start them, with the same result, and does none stay behind?"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from processes import free_port, script, start_script

pytestmark = [pytest.mark.processes, pytest.mark.slow]

ROOT = Path(__file__).parents[1]

SCRIPT = """
import atexit, os, sys, time
if sys.argv[1] == "notebook":
    sys.ps1 = ">>> "  # by which Lightning recognises an interactive Python
from datetime import timedelta
import lightning as L, torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_diloco import DilocoStrategy

class Writes(L.Callback):
    def on_train_end(self, trainer, pl_module):
        if trainer.global_rank == 1:
            time.sleep(3)  # longer than the watch over the parent looks away
            open("written late", "w").write("")

class Module(BoringModel):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if "fail" in sys.argv and self.trainer.global_step == 3 and self.trainer.global_rank == int(sys.argv[-1]):
            raise ValueError("ill")
        if "slow" in sys.argv:
            open(f"pid{self.trainer.global_rank}", "w").write(str(os.getpid()))
            time.sleep(300)

if __name__ == "__main__":
    atexit.register(lambda: torch.distributed.is_initialized() and print("threads of gloo meet the end of Python"))
    torch.set_num_threads(1)
    L.seed_everything(1, verbose=False)
    module = Module()
    strategy = DilocoStrategy(
        num_nodes=2, diloco_interval=100 if "slow" in sys.argv else 4, timeout=timedelta(seconds=60),
        start_method=None if sys.argv[1] in ("one", "notebook") else sys.argv[1],
    )
    trainer = L.Trainer(
        strategy=strategy, devices=1 if sys.argv[1] == "one" else 2, accelerator="cpu", max_steps=10, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[Writes()] if "late" in sys.argv else [],
    )
    try:
        trainer.fit(module)
    except Exception as error:
        print("caught", str(error).strip().splitlines()[-1].removeprefix("ValueError: "), flush=True)
        if sys.argv[1] in ("spawn", "fork"):
            sys.exit(3)
        time.sleep(8)  # longer than Lightning's observer of child processes sleeps
        open(f"survived {trainer.global_rank}", "w").write("")
        sys.exit(3)
    if "outlive" in sys.argv and trainer.global_rank == 1:
        time.sleep(3)
        open("outlived", "w").write("")
    if trainer.is_global_zero:
        torch.save(module.state_dict(), f"{sys.argv[1]}.pt")
    if sys.argv[1] == "fork":
        try:
            strategy.outer_state_dict()
        except RuntimeError as error:
            print(error)
"""


def clean_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def begin(folder: Path, *arguments: str) -> Any:
    (folder / "script.py").write_text(SCRIPT)
    return start_script("script.py", *arguments, folder=folder, environment=clean_environment())


def call(folder: Path, *arguments: str, copies: bool = True) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    for _ in range(3):  # gloo's threads may abort a process at the very end, in plain torch too (1 in 70 pairs)
        if arguments == ("notebook",):  # Lightning recognises one when it is imported
            done = subprocess.run(
                [sys.executable, "script.py", *arguments],
                cwd=folder,
                env=clean_environment(),
                text=True,
                capture_output=True,
                timeout=120,
            )
        else:
            done = script("script.py", *arguments, folder=folder, environment=clean_environment(), copies=copies)
        if done.returncode != -signal.SIGABRT:
            break
    return done


def test_popen_spawn_and_fork_train_as_one_process_does(tmp_path: Path) -> None:
    """A notebook forks by itself."""
    for method in ("one", "popen", "spawn", "fork", "notebook"):
        done = call(tmp_path, method, copies=False)
        assert done.returncode == 0, done.stderr
        assert "threads of gloo" not in done.stdout  # they abort a process now and then
        assert (method == "fork") == (
            "The workers live in the processes that this one started (`start_method` is 'fork'; in notebooks that is"
            " 'fork'), and ended with them. Ask in a callback or hook of the fit. Here are" in done.stdout
        )
    expected = torch.load(tmp_path / "one.pt", weights_only=True)
    for method in ("popen", "spawn", "fork", "notebook"):
        state = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        assert all(torch.equal(state[key], value) for key, value in expected.items()), method


def pids(folder: Path, limit: float = 120) -> list[psutil.Process]:
    """The training processes, as soon as both train."""
    deadline = time.monotonic() + limit
    files = [folder / "pid0", folder / "pid1"]
    while not all(f.exists() and f.read_text() for f in files):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return [psutil.Process(int(f.read_text())) for f in files]


@pytest.mark.parametrize(("method", "victim"), [("popen", 0), ("popen", 1), ("fork", None)])
def test_none_stays_behind_when_one_is_killed(method: str, victim: int | None, tmp_path: Path) -> None:
    """In mid-round; None: the process that started the others and trains nothing itself."""
    parent = begin(tmp_path, method, "slow")
    processes = pids(tmp_path)
    os.kill(parent.pid if victim is None else processes[victim].pid, signal.SIGKILL)
    parent.join(60)
    assert parent.exitcode
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


def test_a_process_that_was_told_to_stop_ends_with_its_parent(tmp_path: Path) -> None:
    """SIGTERM, and SIGKILL a moment later, as container engines do; the next synchronisation is far away."""
    parent = begin(tmp_path, "popen", "slow")
    processes = pids(tmp_path)
    os.kill(parent.pid, signal.SIGTERM)
    time.sleep(1)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(60)
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()
    assert not alive


def test_a_process_may_work_on_after_the_fit_when_its_parent_is_gone(tmp_path: Path) -> None:
    assert call(tmp_path, "popen", "outlive").returncode == 0
    deadline = time.monotonic() + 60
    while not (tmp_path / "outlived").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_process_that_is_done_first_waits_for_the_others(tmp_path: Path) -> None:
    """Whoever starts the others must not look like one that died, or they would end in the middle of their work."""
    assert call(tmp_path, "popen", "late").returncode == 0
    assert (tmp_path / "written late").exists()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_an_error_in_a_started_process_arrives(method: str, tmp_path: Path) -> None:
    done = call(tmp_path, method, "fail", "1")
    assert (done.returncode, done.stdout.strip()) == (3, "caught ill"), done.stderr


def test_a_script_that_catches_its_own_error_goes_on_and_leaves_none_behind(tmp_path: Path) -> None:
    done = call(tmp_path, "popen", "fail", "0", copies=False)
    assert "caught ill" in done.stdout
    assert [p.name for p in tmp_path.glob("survived*")] == ["survived 0"]
    assert done.returncode == 3
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


def test_the_commands_from_laptop_to_cluster(tmp_path: Path) -> None:
    """One process, two processes, and two machines on loopback train the byte GPT, with one result."""
    guide = (ROOT / "examples" / "guides" / "cluster.md").read_text()
    laptop, devices, cluster = re.findall(r"^```sh cluster\n(.*?)^```$", guide, re.M | re.S)[0].strip().splitlines()
    tiny = " --layers 1 --width 16 --heads 2 --context 16 --megabytes 0.3 --steps 40 --interval 10 --workers 2"
    tiny += f" --accelerator cpu --logdir {tmp_path}"
    cluster = cluster.replace("29500", str(free_port()))

    def results(line: str, out: str) -> dict[str, float]:
        program, *arguments = shlex.split(line.replace("$FIRST", "127.0.0.1") + tiny)
        module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[program]  # what `torchrun` runs
        (tmp_path / out).mkdir()
        environment = clean_environment()
        new = program == "torchrun"
        done = script(*module, *arguments, folder=ROOT, out=tmp_path / out, environment=environment, copies=not new)
        assert done.returncode == 0, done.stderr
        rows = re.findall(r"^(\w+) +([\d.,]+)$", done.stdout, re.MULTILINE)
        return {name: float(value.replace(",", "")) for name, value in rows if name != "seconds"}

    with ThreadPool(2) as machines:
        names = ("first", "second")
        commands = [(cluster.replace("$NODE", str(node)), name) for node, name in enumerate(names)]
        first, second = machines.starmap(results, commands)
    assert second == {}
    assert first.keys() == {"parameters", "val_loss", "bits_per_byte", "bytes_sent_per_worker"}
    assert first["val_loss"] < 5.0  # ln 256 = 5.55 at the start
    one = results(laptop, "laptop")
    for several in (results(devices, "devices"), first):
        assert several == pytest.approx(one, rel=1e-3)  # the sampler of the evaluation repeats a window
