"""Is a run the same however its workers are dealt over processes?"""

import csv
import os
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import schedulefree
import torch
import torch.distributed as dist
import torchmetrics
from helpers import Net, loader, regression_data, trainer
from lightning.pytorch import callbacks as C
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import CSVLogger
from processes import free_port, run
from test_algorithms import DataParallel, Gossip, PeriodicAveraging
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_diloco import DilocoCallback, DilocoSimulator, DilocoStrategy
from lightning_diloco.comm import means, world
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.tensors import bitwise_equal
from lightning_diloco.comm.world import World

LAYOUTS = [1, 2, 4]


class Project(Net):
    """Dropout, BatchNorm, a frozen layer that a hook moves, per-step and per-epoch logging, validation."""

    def __init__(self, optimizer: Any = None, batch_norm: bool = True, dropout: float = 0.2) -> None:
        super().__init__(optimizer, batch_norm, dropout)
        self.slow = nn.Linear(2, 2).requires_grad_(False)
        with torch.no_grad():
            self.slow.weight.fill_(0.5)
            self.slow.bias.fill_(0.5)

    def on_train_batch_start(self, batch, batch_idx):
        self.slow.weight.data.add_(self.net[0].weight.data[:2, :2], alpha=0.1)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("largest", loss, on_step=True, on_epoch=False, reduce_fx="max", sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)


class Watch(DilocoCallback):
    """Every metric that callbacks see after every step, and every report."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []
        self.reports: list[Any] = []

    def on_train_batch_end(self, trainer, *_):
        names = ("loss_step", "largest")
        self.steps.append({k: trainer.callback_metrics[k].item() for k in names})

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.epochs.append({k: trainer.callback_metrics[k].item() for k in ("val_loss",)})

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({k: v.item() for k, v in trainer.callback_metrics.items() if k == "loss_epoch"})

    def on_outer_step(self, trainer, pl_module, report):
        self.reports.append(report)


def train(
    folder: Path,
    devices: int,
    machines: int = 1,
    make: Any = Project,
    resume: Path | None = None,
    samples: int = 72,
    batch: int = 4,
    data: Any = None,
    strategy: dict[str, Any] | None = None,
    shuffle: bool = True,
    chunk: int = means.CHUNK,
    more: Any = list,
    **kwargs: Any,
) -> dict[str, Any]:
    """Everything that a run leaves behind on this rank."""
    L.seed_everything(5, verbose=False)
    module, watch = make(), Watch()
    means.CHUNK = chunk
    diloco = DilocoStrategy(**{"num_nodes": 4, "diloco_interval": 4, **(strategy or {})})
    t = trainer(
        diloco,
        devices=devices,
        num_nodes=machines,
        callbacks=[watch, *more()],
        **{"max_epochs": 3, "val_check_interval": 3, "default_root_dir": folder, **kwargs},
    )
    dtype = torch.float64 if kwargs.get("precision") == "64-true" else torch.float32
    train_data = loader(data or regression_data(samples, dtype=dtype), batch, shuffle=shuffle)
    t.fit(module, train_data, loader(regression_data(40, seed=9, dtype=dtype), 2, shuffle=False), ckpt_path=resume)
    t.save_checkpoint(folder / "end.ckpt")
    inner = diloco._engine.context.inner.workers
    return {
        "workers": {w: diloco.worker_state_dict(w) for w in diloco.local_workers},
        "inner": {w: [[v for v in s.values() if v] for s in inner[w].states] for w in diloco.local_workers},
        "theta": diloco.outer_state_dict(),
        "outer": diloco.outer_optimizer.state_dict(),
        "module": {k: v.clone() for k, v in module.state_dict().items()},
        "steps": watch.steps,
        "epochs": watch.epochs,
        "reports": watch.reports,
        "bytes": diloco.ledger.total_bytes,
        "done": (t.global_step, diloco.local_steps, diloco.outer_steps, t.world_size),
    }


def joined(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One result from those of all ranks, which must agree in what all have."""
    whole = dict(ranks[0])
    for other in ranks[1:]:
        for key in ("theta", "outer", "module", "steps", "bytes"):
            assert_equal(other[key], ranks[0][key])
    for key in ("workers", "inner"):
        whole[key] = {w: state for rank in ranks for w, state in rank[key].items()}
    return whole


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, whatever is inside."""
    if isinstance(a, torch.Tensor):
        assert bitwise_equal(a, b), f"{where}: {a} != {b}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert repr(a) == repr(b), f"{where}: {a} != {b}"  # so that NaN is itself


def layout(folder: Path, size: int, **kwargs: Any) -> dict[str, Any]:
    out = folder / f"{size} processes"
    out.mkdir()
    return joined(run(lambda: train(out, size, **kwargs), size, out=out / "results"))


class Spoilt(Project):
    """Worker 2's weights become NaN in the second round."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == 5 and self.current == 2 else loss

    @property
    def current(self) -> int | None:
        return self.trainer.strategy.current_worker


class Rests(Project):
    """The first process's workers learn nothing, so that only others have something to synchronise at the end."""

    def __init__(self) -> None:
        super().__init__(lambda p: torch.optim.SGD(p, lr=0.1), batch_norm=False)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float(self.trainer.strategy.current_worker >= 2)


class ComesAndGoes(Project):
    """Some workers have buffers that others lack, or of another shape; some never use a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.sometimes = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.bf16 = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("sizes", torch.zeros(1))
        self.register_buffer("codes", torch.arange(3, dtype=torch.int16))  # gloo can't send such numbers as they are,
        self.register_buffer("eighths", torch.ones(2).to(torch.float8_e4m3fn))  # nor these

    def training_step(self, batch, batch_idx):
        worker = self.trainer.strategy.current_worker
        loss = super().training_step(batch, batch_idx) + (self.scale * (1 + 1j)).abs().sum() + self.bf16.float().sum()
        self.codes.add_(worker + 1)
        self.eighths.copy_(torch.full((2,), worker + 1.0))
        if worker == 1:
            self.net.register_buffer("late", torch.full((2,), float(batch_idx)))
            self.sizes = torch.full((worker + batch_idx,), 2.0)
        if worker == 3:
            self.slow.register_buffer("never seen by the first", torch.ones(1))
        return loss + (self.sometimes(batch[0]).mean() if worker in (1, 2) else 0)


class Manual(Project):
    """Two optimizers, two schedulers stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            scheduler.step()
            self.untoggle_optimizer(optimizer)
        return loss

    def configure_optimizers(self):
        optimizers = [torch.optim.AdamW(self.net[i].parameters(), lr=1e-2) for i in (0, 4)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


class ScheduleFree(Project):
    def __init__(self) -> None:
        super().__init__(lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2))

    def on_train_epoch_start(self):
        self.optimizers().train()

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.optimizers().eval()

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.optimizers().train()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(regression_data(80))


def thirds(dataset: Any, num_workers: int) -> list[list[int]]:
    """Uneven parts of the data."""
    return [list(range(w, len(dataset) // (1 + w % 2), num_workers)) for w in range(num_workers)]


SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "small chunks": {"chunk": 5},
    "skip": {"make": Spoilt, "strategy": {"nonfinite": "skip"}},
    "propagate": {"make": Spoilt, "strategy": {"nonfinite": "propagate"}, "max_steps": 9},
    "comes and goes": {"make": ComesAndGoes, "strategy": {"inner_state": "average"}},
    "manual": {"make": Manual},
    "rests": {"make": Rests, "max_steps": 2},
    "schedule-free": {"make": ScheduleFree},
    "stream": {"data": Stream(), "shuffle": False},
    "partition": {"strategy": {"partition": thirds}},
    "data parallel": {"strategy": {"algorithm": DataParallel()}, "accumulate_grad_batches": 2, "chunk": 7},
    "gossip": {"strategy": {"algorithm": Gossip()}},
    "by hand": {"strategy": {"algorithm": PeriodicAveraging()}},
    "EMA, SWA, early stopping": {
        "more": lambda: [
            C.EMAWeightAveraging(decay=0.5),
            C.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
            C.EarlyStopping("val_loss", patience=5),
        ]
    },
    "first, reset": {"strategy": {"buffers": "first", "inner_state": "reset", "eval_weights": "worker"}},
    "local, average": {"strategy": {"buffers": "local", "inner_state": "average", "eval_weights": "outer"}},
    "accumulation, clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-true"},
    "plain average, H = 1": {"strategy": {"diloco_interval": 1, "outer_optimizer_kwargs": {"lr": 1.0}}},
}


@pytest.mark.filterwarnings("ignore:Worker 2 is left out", "ignore:.*does not have a length|.*IterableDataset")
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_layout_gives_the_same_bits(setting: str, tmp_path: Path) -> None:
    one, two, four = (layout(tmp_path, size, **SETTINGS[setting]) for size in LAYOUTS)
    assert one["done"][:3] == two["done"][:3] == four["done"][:3]
    for other in (two, four):
        for key in ("workers", "inner", "theta", "outer", "module", "steps", "bytes"):
            assert_equal(other[key], one[key], key)
        for mine, theirs in zip(one["epochs"], other["epochs"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-2 if setting == "bf16" else 1e-6, nan_ok=True)
        for mine, theirs in zip(one["reports"], other["reports"], strict=True):
            exact = ("step", "kind", "drift", "payload_bytes", "participants")
            assert repr([getattr(mine, k) for k in exact]) == repr([getattr(theirs, k) for k in exact])
            numbers = [[r.pseudo_gradient_norm, r.cosine] for r in (mine, theirs) if r.cosine is not None]
            assert numbers[:1] == [pytest.approx(n, rel=1e-9, abs=1e-12, nan_ok=True) for n in numbers[1:]]
    files = [torch.load(tmp_path / f"{size} processes" / "end.ckpt", weights_only=True) for size in LAYOUTS]
    for file in files:
        file["loops"] = {}
        del file["callbacks"]
    assert_equal(files[1], files[0], "file")
    assert_equal(files[2], files[0], "file")


def test_all_reduce_agrees_after_one_round(tmp_path: Path) -> None:
    """Its sums are in the back end's order."""
    setting: dict[str, Any] = {"max_steps": 4, "strategy": {"reduction": "all_reduce"}}
    one, two, four = (layout(tmp_path, size, **setting) for size in LAYOUTS)
    for other in (two, four):
        for key, value in other["theta"].items():
            torch.testing.assert_close(value, one["theta"][key], rtol=1e-6, atol=1e-7)
        assert other["bytes"] == one["bytes"]
        assert [r.drift for r in other["reports"]] == [r.drift for r in one["reports"]]
        norms = [[r.pseudo_gradient_norm for r in result["reports"]] for result in (one, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        assert [r.cosine for r in other["reports"]] == [None]  # nobody sees another's Δ


def test_all_reduce_in_teams_is_the_mean_of_the_workers(tmp_path: Path) -> None:
    setting: dict[str, Any] = {"make": smooth, "precision": "64-true", "samples": 80, "max_steps": 3}
    setting["strategy"] = {"num_nodes": 2, "diloco_interval": 3, "reduction": "all_reduce"}
    two, four = layout(tmp_path, 1, batch=8, **setting), layout(tmp_path, 4, batch=4, **setting)
    for key, value in two["theta"].items():
        torch.testing.assert_close(four["theta"][key], value, rtol=0, atol=1e-12)


def test_all_start_from_the_first_processs_weights_and_seed(tmp_path: Path) -> None:
    """Without `seed_everything`, and with generators that differ from process to process."""

    def fit(size: int) -> dict[str, Any]:
        torch.manual_seed(3 + 4 * int(os.environ.get("LOCAL_RANK", 0)))
        module = Project()
        nn.init.normal_(module.net[0].weight)
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=3)
        t = trainer(strategy, devices=size, max_steps=7, default_root_dir=tmp_path)
        t.fit(module, loader(regression_data(70), 4))
        return {w: strategy.worker_state_dict(w) for w in strategy.local_workers}

    (one,), two = run(fit, 1, 1, out=tmp_path / "one"), run(fit, 2, 2, out=tmp_path / "two")
    assert_equal(two[0] | two[1], one)


def test_auto_is_ordered_on_one_machine_and_all_reduces_across_machines(tmp_path: Path) -> None:
    def ordered(machines: int) -> tuple[bool, tuple[int, ...]]:
        strategy = DilocoStrategy(num_nodes=2)
        t = trainer(strategy, devices=2 // machines, num_nodes=machines, max_steps=1, default_root_dir=tmp_path)
        t.fit(Project(), loader())
        comm = strategy._engine.context.channel
        return comm.ordered, (strategy.num_nodes, t.num_nodes, t.world_size, t.node_rank, t.local_rank, t.global_rank)

    assert run(ordered, 2, 1, out=tmp_path / "1") == [(True, (1, 1, 2, 0, 0, 0)), (True, (1, 1, 2, 0, 1, 1))]
    assert run(ordered, 2, 2, out=tmp_path / "2", machines=2) == [
        (False, (2, 2, 2, 0, 0, 0)),
        (False, (2, 2, 2, 1, 0, 1)),
    ]


# -------------------------------------------------------------------------------------------- teams


def smooth(optimizer: Any = None) -> Project:
    """Without what depends on a batch's size or on random numbers."""
    return Project(optimizer, batch_norm=False, dropout=0.0)


TEAMS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "several buckets of gradients": {"chunk": 9},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.05},
    "average": {"strategy": {"inner_state": "average"}},
    "partition": {"strategy": {"partition": thirds}},
    "LBFGS": {"make": lambda: smooth(lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe")), "max_steps": 2},
}


@pytest.mark.parametrize("setting", TEAMS)
def test_teams_of_processes_are_workers_with_larger_batches(setting: str, tmp_path: Path) -> None:
    """'four processes on two workers with B each see what two workers with 2B see'"""
    common = {"make": smooth, "precision": "64-true", "samples": 80, **TEAMS[setting]}
    common["strategy"] = {"num_nodes": 2, "diloco_interval": 3, **common.get("strategy", {})}
    two = layout(tmp_path, 1, batch=8, **common)
    four = layout(tmp_path, 4, batch=4, **common)
    assert four["done"][:3] == two["done"][:3]
    assert four["workers"].keys() == two["workers"].keys() == {0, 1}
    tolerance = 1e-7 if setting == "LBFGS" else 1e-12  # its line searches amplify every rounding
    for worker, state in two["workers"].items():
        for key, value in state.items():
            torch.testing.assert_close(four["workers"][worker][key], value, rtol=0, atol=tolerance)
    for mine, theirs in zip(two["steps"], four["steps"], strict=True):
        assert mine["loss_step"] == pytest.approx(theirs["loss_step"], rel=tolerance)
    assert four["bytes"] == two["bytes"]


def test_gradients_travel_in_buckets_of_bounded_size() -> None:
    sizes = [4, 4, 3, 9, 1]
    parameters = [nn.Parameter(torch.zeros(n, dtype=d)) for n in sizes for d in (torch.float32, torch.float64)]
    buckets = list(world._buckets(parameters, 8))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[4, 4], [3], [9], [1]] * 2
    assert [{p.dtype for p in bucket} for bucket in buckets] == [{torch.float32}] * 4 + [{torch.float64}] * 4


class Plain(Net):
    """BatchNorm and dropout; no metrics that several processes would have to share."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__(dropout=0.2)
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if batch_idx % 2:
                optimizer = self.optimizers()
                self.clip_gradients(optimizer, 0.1, "norm")
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)


class OwnStep(Plain):
    """Calls the closure itself, which Lightning allows."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer.optimizer.step()


class ClipsAfterBackward(Plain):
    def on_after_backward(self):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


DDP: dict[str, dict[str, Any]] = {
    "on_after_backward": {"cls": ClipsAfterBackward},
    "as it comes": {},
    "accumulation, clipping": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    "manual": {"manual": True},
    "its own optimizer_step": {"cls": OwnStep},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("setting", DDP)
def test_one_worker_of_two_processes_is_lightnings_ddp(setting: str, seeded: bool, tmp_path: Path) -> None:
    def fit(strategy: Any) -> Any:
        options = dict(DDP[setting])
        if seeded:
            L.seed_everything(5, verbose=False)
            torch.rand(3)  # DDP starts its processes' generators from the seed again
        module = options.pop("cls", Plain)(manual=options.pop("manual", False))
        seen: list[Any] = []

        class Look(L.Callback):
            def on_train_batch_end(self, trainer, *_):
                seen.append(trainer.callback_metrics["loss_step"].item())

            def on_validation_end(self, trainer, *_):
                if trainer.lightning_module.automatic_optimization:  # else DDP leaves each process its own buffers
                    seen.append(trainer.callback_metrics["val_loss"].item())

        t = trainer(strategy(), devices=2, max_epochs=2, callbacks=[Look()], default_root_dir=tmp_path, **options)
        t.fit(module, loader(regression_data(70)), loader(regression_data(30), shuffle=False))
        return {k: v.clone() for k, v in module.state_dict().items()}, t.optimizers[0].state_dict(), seen, t.global_step

    def diloco() -> Any:
        return DilocoStrategy(num_nodes=1, diloco_interval=3, outer_optimizer_kwargs={"lr": 1.0})

    theirs = run(fit, 2, lambda: "ddp", out=tmp_path / "ddp")
    ours = run(fit, 2, diloco, out=tmp_path / "diloco")
    buffers = [k for k in theirs[0][0] if "running" in k or "tracked" in k]
    for mine, other in zip(ours, theirs, strict=True):
        assert_equal(
            {k: v for k, v in mine[0].items() if k not in buffers},
            {k: v for k, v in other[0].items() if k not in buffers},
        )
        assert_equal(mine[1:], other[1:])
    if setting != "manual":
        assert_equal(ours[0][0], theirs[0][0])  # DDP shares buffers before the next forward: the first process's hold
    assert_equal(ours[1][0], ours[0][0])


class Noisy(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(torch.randn_like(p), alpha=0.01)
        return loss


def test_members_of_a_team_that_drift_apart_are_noticed(tmp_path: Path) -> None:
    def fit() -> None:
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=3)
        t = trainer(strategy, devices=4, max_steps=3, default_root_dir=tmp_path)
        with pytest.warns(UserWarning, match=r"^The processes of worker [01] hold different weights at local step 3,"):
            t.fit(smooth(lambda p: Noisy(p, lr=0.1)), loader())

    run(fit, 4, out=tmp_path / "out")


# -------------------------------------------------------------------------------------------- exchange and logs


def test_pairs_that_cross_processes_in_either_direction_swap(tmp_path: Path) -> None:
    def talk(size: int) -> tuple[dict[int, float], float]:
        world = World(4, int(os.environ.get("LOCAL_RANK", 0)), size)
        if size > 1:
            dist.init_process_group("gloo", rank=world.rank, world_size=size)
            world.connect(None, {})
        over = Channel(world, lambda: 0)
        held = {w: {"x": torch.full((3,), float(w))} for w in world.workers}
        received = over.exchange([(0, 2), (3, 1)], ["x"], held.__getitem__)
        mean = over.mean(["x"], held.__getitem__, workers=[2, 0], weights=[3, 1])["x"][0].item()
        return {w: tensors["x"][2].item() for w, tensors in received.items()}, mean

    for size in LAYOUTS:
        results = run(talk, size, size, out=tmp_path / str(size))
        assert {w: v for received, _ in results for w, v in received.items()} == {0: 2.0, 1: 3.0, 2: 0.0, 3: 1.0}
        assert [mean for _, mean in results] == [1.5] * size


def test_logs_per_worker_are_complete_on_the_first_process(tmp_path: Path) -> None:
    def logged(size: int) -> list[dict[str, str]]:
        folder = tmp_path / f"logs of {size}"
        L.seed_everything(5, verbose=False)
        t = trainer(
            DilocoStrategy(num_nodes=4, diloco_interval=4),
            devices=size,
            max_steps=5,
            callbacks=[DilocoCallback(per_worker=True)],
            logger=CSVLogger(folder, name="", version=""),
        )
        t.fit(Project(), loader(regression_data(72), 4))
        if not t.is_global_zero:
            return []
        with open(folder / "metrics.csv") as file:
            return [{k: v for k, v in row.items() if "worker" in k and v} for row in csv.DictReader(file)]

    def of_teams(size: int) -> dict[str, float]:
        L.seed_everything(5, verbose=False)
        t = trainer(
            DilocoStrategy(num_nodes=2, diloco_interval=4),
            devices=size,
            max_steps=1,
            callbacks=[DilocoCallback(per_worker=True)],
            logger=CSVLogger(tmp_path / f"teams {size}", name="", version=""),
            precision="64-true",
        )
        t.fit(smooth(), loader(regression_data(80, dtype=torch.float64), 16 // size if size > 1 else 8))
        if not t.is_global_zero:
            return {}
        with open(tmp_path / f"teams {size}" / "metrics.csv") as file:
            rows = [{k: float(v) for k, v in r.items() if "step/worker" in k and v} for r in csv.DictReader(file)]
        return {k: v for row in rows for k, v in row.items()}

    teams = [run(of_teams, size, size, out=tmp_path / f"out {size}")[0] for size in (1, 4)]
    assert teams[0].keys() == {"loss_step/worker_0", "loss_step/worker_1"}
    assert teams[1] == pytest.approx(teams[0], rel=1e-12)  # of a team: the mean over its members
    one, two, four = (run(logged, size, size, out=tmp_path / str(size))[0] for size in LAYOUTS)
    assert {key for row in one for key in row} >= {f"loss_step/worker_{w}" for w in range(4)}
    assert one == two == four


def test_a_validation_by_the_clock_comes_after_the_same_step_everywhere(tmp_path: Path) -> None:
    class Slow(Project):
        def training_step(self, batch, batch_idx):
            time.sleep(0.01 + 0.02 * self.trainer.global_rank)
            return self.loss(batch)

        def on_validation_start(self):
            validated.append(self.trainer.global_step)

    validated: list[int] = []

    def fit() -> list[int]:
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=50, timeout=timedelta(seconds=20))
        t = trainer(
            strategy, devices=2, max_steps=60, max_epochs=-1, val_check_interval="00:00:00:01",
            check_val_every_n_epoch=None, default_root_dir=tmp_path, num_sanity_val_steps=0,
        )  # fmt: skip
        t.fit(Slow(), loader(regression_data(80)), loader(regression_data(8), shuffle=False))
        return validated

    first, second = run(fit, 2, out=tmp_path / "out")
    assert first == second
    assert first


class Gap(Project):
    """Worker 1 leaves out its second step, worker 3 its third; another may log an integer metric of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        worker = self.trainer.strategy.current_worker
        self.count(worker)
        self.log("count", self.count, on_step=True, on_epoch=True, sync_dist=True)
        self.log("truth", torch.tensor(worker > 1), on_step=True, on_epoch=True, sync_dist=True)
        loss = super().training_step(batch, batch_idx)
        return None if (worker, batch_idx) in ((1, 1), (3, 2)) else loss

    def __init__(self) -> None:
        super().__init__()
        self.count = WholeSum()


class WholeSum(torchmetrics.Metric):
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, value: int) -> None:
        self.total += value

    def compute(self) -> Any:
        return self.total


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.filterwarnings("ignore:You called `self.log.*needs to be floating")
def test_a_worker_may_leave_out_a_step_wherever_it_is_hosted_and_log_whole_numbers(tmp_path: Path) -> None:
    def fit() -> dict[str, Any]:
        L.seed_everything(3)
        strategy, module, steps = DilocoStrategy(num_nodes=4, diloco_interval=2, reduction="ordered"), Gap(), Watch()
        size = int(os.environ.get("WORLD_SIZE", 1))
        t = trainer(strategy, devices=size, max_steps=4, default_root_dir=tmp_path, callbacks=[steps])
        t.fit(module, loader())
        logged = {k: v.item() for k, v in t.callback_metrics.items() if k.startswith(("count", "truth"))}
        weights = {k: v for k, v in module.state_dict().items() if not k.startswith("count")}
        return {"weights": weights, "logged": logged, "local": strategy.local_steps, "steps": steps.steps}

    (one,) = run(fit, 1, out=tmp_path / "one")
    two = run(fit, 2, out=tmp_path / "two")
    assert one["logged"]["count_step"] == 1.5  # workers 0, 1, 2, 3
    assert one["logged"]["truth_step"] == 0.5
    for process in two:
        for name, value in one["weights"].items():
            assert bitwise_equal(process["weights"][name], value), name
        assert process["local"] == one["local"] == 4
        assert process["logged"] == one["logged"]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_team_cannot_leave_out_a_step(tmp_path: Path) -> None:
    def fit() -> str:
        class Nothing(Plain):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                return None

        with pytest.raises(RuntimeError) as error:
            trainer(DilocoStrategy(2), devices=4, max_steps=2, default_root_dir=tmp_path).fit(Nothing(), loader())
        return str(error.value)

    assert {m.partition(" in")[0] for m in run(fit, 4, out=tmp_path / "out")} == {
        "Skipping the `training_step` by returning None"
    }


def test_workers_may_log_in_an_order_of_their_own(tmp_path: Path) -> None:
    class LogsInTurn(Net):
        def training_step(self, batch, batch_idx):
            w = self.trainer.strategy.current_worker
            both = {"on_step": True, "on_epoch": True, "sync_dist": True}
            if w in (0, 3):
                self.log("some", float(w), **both)
            self.log("sum", 1.0, reduce_fx="sum", **both)
            self.log("largest", float(w + batch_idx), reduce_fx="max", **both)
            if w in (1, 2):
                self.log("some", float(w), **both)
                self.log("others", float(w), **both)
            return self.loss(batch)

    def logged(size: int) -> dict[str, float]:
        t = trainer(
            DilocoStrategy(num_nodes=4, diloco_interval=4), devices=size, max_epochs=1, default_root_dir=tmp_path
        )
        t.fit(LogsInTurn(), loader())
        return {k: v.item() for k, v in t.callback_metrics.items()}

    (one,), two = run(logged, 1, 1, out=tmp_path / "1"), run(logged, 2, 2, out=tmp_path / "2")
    assert one["largest"] == 3 + 5
    assert (one["some"], one["others"], one["sum"]) == (1.5, 1.5, 24.0)
    assert two == [one, one]


def test_the_process_group_may_be_destroyed_between_fits(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]

    def fit() -> int:
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=4)
        for port in ports:
            os.environ["MASTER_PORT"] = str(port)
            strategy.cluster_environment = None  # which remembers the port
            trainer(strategy, devices=2, max_steps=5, default_root_dir=tmp_path).fit(Project(), loader())
            dist.destroy_process_group()
        return strategy.local_steps

    assert run(fit, 2, out=tmp_path / "out") == [5, 5]


def test_barriers_may_have_names_of_their_own(tmp_path: Path) -> None:
    def gather_all() -> int:
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=4)
        t = trainer(strategy, devices=2, max_steps=2, default_root_dir=tmp_path)
        t.fit(Project(), loader())
        strategy.barrier(f"process {t.global_rank} is here")
        return strategy.local_steps

    assert run(gather_all, 2, out=tmp_path / "out") == [2, 2]


def test_an_outer_optimizer_may_have_objects_among_its_arguments(tmp_path: Path) -> None:
    """Their addresses, which ``repr`` shows, differ from process to process."""

    class Scaled(torch.optim.SGD):
        def __init__(self, parameters: Any, scale: Any) -> None:
            super().__init__(parameters, lr=0.7)
            self.defaults["scale"] = scale

    def fit() -> int:
        kept = [object() for _ in range(1 + 100 * int(os.environ["LOCAL_RANK"]))]
        kwargs = {"scale": kept[-1]}
        strategy = DilocoStrategy(num_nodes=2, outer_optimizer_cls=Scaled, outer_optimizer_kwargs=kwargs)
        trainer(strategy, devices=2, max_steps=3, default_root_dir=tmp_path).fit(Project(), loader())
        return strategy.outer_steps

    assert run(fit, 2, out=tmp_path / "out") == [1, 1]


# -------------------------------------------------------------------------------------------- checkpoints


class Save(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [4, 6, 11])
def test_a_file_of_any_layout_resumes_on_any_other(step: int, tmp_path: Path) -> None:
    """On a synchronisation, in mid-round, and at an epoch's end in mid-round."""
    torch.manual_seed(0)
    whole = layout(tmp_path, 1)

    def interrupted(size: int, path: Path) -> None:
        L.seed_everything(5, verbose=False)
        t = trainer(
            DilocoStrategy(num_nodes=4, diloco_interval=4),
            devices=size,
            max_steps=step,
            callbacks=[Save(step, path)],
            max_epochs=3,
            val_check_interval=3,
            default_root_dir=tmp_path,
        )
        t.fit(Project(), loader(regression_data(72), 4), loader(regression_data(40, seed=9), 2, shuffle=False))

    def resumed(size: int, folder: Path, path: Path) -> dict[str, Any]:
        return train(folder, size, resume=path)

    for size in LAYOUTS:
        path = tmp_path / f"{size}.ckpt"
        run(interrupted, size, size, path, out=tmp_path / f"from{size}")
    for source in LAYOUTS:
        for target in LAYOUTS:
            folder = tmp_path / f"{source} to {target}"
            folder.mkdir()
            result = joined(run(resumed, target, target, folder, tmp_path / f"{source}.ckpt", out=folder / "results"))
            for key in ("workers", "inner", "theta", "outer", "module", "bytes"):
                assert_equal(result[key], whole[key], f"{source} to {target}: {key}")
            assert_equal(result["steps"], whole["steps"][step:], f"{source} to {target}")


@pytest.mark.parametrize("step", [3, 4])
def test_teams_resume_where_they_were(step: int, tmp_path: Path) -> None:
    """With a random stream per process, and in the middle of an accumulation."""
    setting: dict[str, Any] = {
        "strategy": {"num_nodes": 2, "diloco_interval": 4},
        "accumulate_grad_batches": 2,
        "batch": 2,
        "max_steps": 9,
    }

    def resumed(path: Path) -> dict[str, Any]:
        return train(tmp_path, 4, resume=path, **setting)

    class SaveInWindow(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0 and batch_idx == 2 * step:
                trainer.save_checkpoint(tmp_path / "window.ckpt")

    whole = layout(tmp_path, 4, more=lambda: [SaveInWindow()], **setting)
    again = joined(run(resumed, 4, tmp_path / "window.ckpt", out=tmp_path / "resumed"))
    for key in ("workers", "inner", "theta", "outer", "bytes"):
        assert_equal(again[key], whole[key], key)
    state = torch.load(tmp_path / "window.ckpt", weights_only=True)["diloco"]
    assert [[m.keys() for m in state["workers"][w]["team"]] for w in range(2)] == [[{"random", "gradients"}]] * 2
    random = [m["random"]["cpu"] for w in range(2) for m in (state["workers"][w], *state["workers"][w]["team"])]
    assert len({tuple(r.tolist()) for r in random}) == 4
    with pytest.warns(
        UserWarning, match=r"^Resuming workers of 2 processes each with 1: the batch of a worker is now 1"
    ):
        train(tmp_path, 1, resume=tmp_path / "window.ckpt", **setting)


# -------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize(("workers", "size"), [(2, 2), (4, 2), (4, 4), (2, 4)])
@pytest.mark.parametrize("reduction", ["ordered", "all_reduce"])
def test_bytes_handed_to_collectives_match_the_closed_form(
    workers: int, size: int, reduction: Any, tmp_path: Path
) -> None:
    """n = workers per process, k = processes per worker, P = bytes of the model (here a multiple of 4·W numbers)."""

    def sent() -> dict[str, int]:
        counts = {"to owners": 0, "results": 0, "all_reduce": 0}
        plain = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather", "all_reduce")}

        def all_to_all_single(output, given, output_sizes, sizes):
            own = sizes[dist.get_rank()]
            counts["to owners"] += (given.numel() - own) * given.itemsize
            assert given.nbytes <= 4 * means.CHUNK  # float32, all workers of the process together
            return plain["all_to_all_single"](output, given, output_sizes, sizes)

        def all_gather(output, given, **kwargs):
            counts["results"] += (dist.get_world_size() - 1) * given.nbytes
            return plain["all_gather"](output, given, **kwargs)

        def all_reduce(tensor, **kwargs):
            if kwargs.get("group") is None:  # the workers', not a team's
                counts["all_reduce"] += 2 * (dist.get_world_size() - 1) * tensor.nbytes // dist.get_world_size()
            return plain["all_reduce"](tensor, **kwargs)

        dist.all_to_all_single, dist.all_gather, dist.all_reduce = all_to_all_single, all_gather, all_reduce
        means.CHUNK = 32  # half of the model
        module = BoringModel()
        module.layer = nn.Linear(32, 2, bias=False)
        module.training_step = lambda batch, batch_idx: module.layer(batch).square().mean()
        strategy = DilocoStrategy(num_nodes=workers, diloco_interval=4, reduction=reduction)
        t = trainer(strategy, devices=size, max_steps=12, limit_val_batches=0, default_root_dir=tmp_path)
        t.fit(module, DataLoader(RandomDataset(32, 64)))
        assert strategy.outer_steps == 3
        assert strategy.ledger.total_bytes == 3 * 256  # what a worker would send to a server
        return counts

    n, k, rounds, model = max(1, workers // size), max(1, size // workers), 3, 256
    expected = {
        "to owners": rounds * n * model * (size // k - 1) // size,
        "results": rounds * model * (size - 1) // size,
        "all_reduce": rounds * 2 * model * (size - 1) // size,
    }
    for counts in run(sent, size, out=tmp_path / "out"):
        unused = ("all_reduce",) if reduction == "ordered" else ("to owners", "results")
        assert counts == {**expected, **dict.fromkeys(unused, 0)}


# -------------------------------------------------------------------------------------------- the facade


def numbers(stats: Any) -> dict[str, float]:
    return {key: -1.0 if value is None else value for key, value in asdict(stats).items()}


def test_the_simulator_gives_the_same_statistics_over_two_processes(tmp_path: Path) -> None:
    def simulate(size: int, path: str | None = None) -> tuple[list[Any], dict[str, Any]]:
        stats: list[Any] = []
        data = regression_data(70, dtype=torch.float64)
        simulator = DilocoSimulator(
            model_cls=nn.Linear,
            model_kwargs={"in_features": 3, "out_features": 1, "dtype": torch.float64},
            train_dataset=data,
            eval_dataset=data,
            loss_fn=nn.functional.mse_loss,
            num_nodes=4,
            diloco_interval=3,
            batch_size=2,
            num_epochs=2,
            train_loss_hook=stats.append,
            eval_loss_hook=stats.append,
            ckpt_interval=2,
            save_dir=str(tmp_path / str(size)),
            seed=1,
            trainer_kwargs={"accelerator": "cpu", "devices": size, "enable_progress_bar": False},
        )
        simulator.train(ckpt_path=path)
        return stats, {k: v.clone() for k, v in simulator.model.state_dict().items()}

    (one,), two = run(simulate, 1, 1, out=tmp_path / "a"), run(simulate, 2, 2, out=tmp_path / "b")
    assert two[1][0] == []  # hooks run on the first process
    assert [type(s) for s in one[0]] == [type(s) for s in two[0][0]]
    for mine, theirs in zip(one[0], two[0][0], strict=True):
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-12)
    for _, state in two:
        assert_equal(state, one[1])
    resumed = run(simulate, 2, 2, str(tmp_path / "1" / "step=000006.ckpt"), out=tmp_path / "c")
    assert_equal(resumed[0][1], one[1])
    after = [s for s in one[0] if s.local_step > 6]
    for mine, theirs in zip(after, resumed[0][0], strict=True):
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-12)


def test_a_hook_of_the_simulator_stops_all_processes(tmp_path: Path) -> None:
    def simulate() -> tuple[int, int]:
        def hook(stats: Any) -> None:
            simulator.trainer.should_stop = stats.local_step == 4

        simulator = DilocoSimulator(
            model_cls=nn.Linear,
            model_kwargs={"in_features": 3, "out_features": 1},
            train_dataset=regression_data(70),
            loss_fn=nn.functional.mse_loss,
            num_nodes=2,
            diloco_interval=3,
            batch_size=2,
            train_loss_hook=hook,
            trainer_kwargs={"accelerator": "cpu", "devices": 2, "enable_progress_bar": False},
        )
        simulator.train()
        return simulator.strategy.local_steps, simulator.strategy.outer_steps

    assert run(simulate, 2, out=tmp_path) == [(4, 2)] * 2
