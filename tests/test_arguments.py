"""Does every argument do something, and is bad input refused in words that help?"""

import inspect
import re
from datetime import timedelta
from functools import partial
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from helpers import Net, WithSlowLayer, copy_of, loader, regression_data, slow_but, trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_diloco import (
    FP4,
    Diloco,
    DilocoSimulator,
    DilocoStrategy,
    DropOut,
    ErrorFeedback,
    SyncAlgorithm,
    Table,
)


class Project(WithSlowLayer):
    """BatchNorm, a frozen layer that a hook moves, validation: something for every argument to act on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        spoiled = self.trainer.global_step == 4 and self.trainer.strategy.current_worker == 1 and self.spoil
        return loss * float("nan") if spoiled else loss

    spoil = False


def outcome(spoil: bool = False, **arguments: Any) -> Any:
    """Everything a run leaves behind: weights, validation metrics, bytes, number of replicas in memory."""
    L.seed_everything(8, verbose=False)
    module, seen = Project(), []
    module.spoil = spoil

    class Look(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val")})

    strategy = DilocoStrategy(**{"num_nodes": 3, "diloco_interval": 4, **arguments})
    t = trainer(strategy, max_steps=10, val_check_interval=3, callbacks=[Look()])
    try:
        t.fit(module, loader(regression_data(120), shuffle=True), loader(regression_data(20), shuffle=False))
    except RuntimeError as error:
        return str(error)[:30]
    weights = {k: v.tolist() for k, v in copy_of(module.state_dict()).items()}
    workers = [{k: v.tolist() for k, v in strategy.worker_state_dict(w).items()} for w in strategy.local_workers]
    return weights, workers, seen, strategy.ledger.total_bytes, strategy.memory_report()


class EveryStep(Diloco):
    def after_inner_step(self, step):
        ctx = self.ctx
        ctx.send(ctx.names, ctx.delta)
        for transfer in ctx.arrived():
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)


def halves(dataset: Any, num_workers: int) -> list[list[int]]:
    return [list(range(w, len(dataset) // 2, num_workers)) for w in range(num_workers)]


def uneven(dataset: Any, num_workers: int) -> list[range]:
    return [range(40 * w, 40 * w + 20 + 10 * w) for w in range(num_workers)]


LIVE: dict[str, list[dict[str, Any]]] = {  # settings of one argument, all of which must differ in effect
    "num_nodes": [{"num_nodes": 2}, {}, {"num_nodes": 4}],
    "diloco_interval": [{"diloco_interval": 1}, {"diloco_interval": 3}, {}],
    "outer_optimizer_cls": [{}, {"outer_optimizer_cls": torch.optim.Adam}],
    "outer_optimizer_kwargs": [{}, {"outer_optimizer_kwargs": {"lr": 0.7}}, {"outer_optimizer_kwargs": {"lr": 1.0}}],
    "algorithm": [{}, {"algorithm": EveryStep()}],
    "eval_weights": [{}, {"eval_weights": "outer"}, {"eval_weights": "worker"}],
    "buffers": [{}, {"buffers": "first"}, {"buffers": "local"}],
    "inner_state": [{}, {"inner_state": "reset"}, {"inner_state": "average"}],
    "final_sync": [{}, {"final_sync": False}],
    "partition": [{}, {"partition": halves}],
    "weights": [{"partition": uneven}, {"partition": uneven, "weights": "samples"}],
    "nonfinite": [{"spoil": True}, {"spoil": True, "nonfinite": "skip"}, {"spoil": True, "nonfinite": "propagate"}],
    "share_frozen": [{}, {"share_frozen": True}],
    "codec": [{}, {"codec": FP4()}, {"codec": ErrorFeedback(FP4())}],
    "participation": [{}, {"participation": DropOut(0.5)}, {"participation": Table({4: [0, 2]})}],
}


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
@pytest.mark.parametrize("argument", slow_but(["num_nodes", "final_sync", "partition"], LIVE))
def test_every_setting_of_an_argument_has_its_own_effect(argument: str) -> None:
    outcomes = [repr(outcome(**setting)) for setting in LIVE[argument]]
    assert len(set(outcomes)) == len(outcomes)


def test_the_sum_is_ordered_as_long_as_one_process_sums() -> None:
    assert repr(outcome(reduction="ordered")) == repr(outcome())


def test_none_of_the_arguments_is_missing_here() -> None:
    elsewhere = {  # tested below, and in test_interface.py
        "cluster",  # in test_simulated_time.py
        "diagnostics",
        "reduction",
        "accelerator",
        "parallel_devices",
        "cluster_environment",
        "checkpoint_io",
        "precision_plugin",
        "process_group_backend",
        "timeout",
        "start_method",
    }
    assert set(inspect.signature(DilocoStrategy).parameters) == set(LIVE) | elsewhere


def test_lightnings_own_arguments_reach_the_trainer(tmp_path: Any) -> None:
    class Counting(TorchCheckpointIO):
        saved = 0

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.saved += 1
            super().save_checkpoint(*args, **kwargs)

    class Environment(LightningEnvironment):
        pass

    io, precision = Counting(), MixedPrecision("bf16-mixed", "cpu")
    accelerator, environment = CPUAccelerator(), Environment()
    strategy = DilocoStrategy(
        num_nodes=2,
        accelerator=accelerator,
        checkpoint_io=io,
        precision_plugin=precision,
        cluster_environment=environment,
    )
    t = trainer(strategy, accelerator="auto", max_steps=1)
    assert t.accelerator is accelerator
    assert t.precision_plugin is precision
    assert strategy.cluster_environment is environment
    t.fit(Net(), loader())
    t.save_checkpoint(tmp_path / "x.ckpt")
    assert io.saved == 1
    devices = [torch.device("cpu", 0)]
    assert trainer(DilocoStrategy(parallel_devices=devices), accelerator="cpu").strategy.root_device == devices[0]


def test_num_nodes_of_the_trainer_stays_the_number_of_machines() -> None:
    strategy = DilocoStrategy(num_nodes=3)
    t = trainer(strategy)
    assert (strategy.num_workers, strategy.num_nodes, t.num_nodes, t.world_size) == (3, 1, 1, 1)


def test_one_strategy_object_serves_several_trainers() -> None:
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    for precision in ("32-true", "bf16-mixed"):
        module = Net()
        trainer(strategy, max_steps=3, precision=precision).fit(module, loader())
        assert strategy.local_steps == 3


class NoOuter(SyncAlgorithm):
    def after_inner_step(self, step):
        pass


DEFAULTS = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
CHOICE = "`{0}` (='typo') must be one of {1}."
COUNT = "`{0}` (={1!r}) must be an integer ≥ 1: the number of {2}."
WORKERS, STEPS = "simulated workers", "local steps between outer steps"
CLASS = " must be a torch.optim.Optimizer class, or a callable that makes one from a list of parameters."

NO_LR = (
    "`outer_optimizer_kwargs` (={}) must name `lr` for torch.optim.SGD: a dict replaces the defaults wholly, and with"
    " torch's own lr of 0.001 θ would hardly move. Add it, as in {{'lr': 0.7, 'momentum': 0.9, 'nesterov': True}}, or"
    " pass None for the algorithm's defaults."
)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_nodes": 0}, COUNT.format("num_nodes", 0, WORKERS)),
    ({"num_nodes": True}, COUNT.format("num_nodes", True, WORKERS)),
    ({"num_nodes": 2.0}, COUNT.format("num_nodes", 2.0, WORKERS)),
    ({"diloco_interval": -3}, COUNT.format("diloco_interval", -3, STEPS)),
    ({"diloco_interval": "10"}, COUNT.format("diloco_interval", "10", STEPS)),
    ({"eval_weights": "typo"}, CHOICE.format("eval_weights", "'average', 'outer', 'worker'")),
    ({"buffers": "typo"}, CHOICE.format("buffers", "'average', 'first', 'local'")),
    ({"inner_state": "typo"}, CHOICE.format("inner_state", "'keep', 'reset', 'average'")),
    ({"nonfinite": "typo"}, CHOICE.format("nonfinite", "'raise', 'skip', 'propagate'")),
    ({"reduction": "typo"}, CHOICE.format("reduction", "'auto', 'ordered', 'all_reduce'")),
    ({"final_sync": 1}, "`final_sync` (=1) must be True or False."),
    ({"share_frozen": None}, "`share_frozen` (=None) must be True or False."),
    (
        {"partition": [[0]]},
        "`partition` (=[[0]]) must be a callable `(dataset, num_workers) -> list of index lists`, or None.",
    ),
    ({"algorithm": "diloco"}, "`algorithm` (='diloco') must be an instance of SyncAlgorithm, like Diloco(), or None."),
    (
        {"process_group_backend": 3},
        "`process_group_backend` (=3) must be the name of a back end, like 'gloo', or None.",
    ),
    ({"timeout": 60}, "`timeout` (=60) must be a positive datetime.timedelta, or None."),
    (
        {"timeout": timedelta(0)},
        "`timeout` (=datetime.timedelta(0)) must be a positive datetime.timedelta, or None.",
    ),
    ({"start_method": "typo"}, CHOICE.format("start_method", "'popen', 'spawn', 'fork'")),
    ({"outer_optimizer_cls": 3}, "`outer_optimizer_cls` (=3)" + CLASS),
    ({"outer_optimizer_cls": Net}, "`outer_optimizer_cls` (=Net)" + CLASS),
    ({"outer_optimizer_kwargs": [1]}, "`outer_optimizer_kwargs` (=[1]) must be a dict or None."),
    (
        {"outer_optimizer_cls": lambda p: torch.optim.SGD(p, lr=1), "outer_optimizer_kwargs": {"lr": 2}},
        "`outer_optimizer_kwargs` (={'lr': 2}) can't be combined with a callable `outer_optimizer_cls` (=<lambda>),"
        " which has its arguments already. Pass None, or the optimizer's class.",
    ),
    ({"outer_optimizer_kwargs": {"momentum": 0.5}}, NO_LR.format({"momentum": 0.5})),
    ({"outer_optimizer_kwargs": {}}, NO_LR.format({})),
    (
        {"outer_optimizer_kwargs": {"lr": -1.0}},
        "The outer optimizer can't be built: `outer_optimizer_cls` (=SGD) with `outer_optimizer_kwargs` (={'lr': -1.0})"
        " fails with: Invalid learning rate: -1.0",
    ),
    (
        {"outer_optimizer_cls": torch.optim.LBFGS},
        "The outer optimizer can't be built: `outer_optimizer_cls` (=LBFGS) with `outer_optimizer_kwargs` (={}) fails"
        " with: LBFGS.step needs a closure, which an outer step doesn't have. Use an optimizer whose step needs none.",
    ),
    (
        {"outer_optimizer_cls": lambda p: list(p)},
        "The outer optimizer can't be built: `outer_optimizer_cls` (=<lambda>) with `outer_optimizer_kwargs` (=None)"
        " fails with: the factory returned a list; it must return a torch.optim.Optimizer",
    ),
    (
        {"algorithm": NoOuter(), "outer_optimizer_kwargs": {"lr": 1.0}},
        "NoOuter has no outer optimizer, but `outer_optimizer_cls` (=SGD) or `outer_optimizer_kwargs` (={'lr': 1.0})"
        " were given. Leave both out.",
    ),
    (
        {"algorithm": NoOuter(), "outer_optimizer_cls": torch.optim.Adam},
        "NoOuter has no outer optimizer, but `outer_optimizer_cls` (=Adam) or `outer_optimizer_kwargs` (=None) were"
        " given. Leave both out.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        DilocoStrategy(**arguments)
    assert str(caught.value) == message


def test_only_torchs_own_sgd_must_be_given_an_lr() -> None:
    """Another class has defaults of its own, and a callable has its arguments already."""

    class Fast(torch.optim.SGD):
        def __init__(self, parameters: Any, lr: float = 0.5, **kwargs: Any) -> None:
            super().__init__(parameters, lr, **kwargs)

    for given in ({"outer_optimizer_cls": Fast}, {"outer_optimizer_cls": torch.optim.Adam}):
        DilocoStrategy(**given, outer_optimizer_kwargs={"weight_decay": 0.1})
    DilocoStrategy(outer_optimizer_cls=partial(torch.optim.SGD, momentum=0.5))


def test_an_unknown_argument_is_refused_with_its_name() -> None:
    with pytest.raises(TypeError, match="num_node'"):
        DilocoStrategy(num_node=4)  # type: ignore[call-arg]


UNEVEN = [
    (4, {"devices": 3}, "3 processes (`Trainer(devices=3, num_nodes=1)`)", "4 workers", 4, "2 or 4", 3),
    (4, {"devices": 2, "num_nodes": 3}, "6 processes (`Trainer(devices=2, num_nodes=3)`)", "4 workers", 4, "4 or 8", 6),
    (6, {"devices": 4}, "4 processes (`Trainer(devices=4, num_nodes=1)`)", "6 workers", 6, "3 or 6", 4),
]


@pytest.mark.parametrize(("workers", "asked", "processes", "given", "argument", "fits", "size"), UNEVEN)
def test_processes_that_cannot_share_the_workers_evenly_are_refused_by_the_trainers_constructor(
    workers: int, asked: dict[str, int], processes: str, given: str, argument: int, fits: str, size: int
) -> None:
    with pytest.raises(ValueError) as caught:
        trainer(DilocoStrategy(num_nodes=workers), **asked)
    assert str(caught.value) == (
        f"{processes} can't share {given} (`DilocoStrategy(num_nodes={argument})`) evenly: one number must be a"
        f" multiple of the other. Start {fits} processes, or simulate {size} workers."
    )


def test_synchronised_batch_norm_is_refused_for_several_workers() -> None:
    with pytest.raises(MisconfigurationException, match=r"^`Trainer\(sync_batchnorm=True\)` averages each batch"):
        trainer(DilocoStrategy(num_nodes=2), sync_batchnorm=True)
    trainer(DilocoStrategy(num_nodes=1), sync_batchnorm=True)  # no effect in one process, as under "auto"


def test_the_outer_defaults_are_the_papers_for_sgd_and_its_own_for_another_class() -> None:
    def groups(**arguments: Any) -> Any:
        strategy = DilocoStrategy(num_nodes=2, **arguments)
        trainer(strategy, max_steps=1).fit(Net(), loader())
        return strategy.outer_optimizer

    assert DEFAULTS.items() <= groups().param_groups[0].items()
    adam = groups(outer_optimizer_cls=torch.optim.Adam)
    assert type(adam) is torch.optim.Adam
    assert adam.param_groups[0]["lr"] == 1e-3
    replaced = groups(outer_optimizer_kwargs={"lr": 0.5}).param_groups[0]  # replaced wholly, never merged
    assert (replaced["lr"], replaced["momentum"], replaced["nesterov"]) == (0.5, 0, False)
    made = groups(outer_optimizer_cls=lambda p: torch.optim.SGD(p, lr=0.25))
    assert made.param_groups[0]["lr"] == 0.25


def test_the_outer_learning_rate_can_be_scheduled() -> None:
    seen: list[float] = []

    class Schedule(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.strategy.outer_optimizer, 0.5)

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.strategy.local_steps % 2 == 0:
                seen.append(trainer.strategy.outer_optimizer.param_groups[0]["lr"])
                self.schedule.step()

    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    trainer(strategy, max_steps=6, callbacks=[Schedule()]).fit(Net(), loader())
    assert seen == [0.7, 0.35, 0.175]


def test_the_registry_knows_the_strategy() -> None:
    t = trainer("diloco", max_steps=1)
    assert isinstance(t.strategy, DilocoStrategy)
    assert t.strategy.num_workers == 4
    t.fit(Net(), loader())


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_training_step_with_an_iterator_is_refused() -> None:
    class Fetches(Net):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(MisconfigurationException, match=re.escape("fetches batches by itself")):
        trainer(DilocoStrategy(num_nodes=2), max_steps=1).fit(Fetches(), loader())


INTEGERS = [numpy.int64(2), numpy.uint8(2), numpy.array(2), torch.tensor(2)]


@pytest.mark.parametrize("two", INTEGERS)
def test_integers_of_other_libraries_are_integers(two: Any, tmp_path: Any) -> None:
    true = numpy.bool_(True)
    strategy = DilocoStrategy(num_nodes=two, diloco_interval=two, final_sync=true, share_frozen=numpy.bool_(False))
    t = trainer(strategy, max_steps=3)
    t.fit(Net(), loader())
    assert (strategy.num_workers, strategy.outer_steps) == (2, 2)
    assert strategy.worker_state_dict(two - 1).keys() == strategy.worker_state_dict(1).keys()
    with strategy.weights(two - 1):
        pass
    t.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = DilocoStrategy(num_nodes=2, diloco_interval=2)
    trainer(again, max_steps=4).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert again.local_steps == 4


@pytest.mark.parametrize("two", INTEGERS)
def test_integers_of_other_libraries_are_integers_in_the_simulator(two: Any, tmp_path: Any) -> None:
    simulator = DilocoSimulator(
        model_cls=torch.nn.Linear,
        model_kwargs={"in_features": 3, "out_features": 1},
        num_nodes=two,
        diloco_interval=two,
        batch_size=two,
        loss_fn=torch.nn.functional.mse_loss,
        train_dataset=regression_data(24),
        eval_dataset=regression_data(8),
        num_epochs=two,
        max_local_step=two + two,
        eval_iters=two,
        ckpt_interval=two - 1,
        save_dir=tmp_path,
        seed=two,
        cosine_anneal=numpy.bool_(False),
        trainer_kwargs={"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
    )
    simulator.train()
    assert {p.name for p in tmp_path.iterdir()} >= {"step=000002.ckpt", "step=000004.ckpt"}


@pytest.mark.parametrize("bad", [numpy.bool_(True), torch.tensor(True), numpy.float64(2), torch.tensor(2.0), "2"])
def test_booleans_and_floats_of_other_libraries_are_no_integers(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^`num_nodes` \(=.*\) must be an integer ≥ 1"):
        DilocoStrategy(num_nodes=bad)
    strategy = DilocoStrategy(2)
    trainer(strategy, max_steps=1).fit(Net(), loader())
    with pytest.raises(ValueError, match="doesn't exist"):
        strategy.worker_state_dict(bad)
