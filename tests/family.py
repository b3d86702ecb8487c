"""A run of any algorithm, the record that it leaves behind, and the comparison of that record with an oracle's."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import codec_reference
import lightning as L
import numpy as np
import pytest
import torch
from helpers import assert_equal, copy_of, loader, regression_data, trainer
from oracles import DataParallel, Oracle, PostLocalSGD
from processes import run
from reference import shards
from torch import Tensor, nn

from lightning_diloco import DilocoCallback, DilocoStrategy, OuterStepReport

TOLERANCE = 1e-12
SEED = 5
WORKERS, INTERVAL, STEPS = 4, 6, 19  # rounds end in mid-epoch, and the last one is partial
SAMPLES, BATCH_SIZE, EPOCHS = 96, 4, 4  # six steps per epoch for each of four workers

INNER = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
}


class Layers(L.LightningModule):
    """Linear layers in a list, the last one without a bias: every second layer has other sizes than the rest."""

    def __init__(self, optimizer: str = "sgd", sizes: Sequence[int] = (3, 6, 5, 4, 1), bias: bool = True) -> None:
        super().__init__()
        self.optimizer = optimizer
        last = len(sizes) - 2
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.ModuleList(
                nn.Linear(a, b, bias=bias and i < last) for i, (a, b) in enumerate(itertools.pairwise(sizes))
            )

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return nn.functional.mse_loss(self.layers[-1](x).mean(1, keepdim=True), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return INNER[self.optimizer](self.parameters())


class Breaks(Layers):
    """The loss of a worker, 1, is NaN in step 5."""

    worker: ClassVar[int] = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy: Any = self.trainer.strategy
        broken = strategy.current_worker == self.worker and strategy.local_steps == 4
        return super().training_step(batch, batch_idx) * (float("nan") if broken else 1.0)


def unequal(dataset: Any, num_workers: int) -> list[list[int]]:
    """6, 18, 30 and 42 of 96 samples."""
    indices = iter(range(len(dataset)))
    return [[next(indices) for _ in range(6 + 12 * w)] for w in range(num_workers)]


NAMES = [name for name, _ in Layers().named_parameters()]


def layers(*numbers: int) -> list[str]:
    """The names of these layers' parameters."""
    return [name for name in NAMES if int(name.split(".")[1]) in numbers]


class Record(DilocoCallback):
    """θ and the workers of this process after every step, and all reports."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]] = []
        self.reports: list[OuterStepReport] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        s = trainer.strategy
        assert isinstance(s, DilocoStrategy)
        self.history.append((s.outer_state_dict(), {w: s.worker_state_dict(w) for w in s.local_workers}))

    def on_outer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, report: OuterStepReport) -> None:
        self.reports.append(report)


class Save(L.Callback):
    """Writes ``{step}.ckpt`` into a folder at the end of these steps."""

    def __init__(self, steps: Iterable[int], folder: Path) -> None:
        self.steps, self.folder = set(steps), folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@dataclass
class Run:
    """What a fit leaves behind on a process."""

    history: list[tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]]
    reports: list[OuterStepReport]
    theta: dict[str, Tensor]
    workers: dict[int, dict[str, Tensor]]
    module: dict[str, Tensor]
    bytes: int
    whats: list[str]
    steps: tuple[int, int]


def train(
    folder: Path,
    num_workers: int = WORKERS,
    interval: int = INTERVAL,
    steps: int = STEPS,
    *,
    make: Callable[[], L.LightningModule] = Layers,
    devices: int = 1,
    data: Any = None,
    seed: int = SEED,
    callbacks: Iterable[L.Callback] = (),
    resume: Path | None = None,
    end: Path | None = None,
    options: dict[str, Any] | None = None,
    shuffle: bool | None = None,
    batch_size: int = BATCH_SIZE,
    **strategy: Any,
) -> Run:
    """A fit on ``devices`` processes, of which this is one; ``options`` are the Trainer's, ``end`` a file to write."""
    L.seed_everything(seed, verbose=False)
    module, record = make(), Record()
    diloco = DilocoStrategy(num_workers, interval, **strategy)
    settings = {"max_epochs": EPOCHS, "max_steps": steps, "precision": "64-true", **(options or {})}
    t = trainer(diloco, devices=devices, callbacks=[record, *callbacks], default_root_dir=folder, **settings)
    dataset = regression_data(SAMPLES, dtype=torch.float64) if data is None else data
    shuffle = num_workers > 1 if shuffle is None else shuffle
    t.fit(module, loader(dataset, batch_size, shuffle=shuffle), ckpt_path=resume)
    if end is not None:
        t.save_checkpoint(end)
    return Run(
        record.history,
        record.reports,
        diloco.outer_state_dict(),
        {w: diloco.worker_state_dict(w) for w in diloco.local_workers},
        copy_of(module.state_dict()),
        diloco.ledger.total_bytes,
        [entry.what for entry in diloco.ledger.entries],
        (diloco.local_steps, diloco.outer_steps),
    )


def several(folder: Path, size: int, settings: Sequence[dict[str, Any]]) -> list[Run]:
    """Fits with these settings, one after the other, on ``size`` processes; what the processes leave behind, joined."""
    out = folder / f"{size} processes"
    out.mkdir()
    ranks = run(lambda: [train(out, devices=size, **s) for s in settings], size, out=out / "results")
    return [joined(list(of_ranks)) for of_ranks in zip(*ranks, strict=True)]


def joined(ranks: list[Run]) -> Run:
    """The runs of all processes as one; they must agree in all that each of them has."""
    first = ranks[0]
    for other in ranks[1:]:
        assert_equal([theta for theta, _ in other.history], [theta for theta, _ in first.history])
        for field in ("theta", "module", "bytes", "steps"):
            assert_equal(getattr(other, field), getattr(first, field), field)
        assert [seen(r) for r in other.reports] == [seen(r) for r in first.reports]
    history = [
        (steps[0][0], {w: state for _, workers in steps for w, state in workers.items()})
        for steps in zip(*(r.history for r in ranks), strict=True)
    ]
    workers = {w: state for r in ranks for w, state in r.workers.items()}
    return replace(first, history=history, workers=workers)


def seen(report: OuterStepReport) -> Any:
    """What a report says, but for time and what the order of a sum may change in the last bits."""
    return (
        report.step,
        report.outer_step,
        report.kind,
        report.payload_bytes,
        report.participants,
        report.sent_step,
        report.tag,
        report.names,
    )


def assert_same_run(a: Run, b: Run, measured: float = 0.0, trace: bool = True) -> None:
    """Bit for bit, every step on the way.

    Args:
        a: a run.
        b: another.
        measured: by how much norms, cosines and drifts may differ, relatively: another layout sums in another order.
        trace: also the reports and bytes.
    """
    assert_equal(a.history, b.history, "history")
    for field in ("theta", "workers", "module"):
        assert_equal(getattr(a, field), getattr(b, field), field)
    if trace:
        assert a.bytes == b.bytes
        assert a.whats == b.whats
        assert a.steps == b.steps
        assert_same_reports(a.reports, b.reports, measured)


def assert_same_reports(a: Sequence[OuterStepReport], b: Sequence[OuterStepReport], measured: float = 0.0) -> None:
    assert [seen(r) for r in a] == [seen(r) for r in b]
    for x, y in zip(a, b, strict=True):
        assert len(x.drift) == len(y.drift)
        pairs = [(x.pseudo_gradient_norm, y.pseudo_gradient_norm), (x.cosine, y.cosine)]
        for one, other in (*pairs, *zip(x.drift, y.drift, strict=True)):
            assert (one is None) == (other is None)
            if other is not None:
                assert one == pytest.approx(other, rel=measured, abs=measured, nan_ok=True)


# ---------------------------------------------------------------------------------------------------- the oracles' side


def start(optimizer: str = "sgd") -> Layers:
    return Layers(optimizer).double()


def batches_of(num_workers: int, steps: int = STEPS, seed: int = SEED) -> list[list[Any]]:
    dataset = regression_data(SAMPLES, dtype=torch.float64)
    if num_workers == 1:  # reads the loader as it is
        return [(list(loader(dataset, BATCH_SIZE, shuffle=False)) * EPOCHS)[:steps]]
    batches = shards(dataset.tensors, num_workers, BATCH_SIZE, EPOCHS, seed)
    assert len(batches[0]) >= steps
    return [own[:steps] for own in batches]


def by_numbers(function: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    """A slow codec on tensors, from one on lists of numbers."""

    def compress(x: Tensor) -> Tensor:
        numbers = function(list(x.detach().reshape(-1).numpy()))
        return torch.tensor(np.array(numbers, dtype=np.float64)).view(x.shape)

    return compress


def largest(block: tuple[int, int], k: int, values: Any = None) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tensor(codec_reference.topk(x.detach().numpy(), block, k, values))


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype == torch.float64 for key in a)
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def assert_agrees(ours: Run, twin: Oracle | DataParallel | PostLocalSGD) -> None:
    """At every step and at the end, to 1e-12; and the same transfers, if the oracle has any."""
    assert len(ours.history) == len(twin.history)
    for t, ((theta, workers), (twin_theta, twin_workers)) in enumerate(
        zip(ours.history, twin.history, strict=True), start=1
    ):
        assert difference(theta, twin_theta) <= TOLERANCE, f"θ after step {t}"
        assert sorted(workers) == list(range(len(twin_workers)))
        for w, expected in enumerate(twin_workers):
            assert difference(workers[w], expected) <= TOLERANCE, f"worker {w} after step {t}"
    assert difference(ours.theta, twin.theta.state_dict()) <= TOLERANCE
    assert difference(ours.module, twin.theta.state_dict()) <= TOLERANCE
    for w, worker in enumerate(twin.workers):
        assert difference(ours.workers[w], worker.state_dict()) <= TOLERANCE, f"worker {w} at the end"
    assert ours.steps[0] == len(twin.history)
    if isinstance(twin, Oracle):
        assert_same_arrivals(ours, twin)


def assert_same_arrivals(ours: Run, twin: Oracle) -> None:
    assert [(r.step, r.sent_step, r.participants, r.names) for r in ours.reports] == [
        (s.arrived, s.step, tuple(s.participants), len(s.mean)) for s in twin.arrived
    ]
    assert [r.outer_step for r in ours.reports] == list(range(1, len(twin.arrived) + 1))
    assert ours.steps[1] == len(twin.arrived)
    for report, transfer in zip(ours.reports, twin.arrived, strict=True):
        if transfer.arrived == transfer.due:  # not one that a flush has hurried
            assert report.kind == transfer.kind
        norm = torch.cat([delta.flatten() for delta in transfer.mean.values()]).norm().item()
        assert report.pseudo_gradient_norm == pytest.approx(norm, rel=1e-9, abs=1e-12)
