"""Does a run over several processes end in time, with words that help and nothing lost, when one of them fails?"""

import os
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_equal, loader, regression_data, trainer
from layouts import Project
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from processes import outcomes, start

from lightning_diloco import DilocoStrategy

pytestmark = pytest.mark.processes

TIMEOUT = timedelta(seconds=4)  # for tests that wait for it; on a busy machine it may end others


OF_LIGHTNINGS = r"ignore:.*(was called without a model|is set, but there is no last)"  # beside OnExceptionCheckpoint


SLACK = 60  # seconds that a loaded machine may take; beyond the timeout, if one is waited for


class Trouble(L.Callback):
    """At the end of step 6, in the second round of 4: writes down that it was there, and calls ``what``."""

    def __init__(self, rank: int, what: Any, folder: Path) -> None:
        self.rank, self.what, self.folder = rank, what, folder

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 6 and trainer.global_rank == self.rank:
            (self.folder / "since").write_text(str(time.time()))
            self.what()


class InValidation(Trouble):
    """In the validation after step 6."""

    def on_validation_batch_start(self, trainer, pl_module, *_):
        super().on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, *_):
        pass


def fit(folder: Path, callbacks: list[Any], workers: int = 4, devices: int = 3, **strategy: Any) -> Any:
    L.seed_everything(5, verbose=False)
    diloco = DilocoStrategy(num_nodes=workers, diloco_interval=4, **strategy)
    t = trainer(diloco, devices=devices, max_steps=16, max_epochs=-1, callbacks=callbacks, default_root_dir=folder)
    t.fit(Project(), loader(regression_data(72), 4))
    return diloco


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(300)


class Save(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step % 4 == 0:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", [die, hang])
def test_the_others_end_in_time_and_name_the_process(what: Any, rank: int, tmp_path: Path) -> None:
    def run() -> None:
        fit(tmp_path, [Save(), Trouble(rank, what, tmp_path)], workers=3, timeout=TIMEOUT)

    children = start(run, 3, (), tmp_path / "out")
    survivors = [c for r, c in enumerate(children) if r != rank]
    for child in survivors:
        child.join(120)
    waited = time.time() - float((tmp_path / "since").read_text())
    children[rank].kill()
    results = outcomes(children, tmp_path / "out")
    assert waited < TIMEOUT.total_seconds() + SLACK
    for r, outcome in enumerate(results):
        if r != rank:
            assert outcome is not None
            assert outcome[0] == "raised"
            assert outcome[1].startswith(f"RuntimeError: Process {r} of 3 failed at ")
            assert ". If another process has exited or hangs (`timeout` = 0:00:04), see its output. " in outcome[1]
    if rank != 0:  # which the first process knows
        assert f" Process {rank} is missing: " in results[0][1]  # type: ignore[index]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["diloco"]["local_steps"] == 4
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".ckpt", ".part")] == ["last.ckpt"]


class Ill(Project):
    """Worker 1 fails in step 7."""

    def training_step(self, batch, batch_idx):
        if self.trainer.strategy.current_worker == 1 and self.trainer.global_step == 6:
            raise ValueError("worker 1 is ill")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings(OF_LIGHTNINGS)
def test_an_exception_on_one_process_ends_all_without_a_deadlock_and_without_half_a_file(tmp_path: Path) -> None:
    def run() -> None:
        L.seed_everything(5, verbose=False)
        diloco = DilocoStrategy(num_nodes=2, diloco_interval=4)
        callbacks = [OnExceptionCheckpoint(tmp_path / "rescue"), Save()]
        t = trainer(
            diloco, devices=2, max_steps=16, max_epochs=-1, callbacks=callbacks, default_root_dir=tmp_path,
            enable_checkpointing=True,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                t.fit(Ill(), loader(regression_data(72), 4))
            finally:
                said = [str(w.message) for w in seen if "is not written: an exception has stopped" in str(w.message)]
                (tmp_path / f"said by {os.environ['LOCAL_RANK']}").write_text("".join(said))

    began = time.monotonic()
    results = outcomes(start(run, 2, (), tmp_path / "out"), tmp_path / "out")
    assert time.monotonic() - began < SLACK
    assert results[1] == ("raised", "ValueError: worker 1 is ill")
    assert results[0] is not None
    assert results[0][1].startswith("RuntimeError: Process 0 of 2 failed at self.log")
    assert not list((tmp_path / "rescue").glob("*"))
    for rank in range(2):
        assert (
            (tmp_path / f"said by {rank}")
            .read_text()
            .endswith(
                f"is not written: an exception has stopped process {rank}, and the state of the other processes'"
                " workers is out of reach. Resume from the last file before it."
            )
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["diloco"]["local_steps"] == 4


def raised(run: Any, size: int, out: Path) -> list[str]:
    results = outcomes(start(run, size, (), out), out)
    assert all(r is not None and r[0] == "raised" for r in results), results
    return [r[1] for r in results if r is not None]


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "N": ({"workers": 2}, {"workers": 4}, "`num_nodes` is 2 on process 0 and 4 on process 1"),
    "buffers": ({}, {"buffers": "first"}, "`buffers` is 'average' on process 0 and 'first' on process 1"),
    "outer": (
        {},
        {"outer_optimizer_cls": torch.optim.Adam},
        "`outer_optimizer_cls` is 'SGD' on process 0 and 'Adam' on process 1",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_different_settings_are_found_at_the_start(what: str, tmp_path: Path) -> None:
    zero, one, message = DIFFERENT[what]

    def run() -> None:
        fit(tmp_path, [], devices=2, **(zero if os.environ["LOCAL_RANK"] == "0" else one))

    for error in raised(run, 2, tmp_path):
        assert error == (
            f"ValueError: The processes were started with different settings: {message}. Start the same script with"
            " the same arguments everywhere."
        )


def test_a_different_interval_and_a_different_model_are_found_at_the_start(tmp_path: Path) -> None:
    def interval() -> None:
        diloco = DilocoStrategy(num_nodes=2, diloco_interval=4 + int(os.environ["LOCAL_RANK"]))
        trainer(diloco, devices=2, max_steps=1, default_root_dir=tmp_path).fit(Project(), loader())

    def model() -> None:
        module = Net()
        if os.environ["LOCAL_RANK"] == "1":
            module.extra = torch.nn.Linear(1, 1)
        trainer(DilocoStrategy(num_nodes=2), devices=2, max_steps=1, default_root_dir=tmp_path).fit(module, loader())

    def frozen() -> None:
        module = Net()
        module.net[0].requires_grad_(os.environ["LOCAL_RANK"] == "0")
        trainer(DilocoStrategy(num_nodes=2), devices=2, max_steps=1, default_root_dir=tmp_path).fit(module, loader())

    for error in raised(frozen, 2, tmp_path / "frozen"):
        assert "`net.0.weight` is '(8, 3) torch.float32 trained' on process 0 and '(8, 3) torch.float32' on" in error
    for error in raised(interval, 2, tmp_path / "interval"):
        assert "`diloco_interval` is 4 on process 0 and 5 on process 1" in error
    for error in raised(model, 2, tmp_path / "model"):
        assert "`extra.weight` is None on process 0 and '(1, 1) torch.float32 trained' on process 1" in error


def test_processes_that_part_ways_are_told_so(tmp_path: Path) -> None:
    def shorter() -> None:
        """Process 1 skips the end of its epoch, so the processes meet at different steps."""

        class Skips(Project):
            def on_train_batch_start(self, batch, batch_idx):
                return -1 if batch_idx == 2 and self.trainer.global_rank == 1 else None

        diloco = DilocoStrategy(num_nodes=2, diloco_interval=4)
        t = trainer(diloco, devices=2, max_epochs=3, default_root_dir=tmp_path)
        t.fit(Skips(), loader(regression_data(72), 4))

    def writes() -> None:
        class Writes(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                if trainer.global_step == 2 and trainer.is_global_zero:
                    with torch.no_grad():
                        pl_module.net[0].weight.add_(1)

        fit(tmp_path, [Writes()], workers=2, devices=2)

    for error in raised(shorter, 2, tmp_path / "shorter"):
        assert error.startswith("RuntimeError: The processes are at different places: process 0 is at ")
        assert error.endswith(
            ". All must take the same steps; look for loaders of different lengths, and for hooks that stop, validate,"
            " save or (with sync_dist=True) log on one process only."
        )
    for error in raised(writes, 2, tmp_path / "writes"):
        assert error == (
            "RuntimeError: Process 1 holds another outer model θ than process 0 at the synchronisation after 4 local"
            " steps: something wrote different weights into the module on different processes. Callbacks and hooks must"
            " write the same everywhere."
        )


def test_a_value_that_one_process_logs_is_named(tmp_path: Path) -> None:
    class LogsAlone(Project):
        def training_step(self, batch, batch_idx):
            if self.trainer.strategy.current_worker == 0:
                self.log("alone", 1.0, on_step=False, on_epoch=True, sync_dist=True)
            return self.loss(batch)

    def run() -> None:
        diloco = DilocoStrategy(num_nodes=2, diloco_interval=9)
        trainer(diloco, devices=2, max_epochs=1, default_root_dir=tmp_path).fit(LogsAlone(), loader())

    for error in raised(run, 2, tmp_path):
        assert "process 0 is at a reduction of what is logged as training_step.alone with sync_dist=True;" in error


@pytest.mark.slow
def test_a_process_that_is_long_over_the_end_spoils_nothing(tmp_path: Path) -> None:
    class Late(L.Callback):
        def on_train_end(self, trainer, pl_module):
            time.sleep(16 * trainer.is_global_zero)

    def run() -> tuple[int, bool]:
        diloco = DilocoStrategy(num_nodes=2, diloco_interval=4, timeout=timedelta(seconds=6))
        t = trainer(diloco, devices=2, max_steps=6, callbacks=[Late()], default_root_dir=tmp_path)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            t.fit(Project(), loader())
        return diloco.local_steps, any("failed at the end of the run. If another" in str(w.message) for w in seen)

    results = outcomes(start(run, 2, (), tmp_path / "out"), tmp_path / "out")
    assert results == [("returned", (6, True))] * 2


def test_an_error_is_not_hidden_by_what_the_others_do(tmp_path: Path) -> None:
    """Callbacks read metrics when a fit fails, which are means over the processes, and may ask for more."""

    class Curious(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            dict(trainer.callback_metrics)
            pl_module.all_gather(torch.ones(1))
            trainer.strategy.reduce_boolean_decision(True)

    class Fails(Project):
        def on_train_epoch_end(self):
            if self.trainer.global_rank == 1:
                raise ValueError("ill")

    def run() -> None:
        diloco = DilocoStrategy(num_nodes=2, diloco_interval=4)
        trainer(diloco, devices=2, max_epochs=2, callbacks=[Curious()], default_root_dir=tmp_path).fit(
            Fails(), loader()
        )

    zero, one = raised(run, 2, tmp_path / "out")
    assert one == "ValueError: ill"
    assert zero.startswith("RuntimeError: Process 0 of 2 failed at a reduction of what is logged as")


def test_a_signal_in_teardown_is_survived(tmp_path: Path) -> None:
    class Told(Project):
        def cpu(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().cpu()

    def run() -> int:
        diloco = DilocoStrategy(num_nodes=2, diloco_interval=4)
        trainer(diloco, max_steps=6, default_root_dir=tmp_path).fit(Told(), loader())
        return diloco.local_steps

    assert outcomes(start(run, 1, (), tmp_path / "out"), tmp_path / "out") == [("returned", 6)]


def test_a_partition_that_fails_fails_everywhere(tmp_path: Path) -> None:
    def partition(dataset: Any, num_workers: int) -> Any:
        (tmp_path / f"called by {os.environ['LOCAL_RANK']}").touch()
        raise KeyError("no such column")

    def run() -> None:
        fit(tmp_path, [], workers=2, devices=2, partition=partition)

    assert raised(run, 2, tmp_path / "out") == ["KeyError: 'no such column'"] * 2
    assert [p.name for p in tmp_path.glob("called*")] == ["called by 0"]


def test_other_processes_workers_are_named(tmp_path: Path) -> None:
    def run() -> None:
        diloco = fit(tmp_path, [], workers=4, devices=2)
        assert len(diloco.local_workers) == 2
        diloco.worker_state_dict(3 - 3 * int(os.environ["LOCAL_RANK"]))

    zero, one = raised(run, 2, tmp_path)
    assert zero == (
        "ValueError: Worker 3 is hosted by process 1; this is process 0, which hosts [0, 1]. Ask there: `if 3 in"
        " strategy.local_workers: ...`."
    )
    assert one.startswith("ValueError: Worker 0 is hosted by process 0; this is process 1, which hosts [2, 3].")


@pytest.mark.slow
@pytest.mark.filterwarnings(OF_LIGHTNINGS)
@pytest.mark.parametrize(("receiver", "during"), [(0, "training"), (1, "training"), (1, "validation")])
def test_sigterm_stops_all_after_the_next_synchronisation_with_a_file_that_resumes(
    receiver: int, during: str, tmp_path: Path
) -> None:
    def run(resume: bool = False) -> Any:
        L.seed_everything(5, verbose=False)
        diloco = DilocoStrategy(num_nodes=2, diloco_interval=4)
        trouble = (Trouble if during == "training" else InValidation)(
            -1 if resume else receiver, lambda: os.kill(os.getpid(), signal.SIGTERM), tmp_path
        )
        t = trainer(
            diloco, devices=2, max_steps=14, max_epochs=-1, default_root_dir=tmp_path, enable_checkpointing=True,
            val_check_interval=3,
            callbacks=[OnExceptionCheckpoint(tmp_path, "rescue"), trouble],
        )  # fmt: skip
        path = tmp_path / "rescue.ckpt" if resume else None
        t.fit(Project(), loader(regression_data(72), 4), loader(regression_data(8), shuffle=False), ckpt_path=path)
        return [diloco.worker_state_dict(w) for w in diloco.local_workers]

    stopped = outcomes(start(run, 2, (), tmp_path / "out"), tmp_path / "out")
    assert [r[1].split(":")[0] for r in stopped if r is not None] == ["SIGTERMException"] * 2
    assert torch.load(tmp_path / "rescue.ckpt", weights_only=True)["diloco"]["local_steps"] == 8
    resumed = outcomes(start(run, 2, (True,), tmp_path / "resumed"), tmp_path / "resumed")
    receiver = -1
    undisturbed = outcomes(start(run, 2, (), tmp_path / "undisturbed"), tmp_path / "undisturbed")
    assert_equal(resumed, undisturbed)
    assert all(r is not None and r[0] == "returned" for r in resumed)
