"""Does a process that waits say for whom, and where, once, without a collective more and without a thread left?"""

import io
import logging
import re
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, assert_same, loader, trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from processes import outcomes, run, script, start
from torch.distributed import HashStore

from lightning_diloco import DilocoCallback, DilocoStrategy
from lightning_diloco.comm.waiting import Waiting
from lightning_diloco.comm.watcher import Watcher
from lightning_diloco.reporting.progress import announce


class Machines:
    """Watchers of several processes that share a store, on a clock that the test moves."""

    def __init__(self, size: int, monkeypatch: Any, teams: dict[int, list[int]] | None = None) -> None:
        self.now = 0.0
        for module in ("waiting", "watcher"):
            monkeypatch.setattr(f"lightning_diloco.comm.{module}.perf_counter", lambda: self.now)
        store = HashStore()
        self.said: list[tuple[int, str]] = []
        self.waiting = [Waiting() for _ in range(size)]
        self.open: dict[int, Any] = {}
        self.watchers = [
            Watcher(
                self.waiting[r],
                r,
                {"all": range(size), "team": (teams or {}).get(r, [r])},
                store,  # type: ignore[arg-type]
                5.0,
                lambda message, r=r: self.said.append((r, message)),  # type: ignore[misc]
            )
            for r in range(size)
        ]

    def arrive(self, *ranks: int, among: Any = "all", where: str = "the end of local step 7") -> None:
        for r in ranks:
            self.open[r] = self.waiting[r].at(where, among)
            self.open[r].__enter__()

    def leave(self, *ranks: int) -> None:
        for r in ranks:
            self.open.pop(r).__exit__(None, None, None)

    def pass_time(self, seconds: float) -> None:
        """Every watcher looks twice per second."""
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            for watcher in self.watchers:
                watcher.look()


def test_the_lowest_process_that_waits_names_those_that_have_not_arrived(monkeypatch: Any) -> None:
    here = Machines(4, monkeypatch)
    here.arrive(2)
    here.pass_time(2)
    here.arrive(1)
    here.pass_time(2.5)
    assert here.said == []
    here.pass_time(20)
    # process 2 leaves it to process 1, which has waited for 5 s half a second before the others look
    assert here.said == [(1, "waiting for processes 0 and 3 at the end of local step 7 (5 s)")]
    here.arrive(0, 3)
    here.leave(0, 1, 2, 3)
    here.pass_time(20)
    here.arrive(0, 1, 2)
    here.pass_time(20)
    assert here.said[1:] == [(0, "waiting for process 3 at the end of local step 7 (5 s)")]
    here.arrive(3)
    here.pass_time(20)  # all are there, and what is sent takes long
    assert len(here.said) == 2


def test_teams_are_counted_apart(monkeypatch: Any) -> None:
    here = Machines(4, monkeypatch, {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]})
    for _ in range(3):
        here.arrive(0, 1, among="team")
        here.leave(0, 1)
    here.arrive(3, among="team", where="the mean of losses in a worker's team")
    here.pass_time(5)
    assert here.said == [(3, "waiting for process 2 at the mean of losses in a worker's team (5 s)")]
    here.arrive(2, among="team")
    here.leave(2, 3)
    here.arrive(0)
    here.pass_time(5)
    assert here.said[1:] == [(0, "waiting for processes 1, 2 and 3 at the end of local step 7 (5 s)")]


def test_short_waits_do_not_touch_the_store(monkeypatch: Any) -> None:
    here = Machines(2, monkeypatch)
    monkeypatch.setattr(here.watchers[0], "_store", None)
    for _ in range(9):
        here.arrive(0)
        here.now += 0.4
        here.watchers[0].look()
        here.arrive(1)
        here.leave(0, 1)
        here.watchers[0].look()
    assert here.said == []


def test_a_watcher_ends_with_its_store_and_when_it_is_stopped() -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

    for store in (Gone(), HashStore()):
        waiting = Waiting()
        watcher = Watcher(waiting, 0, {"all": range(2)}, store, 0.2, print)  # type: ignore[arg-type]
        watcher.start()
        with waiting.at("a test", "all"):
            time.sleep(0.1)
        if isinstance(store, HashStore):
            assert watcher._thread.is_alive()
        watcher.stop()
        watcher._thread.join(60)
        assert not watcher._thread.is_alive()


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_an_impossible_number_of_seconds(seconds: float) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"`announce_waiting` (={seconds}) must be a number of seconds > 0, or None: never.")
    ):
        DilocoCallback(announce_waiting=seconds)


def test_the_message_stands_above_a_live_bar_and_else_in_the_log(monkeypatch: Any, caplog: Any) -> None:
    class Says(Net):
        def training_step(self, batch, batch_idx):
            announce(self.trainer, "waiting for process 1")
            return super().training_step(batch, batch_idx)

    for bar in (TQDMProgressBar(), RichProgressBar(console_kwargs={"width": 100, "force_terminal": True})):
        monkeypatch.setattr(sys, "stdout", out := io.StringIO())
        t = trainer(DilocoStrategy(num_nodes=2), max_steps=1, callbacks=[bar], enable_progress_bar=True)
        t.fit(Says(), loader())
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", out.getvalue()))
        assert [line.strip() for line in lines].count("waiting for process 1") == 2, lines
    caplog.set_level(logging.WARNING, logger="lightning.pytorch.diloco")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    trainer(DilocoStrategy(num_nodes=2), max_steps=1).fit(Says(), loader())
    assert [r.message for r in caplog.records if r.message.startswith("waiting")] == ["waiting for process 1"] * 2


def _late(late: int, seconds: float | None, timeout: float, log: Path) -> tuple[list[str], dict[str, Any], list[str]]:
    """Process ``late`` is late in local step 3; messages of this process, its weights, and its threads afterwards."""

    class Late(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.strategy._world.rank == late and self.trainer.global_step == 2:
                time.sleep(2 if timeout > 10 else 300)
            return self.loss(batch)

    messages: list[str] = []

    def note(record: logging.LogRecord) -> None:
        messages.append(record.getMessage())
        with log.open("a") as file:
            file.write(f"{strategy._world.rank}: {messages[-1]}\n")

    handler = logging.Handler()
    handler.emit = note  # type: ignore[method-assign]
    logging.getLogger("lightning.pytorch.diloco").addHandler(handler)
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=4, timeout=timedelta(seconds=timeout))
    model, callback = Late(), DilocoCallback(announce_waiting=seconds)
    trainer(strategy, devices=2, max_steps=8, callbacks=[callback]).fit(model, loader())
    return messages, model.state_dict(), [t.name for t in threading.enumerate()]


@pytest.mark.processes
@pytest.mark.parametrize("late", [0, 1])
def test_two_processes_of_which_one_is_late(late: int, tmp_path: Path) -> None:
    at = "the synchronisation after 4 local steps"  # elsewhere processes may be late on a busy machine
    says = run(_late, 2, late, 0.8, 60.0, tmp_path / "log", out=tmp_path / "on")
    silent = run(_late, 2, late, None, 60.0, tmp_path / "log", out=tmp_path / "off")
    for messages, _, threads in (*says, *silent):
        assert "diloco-watcher" not in threads
        del messages
    there = [[message for message in messages if at in message] for messages, _, _ in says]
    assert there[late] == [] == silent[0][0] == silent[1][0]
    (message,) = there[1 - late]
    assert re.fullmatch(rf"waiting for process {late} at {at} \(\d+ s\)", message)
    for rank in (0, 1):
        assert_same(says[rank][1], silent[rank][1])


SCRIPT = """
import time, lightning as L, torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_diloco import DilocoCallback, DilocoStrategy
from datetime import timedelta
import sys

class Module(BoringModel):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_rank == 1 and self.trainer.global_step == 2:
            time.sleep(float(sys.argv[2]))
        return super().training_step(batch, batch_idx)

if __name__ == "__main__":
    torch.set_num_threads(1)
    strategy = DilocoStrategy(
        num_nodes=2, diloco_interval=4, start_method=sys.argv[1], timeout=timedelta(seconds=float(sys.argv[3])))
    L.Trainer(
        strategy=strategy, devices=2, accelerator="cpu", max_steps=8, logger=False, enable_checkpointing=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[DilocoCallback(announce_waiting=1.0)],
    ).fit(Module())
"""


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["popen", "fork"])
def test_a_script_with_a_progress_bar(start_method: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ended = script("script.py", start_method, "4", "300")
    assert ended.returncode == 0, ended.stderr
    found = re.findall(r"waiting for .*", ended.stdout + ended.stderr)
    found = [line for line in found if "synchronisation" in line]  # processes may start at different times
    assert len(found) == 1
    assert re.match(r"waiting for process 1 at the synchronisation after 4 local steps \(\d+ s\)", found[0])


@pytest.mark.processes
def test_the_timeout_still_ends_a_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"
    children = start(_late, 2, (1, 0.5, 8.0, log), tmp_path)
    children[0].join(60)
    assert not children[0].is_alive()
    children[1].kill()
    first, _ = outcomes(children, tmp_path)
    assert first is not None
    assert first[0] == "raised"
    assert "Process 0 of 2 failed at the synchronisation after 4 local steps. If another process has exited" in first[1]
    said = log.read_text().splitlines()[-1]
    assert re.fullmatch(r"0: waiting for process 1 at the synchronisation after 4 local steps \(\d+ s\)", said)


def test_no_watch_within_one_process() -> None:
    seen: list[str] = []

    class Looks(Net):
        def training_step(self, batch, batch_idx):
            seen.extend(t.name for t in threading.enumerate())
            return super().training_step(batch, batch_idx)

    trainer(DilocoStrategy(num_nodes=2), max_steps=1).fit(Looks(), loader())
    assert seen
    assert "diloco-watcher" not in seen
    assert not torch.distributed.is_initialized()
