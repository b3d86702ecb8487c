"""Several fits, evaluations around them, the tuner's trials, and checkpoints as far as they go."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from lightning.pytorch import callbacks as C
from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner

from lightning_diloco import DilocoCallback, DilocoStrategy


class Everything(Net):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.slow
def test_validate_test_and_predict_before_between_and_after_fits_see_the_module() -> None:
    strategy, module = DilocoStrategy(num_nodes=3, diloco_interval=4), Everything()
    t, data = trainer(strategy, max_steps=6), loader(shuffle=False)

    def evaluations() -> list[Any]:
        plain = trainer()
        mine = [
            t.validate(module, data, verbose=False)[0]["val_loss"],
            t.test(module, data, verbose=False)[0]["test_loss"],
            torch.cat(t.predict(module, data)),
        ]
        twin = Everything()
        twin.load_state_dict(module.state_dict())
        assert mine[0] == plain.validate(twin, data, verbose=False)[0]["val_loss"]
        assert mine[1] == plain.test(twin, data, verbose=False)[0]["test_loss"]
        assert torch.equal(mine[2], torch.cat(plain.predict(twin, data)))
        return mine

    first = evaluations()
    t.fit(module, loader())
    after = copy_of(module.state_dict())
    second = evaluations()
    assert second[0] != first[0]
    assert_same(copy_of(module.state_dict()), after)
    assert (strategy.local_steps, strategy.outer_steps) == (6, 2)
    t.fit_loop.epoch_loop.max_steps = 12
    t.fit(module, loader())
    assert strategy.local_steps == 6, "a new fit counts afresh; the Trainer goes on from its step"
    assert t.global_step == 12
    assert evaluations()[0] != second[0]
    loops = (t.fit_loop, t.fit_loop.epoch_loop, t.validate_loop, t.test_loop)
    assert all(type(x).__module__.startswith("lightning.pytorch") for x in loops)


@pytest.mark.slow
def test_the_lr_finder_finds_what_it_finds_for_one_worker_and_its_trial_does_not_count() -> None:
    class Tuned(Net):
        lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    found = []
    for strategy in ("auto", DilocoStrategy(num_nodes=1, diloco_interval=3, outer_optimizer_kwargs={"lr": 1.0})):
        L.seed_everything(1, verbose=False)
        module, t = Tuned(), trainer(strategy, max_steps=3)
        finder = Tuner(t).lr_find(module, loader(), num_training=20, update_attr=True)
        found.append((finder.results["loss"], finder.suggestion(), module.lr))
    assert found[0] == found[1]

    strategy, module = DilocoStrategy(num_nodes=3, diloco_interval=4), Tuned()
    t, start = trainer(strategy, max_steps=3, max_epochs=-1), copy_of(module.state_dict())
    finder = Tuner(t).lr_find(module, loader(), num_training=20)
    assert len(finder.results["lr"]) == 20
    assert_same(copy_of(module.state_dict()), start)
    assert (strategy.local_steps, strategy.outer_steps, t.global_step) == (0, 0, 0)
    with pytest.raises(RuntimeError, match="The workers exist from"):
        strategy.worker_state_dict(0)
    reports: list[Any] = []

    class Look(DilocoCallback):
        def on_train_start(self, trainer, pl_module):
            assert (trainer.strategy.local_steps, trainer.strategy.outer_steps) == (0, 0)

        def on_sanity_check_start(self, trainer, pl_module):
            assert trainer.strategy.local_steps == 0

        def on_outer_step(self, trainer, pl_module, report):
            reports.append(report.step)

    t.callbacks.append(Look())
    t.callbacks.append(C.LearningRateFinder(num_training_steps=10))
    t.fit(module, loader(), loader(shuffle=False))
    assert (strategy.local_steps, strategy.outer_steps) == (3, 1)
    assert reports == [3]


@pytest.mark.slow
def test_the_batch_size_finder_scales_the_batch_of_one_worker() -> None:
    class Sized(Net):
        batch_size = 2

        def train_dataloader(self):
            return loader(regression_data(192), batch_size=self.batch_size)

        def val_dataloader(self):
            return loader(batch_size=4, shuffle=False)

    sizes = []
    for strategy in ("auto", DilocoStrategy(num_nodes=3, diloco_interval=2)):
        module, t = Sized(), trainer(strategy, max_epochs=1)
        sizes.append(Tuner(t).scale_batch_size(module, max_trials=3, steps_per_trial=2))
        assert module.batch_size == sizes[-1]
    assert sizes == [8, 8]
    assert strategy.local_steps == 0
    t.fit(module)
    assert strategy.local_steps == t.num_training_batches == 192 // 3 // 8


def test_files_are_small_and_share_no_storage_with_the_replicas(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.wide = torch.nn.Linear(500, 500)

    trainer(DilocoStrategy(num_nodes=4), max_steps=1, callbacks=[Save()]).fit(Wide(), loader())
    tensors = sum(p.nbytes for p in Wide().parameters())
    assert tensors < (tmp_path / "x.ckpt").stat().st_size < tensors + 20_000


@pytest.mark.filterwarnings("ignore:.*was called without a model")  # Lightning's, about OnExceptionCheckpoint
@pytest.mark.filterwarnings("ignore:.*ckpt_path=")
def test_a_checkpoint_written_on_an_exception_holds_the_evaluated_weights(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3 and self.trainer.strategy.current_worker == 2:
                raise ValueError("enough")
            return super().training_step(batch, batch_idx)

    strategy = DilocoStrategy(num_nodes=3, diloco_interval=100)
    t = trainer(strategy, callbacks=[C.OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="Local step 4 was interrupted"), pytest.raises(ValueError, match=r"^enough$"):
        t.fit(Fails(), loader(batch_size=2))
    (path,) = tmp_path.glob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    workers = [strategy.worker_state_dict(w) for w in range(3)]
    for key, value in state.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([w[key] for w in workers]).mean(0), rtol=0, atol=1e-6)


def test_gradients_are_kept_only_for_projects_that_look_at_them() -> None:
    norms: list[Any] = []

    class Looks(Net):
        def on_before_zero_grad(self, optimizer):
            gradient = self.net[0].weight.grad
            norms.append(None if gradient is None else gradient.norm().item())

    for make, kept in ((Net, False), (Looks, True)):
        reports: list[int] = []

        class Memory(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_, reports=reports):
                reports.append(trainer.strategy.memory_report()["gradients_per_worker"])

        trainer(DilocoStrategy(num_nodes=3), max_steps=4, callbacks=[Memory()]).fit(make(), loader())
        parameters = sum(p.nbytes for p in Net().parameters())
        assert reports == [parameters if kept else 0] * 4
    assert norms[:3] == [None] * 3
    assert len(set(norms[3:])) == 9  # every worker its own


def test_memory_report_adds_up() -> None:
    strategy, module = DilocoStrategy(num_nodes=3, diloco_interval=2), Net()
    trainer(strategy, max_steps=4).fit(module, loader())
    report = strategy.memory_report()
    parameters, buffers = sum(p.nbytes for p in module.parameters()), sum(b.nbytes for b in module.buffers())
    assert report["parameters_per_worker"] == parameters
    assert report["buffers_per_worker"] == buffers
    assert report["inner_state_per_worker"] == 2 * parameters + 4 * 6  # AdamW: two moments and a step counter
    assert report["outer_state"] == parameters  # momentum
    assert report["module"] == parameters + buffers
    per_worker = sum(report[f"{k}_per_worker"] for k in ("parameters", "buffers", "inner_state", "gradients"))
    assert report["total"] == 3 * per_worker + sum(report[k] for k in ("outer_model", "outer_state", "module"))


@pytest.mark.slow
def test_the_outer_step_shows_up_in_profiles_by_name(tmp_path: Path) -> None:
    name = "[Strategy]DilocoStrategy.outer_step"
    simple = SimpleProfiler()
    trainer(DilocoStrategy(num_nodes=3, diloco_interval=2), max_steps=5, profiler=simple).fit(Net(), loader())
    assert len(simple.recorded_durations[name]) == 5
    assert name in simple.summary()
    torchs = PyTorchProfiler(tmp_path, "profile", record_functions={name}, export_to_chrome=False, row_limit=1000)
    trainer(DilocoStrategy(num_nodes=3, diloco_interval=2), max_steps=8, profiler=torchs).fit(Net(), loader())
    assert "outer_step" in (tmp_path / "fit-profile.txt").read_text()
