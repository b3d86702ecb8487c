"""Do the simulator's files resume to the uninterrupted run, and load elsewhere?"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_same, copy_of
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from simulators import QUIET, Classifier, Log, classes, simulator, trained, weights
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_diloco import DilocoSimulator
from lightning_diloco.simulator.module import SimulatorModule


@pytest.mark.slow
@pytest.mark.parametrize("file", ["step=000004.ckpt", "step=000008.ckpt", "step=000012.ckpt"])
def test_a_resumed_run_is_the_uninterrupted_one(file: str) -> None:
    """Bit for bit: weights, every number that hooks get, and the files that follow."""
    arguments = {
        "train_dataset": classes(84),  # 7 steps per pass
        "num_epochs": 2,
        "eval_dataset": classes(20, seed=1),
        "save_dir": "files",
        "ckpt_interval": 1,
        "cosine_anneal": True,
        "num_nodes": 3,
    }
    whole, rest = Log(), Log()
    first = trained(**arguments, **whole.hooks())
    theta, workers = weights(first), [first.strategy.worker_state_dict(w) for w in range(3)]
    torch.manual_seed(99)
    again = simulator(**{**arguments, "seed": None, "save_dir": "again"}, **rest.hooks())
    torch.rand(5)
    again.train(ckpt_path=Path("files") / file)
    done = int(file[5:11])
    assert list(rest) == [s for s in whole if s.local_step > done]
    assert rest.train[-1].local_step == again.total == 14
    assert_same(weights(again), theta)
    for worker in range(3):
        assert_same(again.strategy.worker_state_dict(worker), workers[worker])
    assert {p.name for p in Path("again").iterdir()} == {
        p.name for p in Path("files").iterdir() if p.name > file or p.name == "final.ckpt"
    }


def test_a_resumed_run_accumulates_gradients_as_before() -> None:
    whole, rest = Log(), Log()
    arguments = {"trainer_kwargs": {"accumulate_grad_batches": 2}, "max_local_step": 7}
    first = trained(**arguments, save_dir="files", ckpt_interval=1, train_loss_hook=whole.append)
    again = simulator(**arguments, train_loss_hook=rest.append)
    again.train("files/step=000004.ckpt")
    assert rest == whole[4:]
    assert_same(weights(again), weights(first))


@pytest.mark.parametrize("samples", [96, 90])  # a pass of 8 steps, of which the shorter run takes 8 or 7
def test_a_final_file_continues_with_more_epochs(samples: int) -> None:
    log = Log()
    short = trained(train_dataset=classes(samples), save_dir="files", cosine_anneal=True)
    longer = simulator(train_dataset=classes(samples), num_epochs=2, cosine_anneal=True, train_loss_hook=log.append)
    longer.train("files/final.ckpt")
    assert longer.total > short.total
    assert [s.local_step for s in log] == list(range(short.total + 1, longer.total + 1))
    assert longer.strategy.local_steps == longer.total
    assert longer.trainer.optimizers[0].param_groups[0]["lr"] == 0  # the cosine is that of the longer run


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("num_nodes", [1, 3])
def test_a_file_of_the_last_step_in_a_partial_round_has_the_last_outer_step_before_it(num_nodes: int) -> None:
    arguments = {"num_nodes": num_nodes, "max_local_step": 10, "eval_dataset": classes(8)}
    whole, rest = Log(), Log()
    kept = ModelCheckpoint("kept", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    s = trained(**arguments, trainer_kwargs={"callbacks": [kept]}, **whole.hooks())
    again = simulator(**arguments, save_dir="files", **rest.hooks())
    again.train("kept/step=10.ckpt")
    assert_same(weights(again), weights(s))
    assert rest == whole[-1:]
    assert_same(
        SimulatorModule.load_from_checkpoint(
            "files/final.ckpt", model=Classifier(), loss_fn=F.cross_entropy
        ).model.state_dict(),
        weights(s),
    )


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_file_that_a_callback_wrote_at_a_synchronisation_counts_it() -> None:
    class Save(L.Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step:
                trainer.save_checkpoint("again.ckpt")

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint("four.ckpt")

    arguments = {"num_nodes": 1, "outer_optimizer_kwargs": {"lr": 1.0}, "max_local_step": 10}
    whole, rest = Log(), Log()
    trained(**arguments, trainer_kwargs={"callbacks": [Save()]}, train_loss_hook=whole.append)
    simulator(**arguments, train_loss_hook=rest.append, trainer_kwargs={"callbacks": [Save()]}).train("four.ckpt")
    assert [(s.local_step, s.num_diloco_steps) for s in rest] == [(s.local_step, s.num_diloco_steps) for s in whole[4:]]
    assert rest[-1].num_diloco_steps == 2
    callbacks = torch.load("again.ckpt", weights_only=True)["callbacks"]
    assert callbacks["SimulatorCallback"] == {"outer_steps": 1, "cosine_anneal": False}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("cosine_anneal", [True, False])
def test_resuming_can_t_begin_or_end_the_cosine(cosine_anneal: bool) -> None:
    trained(save_dir="files", ckpt_interval=1, cosine_anneal=not cosine_anneal)
    with pytest.raises(MisconfigurationException) as caught:
        simulator(cosine_anneal=cosine_anneal).train("files/step=000004.ckpt")
    assert str(caught.value) == (
        f"The checkpoint was written by a run with `cosine_anneal` (={not cosine_anneal}) and can't be resumed with"
        f" `cosine_anneal` (={cosine_anneal}), since the learning rate in the file follows that setting. Resume with"
        f" `cosine_anneal={not cosine_anneal}`."
    )
    module = SimulatorModule.load_from_checkpoint("files/final.ckpt", model=Classifier(), loss_fn=F.cross_entropy)
    module.test_step = lambda batch, batch_idx: module.log("loss", module.evaluate(batch)[0])
    loader = DataLoader(classes(8), 4)
    L.Trainer(logger=False, **QUIET).test(module, loader, ckpt_path="files/final.ckpt", verbose=False)  # may be read


def test_a_subclass_may_have_a_schedule_of_its_own() -> None:
    class Scheduled(SimulatorModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Own(DilocoSimulator):
        module_cls = Scheduled

    whole, rest = simulator(Own, save_dir="files", ckpt_interval=1), simulator(Own)
    whole.train()
    rest.train("files/step=000004.ckpt")
    assert_same(weights(rest), weights(whole))


def test_nothing_is_left_to_do_after_a_final_file() -> None:
    log = Log()
    theta = weights(trained(save_dir="files"))
    again = simulator(train_loss_hook=log.append, save_dir="again")
    again.train("files/final.ckpt")
    assert not log
    assert not Path("again").exists()
    assert_same(weights(again), theta)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_one_worker_counts_on_after_resuming() -> None:
    """Averaged plainly, it is the plain run, whose files say nothing of outer steps; the simulator's own entry does."""
    whole, rest = Log(), Log()
    arguments = {
        "num_nodes": 1,
        "outer_optimizer_kwargs": {"lr": 1.0},
        "max_local_step": 12,
        "eval_dataset": classes(8),
        "save_dir": "files",
        "ckpt_interval": 1,
    }
    trained(**arguments, **whole.hooks())
    simulator(**arguments, **rest.hooks()).train("files/step=000004.ckpt")

    def counts(log: Log) -> list[Any]:
        return [(s.local_step, s.global_step, s.num_diloco_steps) for s in log if s.local_step > 4]

    assert counts(rest) == counts(whole)


def test_files_in_the_middle_of_a_round_hold_the_outer_model_unless_told_otherwise() -> None:
    def saved(**strategy_kwargs: Any) -> Tensor:
        files = ModelCheckpoint(strategy_kwargs.get("eval_weights", "default"), every_n_train_steps=6)
        trained(trainer_kwargs={"callbacks": [files]}, strategy_kwargs=strategy_kwargs, max_local_step=6)
        return torch.load(files.best_model_path, weights_only=True)["state_dict"]["model.net.0.weight"]

    theta = trained(max_local_step=4).model.net[0].weight
    assert torch.equal(saved(), theta)
    assert not torch.equal(saved(eval_weights="average"), theta)


def test_files_are_ordinary_and_hold_the_outer_model() -> None:
    log = Log()
    s = trained(save_dir="files", ckpt_interval=1, eval_dataset=classes(20), eval_loss_hook=log.append)
    loaded = SimulatorModule.load_from_checkpoint("files/final.ckpt", model=Classifier(), loss_fn=F.cross_entropy)
    assert_same(copy_of(loaded.model.state_dict()), weights(s))
    file = torch.load("files/step=000004.ckpt", weights_only=True)
    assert file["global_step"] == 4
    model = Classifier()
    model.load_state_dict({k.removeprefix("model."): v for k, v in file["state_dict"].items()})
    x, y = classes(20).tensors
    assert F.cross_entropy(model.eval()(x), y).item() == pytest.approx(log[0].loss, rel=1e-5)
