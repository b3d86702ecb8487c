"""Do processes exchange, log and leave out steps as workers of a single process do?"""

import csv
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from helpers import Net, loader, regression_data, trainer
from layouts import LAYOUTS, Plain, Project, Watch, smooth
from lightning.pytorch.loggers import CSVLogger
from processes import free_port, run

from lightning_diloco import DilocoCallback, DilocoStrategy
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.tensors import bitwise_equal
from lightning_diloco.comm.world import World

pytestmark = pytest.mark.processes


def test_a_mean_over_some_workers_has_their_weights_on_every_process(tmp_path: Path) -> None:
    def talk(size: int) -> float:
        world = World(4, int(os.environ.get("LOCAL_RANK", 0)), size)
        if size > 1:
            dist.init_process_group("gloo", rank=world.rank, world_size=size)
            world.connect(None, {})
        over = Channel(world, lambda: 0)
        held = {w: {"x": torch.full((3,), float(w))} for w in world.workers}
        return over.mean(["x"], held.__getitem__, workers=[2, 0], weights=[3, 1])["x"][0].item()

    for size in LAYOUTS:
        assert run(talk, size, size, out=tmp_path / str(size)) == [1.5] * size


@pytest.mark.slow
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
            mine = [{k: v for k, v in row.items() if "/worker_" in k and v} for row in csv.DictReader(file)]
        # the strategy's own numbers are measured in float32 blocks, which layouts cut differently
        return [{k: v for k, v in row.items() if not k.startswith("diloco_workers/")} for row in mine]

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


@pytest.mark.slow
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
