"""Does ``validate_on`` give the values of the other weights, under keys of their own, and change nothing else?"""

import random
import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_equal, assert_same, loader, regression_data, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from processes import run
from torch.utils.data import DataLoader, Sampler
from torchmetrics import MeanAbsoluteError

from lightning_diloco import DilocoCallback, DilocoStrategy

SETS: list[Any] = ["outer", "average", 0, 1]
NAMES = ["outer", "average", "worker_0", "worker_1"]
DATA = regression_data(dtype=torch.float64)
HELD_OUT = regression_data(22, seed=8, dtype=torch.float64)


class Validates(Net):
    """In float64, with BatchNorm; logs a mean, a metric and a value of its own, and draws random numbers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.double()
        self.error = MeanAbsoluteError()
        self.outputs: list[Any] = []
        self.calls: list[str] = []

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def on_validation_start(self) -> None:
        self.calls.append("start")

    def on_validation_epoch_start(self) -> None:
        self.outputs = []
        self.calls.append("epoch start")

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.outputs.append((self(x) - y).square().flatten())
        self.error(self(x).float(), y.float())
        self.log("val_loss", self.loss(batch), on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        self.log("val_error", self.error, on_epoch=True)
        self.log("val_noise", torch.rand(()).double() + random.random(), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_own", torch.cat(self.outputs).mean(), sync_dist=True)
        self.calls.append("epoch end")

    def on_validation_end(self) -> None:
        self.calls.append("end")


class Oracle(L.Callback):
    """At the beginning of the ordinary validation: each set's loss, by a copy of the module on all the data."""

    def __init__(self) -> None:
        self.expected: list[dict[str, float]] = []
        self.found: list[dict[str, float]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        states = {f"worker_{w}": strategy.worker_state_dict(w) for w in strategy.local_workers}
        states["outer"] = strategy.outer_state_dict()
        if len(states) == 3:
            mean = {k: torch.stack([states[f"worker_{w}"][k] for w in (0, 1)]) for k in states["outer"]}
            states["average"] = {
                k: v.mean(0) if v.is_floating_point() else states["worker_0"][k] for k, v in mean.items()
            }
        losses = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, state in states.items():
                twin = Validates()
                twin.load_state_dict(state)
                x, y = HELD_OUT.tensors
                losses[name] = float((twin.eval()(x) - y).square().mean())
        self.expected.append(losses)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(sets: Any = SETS, num_workers: int = 2, callbacks: Any = (), model: Any = None, **kwargs: Any) -> Any:
    """A run of 12 steps in two epochs, with two validations in each."""
    strategy = DilocoStrategy(num_nodes=num_workers, diloco_interval=5, eval_weights="average")
    options: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 6, "val_check_interval": 3, **kwargs}
    t = trainer(strategy, num_sanity_val_steps=0, callbacks=[DilocoCallback(validate_on=sets), *callbacks], **options)
    L.seed_everything(5, verbose=False)
    model = model or Validates()
    t.fit(model, loader(DATA), DataLoader(HELD_OUT, 5))
    return t, model


@pytest.mark.slow
def test_values_are_those_of_copies_of_the_weights() -> None:
    oracle = Oracle()
    fit(callbacks=[oracle])
    assert len(oracle.expected) == 4
    for expected, found in zip(oracle.expected, oracle.found, strict=True):
        assert len(set(expected.values())) == 4
        for name in NAMES:
            for key in ("val_loss", "val_own"):
                assert found[f"{key}/{name}"] == pytest.approx(expected[name], rel=1e-12, abs=0), (key, name)
        assert found["val_loss"] == found["val_loss/average"]
        assert found["val_own"] == found["val_own/average"]
        assert found["val_noise"] == found["val_noise/worker_1"] == found["val_noise/outer"]
        assert found["val_error"] == found["val_error/average"] != found["val_error/worker_0"]


@pytest.mark.slow
def test_keys_in_loggers_and_steps(tmp_path: Path) -> None:
    logged: list[tuple[str, Any, float]] = []

    class Notes(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            logged.extend((key, step, value) for key, value in metrics.items())

    oracle = Oracle()
    t, _ = fit(callbacks=[oracle], logger=Notes(tmp_path))
    for name in NAMES:
        at = {key: [(s, v) for k, s, v in logged if k == f"{key}/{name}"] for key in ("val_loss_epoch", "val_own")}
        ordinary = [s for k, s, _ in logged if k == "val_own"]
        assert at["val_loss_epoch"] == [
            (s, pytest.approx(e[name], rel=1e-12)) for s, e in zip(ordinary, oracle.expected, strict=True)
        ]
        assert at["val_own"] == [(s, pytest.approx(v, rel=1e-12)) for s, v in at["val_loss_epoch"]]
        steps = [s for k, s, _ in logged if k == f"val_loss_step/{name}"]
        assert steps == [s for k, s, _ in logged if k == "val_loss_step"] == list(range(4 * 5))
    assert {key for key in t.progress_bar_metrics if "val" in key} == {"val_loss_step", "val_loss_epoch"}


@pytest.mark.slow
def test_everything_else_is_as_without(tmp_path: Path) -> None:
    runs: list[Any] = []

    class Draws(Sampler[int]):
        """Ten samples by a generator of its own, which goes on from validation to validation."""

        generator = torch.Generator()

        def __iter__(self) -> Any:
            return iter(torch.randint(22, (10,), generator=self.generator).tolist())

        def __len__(self) -> int:
            return 10

    class Notes(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            runs[-1]["log"] += [(k, step, v) for k, v in metrics.items() if not k.endswith((*NAMES, "_seconds"))]

    class Random(L.Callback):
        """Notes the random numbers that training finds, and how often callbacks are called."""

        def on_train_batch_start(self, *args: Any) -> None:
            runs[-1]["calls"].append((float(torch.get_rng_state().sum()), hash(random.getstate())))

        def on_validation_batch_end(self, *args: Any) -> None:
            runs[-1]["calls"].append(f"batch {args[4]}")

        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            runs[-1]["calls"].append(trainer.fit_loop.epoch_loop.val_loop.state_dict())

    for sets in ((), SETS):
        runs.append({"log": [], "calls": []})
        Draws.generator.manual_seed(3)
        held_out = DataLoader(HELD_OUT, 5, sampler=Draws())
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=5)
        t = trainer(
            strategy,
            max_steps=12,
            val_check_interval=3,
            logger=Notes(tmp_path),
            callbacks=[DilocoCallback(validate_on=sets), Random()],
            profiler=None,
        )
        L.seed_everything(5, verbose=False)
        model = Validates(dropout=0.3)
        t.fit(model, loader(DATA), held_out)
        t.save_checkpoint(tmp_path / "x.ckpt")
        state = torch.load(tmp_path / "x.ckpt", weights_only=False)
        runs[-1] |= {"weights": model.state_dict(), "state": state["diloco"], "loops": state["loops"]}
        assert model.calls.count("end") == (1 + 4 * (1 + len(sets)))
        assert model.calls[-4:] == ["start", "epoch start", "epoch end", "end"]
    without, on = runs
    assert len(without["calls"]) > 12
    assert_equal(without, on)


@pytest.mark.slow
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_live_through_further_runs(bar: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(Validates):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.02)  # Rich draws in a thread
            super().validation_step(batch, batch_idx)

    t, _ = fit(callbacks=[bar()], model=Slow(), enable_progress_bar=True, max_epochs=1)
    assert "val_own/worker_1" in t.callback_metrics
    assert not [key for key in t.progress_bar_metrics if "/" in key.replace("steps/s", "")]
    assert "val_loss" in capsys.readouterr().out


@pytest.mark.slow
def test_one_worker_and_the_plain_run() -> None:
    for options in ({}, {"outer_optimizer_kwargs": {"lr": 1.0}}):
        weights = []
        for sets in ((), ("outer", 0)):
            strategy = DilocoStrategy(num_nodes=1, diloco_interval=5, **options)
            t = trainer(strategy, max_steps=6, val_check_interval=3, callbacks=[DilocoCallback(validate_on=sets)])
            L.seed_everything(5, verbose=False)
            model = Validates(dropout=0.3)
            t.fit(model, loader(DATA), DataLoader(HELD_OUT, 5))
            weights.append(model.state_dict())
        assert_same(*weights)
        metrics = t.callback_metrics
        assert metrics["val_own/worker_0"] == metrics["val_own"] != metrics["val_own/outer"]


def test_early_stopping_and_checkpoints_are_called_once_and_see_this_validations_values(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    class Stops(EarlyStopping):
        def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
            seen.append((float(trainer.callback_metrics["val_own/outer"]), float(trainer.callback_metrics["val_own"])))
            super()._run_early_stopping_check(trainer)

    oracle = Oracle()
    keeps = ModelCheckpoint(tmp_path, monitor="val_loss/outer", mode="max", filename="best")
    stops = Stops("val_loss/worker_1", mode="max", patience=1, check_on_train_epoch_end=False)
    t, _ = fit(callbacks=[oracle, keeps, stops], enable_checkpointing=True, max_epochs=9)
    # the losses fall, so that the first is the best and the third validation stops the run
    assert len(seen) == len(oracle.expected) == stops.stopped_epoch + 2
    assert [outer for outer, _ in seen] == [pytest.approx(e["outer"], rel=1e-12) for e in oracle.expected]
    assert float(keeps.best_model_score) == pytest.approx(max(e["outer"] for e in oracle.expected), rel=1e-12)
    assert t.global_step < 54


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_logs_the_same(tmp_path: Path) -> None:
    whole, half = Oracle(), Oracle()
    _, model = fit(callbacks=[whole])
    fit(max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=5)
    again = trainer(
        strategy,
        max_epochs=2,
        limit_train_batches=6,
        val_check_interval=3,
        callbacks=[DilocoCallback(validate_on=SETS), half, ModelCheckpoint(tmp_path)],
        enable_checkpointing=True,
    )
    resumed = Validates()
    again.fit(resumed, loader(DATA), DataLoader(HELD_OUT, 5), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert_same(resumed.state_dict(), model.state_dict())
    names = [f"val_loss/{name}" for name in NAMES]
    assert [[f[n] for n in names] for f in half.found] == [[f[n] for n in names] for f in whole.found[-2:]]


def _in_processes(sets: Any) -> tuple[Any, Any, Any]:
    oracle = Oracle()
    _, model = fit(sets, callbacks=[oracle], devices=2)
    return oracle.expected, oracle.found, model.state_dict()


@pytest.mark.processes
def test_workers_of_other_processes(tmp_path: Path) -> None:
    ((alone, found_alone, weights),) = run(_in_processes_alone, 1, out=tmp_path)
    both = run(_in_processes, 2, SETS, out=tmp_path / "on")
    off = run(_in_processes, 2, (), out=tmp_path / "off")
    for rank in (0, 1):
        assert_same(both[rank][2], off[rank][2])
        assert_same(both[rank][2], weights)
        for found, expected in zip(both[rank][1], alone, strict=True):
            for name in NAMES:  # the processes' shares of the data are of the same size
                assert found[f"val_loss/{name}"] == pytest.approx(expected[name], rel=1e-12)
    assert len(found_alone) == len(both[0][1]) == 4


def _in_processes_alone() -> tuple[Any, Any, Any]:
    oracle = Oracle()
    _, model = fit(callbacks=[oracle])
    return oracle.expected, oracle.found, model.state_dict()


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`", "ignore:Found `dataloader_iter`")
def test_several_loaders_and_steps_that_fetch_batches() -> None:
    class Two(Validates):
        def on_validation_epoch_end(self) -> None: ...

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("two", self.loss(batch))

    class Fetches(Two):
        def validation_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            self.log("fetched", self.loss(batch), batch_size=1)

    for model, names in ((Two(), ["two/dataloader_idx_0", "two/dataloader_idx_1"]), (Fetches(), ["fetched"])):
        held_out = [DataLoader(HELD_OUT, 22), DataLoader(DATA, 96)][: len(names)]
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=5)
        t = trainer(strategy, max_steps=3, val_check_interval=3, callbacks=[DilocoCallback(validate_on=(1, "average"))])
        t.fit(model, loader(DATA), held_out)
        metrics = t.callback_metrics
        for name in names:
            assert metrics[f"{name}/average"] == metrics[name] != metrics[f"{name}/worker_1"]
        assert {k for k in metrics if "worker" in k} == {f"{name}/worker_1" for name in names}


@pytest.mark.parametrize("sets", ["outer", ("theta",), (0, 0), (-1,), (True,), (0.5,), None, 1])
def test_what_is_no_set_of_weights(sets: Any) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"`validate_on` (={sets!r}) must be a sequence of different sets of weights")
    ):
        DilocoCallback(validate_on=sets)


def test_clear_errors() -> None:
    with pytest.raises(MisconfigurationException, match=r"names worker 2, but `num_nodes` is 2: ids go from 0 to 1\."):
        fit((2,))

    class Modes(torch.optim.SGD):
        def eval(self) -> None: ...

        def train(self) -> None: ...

    with pytest.raises(RuntimeError, match=r"`validate_on` \(='outer'\) .* but Modes computes its evaluation weights"):
        fit(("outer",), model=Validates(optimizer=lambda p: Modes(p, lr=0.1)))

    class Once:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            raise StopIteration

    t = trainer(
        DilocoStrategy(num_nodes=2),
        max_steps=2,
        num_sanity_val_steps=0,
        callbacks=[DilocoCallback(validate_on=("outer",))],
        limit_val_batches=3,
        val_check_interval=1,
    )
    with pytest.raises(MisconfigurationException, match="they come from a Once, which can be read only once"):
        t.fit(Validates(), loader(DATA), Once())
