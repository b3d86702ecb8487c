"""Is the facade's run the one that you would write by hand?"""

import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_same, copy_of, differs
from lightning.pytorch.callbacks import ModelCheckpoint
from simulators import QUIET, Classifier, Log, classes, simulator, trained, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_diloco import DilocoSimulator, DilocoStrategy


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_table_of_the_guide_spells_the_same_run() -> None:
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
