"""Is each worker an ordinary training run of its own, between synchronisations?"""

from collections import defaultdict
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, slow_but, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler

from lightning_diloco import DilocoStrategy
from lightning_diloco.comm.tensors import copied
from lightning_diloco.state.randomness import RandomStream, derive_seed

SEED = 5
FAR = 10**6  # no outer step in reach


class Adam(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 4, 0.5), "interval": "step"}]


class Momentum(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class TwoByHand(Net):
    """Manual optimization: two optimizers, schedulers, toggling, clipping, accumulation by hand."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = torch.optim.SGD(self.net[0].parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.Adam(self.net[-1].parameters(), lr=0.01)
        return [first, second], [lr_scheduler.StepLR(first, 3, 0.5), lr_scheduler.ExponentialLR(second, 0.9)]

    def training_step(self, batch, batch_idx):
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            with optimizer.toggle_model():
                self.manual_backward(self.loss(batch))
            if batch_idx % 2 == 1:
                self.clip_gradients(optimizer, 0.1, "norm")
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()


def scaled() -> dict[str, Any]:
    # the scale starts where the first steps overflow, so that skipping and growth differ between workers
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


CASES: dict[str, tuple[Any, Any]] = {
    "adamw": (Adam, dict),
    "momentum": (Momentum, dict),
    "clip": (Adam, lambda: {"gradient_clip_val": 0.05}),
    "accumulate": (Momentum, lambda: {"accumulate_grad_batches": 2}),
    "dropout": (lambda: Adam(dropout=0.5), dict),
    "16-mixed": (Momentum, scaled),
    "16-mixed-accumulate": (Momentum, lambda: {**scaled(), "accumulate_grad_batches": 2}),
    "bf16-mixed": (Adam, lambda: {"precision": "bf16-mixed"}),
    "64-true": (Adam, lambda: {"precision": "64-true"}),
    "manual": (TwoByHand, dict),
    "lbfgs": (lambda: Net(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)), dict),
}


class OwnStream(L.Callback):
    """Puts the plain run on the random stream of worker ``index``."""

    def __init__(self, index: int) -> None:
        self.state = RandomStream(derive_seed(SEED, "worker", index, 0)).cpu_state

    def on_train_start(self, trainer, pl_module):
        torch.set_rng_state(self.state)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize("name", slow_but(["adamw", "accumulate", "manual"], CASES))
def test_without_an_outer_step_every_replica_is_its_own_trainer_on_its_shard(name: str) -> None:
    make, options = CASES[name]
    data = regression_data(42)  # not divisible by 4: the shards are padded
    L.seed_everything(SEED, verbose=False)
    strategy = DilocoStrategy(num_nodes=4, diloco_interval=FAR, final_sync=False)
    t = trainer(strategy, max_epochs=3, **options())
    t.fit(make(), loader(data, 3))
    states = strategy._engine.context.inner.workers

    replicas = []
    for worker in range(4):
        L.seed_everything(SEED, verbose=False)
        shard = DistributedSampler(data, num_replicas=4, rank=worker, seed=SEED)
        own = DataLoader(data, 3, sampler=shard, generator=torch.Generator())
        solo, module = trainer(callbacks=[OwnStream(worker)], max_epochs=3, **options()), make()
        solo.fit(module, own)
        assert_same(strategy.worker_state_dict(worker), module.state_dict())
        replicas.append(copy_of(module.state_dict()))
        for mine, optimizer in zip(states[worker].states, solo.optimizers, strict=True):
            assert str(list(mine.values())) == str(list(optimizer.state.values()))
        if name.startswith("16-mixed"):
            assert states[worker].scaler.state_dict() == solo.precision_plugin.scaler.state_dict()
        assert t.global_step == solo.global_step
    assert not torch.equal(replicas[0]["net.0.weight"], replicas[1]["net.0.weight"])


class Clamped(Net):
    """Weight clamping after every batch, which must act on each replica."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.3, 0.3)


class Teacher(Net):
    """A frozen exponential moving average of the student, updated after every batch without a trace (`.data`)."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.teacher = torch.nn.Linear(3, 8).requires_grad_(False)
        self.teacher.load_state_dict(self.net[0].state_dict())

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for slow, fast in zip(self.teacher.parameters(), self.net[0].parameters(), strict=True):
            slow.data.mul_(0.9).add_(fast.data, alpha=0.1)


@pytest.mark.parametrize("make", [Clamped, Teacher])
def test_what_a_module_writes_after_each_batch_acts_on_every_replica(make: Any) -> None:
    L.seed_everything(SEED, verbose=False)
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=FAR, final_sync=False)
    trainer(strategy, max_epochs=2).fit(make(), loader(regression_data(30), 2))
    for worker in range(3):
        shard = DistributedSampler(regression_data(30), num_replicas=3, rank=worker, seed=SEED)
        module = make()
        trainer(max_epochs=2).fit(module, DataLoader(regression_data(30), 2, sampler=shard))
        assert_same(strategy.worker_state_dict(worker), module.state_dict())
        if make is Clamped:
            assert all(v.abs().max() <= 0.3 for k, v in module.named_parameters())


def test_a_teacher_is_averaged_at_a_synchronisation_and_left_alone_by_the_outer_optimizer() -> None:
    seen: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append([trainer.strategy.worker_state_dict(w) for w in range(3)])

    class Frozen(Teacher):
        """The teacher moves before the step, so that it is in place when the round ends."""

        on_train_batch_end = L.LightningModule.on_train_batch_end

        def on_train_batch_start(self, batch, batch_idx):
            Teacher.on_train_batch_end(self, None, batch, batch_idx)

    strategy = DilocoStrategy(num_nodes=3, diloco_interval=3, outer_optimizer_kwargs={"lr": 0.5})
    module = Frozen().double()
    trainer(strategy, max_steps=4, callbacks=[Look()]).fit(module, loader(regression_data(dtype=torch.float64), 2))
    key = "teacher.weight"
    assert not torch.equal(seen[1][0][key], seen[1][1][key])
    assert all(torch.equal(seen[2][0][key], s[key]) for s in seen[2])
    assert not any(p is module.teacher.weight for g in strategy.outer_optimizer.param_groups for p in g["params"])
    assert len(strategy.outer_optimizer.param_groups[0]["params"]) == 4


HOOKS = (
    "on_train_batch_start",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "training_step",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "on_train_batch_end",
)


class Recorder(Net):
    """Notes for every hook: whose turn, the worker's batch, its own parameters, its own gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Any] = []

    def note(self, hook: str) -> None:
        gradient = self.net[0].weight.grad
        self.notes.append(
            (
                hook,
                self.trainer.strategy.current_worker,
                self.trainer.global_step,
                self.net[0].weight.data_ptr(),
                None if gradient is None else gradient.clone(),
                self.net[1]._buffers["running_mean"].data_ptr(),
            )
        )


def _recording(hook: str) -> Any:
    original = getattr(Net, hook)

    def recorded(self, *args, **kwargs):
        self.note(hook)
        return original(self, *args, **kwargs)

    return recorded


for _hook in HOOKS:
    setattr(Recorder, _hook, _recording(_hook))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_batch_hook_of_the_module_runs_once_per_worker_with_its_own_state(accumulate: int) -> None:
    calls: list[Any] = []

    class Callbacks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            calls.append(("start", trainer.strategy.current_worker, pl_module.net[0].weight.data_ptr()))
            assert all(p.grad is None for p in pl_module.parameters())

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            calls.append(("end", trainer.strategy.current_worker, pl_module.net[0].weight.data_ptr()))
            assert all(p.grad is None for p in pl_module.parameters())

    module, strategy = Recorder(), DilocoStrategy(num_nodes=3, diloco_interval=2)
    t = trainer(
        strategy, callbacks=[Callbacks()], limit_train_batches=4, max_epochs=1, accumulate_grad_batches=accumulate
    )
    t.fit(module, loader(batch_size=2))

    by_hook = {hook: [n for n in module.notes if n[0] == hook] for hook in HOOKS}
    stepping = {"on_before_zero_grad", "optimizer_zero_grad", "on_before_optimizer_step", "configure_gradient_clipping"}
    for hook, notes in by_hook.items():
        times = 4 // (accumulate if hook in {*stepping, "optimizer_step"} else 1)
        assert [n[1] for n in notes] == [0, 1, 2] * times, hook
        for worker in range(3):  # every worker has its storage, always the same
            assert len({n[3] for n in notes if n[1] == worker}) == 1
            assert len({n[5] for n in notes if n[1] == worker}) == 1
        assert len({n[3] for n in notes}) == len({n[5] for n in notes}) == 3
        for i in range(0, len(notes), 3):
            assert len({n[2] for n in notes[i : i + 3]}) == 1, "all workers see one global_step"
    for i in range(0, len(by_hook["on_before_optimizer_step"]), 3):
        gradients = [n[4] for n in by_hook["on_before_optimizer_step"][i : i + 3]]
        assert not torch.equal(gradients[0], gradients[1])
        assert not torch.equal(gradients[1], gradients[2])
    assert [c[:2] for c in calls] == [("start", None), ("end", None)] * 4
    assert len({c[2] for c in calls}) == 1
    assert calls[0][2] not in {n[3] for n in module.notes}
    assert t.global_step == strategy.local_steps == 4 // accumulate


def test_minus_one_from_any_worker_ends_the_epoch_for_all() -> None:
    class Ends(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 and self.trainer.strategy.current_worker == 1 else None

    strategy = DilocoStrategy(num_nodes=3, diloco_interval=2)
    trainer(strategy, max_epochs=2).fit(Ends(), loader(batch_size=2))
    assert strategy.local_steps == 4


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("workers", [{1}, {0, 1, 2}])
def test_a_step_whose_loss_is_none_counts(workers: set[int]) -> None:
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            skip = batch_idx == 1 and self.trainer.strategy.current_worker in workers
            return None if skip else super().training_step(batch, batch_idx)

    strategy = DilocoStrategy(num_nodes=3, diloco_interval=2)
    t = trainer(strategy, max_epochs=1, limit_train_batches=4)
    t.fit(Skips(), loader(batch_size=2))
    assert (strategy.local_steps, strategy.outer_steps, t.global_step) == (4, 2, 4)


@pytest.mark.parametrize("error", [ValueError("worker 1 is ill"), KeyboardInterrupt()])
def test_an_exception_in_a_workers_step_leaves_theta_in_the_module_and_the_error_alone(error: BaseException) -> None:
    seen: list[Any] = []

    class Look(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.append((exception, trainer.strategy.current_worker, copy_of(pl_module.state_dict())))

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3 and self.trainer.strategy.current_worker == 1:
                raise error
            return super().training_step(batch, batch_idx)

    module, strategy = Fails(), DilocoStrategy(num_nodes=3, diloco_interval=2)
    t = trainer(strategy, max_epochs=1, callbacks=[Look()])
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ValueError):
        t.fit(module, loader(batch_size=2))
    assert seen[0][:2] == (error, None)
    theta = strategy.outer_state_dict()
    assert_same(seen[0][2], theta)
    assert_same(copy_of(module.state_dict()), theta)
    assert (strategy.local_steps, strategy.outer_steps) == (3, 1)
    assert all(type(loop).__module__.startswith("lightning.pytorch") for loop in (t.fit_loop, t.fit_loop.epoch_loop))


def test_random_streams_belong_to_workers_and_the_global_one_is_left_alone() -> None:
    draws: dict[int | None, list[float]] = {}

    class Draws(Net):
        def training_step(self, batch, batch_idx):
            draws.setdefault(self.trainer.strategy.current_worker, []).append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    def run(num_nodes: int) -> torch.Tensor:
        draws.clear()
        L.seed_everything(SEED, verbose=False)
        trainer(DilocoStrategy(num_nodes=num_nodes), max_steps=3).fit(Draws(), loader(batch_size=2))
        return torch.get_rng_state()

    after_two = run(2)
    two = {w: list(d) for w, d in draws.items()}
    after_three = run(3)
    assert torch.equal(after_two, after_three)
    assert {w: d for w, d in draws.items() if w != 2} == two
    assert len({x for d in draws.values() for x in d}) == 9


def test_results_are_reproducible() -> None:
    def run() -> Any:
        L.seed_everything(SEED, verbose=False)
        module = Net(dropout=0.3)
        trainer(DilocoStrategy(num_nodes=3, diloco_interval=4)).fit(module, loader())
        return copy_of(module.state_dict())

    assert_same(run(), run())


def test_a_copy_of_nested_state_shares_no_tensor_and_keeps_keys_and_kinds_of_dicts() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    state = {parameter: {"lists": [(torch.ones(2), defaultdict(int, {"a": torch.ones(2)}))], "step": 3}}
    for plain, kind in ((False, defaultdict), (True, dict)):
        duplicate = copied(state, plain=plain)
        ((key, values),) = duplicate.items()
        assert key is parameter
        assert type(values["lists"][0][1]) is kind
        for tensor in (values["lists"][0][0], values["lists"][0][1]["a"]):
            tensor.zero_()
        assert torch.equal(state[parameter]["lists"][0][0], torch.ones(2))
        assert torch.equal(state[parameter]["lists"][0][1]["a"], torch.ones(2))
