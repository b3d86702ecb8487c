"""Can a strategy be pickled and copied at any time, and do a Trainer's connectors work before a run?"""

import copy
import pickle
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle
import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_diloco import Diloco, DilocoStrategy
from lightning_diloco._lightning.io import AtomicCheckpointIO


class Alone(Diloco):
    """Keeps hold of the run."""

    def __init__(self, share: float = 0.5) -> None:
        self.share = share


class Mine(DilocoStrategy):
    """A subclass with an argument of its own, set before and after the base class's constructor."""

    def __init__(self, early: str, late: str) -> None:
        self.early = early
        super().__init__(3, 2, algorithm=Alone(0.25))
        self.late = late


def strided(dataset: Any, workers: int) -> list[list[int]]:
    return [list(range(w, len(dataset), workers)) for w in range(workers)]


SETTINGS: dict[str, Any] = {
    "num_nodes": 3,
    "diloco_interval": 2,
    "outer_optimizer_kwargs": {"lr": 0.5},
    "algorithm": Alone(0.25),
    "inner_state": "reset",
    "partition": strided,
    "checkpoint_io": AtomicCheckpointIO(),
    "process_group_backend": "gloo",
}

COPIES = {
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "cloudpickle": lambda s: cloudpickle.loads(cloudpickle.dumps(s)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def train(strategy: Any, callbacks: Any = (), **options: Any) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    module = Net(torch.optim.Adam)  # can be pickled
    trainer(strategy, max_steps=5, callbacks=list(callbacks), **options).fit(module, loader())
    return copy_of(module.state_dict())


class Copying(L.Callback):
    """Copies the strategy in every hook it gets, and in a worker's turn."""

    def __init__(self, make: Any) -> None:
        self.make, self.copies, self.largest = make, {}, 0

    def keep(self, where: str, trainer: Any) -> None:
        self.copies[where] = self.make(trainer.strategy)
        self.largest = max(self.largest, len(cloudpickle.dumps(trainer.strategy)))

    def setup(self, trainer, *_: Any, **__: Any) -> None:
        self.keep("setup", trainer)

    def on_train_start(self, trainer, *_: Any) -> None:
        self.keep("start", trainer)

    def on_before_backward(self, trainer, *_: Any) -> None:
        self.keep(f"turn of {trainer.strategy.current_worker}", trainer)

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        self.keep("batch end", trainer)

    def on_train_end(self, trainer, *_: Any) -> None:
        self.keep("end", trainer)

    def teardown(self, trainer, *_: Any, **__: Any) -> None:
        self.keep("teardown", trainer)


@pytest.mark.slow
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_at_any_time_is_a_fresh_strategy_with_the_same_settings(how: str) -> None:
    strategy = DilocoStrategy(**SETTINGS)
    expected = train(DilocoStrategy(**SETTINGS))
    copying = Copying(COPIES[how])
    copies = {"before": COPIES[how](strategy)}
    assert_same(train(strategy, [copying]), expected)
    copies |= {**copying.copies, "after": COPIES[how](strategy)}
    assert len(copies) == 10
    assert copying.largest < 4000, "no tensor, no module, no Trainer"
    for where, copied in copies.items():
        assert type(copied) is DilocoStrategy
        assert copied._compared_settings == strategy._compared_settings, where
        assert (copied.local_steps, copied.current_worker, copied.lightning_module) == (0, None, None)
        assert (copied.launcher, copied.accelerator, copied.parallel_devices) == (None, None, [])
        with pytest.raises(RuntimeError, match=r"^The workers exist from `on_train_start` on"):
            copied.worker_state_dict(0)
    for where in ("before", "turn of 1", "batch end", "after"):
        assert_same(train(copies[where]), expected)
    assert strategy.local_steps == 5
    assert_same(copy_of(strategy._engine.module.state_dict()), strategy.outer_state_dict())


def test_subclasses_keep_their_attributes_and_algorithms_their_arguments() -> None:
    strategy = Mine("a", "b")
    train(strategy)
    for make in COPIES.values():
        copied = make(strategy)
        assert (type(copied), copied.early, copied.late, copied.num_workers) == (Mine, "a", "b", 3)
        assert copied._settings.algorithm.share == 0.25
    algorithm = copy.deepcopy(strategy._settings.algorithm)
    assert not hasattr(algorithm, "ctx")
    assert strategy._settings.algorithm.ctx.local_steps == 5, "the original keeps its run"


class Hyper(BoringModel):
    """Keeps its Trainer's arguments in its hyperparameters."""

    def __init__(self, **trainer_arguments: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers", "ignore:Attribute 'strategy' is")
def test_projects_that_keep_the_strategy_in_their_hyperparameters_save_and_resume() -> None:
    arguments = {"strategy": DilocoStrategy(3, 2), "max_steps": 4, "limit_val_batches": 0}

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_: Any) -> None:
            trainer.save_checkpoint(f"{trainer.global_step}.ckpt")

    trainer(**arguments, callbacks=[Save()]).fit(Hyper(**arguments))
    module = Hyper.load_from_checkpoint("2.ckpt", weights_only=False)
    assert module.hparams["strategy"]._compared_settings == arguments["strategy"]._compared_settings
    resumed = trainer(**{**module.hparams, "max_steps": 6})
    resumed.fit(module, ckpt_path="2.ckpt", weights_only=False)
    assert resumed.strategy.local_steps == 6
    assert Path("2.ckpt").stat().st_size < 30_000


@pytest.mark.parametrize("num_nodes", [1, 3])
@pytest.mark.parametrize("how", ["pickle", "cloudpickle", "deepcopy"])
def test_a_trainer_can_be_copied_and_its_copy_trains(how: str, num_nodes: int) -> None:
    options = {"max_steps": 5, "precision": "bf16-mixed"}
    strategy = DilocoStrategy(num_nodes=num_nodes, diloco_interval=2)
    expected = train(DilocoStrategy(num_nodes=num_nodes, diloco_interval=2), precision="bf16-mixed")
    t = trainer(strategy, **options)
    before = COPIES[how](t)
    t.fit(Net(torch.optim.Adam), loader())
    after = COPIES[how](t)
    assert after.global_step == 5
    assert after.strategy is not strategy
    L.seed_everything(3, verbose=False)
    module = Net(torch.optim.Adam)
    before.fit(module, loader())
    assert_same(copy_of(module.state_dict()), expected)
    assert before.strategy.precision_plugin.precision == "bf16-mixed"


class Iterates(DataLoader):
    def __iter__(self) -> Any:
        return super().__iter__()


class Copies(L.Callback):
    """Copies the Trainer after two steps."""

    made: ClassVar[list[L.Trainer]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step in (2, 3):
            self.made.extend([copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))])


class Rows:
    """A stream without a length."""

    def __iter__(self) -> Any:
        return iter(loader())


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [1, 3])
@pytest.mark.parametrize("make", [loader, lambda: Iterates(regression_data(), 4), Rows])
def test_a_trainer_can_be_copied_while_batches_are_read(make: Any, num_nodes: int) -> None:
    def run(*callbacks: Any) -> Any:
        L.seed_everything(3, verbose=False)
        strategy = DilocoStrategy(num_nodes, 2, outer_optimizer_kwargs={"lr": 1.0})
        trainer(strategy, max_epochs=1, callbacks=list(callbacks)).fit(module := Net(torch.optim.Adam), make())
        return copy_of(module.state_dict())

    Copies.made.clear()
    assert_same(run(Copies()), run())
    assert len(Copies.made) == 4
    for twin in Copies.made[1:3]:
        assert twin.global_step in (2, 3)
        twin.callbacks = []
        twin.fit(Net(), loader())


def test_a_copied_trainer_of_several_processes_says_that_it_starts_none() -> None:
    t = trainer(DilocoStrategy(num_nodes=2), devices=2)
    copied = pickle.loads(pickle.dumps(t))
    with pytest.raises(
        L.fabric.utilities.exceptions.MisconfigurationException, match=r"one with 2 processes, and copie"
    ):
        copied.fit(Net(), loader())


# -------------------------------------------------------------------------------------------- connectors


def test_a_file_without_a_fit() -> None:
    for strategy in ("auto", DilocoStrategy(num_nodes=2)):
        t = trainer(strategy)
        module = Net()
        t.strategy.connect(module)
        t.save_checkpoint("x.ckpt")
        t.save_checkpoint("weights.ckpt", weights_only=True)
        assert "diloco" not in torch.load("x.ckpt", weights_only=True)
        assert_same(torch.load("x.ckpt", weights_only=True)["state_dict"], copy_of(module.state_dict()))
    t.fit(Net(), loader(), ckpt_path="x.ckpt")


def test_files_of_another_module_hold_nothing_of_the_fit_before() -> None:
    t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), max_steps=3)
    module = Net()
    t.fit(module, loader())
    t.save_checkpoint("x.ckpt")
    assert torch.load("x.ckpt", weights_only=True)["diloco"]["local_steps"] == 3
    other = Net(batch_norm=False)
    t.strategy.connect(other)
    t.save_checkpoint("other.ckpt")
    t.validate(other, loader(shuffle=False), verbose=False)
    t.save_checkpoint("validated.ckpt")
    for name in ("other.ckpt", "validated.ckpt"):
        saved = torch.load(name, weights_only=True)
        assert "diloco" not in saved
        assert_same(saved["state_dict"], copy_of(other.state_dict()))


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_a_fresh_trainers_strategy_answers(num_nodes: int) -> None:
    module = Net()
    fitted = trainer(DilocoStrategy(num_nodes=num_nodes, diloco_interval=2), max_steps=3)
    fitted.fit(module, loader())
    fitted.save_checkpoint("x.ckpt")

    t = trainer(DilocoStrategy(num_nodes=num_nodes))
    strategy = t.strategy
    with pytest.raises(AttributeError, match="a model is attached to the Trainer"):
        t.save_checkpoint("y.ckpt")
    assert (strategy.model, strategy.lightning_module, strategy.optimizers) == (None, None, [])
    checkpoint = strategy.load_checkpoint("x.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    with pytest.raises(FileNotFoundError):
        strategy.load_checkpoint("nowhere.ckpt")
    strategy.save_checkpoint({"state_dict": {}, "optimizer_states": []}, "z.ckpt")
    strategy.barrier("here")
    strategy.barrier()
    value = torch.ones(2)
    assert strategy.broadcast(value) is value
    assert strategy.reduce(value) is value
    assert strategy.all_gather(value) is value
    assert strategy.reduce_boolean_decision(True)
    assert strategy.root_device == torch.device("cpu")
    assert strategy.is_global_zero
    assert strategy.process_dataloader(value) is value
    assert (strategy.local_steps, strategy.outer_steps, strategy.current_worker) == (0, 0, None)
    strategy.setup_environment()
    strategy.teardown()


def test_a_connected_strategy_answers_before_any_run() -> None:
    t = trainer(DilocoStrategy(num_nodes=3))
    strategy, module = t.strategy, Net()
    strategy.connect(module)
    assert strategy.model is strategy.lightning_module is t.lightning_module is module
    assert_same(strategy.lightning_module_state_dict(), copy_of(module.state_dict()))
    strategy.setup_environment()
    strategy.model_to_device()
    strategy.barrier("here")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    strategy.optimizers = [optimizer]
    assert strategy.optimizer_state(optimizer)["param_groups"][0]["lr"] == 0.1
    strategy.load_model_state_dict({"state_dict": module.state_dict()})
    strategy.load_optimizer_state_dict({"optimizer_states": [optimizer.state_dict()]})
    strategy.teardown()
    t.fit(Net(), loader(), ckpt_path=None)
    assert strategy.local_steps == 16


def test_setup_by_hand_in_the_state_of_a_fit() -> None:
    t = trainer(DilocoStrategy(num_nodes=3))
    module = Net()
    t.state.fn = TrainerFn.FITTING
    t.strategy.connect(module)
    t.strategy.setup_environment()
    module.trainer = t
    t.strategy.setup(t)
    assert len(t.optimizers) == 1
    t.strategy.teardown()
