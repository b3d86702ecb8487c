"""Inner optimizers that keep state in their groups, change them inside the step, or hold other optimizers."""

from typing import Any

import lightning as L
import prodigyopt
import pytest
import schedulefree
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, slow_but, trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_diloco import DilocoStrategy

SEED = 5


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: climbs, then lets its base optimizer step from the old place."""

    def __init__(self, params: Any, rho: float = 0.05, lr: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=group["rho"] / (norm.item() + 1e-12))
        torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base.step()
        return loss


class WarmsUp(torch.optim.SGD):
    """Counts its steps in the groups and sets its own learning rate."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = 0.01 * group["k"]
        return super().step(closure)


class TrainEval(Net):
    """Switches a schedule-free optimizer as its authors say: eval before validation, train after it."""

    def __init__(self, make: Any) -> None:
        super().__init__(make, batch_norm=False)
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_start(self):
        self.optimizers().train()

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.optimizers().eval()
            self.seen.append(copy_of(dict(self.named_parameters())))

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.optimizers().train()


OPTIMIZERS: dict[str, Any] = {
    "AdamWScheduleFree": lambda: TrainEval(lambda p: schedulefree.AdamWScheduleFree(p, lr=0.02, warmup_steps=3)),
    "SGDScheduleFree": lambda: TrainEval(lambda p: schedulefree.SGDScheduleFree(p, lr=0.1)),
    "Prodigy": lambda: Net(lambda p: prodigyopt.Prodigy(p, lr=1.0, d_coef=0.5), batch_norm=False),
    "SAM": lambda: Net(SAM, batch_norm=False),
    "own warm-up": lambda: Net(lambda p: WarmsUp(p, lr=1.0), batch_norm=False),
    "Muon": lambda: OnlyMatrices(lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=0.02)),
    "Adafactor": lambda: Net(lambda p: torch.optim.Adafactor(p, lr=0.05), batch_norm=False),
    "Adagrad": lambda: Net(lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1)),
    "NAdam": lambda: Net(lambda p: torch.optim.NAdam(p, lr=0.01)),
    "ASGD": lambda: Net(lambda p: torch.optim.ASGD(p, lr=0.05)),
    "Rprop": lambda: Net(lambda p: torch.optim.Rprop(p, lr=0.01)),
}


class OnlyMatrices(Net):
    def __init__(self, make: Any) -> None:
        super().__init__(make, batch_norm=False)
        for p in self.parameters():
            p.requires_grad_(p.ndim == 2)


def control(optimizer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@pytest.mark.parametrize("name", slow_but(["AdamWScheduleFree", "Prodigy", "Muon"], OPTIMIZERS))
def test_every_replica_is_its_own_run(name: str) -> None:
    data = regression_data(40)
    L.seed_everything(SEED, verbose=False)
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=10**6, final_sync=False)
    trainer(strategy, max_epochs=3, limit_val_batches=0).fit(OPTIMIZERS[name](), loader(data, 3))
    workers = strategy._engine.context.inner.workers
    for w in range(3):
        shard = DistributedSampler(data, num_replicas=3, rank=w, seed=SEED)
        solo, module = trainer(max_epochs=3, limit_val_batches=0), OPTIMIZERS[name]()
        solo.fit(module, DataLoader(data, 3, sampler=shard))
        assert_same(strategy.worker_state_dict(w), copy_of(module.state_dict()))
        assert workers[w].control[0] == control(solo.optimizers[0])


@pytest.mark.parametrize("name", slow_but({"Prodigy", "Adafactor", "own warm-up"}, OPTIMIZERS))
def test_one_worker_is_the_plain_run(name: str) -> None:
    states = []
    for strategy in ("auto", DilocoStrategy(num_nodes=1, diloco_interval=2, outer_optimizer_kwargs={"lr": 1.0})):
        L.seed_everything(SEED, verbose=False)
        module = OPTIMIZERS[name]()
        t = trainer(strategy, val_check_interval=3)
        t.fit(module, loader(), loader(shuffle=False))
        states.append((copy_of(module.state_dict()), control(t.optimizers[0])))
    assert_same(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_eval_in_a_validation_hook_shows_the_mean_evaluation_weights_and_disturbs_nothing(name: str) -> None:
    """Schedule-free: x = y + (1 − 1/β)(z − y), linear in both, so the means of y and z give the mean of the x_i."""

    def run(**kwargs: Any) -> Any:
        L.seed_everything(SEED, verbose=False)
        module, strategy = OPTIMIZERS[name](), DilocoStrategy(num_nodes=3, diloco_interval=5)
        expected: list[Any] = []

        class Look(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                if trainer.global_step % 3 == 0:
                    expected.append(mean_evaluation_weights(trainer.strategy))

        t = trainer(strategy, callbacks=[Look()], max_epochs=1, **kwargs)
        t.fit(module, loader(), loader(shuffle=False))
        return module, expected, [strategy.worker_state_dict(w) for w in range(3)]

    module, expected, replicas = run(val_check_interval=3)
    assert len(module.seen) == len(expected) == 2
    for shown, mean in zip(module.seen, expected, strict=True):
        for key, value in shown.items():
            torch.testing.assert_close(value, mean[key], rtol=1e-5, atol=1e-6)
    _, _, quiet = run(limit_val_batches=0)
    for mine, theirs in zip(replicas, quiet, strict=True):
        assert_same(mine, theirs)


def mean_evaluation_weights(strategy: DilocoStrategy) -> dict[str, torch.Tensor]:
    """Each worker's x from its own y and z, in its own arithmetic, then the mean."""
    names = {id(p): n for n, p in strategy._engine.module.named_parameters()}
    weights: dict[str, list[torch.Tensor]] = {}
    for w in strategy.local_workers:
        worker = strategy._engine.context.inner.workers[w]
        (group,) = worker.control[0]
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        for p, state in worker.states[0].items():
            y = strategy._engine.context.replicas.tensors(w)[names[id(p)]]
            weights.setdefault(names[id(p)], []).append(y + (1 - 1 / beta) * (state["z"] - y))
    return {n: torch.stack(xs).mean(0) for n, xs in weights.items()}


def test_changes_between_turns_apply_to_all_workers_and_those_inside_stay() -> None:
    seen: list[Any] = []

    class Outside(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                trainer.optimizers[0].param_groups[0]["lr"] = 0.5

    class Inside(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            (group,) = optimizer.param_groups
            if batch_idx == 1:
                group["lr"] = 0.1 * (1 + self.trainer.strategy.current_worker)
            seen.append((batch_idx, group["lr"]))
            optimizer.step(closure=optimizer_closure)

    t = trainer(DilocoStrategy(num_nodes=3), callbacks=[Outside()], max_steps=5)
    t.fit(Inside(lambda p: torch.optim.SGD(p, lr=0.01)), loader())
    rates = [[lr for b, lr in seen if b == batch] for batch in range(5)]
    own = pytest.approx([0.1, 0.2, 0.3])
    assert rates == [[0.01] * 3, own, own, [0.5] * 3, [0.5] * 3]
