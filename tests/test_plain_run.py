"""Is N = 1 with a plain average the plain run, bit for bit?

"N=1, outer SGD lr 1, no momentum ≡ plain `Trainer` (bit for bit, any dtype, because 'assign the mean')."
"""

import functools
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, slow_but, trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import lr_scheduler

from lightning_diloco import DilocoStrategy

PLAIN = {"lr": 1.0}
pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")


class Scheduled(Net):
    """Net with a scheduler made by ``schedule(optimizer)``."""

    def __init__(self, schedule: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}


def every_step(make: Any) -> Any:
    return lambda optimizer: {"scheduler": make(optimizer), "interval": "step"}


class WarmUp(Net):
    """An overridden optimizer_step that sets the learning rate, and an overridden zero_grad and clipping."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + self.trainer.global_step)
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class Skips(Net):
    """training_step returns None for every third batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class EndsEarly(Net):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 5 else None


class Hooked(Net):
    """Every batch hook writes something."""

    def on_train_batch_start(self, batch, batch_idx):
        self.log("start", float(batch_idx))

    def on_before_optimizer_step(self, optimizer):
        self.log("norm", sum(p.grad.norm() for p in self.parameters()), on_step=True, on_epoch=True)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.4, 0.4)
        self.log("end", outputs["loss"], reduce_fx="max", on_step=True, on_epoch=True)


class Silent(Net):
    """Logs nothing, as barebones wants it."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        return self.loss(batch)


class Lbfgs(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Manual(Net):
    """Two optimizers and a scheduler stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = torch.optim.SGD(self.net[0].parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.Adam(self.net[-1].parameters(), lr=0.01)
        return [first, second], [lr_scheduler.ExponentialLR(first, 0.9)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.lr_schedulers().step()
        self.log("loss", loss)


def plateau(optimizer: Any) -> Any:
    return {"scheduler": lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5), "monitor": "loss_epoch"}


def scaled() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**14))]


CASES: dict[str, tuple[Any, Any]] = {
    "plain": (Net, dict),
    "accumulate": (Net, lambda: {"accumulate_grad_batches": 3}),
    "clip": (Net, lambda: {"gradient_clip_val": 0.05}),
    "clip_value": (Net, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": (Net, lambda: {"precision": "bf16-mixed"}),
    "bf16-true": (Net, lambda: {"precision": "bf16-true"}),
    "64-true": (Net, lambda: {"precision": "64-true"}),
    "16-mixed": (Net, lambda: {"plugins": scaled()}),
    "16-mixed-accumulate": (Net, lambda: {"plugins": scaled(), "accumulate_grad_batches": 2}),
    "max_steps": (Net, lambda: {"max_steps": 17, "max_epochs": -1}),
    "val_check_interval": (Net, lambda: {"val_check_interval": 5}),
    "overfit_batches": (Net, lambda: {"overfit_batches": 4, "max_epochs": 3}),
    "limit_train_batches": (Net, lambda: {"limit_train_batches": 0.3, "max_epochs": 3}),
    "detect_anomaly": (Net, lambda: {"detect_anomaly": True}),
    "barebones": (Silent, lambda: {"barebones": True, "logger": None, "log_every_n_steps": None}),
    "dropout": (lambda: Net(dropout=0.5), dict),
    "step_lr": (lambda: Scheduled(every_step(lambda o: lr_scheduler.StepLR(o, 5, 0.5))), dict),
    "one_cycle": (lambda: Scheduled(every_step(lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=60))), dict),
    "epoch_lr": (lambda: Scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.5)), lambda: {"max_epochs": 3}),
    "plateau": (lambda: Scheduled(plateau), lambda: {"max_epochs": 4}),
    "warm_up": (WarmUp, lambda: {"accumulate_grad_batches": 2}),
    "returns_none": (Skips, dict),
    "ends_early": (EndsEarly, dict),
    "hooks": (Hooked, dict),
    "lbfgs": (Lbfgs, dict),
    "manual": (Manual, dict),
    "sgd_momentum": (lambda: Net(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)), dict),
}


class Watch(L.Callback):
    """Everything that callbacks can see after every batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
        loss = outputs.get("loss") if outputs else None
        self.seen.append((batch_idx, trainer.global_step, loss, batch, metrics, copy_of(pl_module.state_dict())))


def run(name: str, strategy: Any, watch: Any = None, **overrides: Any) -> tuple[Any, Any]:
    make, options = CASES[name]
    L.seed_everything(11, verbose=False)
    module, kwargs = make(), options()
    callbacks = [watch] if watch and name != "barebones" else []
    t = trainer(strategy, callbacks=callbacks, **{**kwargs, **overrides})
    validation = None if name == "overfit_batches" else loader(shuffle=False, batch_size=16)
    t.fit(module, loader(regression_data(50), shuffle=name != "overfit_batches"), validation)
    return t, module


@functools.cache
def plain_run(name: str) -> tuple[Any, Any, Watch]:
    watch = Watch()
    return *run(name, "auto", watch), watch


@pytest.mark.parametrize("interval", slow_but([3], [1, 3]))
@pytest.mark.parametrize("name", slow_but(["plain", "accumulate", "16-mixed", "max_steps", "manual"], CASES))
def test_one_worker_with_a_plain_average_is_the_plain_run(name: str, interval: int) -> None:
    plain, expected, plain_watch = plain_run(name)
    watch = Watch()
    strategy = DilocoStrategy(num_nodes=1, diloco_interval=interval, outer_optimizer_kwargs=PLAIN)
    ours, module = run(name, strategy, watch)

    assert_same(module.state_dict(), expected.state_dict())
    assert ours.global_step == plain.global_step
    assert ours.current_epoch == plain.current_epoch
    metrics = {k: v.item() for k, v in ours.callback_metrics.items()}
    assert metrics == {k: v.item() for k, v in plain.callback_metrics.items()}
    assert (len(metrics) > 0) == (name != "barebones")
    assert len(watch.seen) == len(plain_watch.seen)
    for mine, theirs in zip(watch.seen, plain_watch.seen, strict=True):
        assert mine[:2] == theirs[:2]
        assert mine[2] is theirs[2] is None or torch.equal(mine[2], theirs[2])
        assert all(torch.equal(a, b) for a, b in zip(mine[3], theirs[3], strict=True))
        assert mine[4] == theirs[4]
        assert_same(mine[5], theirs[5])
    for own, other in zip(ours.optimizers, plain.optimizers, strict=True):
        assert str(own.state_dict()) == str(other.state_dict())
    assert strategy.outer_steps == -(-strategy.local_steps // interval)


def test_the_global_random_stream_is_untouched() -> None:
    after = []
    for strategy in ("auto", DilocoStrategy(num_nodes=1, diloco_interval=2, outer_optimizer_kwargs=PLAIN)):
        run("dropout", strategy)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def test_nothing_is_attached_or_logged_and_the_loader_is_the_users() -> None:
    strategy = DilocoStrategy(num_nodes=1, diloco_interval=2, outer_optimizer_kwargs=PLAIN)
    seen: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append((trainer.train_dataloader, [type(c).__name__ for c in trainer.callbacks]))

    mine = loader()
    t = trainer(strategy, callbacks=[Look()], max_steps=3)
    t.fit(Net(), mine)
    assert all(used is mine for used, _ in seen)
    assert all("DilocoCallback" not in names for _, names in seen)


@pytest.mark.slow
def test_one_worker_without_a_sync_in_reach_trains_as_the_plain_run_through_the_swapping_path() -> None:
    """The path of N > 1 (own tensors at rest, replicas in turns), with one worker: the replica is the plain run."""

    class NotExactlySGD(torch.optim.SGD):
        pass

    strategy = DilocoStrategy(
        num_nodes=1,
        diloco_interval=10**6,
        outer_optimizer_cls=NotExactlySGD,
        outer_optimizer_kwargs=PLAIN,
        final_sync=False,
    )
    for name in ("plain", "accumulate", "16-mixed-accumulate", "hooks", "manual", "warm_up", "plateau", "lbfgs"):
        plain, expected = run(name, "auto")
        ours, _ = run(name, strategy)
        assert not strategy._engine.is_plain_run
        assert_same(strategy.worker_state_dict(0), expected.state_dict())
        for own, other in zip(ours.optimizers, plain.optimizers, strict=True):
            assert str(own.state_dict()) == str(other.state_dict())
        assert ours.global_step == plain.global_step


def plain() -> DilocoStrategy:
    return DilocoStrategy(1, 3, outer_optimizer_kwargs=PLAIN)


class Fetches(Net):
    """Fetches its batches by itself, two per step."""

    def training_step(self, dataloader_iter: Any) -> Any:
        first, _, _ = next(dataloader_iter)
        second, self.last, _ = next(dataloader_iter)
        return self.loss(first) + self.loss(second)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert batch_idx == self.last
        self.ends = [*getattr(self, "ends", []), batch[0].clone()]


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_steps": 5}, {"max_epochs": 1, "limit_train_batches": 8}])
def test_a_training_step_that_fetches_its_batches_is_the_plain_run(options: Any) -> None:
    runs = []
    for strategy in ("auto", plain()):
        L.seed_everything(5)
        module = Fetches()
        t = trainer(strategy, **options)
        t.fit(module, loader())
        runs.append((t, module))
    (t, module), (ours, replica) = runs
    assert_same(module.state_dict(), replica.state_dict())
    assert (t.global_step, t.current_epoch) == (ours.global_step, ours.current_epoch)
    assert all(torch.equal(a, b) for a, b in zip(module.ends, replica.ends, strict=True))
    assert ours.strategy.local_steps == ours.global_step


class MemoryBank(L.LightningModule):
    """Collects features and trains nothing, as anomaly detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("bank", torch.zeros(0, 2))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.bank = torch.cat([self.bank, self.backbone(batch[0])])

    def configure_optimizers(self) -> None:
        return None


class NoParameters(MemoryBank):
    def __init__(self) -> None:
        super().__init__()
        del self.backbone
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.bank = torch.cat([self.bank, batch[0][:, :2]])


class Thaws(Net):
    """Everything is frozen until the second epoch; until then there is no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.current_epoch else None


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("kind", [MemoryBank, NoParameters, Thaws])
def test_a_module_with_nothing_to_train_is_the_plain_run(kind: Any) -> None:
    runs = []
    for strategy in ("auto", plain()):
        L.seed_everything(5)
        module = kind()
        start = copy_of(module.state_dict())
        t = trainer(strategy, max_epochs=3)
        t.fit(module, loader())
        runs.append((t, module))
    (t, module), (ours, replica) = runs
    assert_same(module.state_dict(), replica.state_dict())
    assert t.global_step == ours.global_step
    assert kind is not Thaws or not torch.equal(start["net.0.weight"], replica.net[0].weight)
    assert_same(ours.strategy.outer_state_dict(), replica.state_dict())
    trained = [p for p in replica.parameters() if p.requires_grad]
    assert len(ours.strategy.outer_optimizer.param_groups[0]["params"]) == len(trained)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_several_workers_refuse_a_module_with_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="MemoryBank has no parameter with `requires_grad`"):
        trainer(DilocoStrategy(2), max_epochs=1).fit(MemoryBank(), loader())


def test_ranks_and_world_size_are_assignable_as_those_of_a_single_device() -> None:
    strategy = plain()
    t = trainer(strategy, max_steps=2)
    strategy.world_size, strategy.global_rank, strategy.local_rank = 4, 3, 1
    assert (t.world_size, t.global_rank, t.local_rank, t.is_global_zero) == (4, 3, 1, True)
    t.fit(Net(), loader())
    assert strategy.local_steps == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "world_size", 8)
        assert t.world_size == 8
    del strategy.world_size
    assert t.world_size == 1


def test_profilers_see_lightnings_names() -> None:
    recorded = []
    for strategy in ("auto", plain(), DilocoStrategy(3, 3)):
        profiler = SimpleProfiler()
        trainer(strategy, max_epochs=1, profiler=profiler, num_sanity_val_steps=0).fit(
            Net(), loader(), loader(shuffle=False)
        )
        recorded.append({name for name in profiler.recorded_durations if "Loop]" in name})
    assert recorded[0] == recorded[1] == recorded[2]
    assert "[_TrainingEpochLoop].train_dataloader_next" in recorded[0]


class Silent(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_trainers_loops_are_lightnings_and_pickle_after_a_fit(workers: int) -> None:
    t = trainer(DilocoStrategy(workers, 3) if workers > 1 else plain(), max_steps=4)
    parts = ("fit_loop", "_data_connector", "_signal_connector", "_logger_connector")
    before = [type(getattr(t, part)) for part in parts]
    attributes = set(vars(t.fit_loop.epoch_loop._results))
    t.fit(Silent(), loader())
    assert [type(getattr(t, part)) for part in parts] == before
    assert type(t.fit_loop.epoch_loop.automatic_optimization).__module__.startswith("lightning.")
    assert set(vars(t.fit_loop.epoch_loop._results)) == attributes
    assert pickle.loads(pickle.dumps(t.fit_loop.epoch_loop._results)) == {}


def test_copies_of_loops_made_during_a_fit_are_lightnings() -> None:
    copies: list[Any] = []

    class Copies(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
            loops = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop._results
            for loop in (*loops, trainer._data_connector, trainer.fit_loop.epoch_loop.automatic_optimization):
                copies.extend(loop.__reduce_ex__(protocol)[1][0] for protocol in (0, 2, pickle.HIGHEST_PROTOCOL))
            copies.append(type(pickle.loads(pickle.dumps(loops[2]))))

    trainer(DilocoStrategy(2, 3), max_steps=2, callbacks=[Copies()]).fit(Net(), loader())
    assert len(copies) == 16
    assert all(cls.__module__.startswith("lightning.") for cls in copies)


def test_what_patches_backward_of_lightnings_strategy_is_obeyed(monkeypatch: Any) -> None:
    calls: list[int] = []
    original = SingleDeviceStrategy.backward

    def backward(self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, loss, *args, **kwargs)

    monkeypatch.setattr(SingleDeviceStrategy, "backward", backward, raising=False)
    trainer(DilocoStrategy(2, 3), max_steps=2).fit(Net(), loader())
    assert len(calls) == 4


def test_the_number_of_plain_run_set_ups_is_right() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"over {len(CASES)} set-ups" in readme.replace("\n  ", " ")
