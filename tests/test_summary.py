"""Are the lines at the start and at the end of a fit true, and are they switchable?"""

import logging
import os
import re
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, copy_of, loader, regression_data, trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from processes import run
from projects import Project
from said import said
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_diloco import (
    Availability,
    Cluster,
    DataParallel,
    DilocoCallback,
    DilocoSimulator,
    DilocoStrategy,
    DropOut,
    ErrorFeedback,
    Int8,
    TopK,
)
from lightning_diloco.reporting import summary


@pytest.fixture(autouse=True)
def a_single_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines don't depend on this machine."""
    monkeypatch.setattr(summary, "usable_cores", lambda: 1)


# Linear(3, 8), Linear(8, 1) in float32
PARAMETERS = 4 * (3 * 8 + 8 + 8 + 1)


def fit(strategy: DilocoStrategy, module: Any = None, data: Any = None, **kwargs: Any) -> list[str]:
    """The lines of a fit."""
    with said() as lines:
        trainer(strategy, **kwargs).fit(module or Net(batch_norm=False), loader() if data is None else data)
    return lines


def number(line: str, before: str, after: str) -> int:
    """The number between two words."""
    return int(line.split(before)[1].split(after)[0].replace(",", ""))


# -------------------------------------------------------------------------------------------- whole lines


def test_the_lines_of_a_fit() -> None:
    """14 local steps in rounds of 5: after 5, 10, and one last after 14. AdamW keeps two values per weight."""
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=5)
    lines = fit(strategy, max_steps=14, max_epochs=-1)
    each = 3 * PARAMETERS + 4 * 4  # and the step counters of the four tensors
    total = 3 * each + 3 * PARAMETERS  # θ, the momentum of SGD, the live module
    file = total + 2 * PARAMETERS + 4 * 4  # the live module in ``state_dict``, and worker 0's optimizer once more
    assert lines[:5] == [
        "DiLoCo: 3 workers in 1 process; a synchronisation every 5 local steps (H).",
        "DiLoCo: 14 local steps of each worker = 2 rounds and a shorter last one of 4 steps. Every worker sends"
        f" {PARAMETERS} bytes per round, {3 * PARAMETERS} bytes in all.",
        'DiLoCo: validation and checkpoints see the mean of the workers\' weights (eval_weights="average").',
        f"DiLoCo: memory {each} bytes per worker, {total:,} bytes in all; the tensors of a checkpoint up to {file:,}"
        " bytes.",
        "DiLoCo: done after 14 local steps and 3 outer steps. Every worker sent 492 bytes, 21.4 % of data"
        " parallelism's 2,296 bytes.",
    ]
    assert strategy.ledger.total_bytes == 492 == 3 * PARAMETERS
    assert 14 * PARAMETERS == 2296


@pytest.mark.slow
def test_the_last_line_says_where_the_time_went() -> None:
    class Slow(Net):
        def training_step(self, *args: Any) -> Any:
            time.sleep(0.03)
            return super().training_step(*args)

    began = time.perf_counter()
    line = fit(DilocoStrategy(num_nodes=2, diloco_interval=5), Slow(), max_steps=10)[-1]
    took = time.perf_counter() - began
    found = re.fullmatch(
        r"DiLoCo: inner steps (\S+) s, outer steps (\S+) s, evaluation (\S+) s, waiting for other processes 0\.0 s;"
        r" (\S+) worker-steps per second\.",
        line,
    )
    inner, outer, evaluation, rate = map(float, found.groups())
    assert 20 / took <= rate <= 1 / 0.03
    assert 2 * 10 * 0.03 - 0.05 <= inner <= took + 0.05  # rounded to a tenth
    assert outer + evaluation <= took - 2 * 10 * 0.03 + 0.1


def test_worker_steps_are_those_of_the_workers_that_stepped() -> None:
    """Two of four workers leave at the third of eight steps."""
    events = [{"kind": "leave", "step": 3, "worker": w} for w in (1, 2)]
    leaving = DilocoStrategy(4, 2, cluster=Cluster(1.0, 1.0, 1.0, availability=Availability(events)))
    fit(leaving, max_steps=8)
    assert leaving._started.worker_steps == 2 * 4 + 6 * 2
    together = DilocoStrategy(4, 2)
    fit(together, max_steps=8)
    assert together._started.worker_steps == 8 * 4


def test_cores_that_are_left_over_are_mentioned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def about_cores(workers: int, cores: int, **arguments: Any) -> list[str]:
        monkeypatch.setattr(summary, "usable_cores", lambda: cores)
        lines = fit(DilocoStrategy(workers, diloco_interval=2), max_steps=2, **arguments)
        return [line for line in lines if "cores" in line]

    assert about_cores(6, 4) == [
        "DiLoCo: one process here, and 4 cores: with `Trainer(devices=3)` a step takes about 1/3 of the time of one"
        " process with one thread; starting them takes some seconds."
    ]
    assert "devices=2" in about_cores(2, 8)[0]
    assert about_cores(3, 2) == about_cores(6, 1) == []


# -------------------------------------------------------------------------------------------- how long


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(regression_data(64))


class Stop(Callback):
    """Ends a run that nothing else ends."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 6


UNKNOWN = "the number of local steps is unknown: {}. Every worker sends 164 bytes per round."
LENGTHS = [  # loader(): 96 samples in batches of 4: 24, of a worker 12
    ({"max_epochs": 2}, "24 local steps of each worker = 6 rounds. "),
    ({"max_steps": 7, "max_epochs": -1}, "7 local steps of each worker = 1 round and a shorter last one of 3 steps. "),
    ({"max_epochs": 2, "accumulate_grad_batches": 5}, "6 local steps of each worker = 1 round and a shorter last one"),
    ({"max_epochs": 1, "limit_train_batches": 0.5}, "6 local steps of each worker = 1 round and a shorter last one"),
    ({"max_epochs": 1, "max_time": timedelta(hours=1)}, "at most 12 local steps of each worker = 3 rounds. "),
    ({"max_epochs": -1, "callbacks": Stop()}, UNKNOWN.format("`max_epochs` is -1")),
    ({"max_epochs": -1, "callbacks": Stop(), "max_time": timedelta(hours=1)}, UNKNOWN.format("`max_epochs` is -1")),
    (
        {"max_epochs": 2, "callbacks": GradientAccumulationScheduler({0: 2, 1: 3})},
        UNKNOWN.format("a GradientAccumulationScheduler changes the batches per step"),
    ),
]


@pytest.mark.parametrize(("arguments", "words"), LENGTHS, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_the_length_of_a_run_is_said_in_numbers_or_in_words(arguments: dict[str, Any], words: str) -> None:
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=4)
    line = fit(strategy, **arguments)[1]
    assert line.startswith(f"DiLoCo: {words}")
    if "unknown" not in words:
        assert number(line, "DiLoCo: ".ljust(8) + "at most " * ("at most" in words), " local steps") == (
            strategy.local_steps
        )
        total = number(line, "per round, ", " bytes in all")
        assert total == strategy.ledger.total_bytes


def test_a_stream_without_length() -> None:
    line = fit(DilocoStrategy(num_nodes=2, diloco_interval=4), data=DataLoader(Stream(), batch_size=4), max_epochs=1)[1]
    assert line == "DiLoCo: " + UNKNOWN.format("the training data have no length")


def test_a_partial_round_that_is_not_synchronised() -> None:
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=4, final_sync=False)
    line = fit(strategy, max_steps=7)[1]
    assert "= 1 round and, without a synchronisation, of 3 steps. Every worker sends 164 bytes per round, 164" in line
    assert strategy.ledger.total_bytes == 164


def test_a_resumed_run(tmp_path: Path) -> None:
    def strategy() -> DilocoStrategy:
        return DilocoStrategy(num_nodes=2, diloco_interval=4)

    t = trainer(strategy(), max_steps=6)
    t.fit(Net(batch_norm=False), loader())
    t.save_checkpoint(tmp_path / "x.ckpt")
    resumed = strategy()
    with said() as lines:
        trainer(resumed, max_steps=12).fit(Net(batch_norm=False), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert lines[1].startswith("DiLoCo: 12 local steps of each worker, 6 of them done")
    assert lines[-2 if len(lines) > 5 else -1].startswith(
        f"DiLoCo: done after 12 local steps and {resumed.outer_steps} outer steps. Every worker sent"
        f" {resumed.ledger.total_bytes} bytes"
    )


# -------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    "arguments",
    [
        {"codec": Int8()},
        {"codec": ErrorFeedback(TopK(16, 4))},
        {"participation": DropOut(0.0)},
        {"algorithm": DataParallel()},
        {"inner_state": "average"},
        {"module": Net()},  # BatchNorm's statistics differ from worker to worker
    ],
    ids=lambda x: "-".join(x),
)
def test_bytes_that_only_the_first_round_tells(arguments: dict[str, Any]) -> None:
    arguments = dict(arguments)
    module = arguments.pop("module", None)
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=4, **arguments)
    lines = fit(strategy, module, max_steps=10)
    assert lines[1].endswith("How many bytes a worker sends is known after the first round.")
    first = sum(e.payload_bytes for e in strategy.ledger.entries if e.local_step <= 4)
    assert f"DiLoCo: in its first round every worker sent {first:,} bytes." in lines
    assert first > 0


def test_buffers_that_stay_local_cost_nothing() -> None:
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=4, buffers="local")
    line = fit(strategy, Net(), max_steps=8)[1]
    assert number(line, "per round, ", " bytes in all") == strategy.ledger.total_bytes


def test_a_single_worker_sends_nothing() -> None:
    lines = fit(DilocoStrategy(num_nodes=1, diloco_interval=4), max_steps=8)
    assert lines[1] == "DiLoCo: 8 local steps of each worker = 2 rounds. A single worker sends nothing."
    assert "DiLoCo: done after 8 local steps and 2 outer steps. A single worker sends nothing." in lines


# -------------------------------------------------------------------------------------------- memory, files


class Wide(Net):
    """Large enough that a file consists of tensors."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.wide = nn.Linear(100, 500)

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) + self.wide.weight.square().mean() + self.wide.bias.square().mean()


ADAM = partial(torch.optim.Adam, lr=1e-3)
SGD = partial(torch.optim.SGD, lr=1e-3)


@pytest.mark.parametrize("inner", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"outer_optimizer_kwargs": {"lr": 1.0}},
        {"outer_optimizer_cls": torch.optim.Adam},
        {"codec": ErrorFeedback(Int8())},
    ],
    ids=lambda x: "-".join(x),
)
def test_memory_and_the_size_of_a_checkpoint(arguments: dict[str, Any], inner: Any, tmp_path: Path) -> None:
    """Against the report after the fit, and a file on disk that was saved in the middle of a round."""
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=4, **arguments)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
    lines = fit(strategy, Wide(inner), max_steps=8, callbacks=saved, enable_checkpointing=True)
    (line,) = [x for x in lines if x.startswith("DiLoCo: memory")]
    report = strategy.memory_report()
    codec = report["algorithm_memory"]  # which error feedback has only from the first round on
    assert number(line, "per worker, ", " bytes in all") == report["total"] - codec
    file = number(line, "checkpoint up to ", " bytes") + codec
    (path,) = tmp_path.glob("*.ckpt")
    assert file == pytest.approx(os.path.getsize(path), rel=0.06)


# -------------------------------------------------------------------------------------------- switches


@pytest.mark.parametrize(
    ("strategy", "kwargs"),
    [
        (DilocoStrategy(2, 4), {"callbacks": DilocoCallback(summary=False)}),
        (DilocoStrategy(1, 4, outer_optimizer_kwargs={"lr": 1.0}), {}),
        (DilocoStrategy(1, 4, outer_optimizer_kwargs={"lr": 1.0}), {"callbacks": DilocoCallback()}),
    ],
    ids=["summary=False", "plain run", "plain run with a callback"],
)
def test_nothing_is_said(strategy: DilocoStrategy, kwargs: dict[str, Any]) -> None:
    assert fit(strategy, max_steps=4, **kwargs) == []


def test_lightnings_log_level_holds() -> None:
    with said(logging.WARNING) as lines:
        trainer(DilocoStrategy(2, 4), max_steps=4).fit(Net(), loader())
    assert lines == []


def test_the_switch_must_be_a_boolean() -> None:
    with pytest.raises(ValueError, match=r"`summary` \(=1\) must be True or False."):
        DilocoCallback(summary=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`hints` \(=None\) must be True or False."):
        DilocoCallback(hints=None)  # type: ignore[arg-type]


def test_each_line_comes_once_with_two_callbacks_and_in_the_next_fit_again() -> None:
    strategy = DilocoStrategy(2, 4)
    for _ in range(2):
        lines = fit(strategy, max_steps=4, callbacks=[DilocoCallback(), DilocoCallback()])
        assert len(lines) == len(set(lines)) >= 5


def test_the_numbers_of_a_run_do_not_depend_on_its_lines() -> None:
    results = []
    for spoken in (True, False):
        torch.manual_seed(1)
        module = Net(dropout=0.5)
        with said():
            trainer(DilocoStrategy(2, 4), max_steps=9, callbacks=DilocoCallback(summary=spoken)).fit(module, loader())
        results.append(copy_of(module.state_dict()))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name])


@pytest.mark.processes
def test_process_0_speaks_for_all(tmp_path: Path) -> None:
    def speak() -> list[str]:
        warnings.filterwarnings("ignore", "It is recommended to use `self.log")
        return fit(DilocoStrategy(4, 4), Project(), max_steps=8, devices=2, default_root_dir=tmp_path)

    first, second = run(speak, 2, out=tmp_path / "out")
    assert second == []
    assert first[0] == "DiLoCo: 4 workers in 2 processes; a synchronisation every 4 local steps (H)."
    assert sum(" in all in each process; " in line for line in first) == 1


# -------------------------------------------------------------------------------------------- reprs


def test_reprs() -> None:
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=4, outer_optimizer_kwargs={"lr": 1.0}, codec=Int8())
    arguments = f"num_nodes=2, diloco_interval=4, outer_optimizer_kwargs={{'lr': 1.0}}, codec={Int8()!r}"
    assert repr(strategy) == f"<DilocoStrategy({arguments}), before its first fit>"
    fit(strategy, max_steps=6)
    sent = strategy.ledger.total_bytes
    ledger = f"<Ledger: 2 entries, {sent} bytes (delta {sent}), local steps 4 to 6>"
    assert repr(strategy.ledger) == ledger
    assert repr(strategy) == f"<DilocoStrategy({arguments}) after 6 local steps, 2 outer steps, {ledger}>"
    assert repr(DilocoStrategy()) == "<DilocoStrategy(num_nodes=4, diloco_interval=500), before its first fit>"


def test_repr_of_the_simulator() -> None:
    simulator = DilocoSimulator(
        nn.Linear,
        {"in_features": 3, "out_features": 1},
        num_nodes=2,
        diloco_interval=4,
        batch_size=4,
        loss_fn=nn.functional.mse_loss,
        train_dataset=regression_data(48),
        trainer_kwargs={"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    )
    start = "<DilocoSimulator of Linear on 48 samples, batches of 4, 6 local steps, <DilocoStrategy(num_nodes=2,"
    assert repr(simulator).startswith(start)
    assert repr(simulator).endswith("before its first fit>>")
    simulator.train()
    assert f"after 6 local steps, 2 outer steps, {simulator.strategy.ledger!r}>>" in repr(simulator)
