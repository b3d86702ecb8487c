"""Are several processes of a worker that worker with larger batches?"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_equal, loader, regression_data, slow_but, trainer
from layouts import Plain, layout, smooth, thirds
from processes import run
from torch import nn

from lightning_diloco import DilocoStrategy
from lightning_diloco.comm import world

pytestmark = pytest.mark.processes

TEAMS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "several buckets of gradients": {"chunk": 9},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.05},
    "average": {"strategy": {"inner_state": "average"}},
    "partition": {"strategy": {"partition": thirds}},
    "LBFGS": {"make": lambda: smooth(lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe")), "max_steps": 2},
}


@pytest.mark.parametrize("setting", slow_but({"as it comes"}, TEAMS))
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


@pytest.mark.parametrize("seeded", slow_but([True], [True, False]))
@pytest.mark.parametrize("setting", slow_but({"as it comes", "manual"}, DDP))
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
