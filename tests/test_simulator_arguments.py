"""Does every argument of the simulator do something?"""

import inspect
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_same
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from simulators import Classifier, Log, classes, simulator, trained, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_diloco import Diloco, DilocoSimulator, EvalStats
from lightning_diloco.simulator.callback import SimulatorCallback


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


@pytest.mark.slow
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
        def after_inner_step(self, step: int) -> None:
            ctx = self.ctx
            if ctx.due(step):
                ctx.send(ctx.names, ctx.delta)
            for transfer in ctx.arrived():
                ctx.outer.step(transfer.names, transfer.mean)

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


@pytest.mark.slow
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


@pytest.mark.slow
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
        assert trained(max_local_step=1).strategy._fit._seed == 5
        assert os.environ.get("PL_GLOBAL_SEED") == before
        torch.manual_seed(11)
        assert trained(max_local_step=1, seed=None).strategy._fit._seed == int(before or 11)


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


def test_quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    trained()
    assert any(message.startswith("DiLoCo: done after") for message in caplog.messages)
    caplog.clear()
    trained(quiet=True)
    assert caplog.messages == []


def test_no_argument_is_missing_here() -> None:
    source = Path(__file__).read_text()
    names = [line[len("def test_") :] for line in source.splitlines() if line.startswith("def test_")]
    for argument in inspect.signature(DilocoSimulator).parameters:
        assert any(argument in name for name in names), argument
