"""Files saved when an error or Ctrl-C has interrupted a step: they say so, and a resumed run finishes the step."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import loader, slow_but, trainer
from interruptions import Ill, assert_same_run, run
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from lightning_diloco import DataParallel, DilocoStrategy

# Lightning's, beside OnExceptionCheckpoint
pytestmark = pytest.mark.filterwarnings("ignore:.*(was called without a model|is set, but there is no last)")


@pytest.mark.slow
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "training_step", "on_before_optimizer_step"])
@pytest.mark.parametrize("worker", [0, 1, 2])
@pytest.mark.parametrize("batch", [3, 6])
def test_a_run_that_resumes_from_a_torn_step_finishes_it_for_the_others(
    worker: int, hook: str, batch: int, error: Any
) -> None:
    """Batch 3 ends a round of four steps, batch 6 is in the middle of one."""
    undisturbed, whole, _ = run(Ill(None))
    torn = hook != "on_train_batch_start" and worker > 0
    stepped = ", ".join(map(str, range(worker)))
    match = (
        rf"Local step {batch + 1} was interrupted: .* worker {stepped} after its batch and worker {worker}.* before it"
    )
    said = pytest.warns(UserWarning, match=match) if torn else nullcontext()
    with said, pytest.raises((error, SystemExit)):
        run(Ill(worker, hook, batch, error))
    state = torch.load("rescue.ckpt", weights_only=True)["diloco"]
    assert state["torn"] == {
        "workers": list(range(worker)) if torn else [],
        "stepped": torn,
        "outer_step": False,
    }
    assert state["local_steps"] == batch
    resumed, t, seen = run(Ill(None), "rescue.ckpt")
    assert_same_run(resumed, undisturbed)
    assert t.global_step == whole.global_step == 16
    assert seen == list(range(batch + 1, 17))


@pytest.mark.slow
@pytest.mark.parametrize("worker", [0, 1, 2])
def test_a_worker_that_fails_after_its_step_has_taken_it(worker: int) -> None:
    undisturbed, _, _ = run(Ill(None))
    with pytest.warns(UserWarning, match="Local step 7 was interrupted"), pytest.raises(ArithmeticError):
        run(Ill(worker, "after optimizer_step"))
    resumed, t, _ = run(Ill(None), "rescue.ckpt")
    assert_same_run(resumed, undisturbed)
    assert t.global_step == 16


@pytest.mark.slow
def test_an_error_after_the_step_was_counted_tears_nothing() -> None:
    undisturbed, _, _ = run(Ill(None))
    with pytest.raises(ArithmeticError):
        run(Ill(1, "on_train_batch_end"))
    assert torch.load("rescue.ckpt", weights_only=True)["diloco"]["torn"] == {
        "workers": [],
        "stepped": False,
        "outer_step": False,
    }
    assert_same_run(run(Ill(None), "rescue.ckpt")[0], undisturbed)


class Diverges(Ill):
    """Worker 1's weights become infinite in the last step of the second round."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.worker is not None and self.trainer.strategy.current_worker == 1 and batch_idx == 6:
            self.net[0].weight.data.fill_(float("inf"))


def test_a_file_saved_when_the_outer_step_refused_a_worker_goes_on_with_that_outer_step() -> None:
    said = pytest.warns(UserWarning, match="Local step 8 was interrupted: the checkpoint holds worker 0, 1, 2 after")
    with said, pytest.raises(RuntimeError, match="pseudo-gradient of worker 1 is not finite at local step 8"):
        run(Diverges(1, "none"))
    with pytest.warns(UserWarning, match="Worker 1 is left out of the outer step at local step 8"):
        resumed, t, seen = run(Ill(None), "rescue.ckpt", nonfinite="skip")
    assert (resumed.local_steps, resumed.outer_steps, t.global_step) == (16, 4, 16)
    assert seen == list(range(8, 17))


def test_no_run_resumes_from_a_file_saved_in_the_middle_of_an_outer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_diloco.state.policies import PolicyApplication

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PolicyApplication, "synchronise_buffers", interrupt)
        said = pytest.warns(UserWarning, match="The outer step after 4 local steps was interrupted")
        with said, pytest.raises(SystemExit):
            run(Ill(None))
    assert Path("rescue.ckpt").exists()
    with pytest.raises(ValueError, match="saved when the outer step after local step 4 had been interrupted"):
        run(Ill(None), "rescue.ckpt")


class Accumulates(Ill):
    """Fails in a micro-batch; ``after`` the backward pass, or before it."""

    def __init__(self, worker: int | None, batch: int, after: bool = False) -> None:
        super().__init__(worker, "on_after_backward" if after else "training_step", batch)

    def on_after_backward(self):
        self.fail("on_after_backward", self.trainer.fit_loop.epoch_loop.batch_idx)


def accumulated(module: Any, ckpt: Any = None) -> Any:
    L.seed_everything(1, verbose=False)
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=2)
    rescue = OnExceptionCheckpoint(".", "rescue")
    t = trainer(strategy, callbacks=[rescue], enable_checkpointing=True, accumulate_grad_batches=4)
    t.fit(module, loader(), ckpt_path=ckpt)
    return strategy, t.global_step


@pytest.mark.parametrize("worker", slow_but([1], [0, 1, 2]))
@pytest.mark.parametrize("batch", [4, 5, 6, 7])
def test_a_torn_micro_batch_is_finished_too(worker: int, batch: int) -> None:
    undisturbed = accumulated(Accumulates(None, 0))
    said = pytest.warns(UserWarning, match="Local step 2 was interrupted") if worker else nullcontext()
    with said, pytest.raises(ArithmeticError):
        accumulated(Accumulates(worker, batch))
    resumed = accumulated(Accumulates(None, 0), "rescue.ckpt")
    assert_same_run(resumed[0], undisturbed[0])
    assert resumed[1] == undisturbed[1] == 4


@pytest.mark.parametrize("batch", [5, 7])
def test_a_micro_batch_that_changed_gradients_before_it_failed_is_not_called_exact(batch: int) -> None:
    with pytest.warns(UserWarning, match="not bit for bit the undisturbed"), pytest.raises(ArithmeticError):
        accumulated(Accumulates(1, batch, after=True))


def test_a_turn_that_changed_buffers_before_it_failed_is_not_called_exact() -> None:
    class Normalised(Ill):
        def __init__(self) -> None:
            super().__init__(1)
            self.net.append(torch.nn.BatchNorm1d(1))

    with pytest.warns(UserWarning, match="not bit for bit the undisturbed run"), pytest.raises(ArithmeticError):
        run(Normalised())


def test_a_turn_that_failed_between_two_optimizers_is_not_called_exact() -> None:
    class Two(Ill):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[-1].parameters(), 0.1)]

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.manual_backward(self.loss(batch))
            first.step()
            self.fail("between", batch_idx)
            second.step()
            self.zero_grad()

    with pytest.warns(UserWarning, match="not bit for bit the undisturbed run"), pytest.raises(ArithmeticError):
        run(Two(1, "between"))


def test_an_algorithm_that_exchanges_gradients_cannot_finish_a_torn_step() -> None:
    kwargs: Any = {"algorithm": DataParallel(), "outer_optimizer_cls": torch.optim.SGD}
    with pytest.warns(UserWarning, match="Local step 7 was interrupted"), pytest.raises(ArithmeticError):
        run(Ill(1, "on_before_optimizer_step"), **kwargs)
    with pytest.raises(ValueError, match="DataParallel needs the gradients of all workers to finish that step"):
        run(Ill(None), "rescue.ckpt", **kwargs)


def test_the_number_of_workers_cannot_change_in_a_torn_step() -> None:
    with pytest.warns(UserWarning, match="Local step 5 was interrupted"), pytest.raises(ArithmeticError):
        run(Ill(2, batch=4), interval=4)
    L.seed_everything(1, verbose=False)
    with pytest.raises(
        ValueError, match=r"`num_nodes` \(=2\) differs from the 3 workers of .*1 local steps into a round"
    ):
        trainer(DilocoStrategy(2, 4)).fit(Ill(None), loader(), ckpt_path="rescue.ckpt")
