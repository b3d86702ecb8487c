"""Is a run the same however its workers are spread over processes?"""

import os
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from algorithms import Gossip, PeriodicAveraging
from helpers import assert_equal, loader, regression_data, slow_but, trainer
from layouts import LAYOUTS, Project, layout, smooth, thirds
from lightning.pytorch import callbacks as C
from processes import run
from torch import nn
from torch.utils.data import IterableDataset

from lightning_diloco import DataParallel, DilocoStrategy

pytestmark = pytest.mark.processes


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
@pytest.mark.parametrize("setting", slow_but({"as it comes"}, SETTINGS))
def test_every_layout_gives_the_same_bits(setting: str, tmp_path: Path) -> None:
    one, two, four = (layout(tmp_path, size, **SETTINGS[setting]) for size in LAYOUTS)
    assert one["done"][:3] == two["done"][:3] == four["done"][:3]
    for other in (two, four):
        for key in ("workers", "inner", "theta", "outer", "module", "steps", "bytes"):
            assert_equal(other[key], one[key], key)
        for mine, theirs in zip(one["epochs"], other["epochs"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-2 if setting == "bf16" else 1e-6, nan_ok=True)
        for mine, theirs in zip(one["reports"], other["reports"], strict=True):
            exact = ("step", "kind", "payload_bytes", "participants", "sent_step", "tag", "names")
            assert repr([getattr(mine, k) for k in exact]) == repr([getattr(theirs, k) for k in exact])
            numbers = [[r.pseudo_gradient_norm, r.cosine, *r.drift] for r in (mine, theirs) if r.cosine is not None]
            assert numbers[:1] == [pytest.approx(n, rel=1e-6, abs=1e-9, nan_ok=True) for n in numbers[1:]]
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
        drifts = [[r.drift for r in result["reports"]] for result in (one, other)]
        assert drifts[0] == [pytest.approx(d, rel=1e-6) for d in drifts[1]]
        norms = [[r.pseudo_gradient_norm for r in result["reports"]] for result in (one, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        (weighted,), (plain,) = other["reports"], one["reports"]  # nobody sees two workers' Δ at the same time
        assert (weighted.cosine_weighted, weighted.cosine_matrix) == (True, None)
        assert weighted.norms == pytest.approx(plain.norms, rel=1e-5)
        assert weighted.cosines_with_mean == pytest.approx(plain.cosines_with_mean, abs=1e-5)
        pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
        shares = [plain.norms[i] * plain.norms[j] for i, j in pairs]
        mean = sum(s * plain.cosine_matrix[i][j] for s, (i, j) in zip(shares, pairs, strict=True)) / sum(shares)
        assert weighted.cosine == pytest.approx(mean, abs=1e-5)


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
