"""Does every argument of the facade do something, and is its run the one that you would write by hand?"""

import inspect
import math
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_same, copy_of, differs
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_diloco import Diloco, DilocoSimulator, DilocoStrategy, EvalStats, TrainStats
from lightning_diloco.simulator.callback import SimulatorCallback
from lightning_diloco.simulator.facade import _OWN_STRATEGY_ARGUMENTS, _OWN_TRAINER_ARGUMENTS
from lightning_diloco.simulator.metrics import Evaluation, is_class_index
from lightning_diloco.simulator.module import SimulatorModule

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(nn.Module):
    """Dropout and BatchNorm: something for random streams and modes to act on."""

    def __init__(self, width: int = 8, dropout: float = 0.2) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def classes(samples: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def simulator(cls: type[DilocoSimulator] = DilocoSimulator, **arguments: Any) -> DilocoSimulator:
    """Three workers, rounds of 4, 10 local steps."""
    given: dict[str, Any] = {
        "model_cls": Classifier,
        "num_nodes": 3,
        "diloco_interval": 4,
        "batch_size": 4,
        "loss_fn": F.cross_entropy,
        "train_dataset": classes(120),
        "optimizer_kwargs": {"lr": 0.01},
        "seed": 5,
        **arguments,
    }
    given["trainer_kwargs"] = {**QUIET, **given.get("trainer_kwargs", {})}
    return cls(**given)


def trained(**arguments: Any) -> DilocoSimulator:
    s = simulator(**arguments)
    s.train()
    return s


class Log(list[Any]):
    """Collects what hooks are given."""

    def hooks(self) -> dict[str, Any]:
        return {"train_loss_hook": self.append, "eval_loss_hook": self.append}

    @property
    def train(self) -> list[TrainStats]:
        return [s for s in self if type(s) is TrainStats]

    @property
    def eval(self) -> list[EvalStats]:
        return [s for s in self if type(s) is EvalStats]


def weights(s: DilocoSimulator) -> dict[str, Tensor]:
    return copy_of(s.model.state_dict())


# -------------------------------------------------------------------------------------------- the facade is thin


def test_the_example_of_the_documentation_runs(capsys: Any) -> None:
    class CNNModel(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, num_classes))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    train_dataset = TensorDataset(torch.randn(128, 3, 8, 8), torch.randint(100, (128,)))
    simulator = DilocoSimulator(
        model_cls=CNNModel,
        model_kwargs={"num_classes": 100},
        optimizer_kwargs={"lr": 0.001},
        train_dataset=train_dataset,
        loss_fn=F.cross_entropy,
        num_nodes=4,
        diloco_interval=500,
        batch_size=16,
    )
    simulator.train()
    assert type(simulator.model) is CNNModel
    assert simulator.trainer.global_step == simulator.strategy.local_steps == simulator.total == 2
    assert not list(Path.cwd().iterdir())  # nothing is written unasked
    assert simulator.trainer.progress_bar_callback is not None


class Handmade(L.LightningModule):
    """The same training, written by hand."""

    def __init__(self, **model_kwargs: Any) -> None:
        super().__init__()
        self.model = Classifier(**model_kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_it_is_the_run_that_you_would_write_by_hand() -> None:
    """Bit for bit, although the facade evaluates, calls hooks and writes files on the way."""
    s = trained(eval_dataset=classes(50, seed=1), save_dir="files", ckpt_interval=1, **Log().hooks())

    L.seed_everything(5, verbose=False)
    module, strategy = Handmade(), DilocoStrategy(num_nodes=3, diloco_interval=4)
    trainer = L.Trainer(strategy=strategy, max_steps=10, logger=False, enable_checkpointing=False, **QUIET)
    trainer.fit(module, DataLoader(classes(120), batch_size=4, shuffle=True))

    assert (s.strategy.local_steps, s.strategy.outer_steps) == (strategy.local_steps, strategy.outer_steps) == (10, 3)
    assert_same(weights(s), copy_of(module.model.state_dict()))
    for worker in range(3):
        assert_same(s.strategy.worker_state_dict(worker), strategy.worker_state_dict(worker))


def test_the_table_of_the_readme_spells_the_same_run() -> None:
    """Every row of it at once; the cosine is computed in another way there, so not bit for bit."""
    log, losses, data = Log(), {}, classes(90)  # 8 steps per pass, of which the last is short: 15 in two passes
    s = trained(
        train_dataset=data,
        num_epochs=2,
        max_local_step=100,
        cosine_anneal=True,
        eval_dataset=classes(30, seed=1),
        eval_iters=5,
        save_dir="files",
        ckpt_interval=2,
        model_kwargs={"dropout": 0.0},
        **log.hooks(),
    )

    class Module(Handmade):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("eval_loss", F.cross_entropy(self.model(x), y))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            steps = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Hooks(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses[trainer.global_step] = outputs["loss"].item()

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            losses[f"eval {trainer.strategy.outer_steps}"] = trainer.callback_metrics["eval_loss"].item()

    L.seed_everything(5, verbose=False)
    module, strategy = Module(dropout=0.0), DilocoStrategy(num_nodes=3, diloco_interval=4, eval_weights="outer")
    files = ModelCheckpoint("by_hand", every_n_train_steps=2 * 4, save_top_k=-1)
    trainer = L.Trainer(
        strategy=strategy,
        max_steps=min(100, 2 * len(data) // (4 * 3)),
        max_epochs=-1,
        limit_val_batches=5,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[Hooks(), files],
        logger=False,
        **QUIET,
    )
    val = DataLoader(classes(30, seed=1), batch_size=4)
    trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True), val)
    trainer.save_checkpoint("by_hand/end.ckpt")
    (last,) = trainer.validate(module, val, verbose=False)
    assert {s.local_step: s.loss for s in log.train} == pytest.approx(
        {k: v for k, v in losses.items() if k in range(16)}
    )
    assert [e.loss for e in log.eval] == pytest.approx([*(losses[f"eval {k}"] for k in (1, 2, 3)), last["eval_loss"]])
    for name, value in weights(s).items():
        assert torch.allclose(value.double(), module.model.state_dict()[name].double(), rtol=1e-4, atol=1e-6)
    assert sorted(p.name for p in Path("files").glob("step*")) == ["step=000008.ckpt", "step=000015.ckpt"]
    assert sorted(torch.load(p, weights_only=True)["global_step"] for p in Path("by_hand").iterdir()) == [8, 15]


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize("num_nodes", [1, 3])
def test_what_one_looks_at_does_not_disturb(num_nodes: int) -> None:
    """Modes, gradients and torch's, NumPy's and Python's generators are as without any evaluation."""

    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 30

        def __getitem__(self, index: int) -> Any:
            return torch.randn(4), torch.tensor(index % 3)

    class FrozenMode(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net[1].eval()

    def run(**arguments: Any) -> tuple[DilocoSimulator, list[bool]]:
        s = trained(num_nodes=num_nodes, model_cls=FrozenMode, max_local_step=10, **arguments)
        return s, [m.training for m in s.model.modules()]

    (plain, modes), (watched, same_modes) = run(), run(eval_dataset=Noisy(), **Log().hooks())
    assert_same(weights(plain), weights(watched))
    assert modes == same_modes
    assert modes.count(False) == 1


def test_it_trains_again_from_the_start() -> None:
    s = simulator()
    s.train()
    first, model = weights(s), s.model
    s.train()
    assert_same(weights(s), first)
    assert s.model is not model
    assert s.strategy.local_steps == 10


def test_modules_among_the_arguments_are_where_every_run_starts() -> None:
    class Around(nn.Module):
        def __init__(self, core: nn.Module, note: Any) -> None:
            super().__init__()
            self.core = core
            assert type(note) is type(threading.Lock())

        def forward(self, x: Tensor) -> Tensor:
            return self.core(x)

    class Tied(nn.Module):
        def __init__(self, core: nn.Module) -> None:
            super().__init__()
            self.core = core

        def forward(self, output: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(output, y) + 0.1 * self.core.net[0].weight.square().mean()

    core, note = Classifier(), threading.Lock()  # what can't be copied, and isn't a module, is passed on
    before = copy_of(core.state_dict())
    s = simulator(model_cls=Around, model_kwargs={"core": core, "note": note}, loss_fn=Tied(core))
    s.train()
    first = weights(s)
    s.train()
    assert_same(weights(s), first)
    assert_same(core.state_dict(), before)
    assert s.trainer.lightning_module.loss_fn.core is s.model.core
    assert differs(first, {f"core.{key}": value for key, value in before.items()})


# -------------------------------------------------------------------------------------------- hooks


def test_a_run_by_hand() -> None:
    """One weight w = 0, loss w·x, inner SGD with lr 1, outer plain average: each worker's w falls by its x.

    Two workers, one sample per step. Whatever the order, all samples 1 … 8 are seen once, so θ ends at
    −(1 + … + 8) / 2 = −18; the sum of the two losses of a step is −(what each worker has already) times its x.
    """

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * x

    class Look(L.Callback):
        """Reads the workers' samples through their weights: w falls by x."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append([-trainer.strategy.worker_state_dict(w)["model.w"].item() for w in (0, 1)])

    seen: list[list[float]] = []
    log = Log()
    numbers = torch.arange(1.0, 9.0).reshape(8, 1)
    s = trained(
        model_cls=Line,
        num_nodes=2,
        diloco_interval=3,
        batch_size=1,
        loss_fn=lambda output, y: (output * y).mean(),
        train_dataset=TensorDataset(numbers, torch.ones(8, 1)),
        eval_dataset=TensorDataset(torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, 1)),
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": 1.0},
        outer_optimizer_kwargs={"lr": 1.0},
        trainer_kwargs={"callbacks": Look()},
        **log.hooks(),
    )
    # 4 steps: outer steps after 3 and, the flush, after 4. Before step t both workers' weights and samples are known.
    assert s.total == 4
    before = [[0.0, 0.0], *seen]
    (a1, b1), (a2, b2), (c, d) = seen[0], seen[1], seen[2]
    assert c == d  # synchronised: what both fell by, halved
    samples = [(a1, b1), (a2 - a1, b2 - b1), None, (seen[3][0] - c, seen[3][1] - d)]
    for t in (0, 1, 3):
        x, y = samples[t]
        expected = (-before[t][0] * x - before[t][1] * y) / 2
        assert log.train[t].loss == pytest.approx(expected, abs=1e-6)
    assert s.model.w.item() == pytest.approx(-18)
    # the evaluated loss: w · mean(1, 2, 6) = 3 w, in batches of one
    assert [e.loss for e in log.eval] == pytest.approx([-3 * c, -3 * 18])
    assert log.eval[-1].perplexity == pytest.approx(math.exp(-54))
    assert [type(e).__name__[0] for e in log] == list("TTTETE")
    assert [(e.local_step, e.global_step, e.epoch, e.num_diloco_steps) for e in log] == [
        (1, 2, 0, 0),
        (2, 4, 0, 0),
        (3, 6, 0, 1),
        (3, 6, 0, 1),
        (4, 8, 0, 1),
        (4, 8, 0, 2),
    ]


def test_hooks_come_in_order_and_epochs_are_counted() -> None:
    log = Log()
    order: list[str] = []

    class Saves(L.Callback):
        def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
            order.append(f"file {trainer.global_step}")

    def train_hook(stats: TrainStats) -> None:
        order.append(f"train {stats.local_step}")
        log.append(stats)

    def eval_hook(stats: EvalStats) -> None:
        order.append(f"eval {stats.local_step}")
        log.append(stats)

    s = trained(
        train_dataset=classes(48),
        num_epochs=2,  # 4 steps each
        diloco_interval=3,
        eval_dataset=classes(20),
        ckpt_interval=2,
        save_dir="files",
        train_loss_hook=train_hook,
        eval_loss_hook=eval_hook,
        trainer_kwargs={"callbacks": [Saves()]},
    )
    assert s.total == 8
    assert order == [
        *("train 1", "train 2", "train 3", "eval 3"),
        *("train 4", "train 5", "train 6", "eval 6", "file 6"),
        *("train 7", "train 8", "eval 8", "file 8"),  # the flush, the third outer step; then the final file
    ]
    assert [t.epoch for t in log.train] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [e.epoch for e in log.eval] == [0, 1, 1]
    assert sorted(p.name for p in Path("files").iterdir()) == ["final.ckpt", "step=000006.ckpt"]


def test_a_checkpoint_due_at_the_flush_is_written() -> None:
    trained(ckpt_interval=3, save_dir="files")  # outer steps at 4, 8 and, the flush, at 10
    assert sorted(p.name for p in Path("files").iterdir()) == ["final.ckpt", "step=000010.ckpt"]


def test_a_complete_last_round_is_evaluated_once() -> None:
    log = Log()
    trained(max_local_step=8, eval_dataset=classes(8), **log.hooks())
    assert [e.local_step for e in log.eval] == [4, 8]


def test_without_the_last_synchronisation_there_is_no_last_evaluation() -> None:
    log = Log()
    trained(eval_dataset=classes(8), strategy_kwargs={"final_sync": False}, **log.hooks())
    assert [e.local_step for e in log.eval] == [4, 8]


def test_accumulated_gradients_make_one_step_with_the_mean_loss() -> None:
    """A step of two micro-batches without learning: its loss is the mean over both, of all workers."""
    log, alone = Log(), Log()
    frozen = {"optimizer_kwargs": {"lr": 0.0}, "model_kwargs": {"dropout": 0.0}, "optimizer_cls": torch.optim.SGD}
    trained(trainer_kwargs={"accumulate_grad_batches": 2}, max_local_step=5, train_loss_hook=log.append, **frozen)
    trained(train_loss_hook=alone.append, **frozen)
    assert [s.local_step for s in log] == [1, 2, 3, 4, 5]
    losses = [s.loss for s in alone]
    assert [s.loss for s in log] == pytest.approx([(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_the_loss_is_that_of_the_workers_that_took_a_step() -> None:
    """A module that trains on nothing every other time, and an algorithm under which only one worker is active."""

    class Pauses(SimulatorModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    class PausingSimulator(DilocoSimulator):
        module_cls = Pauses

    class Alone(Diloco):
        def active(self, step: int) -> list[int]:
            return [step % 3]

    log = Log()
    s = simulator(PausingSimulator, train_loss_hook=log.append)
    s.train()
    assert [math.isnan(stats.loss) for stats in log] == [False, True] * 5
    log.clear()
    calls: list[Tensor] = []

    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        calls.append(F.cross_entropy(output, y))
        return calls[-1]

    trained(strategy_kwargs={"algorithm": Alone()}, loss_fn=loss_fn, train_loss_hook=log.append)
    assert [stats.loss for stats in log] == [loss.item() for loss in calls]


@pytest.mark.parametrize("which", ["train_loss_hook", "eval_loss_hook"])
def test_a_hook_that_raises_stops_the_run_with_its_own_error(which: str) -> None:
    def hook(stats: TrainStats) -> None:
        if stats.local_step == 8:
            raise ZeroDivisionError("mine")

    s = simulator(eval_dataset=classes(8), save_dir="files", **{which: hook})
    with pytest.raises(ZeroDivisionError, match=r"^mine$"):
        s.train()
    assert s.trainer.global_step == 8
    assert not Path("files/final.ckpt").exists()


@pytest.mark.parametrize("which", ["train_loss_hook", "eval_loss_hook"])
def test_a_hook_that_raises_stop_iteration_stops_the_run_too(which: str) -> None:
    """Lightning would take it for the end of the data."""
    s = simulator(eval_dataset=classes(8), save_dir="files", **{which: lambda stats: next(iter(()))})
    with pytest.raises(RuntimeError, match=f"^`{which}` raised StopIteration\\.$") as caught:
        s.train()
    assert isinstance(caught.value.__cause__, StopIteration)
    assert not Path("files/final.ckpt").exists()


def test_a_run_that_gets_nowhere_ends() -> None:
    class Empty(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            raise StopIteration

    with pytest.raises(RuntimeError, match=r"^The model or `loss_fn` raised StopIteration\.$"):
        trained(loss_fn=lambda output, y: next(iter(())))
    with pytest.raises(RuntimeError, match=r"^A pass over `train_dataset` brought no step beyond 0, and so would the"):
        trained(train_dataset=Empty(*classes(120).tensors))


def test_a_hook_can_stop_the_run() -> None:
    def hook(stats: TrainStats) -> None:
        s.trainer.should_stop = stats.local_step == 3

    log = Log()
    s = simulator(eval_dataset=classes(8), train_loss_hook=hook, eval_loss_hook=log.append)
    s.train()
    assert [(e.local_step, e.num_diloco_steps) for e in log] == [(3, 1)]


# -------------------------------------------------------------------------------------------- one test per argument


def test_model_cls_and_model_kwargs() -> None:
    model = trained(model_kwargs={"width": 5}).model
    assert type(model) is Classifier
    assert model.net[0].out_features == 5


def test_num_nodes() -> None:
    s = trained(num_nodes=2)
    assert (s.strategy.num_workers, s.total, s.strategy.local_steps) == (2, 15, 15)


def test_optimizer_cls_and_optimizer_kwargs() -> None:
    def group(**arguments: Any) -> Any:
        (optimizer,) = trained(**arguments).trainer.optimizers
        return type(optimizer), optimizer.param_groups[0]["lr"]

    assert group() == (torch.optim.AdamW, 0.01)
    assert group(optimizer_kwargs=None) == (torch.optim.AdamW, 0.001)
    assert group(optimizer_cls=torch.optim.SGD, optimizer_kwargs={"lr": 0.5}) == (torch.optim.SGD, 0.5)


def test_a_single_worker_sees_shuffled_data_too() -> None:
    seen: list[float] = []

    class Look(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.extend(x[:, 0].tolist())
            return super().forward(x)

    numbers = TensorDataset(torch.arange(40.0).reshape(40, 1), torch.zeros(40).long())
    model = {"model_cls": Look, "model_kwargs": {"in_features": 1, "out_features": 2}}
    trained(num_nodes=1, train_dataset=numbers, **model)
    assert sorted(seen) == list(range(40))
    assert seen != sorted(seen)


def test_diloco_interval() -> None:
    assert trained(diloco_interval=3).strategy.outer_steps == 4  # after 3, 6, 9 and, the flush, 10
    assert trained(diloco_interval=5).strategy.outer_steps == 2


def test_batch_size() -> None:
    sizes: set[tuple[bool, int]] = set()

    class Look(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            sizes.add((self.training, len(x)))
            return super().forward(x)

    s = trained(model_cls=Look, batch_size=6, train_dataset=classes(120), eval_dataset=classes(14))
    assert s.total == 120 // (6 * 3)
    assert sizes == {(True, 6), (False, 6), (False, 2)}


def test_loss_fn_gets_the_output_first_and_the_target_second() -> None:
    seen: list[Any] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        seen.append((output.shape, target.dtype))
        return F.cross_entropy(output, target) * 0

    before = simulator(optimizer_cls=torch.optim.SGD, loss_fn=loss_fn)
    before.train()
    assert set(seen) == {((4, 3), torch.int64)}
    log = Log()
    trained(loss_fn=lambda output, y: F.cross_entropy(output, y) + 7, train_loss_hook=log.append)
    assert log[0].loss > 7


def test_a_loss_with_parameters_of_its_own_is_trained_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, output: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(output * self.temperature, y)

    loss_fn = Scaled()
    s = trained(loss_fn=loss_fn)
    assert s.trainer.lightning_module.loss_fn.temperature.item() != 1
    assert loss_fn.temperature.item() == 1  # the user's own is where every run starts


def test_train_dataset() -> None:
    assert simulator(train_dataset=classes(60)).total == 5
    data = TensorDataset(torch.zeros(120, 4), torch.zeros(120).long())
    assert not torch.equal(trained(train_dataset=data).model.net[0].weight, trained().model.net[0].weight)


def test_eval_dataset_and_eval_iters_take_the_first_batches_of_the_outer_model() -> None:
    """Against a plain loop over the file's weights; a short last batch counts by its samples."""
    for eval_iters, samples in ((2, 8), (50, 14), (4, 14), (3, 12)):
        log = Log()
        data = classes(14, seed=3)
        s = trained(eval_dataset=data, eval_iters=eval_iters, eval_loss_hook=log.append, save_dir="files")
        model = s.model.eval()
        x, y = (t[:samples] for t in data.tensors)
        with torch.no_grad():
            loss = F.cross_entropy(model(x).double(), y).item()
            accuracy = (model(x).argmax(1) == y).sum().item() / samples
        assert log[-1].loss == pytest.approx(loss, rel=1e-6)
        assert log[-1].accuracy == accuracy
        assert log[-1].perplexity == math.exp(log[-1].loss)


def test_the_outer_model_is_evaluated_in_rounds_too(tmp_path: Path) -> None:
    """Also where replicas stay apart after an outer step: what is evaluated is neither their mean nor one of them."""

    class Apart(Diloco):
        def _synchronise(self, kind: str) -> Any:
            ctx, outer = self.ctx, self.ctx.outer
            outer.step(outer.names, ctx.channel.mean(outer.names, ctx.pseudo_gradient, ctx.begin_round()))
            return ctx.end_round(kind)

    log, expected = Log(), []
    data = classes(20, seed=4)

    def hook(stats: EvalStats) -> None:
        log.append(stats)
        model = Classifier()
        theta = {k.removeprefix("model."): v for k, v in s.strategy.outer_state_dict().items()}
        model.load_state_dict(theta)
        x, y = data.tensors
        expected.append(F.cross_entropy(model.eval()(x), y).item())

    s = simulator(strategy_kwargs={"algorithm": Apart()}, eval_dataset=data, eval_loss_hook=hook)
    s.train()
    assert [e.loss for e in log] == pytest.approx(expected, rel=1e-5)
    assert len({round(e, 6) for e in expected}) == 3


def test_ckpt_interval_and_save_dir() -> None:
    trained(save_dir="final")
    assert [p.name for p in Path("final").iterdir()] == ["final.ckpt"]
    trained(save_dir=Path("all"), ckpt_interval=1)
    assert sorted(p.name for p in Path("all").iterdir()) == [
        "final.ckpt",
        "step=000004.ckpt",
        "step=000008.ckpt",
        "step=000010.ckpt",
    ]


def test_outer_optimizer_cls_and_outer_optimizer_kwargs() -> None:
    def outer(**arguments: Any) -> torch.optim.Optimizer:
        return trained(**arguments).strategy.outer_optimizer

    group = outer().param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.7, 0.9, True)
    assert type(outer(outer_optimizer_cls=torch.optim.Adam)) is torch.optim.Adam
    group = outer(outer_optimizer_kwargs={"lr": 0.5}).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.5, 0, False)


def test_max_local_step() -> None:
    assert simulator(max_local_step=7).total == 7
    assert simulator(max_local_step=11).total == 10
    log = Log()
    trained(max_local_step=7, train_loss_hook=log.append)
    assert [s.local_step for s in log] == [1, 2, 3, 4, 5, 6, 7]


RAGGED = [  # samples, N, batch, epochs → min(epochs · samples // (batch · N))
    (120, 3, 4, 2, 20),
    (10, 4, 4, 3, 1),  # fewer samples than one step takes
    (17, 4, 4, 16, 17),  # a pass has ⌈⌈17/4⌉/4⌉ = 2 steps, the second with one sample per worker
    (3, 4, 1, 4, 3),  # fewer samples than workers
    (13, 1, 5, 3, 7),
    (7, 2, 3, 5, 5),
]


@pytest.mark.parametrize(("samples", "num_nodes", "batch_size", "num_epochs", "total"), RAGGED)
def test_num_epochs_and_exactly_total_steps(
    samples: int, num_nodes: int, batch_size: int, num_epochs: int, total: int
) -> None:
    log = Log()
    s = trained(
        train_dataset=classes(samples),
        model_cls=nn.Linear,
        model_kwargs={"in_features": 4, "out_features": 3},
        num_nodes=num_nodes,
        batch_size=batch_size,
        num_epochs=num_epochs,
        train_loss_hook=log.append,
    )
    assert s.total == total
    assert [stats.local_step for stats in log] == list(range(1, total + 1))
    assert s.strategy.local_steps == total
    per_epoch = math.ceil(math.ceil(samples / num_nodes) / batch_size)
    assert [stats.epoch for stats in log] == [step // per_epoch for step in range(total)]


def test_a_short_last_batch_is_kept() -> None:
    sizes: list[int] = []

    class Look(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    trained(model_cls=Look, model_kwargs={"in_features": 4, "out_features": 3}, train_dataset=classes(30), num_epochs=2)
    assert sizes == [4, 4, 4, 4, 4, 4, 2, 2, 2, 4, 4, 4, 4, 4, 4][: 3 * 5]


def test_cosine_anneal_goes_to_zero_at_total() -> None:
    rates: list[float] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    s = trained(cosine_anneal=True, trainer_kwargs={"callbacks": Look()})
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)])
    assert s.trainer.optimizers[0].param_groups[0]["lr"] == 0
    rates.clear()
    trained(trainer_kwargs={"callbacks": Look()})
    assert rates == [0.01] * 10


def test_train_loss_hook_gets_the_mean_over_workers() -> None:
    """Three workers that learn nothing, in batches of 4: the mean of three batch means is that of 12 samples."""
    log, data = Log(), classes(24)
    s = trained(
        model_kwargs={"dropout": 0.0},
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.0},
        loss_fn=lambda output, y: y.double().mean() + 0 * output.sum(),
        train_dataset=data,
        train_loss_hook=log.append,
    )
    assert s.total == len(log) == 2
    assert (log[0].loss + log[1].loss) / 2 == pytest.approx(data.tensors[1].double().mean().item(), abs=1e-9)
    assert all(round(12 * stats.loss, 6).is_integer() for stats in log)


def test_eval_loss_hook_and_where_else_results_go() -> None:
    log = Log()
    trainer_kwargs = {"logger": CSVLogger("logs", name=None, version=""), "log_every_n_steps": 1}
    s = trained(eval_dataset=classes(20), eval_loss_hook=log.append, trainer_kwargs=trainer_kwargs)
    last = log[-1]
    assert s.trainer.callback_metrics["eval_loss"].item() == pytest.approx(last.loss)
    assert s.trainer.callback_metrics["eval_accuracy"].item() == pytest.approx(last.accuracy)
    assert s.trainer.callback_metrics["eval_perplexity"].item() == pytest.approx(last.perplexity)
    lines = Path("logs/metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    logged = {int(r["step"]): float(r["eval_loss"]) for r in rows if r["eval_loss"]}
    assert logged == {e.local_step - 1: pytest.approx(e.loss) for e in log}
    assert len([r for r in rows if r["train_loss"]]) == 10


def test_seed() -> None:
    for seed in (0, 1):
        assert_same(weights(trained(seed=seed)), weights(trained(seed=seed)))
    torch.manual_seed(3)
    one = weights(trained(seed=1))
    assert not torch.equal(weights(trained(seed=2))["net.0.weight"], one["net.0.weight"])


def test_without_a_seed_generators_are_used_as_found() -> None:
    def run() -> Tensor:
        return trained(seed=None, max_local_step=1).model.net[0].weight.detach()

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert not torch.equal(second, first)


def test_a_seed_is_forgotten_after_the_run(monkeypatch: Any) -> None:
    """Lightning keeps it in the environment, from where later runs without one would take it."""
    for before in (None, "77"):
        if before:
            monkeypatch.setenv("PL_GLOBAL_SEED", before)
        else:
            monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        assert trained(max_local_step=1).strategy._seed == 5
        assert os.environ.get("PL_GLOBAL_SEED") == before
        torch.manual_seed(11)
        assert trained(max_local_step=1, seed=None).strategy._seed == int(before or 11)


def test_strategy_kwargs() -> None:
    algorithm = Diloco()
    s = trained(strategy_kwargs={"algorithm": algorithm, "final_sync": False})
    assert s.strategy.outer_steps == 2
    assert algorithm.ctx.outer_steps == 2


def test_trainer_kwargs() -> None:
    files = ModelCheckpoint(dirpath="best", monitor="eval_loss", every_n_train_steps=4, filename="{step}")
    kwargs = {"precision": "64-true", "callbacks": [files]}
    s = trained(trainer_kwargs=kwargs, eval_dataset=classes(8))
    assert s.trainer.precision == "64-true"
    assert [p.name for p in Path("best").iterdir()] == [Path(files.best_model_path).name]
    assert set(kwargs) == {"precision", "callbacks"}  # the user's dict is left alone
    assert kwargs["callbacks"] == [files]
    own = [c for c in s.trainer.callbacks if isinstance(c, SimulatorCallback)]
    assert s.trainer.callbacks.index(own[0]) > min(i for i, c in enumerate(s.trainer.callbacks) if c is not own[0])


def test_a_user_s_callbacks_come_before_the_hooks() -> None:
    order: list[str] = []

    class First(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            order.append("callback")

    trained(max_local_step=1, trainer_kwargs={"callbacks": First()}, train_loss_hook=lambda _: order.append("hook"))
    assert order == ["callback", "hook"]


def test_dicts_are_taken_as_they_are_when_given() -> None:
    given = {"model_kwargs": {"width": 5}, "optimizer_kwargs": {"lr": 0.5}, "trainer_kwargs": {"precision": "64-true"}}
    s = simulator(**given)
    given["model_kwargs"]["width"] = 6
    given["optimizer_kwargs"]["lr"] = 0.1
    s.train()
    assert s.model.net[0].out_features == 5
    assert s.trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_a_stock_run_shows_a_progress_bar_with_the_loss_and_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        s = simulator(eval_dataset=classes(8))
        del s._trainer_kwargs["enable_progress_bar"]
        s.train()
    ours = [w for w in seen if "treespec" not in str(w.message)]  # Lightning compares its own pytree specs so
    assert not ours, [str(w.message) for w in ours]
    bar = s.trainer.progress_bar_callback
    assert isinstance(bar, TQDMProgressBar)
    assert "train_loss" in bar.get_metrics(s.trainer, s.trainer.lightning_module)
    rich = RichProgressBar()
    assert (
        trained(trainer_kwargs={"enable_progress_bar": True, "callbacks": rich}).trainer.progress_bar_callback is rich
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_holds_for_the_evaluation(precision: str) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()

    class Look(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            seen.add((self.training, output.dtype))
            return output

    log = Log()
    trained(model_cls=Look, trainer_kwargs={"precision": precision}, eval_dataset=classes(20), **log.hooks())
    dtype = torch.float64 if precision == "64-true" else torch.bfloat16
    assert seen == {(True, dtype), (False, dtype)}
    assert all(0.5 < s.loss < 2 for s in log)


def test_no_argument_is_missing_here() -> None:
    source = Path(__file__).read_text()
    names = [line[len("def test_") :] for line in source.splitlines() if line.startswith("def test_")]
    for argument in inspect.signature(DilocoSimulator).parameters:
        assert any(argument in name for name in names), argument


# -------------------------------------------------------------------------------------------- what is computed


def test_accuracy_is_defined_for_class_indices_only() -> None:
    logits = torch.tensor([[[0.0, 9.0], [1.0, 0.0]], [[5.0, 5.0], [6.0, 0.0]]])  # (batch 2, classes 2, length 2)
    target = torch.tensor([[1, 1], [1, -100]])  # argmax along dimension 1: [[1, 0], [1, 0]]; the last is ignored
    evaluation = Evaluation()
    evaluation.update(torch.tensor(1.0), logits, target, samples=2)
    assert evaluation.results() == (1.0, pytest.approx(2 / 3), math.e)
    assert is_class_index(logits, target)
    for dtype in (torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.int64):
        evaluation = Evaluation()
        evaluation.update(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 1]).to(dtype), samples=3)
        assert evaluation.results()[1] == pytest.approx(2 / 3)
    for output, other in (
        (logits, target.float()),
        (logits, target[:, :1]),
        (logits, target.bool()),
        (logits[0, 0], target[0]),
        (logits, logits),
        ({"logits": logits}, target),
    ):
        assert not is_class_index(output, other)
        evaluation = Evaluation()
        evaluation.update(torch.tensor(2.0), output, other, samples=1)
        assert evaluation.results() == (2.0, None, math.exp(2))


def test_one_batch_without_class_indices_or_none_at_all_gives_no_accuracy() -> None:
    evaluation = Evaluation()
    evaluation.update(torch.tensor(1.0), torch.zeros(2, 3), torch.zeros(2).long(), samples=2)
    evaluation.update(torch.tensor(4.0), torch.zeros(1, 3), torch.zeros(1), samples=1)
    assert evaluation.results()[:2] == (2.0, None)
    evaluation = Evaluation()
    evaluation.update(torch.tensor(1.0), torch.zeros(2, 3), torch.full((2,), -100), samples=2)
    assert evaluation.results()[1] is None


def test_losses_beyond_numbers_are_reported_as_they_are() -> None:
    for loss, perplexity in ((1e4, math.inf), (math.inf, math.inf), (-1e4, 0.0)):
        evaluation = Evaluation()
        evaluation.update(torch.tensor(loss), torch.zeros(1), None, samples=1)
        assert evaluation.results() == (loss, None, perplexity)
    evaluation = Evaluation()
    evaluation.update(torch.tensor(math.nan), torch.zeros(1), None, samples=1)
    evaluation.update(torch.tensor(1.0), torch.zeros(1), None, samples=1)
    loss, _, perplexity = evaluation.results()
    assert math.isnan(loss)
    assert math.isnan(perplexity)


# -------------------------------------------------------------------------------------------- files


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
        f"The checkpoint was written by a run with `cosine_anneal` (={not cosine_anneal}) and can't go on with"
        f" `cosine_anneal` (={cosine_anneal}): its learning rate is where that run had it. Resume with the same."
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


# -------------------------------------------------------------------------------------------- other batches, bad input


class Pictures(Dataset[Any]):
    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> Any:
        return {"image": torch.full((4,), float(index)), "label": index % 3}


def test_other_batches_get_an_error_that_says_what_to_do_and_that_works() -> None:
    for data, size in ((Pictures(), "dict of 2 items"), (classes(120).tensors[0], "Tensor")):
        with pytest.raises(MisconfigurationException) as caught:
            trained(train_dataset=data)
        assert str(caught.value) == (
            f"The dataset's batches are a {size}, but must be pairs `(x, y)`. For others, override `split(self, batch)`"
            " in a subclass of lightning_diloco.simulator.SimulatorModule so that it returns `(x, y)`, and set"
            " `module_cls` to it in a subclass of DilocoSimulator."
        )

    class Labelled(SimulatorModule):
        def split(self, batch: Any) -> tuple[Any, Any]:
            return batch["image"], batch["label"]

    class PictureSimulator(DilocoSimulator):
        module_cls = Labelled

    log = Log()
    s = simulator(PictureSimulator, train_dataset=Pictures(), eval_dataset=Pictures(), **log.hooks())
    s.train()
    assert len(log.train) == 10
    assert log.eval[-1].accuracy is not None


def test_a_loss_that_is_not_one_number_is_refused() -> None:
    for loss_fn, found in (
        (lambda output, y: F.cross_entropy(output, y, reduction="none"), "a tensor of shape (4,)"),
        (lambda output, y: 1.0, "float"),
    ):
        with pytest.raises(MisconfigurationException) as caught:
            trained(loss_fn=loss_fn)
        assert str(caught.value) == (
            f"`loss_fn` returned {found}, but must return a tensor with one number: the mean over the batch."
        )


def test_before_training_there_is_nothing_to_look_at() -> None:
    for name in ("model", "trainer", "strategy"):
        with pytest.raises(RuntimeError, match=r"exist from the first call of `train\(\)` on\."):
            getattr(simulator(), name)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(classes(100))

    def __repr__(self) -> str:
        return "Stream()"


COUNT = "`{0}` (={1!r}) must be an integer ≥ 1: the number of {2}."
LENGTH = (
    "`{0}` (=Stream()) must be a dataset with `__len__` and `__getitem__`. Streams work with a DilocoStrategy in your"
    " own Trainer."
)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_nodes": 0}, COUNT.format("num_nodes", 0, "simulated workers")),
    ({"diloco_interval": 0}, COUNT.format("diloco_interval", 0, "local steps between outer steps")),
    ({"batch_size": 2.5}, COUNT.format("batch_size", 2.5, "samples per worker and step")),
    ({"num_epochs": 0}, COUNT.format("num_epochs", 0, "passes over `train_dataset`")),
    ({"max_local_step": 0}, COUNT.format("max_local_step", 0, "local steps at most")),
    ({"eval_iters": 0}, COUNT.format("eval_iters", 0, "batches per evaluation")),
    (
        {"ckpt_interval": 0, "save_dir": "x"},
        COUNT.format("ckpt_interval", 0, "outer steps between checkpoints"),
    ),
    ({"cosine_anneal": 1}, "`cosine_anneal` (=1) must be True or False."),
    ({"model_cls": Classifier.forward}, f"`model_cls` (={Classifier.forward!r}) must be a class derived from "),
    (
        {"optimizer_cls": "adam"},
        "`optimizer_cls` (='adam') must be a class derived from torch.optim.optimizer.Optimizer.",
    ),
    ({"save_dir": 3}, "`save_dir` (=3) must be the path of a folder, or None."),
    ({"save_dir": ""}, "`save_dir` (='') must be the path of a folder, or None."),
    ({"save_dir": __file__}, f"`save_dir` (={__file__!r}) is a file. Name a folder; it is made if it doesn't exist."),
    ({"loss_fn": "mse"}, "`loss_fn` (='mse') must be a callable `(model(x), y) -> loss`."),
    (
        {"train_loss_hook": 3},
        "`train_loss_hook` (=3) must be a callable that takes the statistics, or None.",
    ),
    (
        {"eval_loss_hook": print},
        "`eval_loss_hook` was given without `eval_dataset` and would never be called. Give both.",
    ),
    ({"ckpt_interval": 2}, "`ckpt_interval` (=2) was given without `save_dir`. Say where the files go."),
    ({"seed": -1}, "`seed` (=-1) must be an integer from 0 to 2**32 - 1, or None."),
    ({"train_dataset": Stream()}, LENGTH.format("train_dataset")),
    ({"eval_dataset": Stream()}, LENGTH.format("eval_dataset")),
    ({"eval_dataset": classes(0)}, "`eval_dataset` is empty. Leave it out, or give it samples."),
    (
        {"train_dataset": classes(11)},
        "The run would have no step: `num_epochs` (=1) times 11 samples are fewer than `batch_size` (=4) times"
        " `num_nodes` (=3). Lower one of these two, or raise `num_epochs`.",
    ),
    ({"model_kwargs": [1]}, "`model_kwargs` (=[1]) must be a dict or None."),
    (
        {"model_kwargs": {"widht": 3}},
        "`model_kwargs` (={'widht': 3}) doesn't fit Classifier: got an unexpected keyword argument 'widht'.",
    ),
    (
        {"optimizer_kwargs": {"learning_rate": 3}},
        "`optimizer_kwargs` (={'learning_rate': 3}) doesn't fit AdamW: got an unexpected keyword argument"
        " 'learning_rate'.",
    ),
    (
        {"model_cls": nn.Linear, "model_kwargs": {"in_features": 4}},
        "`model_kwargs` (={'in_features': 4}) doesn't fit Linear: missing a required argument: 'out_features'.",
    ),
    ({"strategy_kwargs": {"buffer": "first"}}, "`strategy_kwargs` (={'buffer': 'first'}) doesn't fit DilocoStrategy: "),
    (
        {"strategy_kwargs": {"num_nodes": 3}},
        "`strategy_kwargs` has 'num_nodes' (=3), which is decided by the simulator's argument of the same name. Leave"
        " it out.",
    ),
    ({"strategy_kwargs": {"buffers": "typo"}}, "`buffers` (='typo') must be one of 'average', 'first', 'local'."),
    ({"outer_optimizer_kwargs": {"lr": -1.0}}, "The outer optimizer can't be built: "),
    ({"trainer_kwargs": {"max_step": 3}}, "`trainer_kwargs` (="),
    (
        {"trainer_kwargs": {"max_steps": 3}},
        "`trainer_kwargs` has 'max_steps' (=3), which is decided by `max_local_step`. Leave it out.",
    ),
    (
        {"trainer_kwargs": {"strategy": "ddp"}},
        "`trainer_kwargs` has 'strategy' (='ddp'), which is decided by `strategy_kwargs`. Leave it out.",
    ),
    (
        {"trainer_kwargs": {"limit_val_batches": 3}},
        "`trainer_kwargs` has 'limit_val_batches' (=3), which is decided by `eval_iters`. Leave it out.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        simulator(**arguments)
    assert str(caught.value).startswith(message) if message.endswith((" ", "(=")) else str(caught.value) == message


@pytest.mark.parametrize("name", [*_OWN_TRAINER_ARGUMENTS, *_OWN_STRATEGY_ARGUMENTS])
def test_what_the_simulator_decides_can_t_be_given_twice(name: str) -> None:
    where = "trainer_kwargs" if name in _OWN_TRAINER_ARGUMENTS else "strategy_kwargs"
    with pytest.raises(ValueError, match=rf"^`{where}` has '{name}' \(=1\), which is decided by .*\. Leave it out\.$"):
        simulator(**{where: {name: 1}})


def test_defaults() -> None:
    defaults = {
        k: p.default for k, p in inspect.signature(DilocoSimulator).parameters.items() if p.default is not p.empty
    }
    assert {k: v for k, v in defaults.items() if v is not None} == {
        "optimizer_cls": torch.optim.AdamW,
        "outer_optimizer_cls": torch.optim.SGD,
        "num_epochs": 1,
        "cosine_anneal": False,
        "eval_iters": 50,
    }
    outer = trained(max_local_step=1).strategy.outer_optimizer.defaults
    assert [outer[k] for k in ("lr", "momentum", "nesterov")] == [0.7, 0.9, True]


def test_an_unknown_argument_is_refused_with_its_name() -> None:
    with pytest.raises(TypeError, match="'num_node'"):
        simulator(num_node=4)
