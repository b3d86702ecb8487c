"""Does what runs under `Trainer(strategy="auto")` run under DilocoStrategy, with the meaning it has under DDP?

Every feature is three tests: the plain Trainer runs it; N = 1 with a plain average is bit-identical to that; N = 3 has
the documented semantics.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, differs, loader, regression_data, trainer
from lightning.pytorch import callbacks as C
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from torch.optim import lr_scheduler

from lightning_diloco import DilocoStrategy

BATCHES = 8  # local steps per epoch with N = 3: 96 samples, 3 workers, batches of 4
INTERVAL = 5


def replicas(strategy: DilocoStrategy) -> list[dict[str, torch.Tensor]]:
    return [strategy.worker_state_dict(w) for w in strategy.local_workers]


@dataclass
class Feature:
    """A set-up of the Trainer, and what must hold with N = 3."""

    check: Callable[[Any, Any, DilocoStrategy], None]
    module: Callable[[], Any] = Net
    options: Callable[[], dict[str, Any]] = dict
    identical: bool = True  # compare the weights of N = 1 with the plain run's
    strategy: dict[str, Any] = field(default_factory=dict)


def steps(local: int, outer: int | None = None) -> Callable[[Any, Any, DilocoStrategy], None]:
    def check(t: Any, module: Any, strategy: DilocoStrategy) -> None:
        assert strategy.local_steps == t.global_step == local
        assert strategy.outer_steps == (-(-local // INTERVAL) if outer is None else outer)

    return check


# -------------------------------------------------------------------------------------------- callbacks


def saved_every_third_step(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    names = sorted(p.stem for p in Path("every").glob("*.ckpt"))
    assert names == [f"step={s}" for s in (12, 15, 3, 6, 9)]


def saved_every_epoch(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    assert sorted(p.stem for p in Path("epochs").glob("*.ckpt")) == ["epoch=0", "epoch=1", "last"]
    state = torch.load("epochs/last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == module.state_dict().keys()


class Falls(Net):
    """Monitors the distance of the evaluated weights from a far target: it falls with every local step of a worker."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)

    def training_step(self, batch, batch_idx):
        return sum(((p - 100) ** 2).sum() for p in self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", sum(((p - 100) ** 2).sum() for p in self.parameters()))


def early_stopping() -> dict[str, Any]:
    return {"callbacks": [C.EarlyStopping("val_loss", patience=1)], "val_check_interval": 2}


def never_stopped(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    steps(2 * BATCHES, 1)(t, module, strategy)  # θ rested all the time


def stopped_early(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    assert strategy.local_steps < 2 * BATCHES  # because eval_weights="outer" watches θ, which rests


class RecordTheta(C.EMAWeightAveraging):
    """Notes what the averaging sees."""

    def __init__(self) -> None:
        super().__init__(decay=0.5)
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(copy_of(dict(pl_module.named_parameters())))
        super().on_train_batch_end(trainer, pl_module, *args)


def average_of_theta(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    (callback,) = [c for c in t.callbacks if isinstance(c, RecordTheta)]
    assert len(callback.seen) == strategy.local_steps
    average = callback.seen[0]
    for theta in callback.seen[1:]:
        average = {k: 0.5 * v + 0.5 * theta[k] for k, v in average.items()}
    for name, p in module.named_parameters():  # the callback ends training by copying its average into the module
        torch.testing.assert_close(p.detach(), average[name], rtol=1e-5, atol=1e-6)


class Averaged(Net):
    def __init__(self) -> None:
        super().__init__(batch_norm=False)


def swa_average(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    (callback,) = [c for c in t.callbacks if isinstance(c, C.StochasticWeightAveraging)]
    average = {n: p.detach() for n, p in callback._average_model.named_parameters()}
    assert_same({n: p.detach() for n, p in module.named_parameters()}, average)
    steps(4 * BATCHES)(t, module, strategy)


def pruned(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    zeros = sum(int((p == 0).sum()) for p in module.parameters() if p.ndim > 1)
    assert zeros >= 0.3 * sum(p.numel() for p in module.parameters() if p.ndim > 1)


class Finetuned(Net):
    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class NotesBackbone(C.Callback):
    """Whether the replicas' backbones have come apart, after every batch."""

    def __init__(self) -> None:
        self.apart: list[bool] = []
        self.moved: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if isinstance(trainer.strategy, DilocoStrategy):
            states = replicas(trainer.strategy)
            self.apart.append(differs({"w": states[0]["net.0.weight"]}, {"w": states[-1]["net.0.weight"]}))


def finetuning() -> dict[str, Any]:
    return {"callbacks": [C.BackboneFinetuning(1, initial_denom_lr=2), NotesBackbone()], "max_epochs": 3}


def unfrozen_after_one_epoch(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    (notes,) = [c for c in t.callbacks if isinstance(c, NotesBackbone)]
    synchronised = [i % INTERVAL == 0 for i in range(1, 3 * BATCHES + 1)]
    assert notes.apart == [i >= BATCHES and not synchronised[i] for i in range(3 * BATCHES)]
    assert len(strategy.outer_optimizer.param_groups[0]["params"]) == 4


class Lambdas:
    """A LambdaCallback that counts, and the number it must reach."""

    def __init__(self) -> None:
        self.count = 0

    def options(self) -> dict[str, Any]:
        self.count = 0

        def end(*_: Any) -> None:
            self.count += 1

        return {"callbacks": [C.LambdaCallback(on_train_batch_end=end)]}

    def check(self, t: Any, module: Any, strategy: DilocoStrategy) -> None:
        assert self.count == 2 * BATCHES, "callbacks run once per local step, not once per worker"


lambdas = Lambdas()


def logged_rates(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    rows = (Path(t.logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("lr-SGD")
    rates = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert rates == pytest.approx([0.1 * 0.5 ** (i // 4) for i in range(2 * BATCHES)])


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 4, 0.5), "interval": "step"}]


class Estimated(Net):
    """An LR schedule computed from what the Trainer says of its length."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.total = self.trainer.estimated_stepping_batches
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def reached_zero(t: Any, module: Any, strategy: DilocoStrategy) -> None:
    assert module.total == t.global_step == 2 * BATCHES
    assert t.num_training_batches == BATCHES
    assert t.optimizers[0].param_groups[0]["lr"] == 0


FEATURES: dict[str, Feature] = {
    "checkpoint every_n_train_steps": Feature(
        saved_every_third_step,
        options=lambda: {
            "callbacks": [C.ModelCheckpoint("every", "{step}", every_n_train_steps=3, save_top_k=-1)],
            "enable_checkpointing": True,
        },
        identical=False,  # another number of steps
    ),
    "checkpoint every epoch, last": Feature(
        saved_every_epoch,
        options=lambda: {
            "callbacks": [C.ModelCheckpoint("epochs", "{epoch}", monitor="val_loss", save_top_k=-1, save_last=True)],
            "enable_checkpointing": True,
        },
    ),
    "early stopping": Feature(never_stopped, Falls, early_stopping, strategy={"diloco_interval": 1000}),
    "early stopping on θ": Feature(
        stopped_early, Falls, early_stopping, False, {"diloco_interval": 1000, "eval_weights": "outer"}
    ),
    "lr monitor": Feature(
        logged_rates,
        Scheduled,
        lambda: {"callbacks": [C.LearningRateMonitor("step")], "logger": CSVLogger("csv")},
    ),
    "EMA": Feature(average_of_theta, options=lambda: {"callbacks": [RecordTheta()]}),
    "SWA": Feature(
        swa_average, Averaged, lambda: {"callbacks": [C.StochasticWeightAveraging(1e-2, 1)], "max_epochs": 4}
    ),
    "pruning": Feature(
        pruned,
        lambda: Net(batch_norm=False),
        lambda: {"callbacks": [C.ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.3)]},
    ),
    "backbone finetuning": Feature(unfrozen_after_one_epoch, Finetuned, finetuning),
    "accumulation scheduler": Feature(
        steps(BATCHES + BATCHES // 2),
        options=lambda: {"callbacks": [C.GradientAccumulationScheduler({0: 1, 1: 2})]},
    ),
    "timer": Feature(steps(2 * BATCHES), options=lambda: {"callbacks": [C.Timer("00:00:10:00")]}),
    "device stats": Feature(
        steps(2 * BATCHES), options=lambda: {"callbacks": [C.DeviceStatsMonitor()], "logger": CSVLogger("csv")}
    ),
    "throughput": Feature(
        steps(2 * BATCHES),
        options=lambda: {
            "callbacks": [C.ThroughputMonitor(batch_size_fn=lambda b: len(b[0]))],
            "logger": CSVLogger("csv"),
        },
    ),
    "lambda": Feature(lambdas.check, options=lambdas.options),
    "rich bar": Feature(
        steps(2 * BATCHES), options=lambda: {"callbacks": [C.RichProgressBar()], "enable_progress_bar": True}
    ),
    "tqdm bar": Feature(
        steps(2 * BATCHES), options=lambda: {"callbacks": [C.TQDMProgressBar()], "enable_progress_bar": True}
    ),
    "summary": Feature(steps(2 * BATCHES), options=lambda: {"enable_model_summary": True}),
    # ------------------------------------------------------------------------------------ Trainer features
    "fast_dev_run": Feature(steps(1), options=lambda: {"fast_dev_run": True}),
    "detect_anomaly": Feature(steps(2 * BATCHES), options=lambda: {"detect_anomaly": True}),
    "deterministic": Feature(steps(2 * BATCHES), options=lambda: {"deterministic": True}),
    "no inference mode": Feature(steps(2 * BATCHES), options=lambda: {"inference_mode": False}),
    "no sanity check": Feature(steps(2 * BATCHES), options=lambda: {"num_sanity_val_steps": 0}),
    "full sanity check": Feature(steps(2 * BATCHES), options=lambda: {"num_sanity_val_steps": -1}),
    "reload loaders": Feature(steps(2 * BATCHES), options=lambda: {"reload_dataloaders_every_n_epochs": 1}),
    "simple profiler": Feature(steps(2 * BATCHES), options=lambda: {"profiler": SimpleProfiler()}),
    "advanced profiler": Feature(
        steps(2 * BATCHES), options=lambda: {"profiler": AdvancedProfiler(".", "profile"), "max_epochs": 2}
    ),
    "several loggers": Feature(
        steps(2 * BATCHES), options=lambda: {"logger": [CSVLogger("csv"), TensorBoardLogger("board")]}
    ),
    "estimated steps": Feature(reached_zero, Estimated),
}


ONE = {"num_nodes": 1, "diloco_interval": 3, "outer_optimizer_kwargs": {"lr": 1.0}}  # the plain run
THREE = {"num_nodes": 3, "diloco_interval": INTERVAL}


def run(feature: Feature, strategy: Any) -> tuple[Any, Any]:
    L.seed_everything(12, verbose=False)
    module = feature.module()
    t = trainer(strategy, **feature.options())
    t.fit(module, loader(regression_data(96)), loader(regression_data(20, seed=1), shuffle=False))
    return t, module


@functools.cache
def plain(name: str) -> tuple[dict[str, torch.Tensor], int]:
    """The plain Trainer's weights and steps: the first test of a row that asks runs it."""
    t, module = run(FEATURES[name], "auto")
    return copy_of(module.state_dict()), t.global_step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*SWA.*")
@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`")
@pytest.mark.filterwarnings("ignore:The `srun` command")
@pytest.mark.parametrize("run_with", ["plain", "N=1", "N=3"])
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str, run_with: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feature = FEATURES[name]
    if run_with == "N=3":
        t, module = run(feature, DilocoStrategy(**{**THREE, **feature.strategy}))
        feature.check(t, module, t.strategy)
        return
    weights, global_step = plain(name)
    if run_with == "N=1":
        (tmp_path / "one").mkdir()
        monkeypatch.chdir(tmp_path / "one")  # files of the plain run may lie in the folder above
        t, module = run(feature, DilocoStrategy(**ONE))
        if feature.identical:
            assert_same(copy_of(module.state_dict()), weights)
            assert t.global_step == global_step
