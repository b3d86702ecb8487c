"""Which weights are where: between turns, in validation, in checkpoints, after a fit, and when somebody writes them."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, differs, loader, regression_data, trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from observers import Probe
from torch import nn

from lightning_diloco import DilocoStrategy
from lightning_diloco.comm.tensors import bitwise_equal


def mean_state(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        k: torch.stack([s[k] for s in states]).mean(0) if v.is_floating_point() else v for k, v in states[0].items()
    }


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6)


def test_between_steps_the_module_holds_theta_in_its_own_tensors_without_gradients() -> None:
    module = Net()
    own = {n: p.data_ptr() for n, p in module.named_parameters()}
    checked: list[str] = []

    def look(hook: str, t: Any, m: Any) -> None:
        theta = t.strategy.outer_state_dict()
        assert_same(copy_of(m.state_dict()), theta)
        assert {n: p.data_ptr() for n, p in m.named_parameters()} == own
        assert all(p.grad is None for p in m.parameters())
        assert t.strategy.current_worker is None
        checked.append(hook)

    hooks = ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_end")
    trainer(DilocoStrategy(num_nodes=3, diloco_interval=2), callbacks=[Probe(look, *hooks)]).fit(module, loader())
    assert set(checked) == set(hooks)
    look("after", module.trainer, module)
    assert all(type(p) is nn.Parameter for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["average", "outer", "worker"])
def test_validation_and_checkpoints_see_eval_weights(which: str, tmp_path: Any) -> None:
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=5, eval_weights=which)
    seen: list[Any] = []

    def expected(t: Any) -> dict[str, torch.Tensor]:
        workers = [t.strategy.worker_state_dict(w) for w in range(3)]
        return {"average": mean_state(workers), "outer": t.strategy.outer_state_dict(), "worker": workers[0]}[which]

    def look(hook: str, t: Any, m: Any) -> None:
        if not t.sanity_checking:
            assert_close(copy_of(m.state_dict()), expected(t))
            seen.append(hook)

    class Metric(Net):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                assert_close(copy_of(self.state_dict()), expected(self.trainer))
            super().validation_step(batch, batch_idx)

    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}")
    hooks = ("on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end")

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            path = tmp_path / f"batch-{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            assert_close(torch.load(path, weights_only=True)["state_dict"], expected(trainer))
            assert_same(copy_of(module.state_dict()), trainer.strategy.outer_state_dict())

    t = trainer(
        strategy,
        callbacks=[Probe(look, *hooks), saved, Save()],
        enable_checkpointing=True,
        val_check_interval=4,
        max_epochs=1,
        default_root_dir=tmp_path,
    )
    t.fit(Metric(), loader(), loader(shuffle=False))
    assert seen.count("on_validation_end") == 2
    # the monitored metric belongs to the saved weights
    best = torch.load(saved.best_model_path, weights_only=True)["state_dict"]
    module = Net()
    module.load_state_dict(best)
    loss = trainer().validate(module, loader(shuffle=False), verbose=False)[0]["val_loss"]
    assert loss == pytest.approx(saved.best_model_score.item(), abs=1e-6)


@pytest.mark.slow
def test_training_is_undisturbed_by_looking_at_weights_and_by_validation() -> None:
    def run(callbacks: list[Any], **kwargs: Any) -> Any:
        L.seed_everything(1, verbose=False)
        module = Net(dropout=0.2)
        t = trainer(DilocoStrategy(num_nodes=3, diloco_interval=3), callbacks=callbacks, **kwargs)
        t.fit(module, loader(), loader(shuffle=False))
        return copy_of(module.state_dict())

    def look(hook: str, t: Any, m: Any) -> None:
        for which in (0, 1, 2, "average", "outer"):
            with t.strategy.weights(which), torch.no_grad():
                m.eval()
                m(torch.ones(2, 3))
                m.train()
                for p in m.parameters():
                    p.zero_()

    def scribble(hook: str, t: Any, m: Any) -> None:
        if not t.sanity_checking:
            with torch.no_grad():
                for p in m.parameters():
                    p.add_(1)
            for state in t.optimizers[0].state.values():
                state["exp_avg"].zero_()

    quiet = run([], limit_val_batches=0)
    assert_same(run([Probe(look, "on_train_batch_end", "on_train_batch_start")], val_check_interval=2), quiet)
    assert_same(run([Probe(scribble, "on_validation_start", "on_validation_end")], val_check_interval=2), quiet)


def test_worker_and_outer_state_dicts() -> None:
    strategy, module = DilocoStrategy(num_nodes=2, diloco_interval=3), Net()
    for ask in (lambda: strategy.worker_state_dict(0), strategy.outer_state_dict, lambda: strategy.outer_optimizer):
        with pytest.raises(RuntimeError, match="The workers exist from `on_train_start` on"):
            ask()
    assert (strategy.local_steps, strategy.outer_steps, strategy.current_worker) == (0, 0, None)
    early: list[Any] = []
    t = trainer(
        strategy,
        max_steps=4,
        callbacks=[Probe(lambda h, t, m: early.append(t.strategy.worker_state_dict(1)), "on_train_start")],
    )
    start = copy_of(module.state_dict())
    t.fit(module, loader())
    assert_same(early[0], start)
    state = strategy.worker_state_dict(1)
    Net().load_state_dict(state, strict=True)
    assert not any(v.requires_grad for v in state.values())
    before = strategy.worker_state_dict(1)
    state["net.0.weight"].zero_()
    assert_same(strategy.worker_state_dict(1), before)
    with pytest.raises(ValueError, match=r"^Worker 2 doesn't exist: `num_nodes` is 2, ids start at 0\.$"):
        strategy.worker_state_dict(2)


def test_after_a_fit_everything_is_the_users_again() -> None:
    module = Net()
    tensors = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    t = trainer(DilocoStrategy(num_nodes=3, diloco_interval=4), max_steps=6)
    loops = [t.fit_loop, t.fit_loop.epoch_loop, t.fit_loop.epoch_loop.val_loop, t.fit_loop.epoch_loop._results]
    classes = [type(x) for x in loops]
    keys = set(vars(module))
    t.fit(module, loader())
    assert [type(x) for x in loops] == classes
    assert all(p is tensors[n] for n, p in module.named_parameters())
    assert all(b is buffers[n] for n, b in module.named_buffers())
    assert {k for k in vars(module) if not k.startswith("_hparams")} == keys  # those are Lightning's
    ctx = t.strategy._engine.context
    states = [ctx.outer.tensors, *(ctx.replicas.tensors(w) for w in range(3))]
    foreign = {tensor.untyped_storage().data_ptr() for state in states for tensor in state.values()}
    assert not foreign & {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    assert t.global_step == t.strategy.local_steps == 6


@pytest.mark.parametrize("final_sync", [True, False])
def test_final_sync(final_sync: bool) -> None:
    at_end: list[Any] = []
    strategy, module = DilocoStrategy(num_nodes=2, diloco_interval=4, final_sync=final_sync), Net()

    def look(hook: str, t: Any, m: Any) -> None:
        at_end.append((t.strategy.outer_steps, copy_of(m.state_dict())))

    trainer(strategy, max_steps=6, callbacks=[Probe(look, "on_train_end")]).fit(module, loader())
    assert strategy.outer_steps == (2 if final_sync else 1)
    assert at_end[0][0] == strategy.outer_steps, "before callbacks' on_train_end"
    assert_same(copy_of(module.state_dict()), strategy.outer_state_dict())
    apart = differs(strategy.worker_state_dict(0), strategy.worker_state_dict(1))
    assert apart == (not final_sync)


def test_a_parameter_that_rests_keeps_no_pending_round_from_being_flushed() -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.unused = nn.Parameter(torch.ones(2))

    strategy, module = DilocoStrategy(num_nodes=2, diloco_interval=4), Unused()
    trainer(strategy, max_steps=6).fit(module, loader())
    assert strategy.outer_steps == 2
    assert_same(strategy.worker_state_dict(0), strategy.worker_state_dict(1))


def test_should_stop_flushes_and_a_checkpoint_after_fit_holds_theta(tmp_path: Any) -> None:
    def stop(hook: str, t: Any, m: Any) -> None:
        t.should_stop = t.global_step == 5

    strategy, module = DilocoStrategy(num_nodes=2, diloco_interval=4), Net()
    t = trainer(strategy, callbacks=[Probe(stop, "on_train_batch_end")])
    t.fit(module, loader())
    assert (strategy.local_steps, strategy.outer_steps) == (5, 2)
    t.save_checkpoint(tmp_path / "x.ckpt")
    assert_same(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"], strategy.outer_state_dict())


# -------------------------------------------------------------------------------------------- writes from outside


WRITES = {
    "in place": lambda p: p.add_(0.5),
    "data": lambda p: p.data.add_(0.5),
    "pointer": lambda p: setattr(p, "data", p.data + 0.5),
}


@pytest.mark.parametrize(
    ("how", "hook"),
    [
        *((how, hook) for how in ("in place", "pointer") for hook in ("on_train_batch_start", "on_train_batch_end")),
        *((how, "on_train_epoch_end") for how in WRITES),  # where also what leaves no trace is found
    ],
)
def test_weights_written_by_callbacks_become_theta_and_every_replicas(how: str, hook: str) -> None:
    written: list[Any] = []
    after: list[Any] = []

    def write(_: str, t: Any, m: Any) -> None:
        if t.global_step == 4 and not written:
            with torch.no_grad():
                WRITES[how](m.net[0].bias)
            written.append(m.net[0].bias.detach().clone())
            after.append([t.strategy.worker_state_dict(w) for w in range(2)])

    class Look(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if written and len(after) < 3:
                after.append(copy_of(self.state_dict()))

    strategy = DilocoStrategy(num_nodes=2, diloco_interval=100, final_sync=False)
    t = trainer(strategy, limit_train_batches=4, callbacks=[Probe(write, hook)])
    t.fit(Look(), loader(batch_size=2))
    for worker, state in enumerate(after[1:]):
        assert torch.equal(state["net.0.bias"], written[0])
        before = after[0][worker]["net.0.weight"]  # what wasn't written stays each worker's own
        assert torch.equal(state["net.0.weight"], before)
    assert torch.equal(strategy.outer_state_dict()["net.0.bias"], written[0])


def test_a_value_neutral_swap_changes_nothing() -> None:
    def run(callbacks: list[Any]) -> Any:
        L.seed_everything(2, verbose=False)
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=5, final_sync=False)
        trainer(strategy, callbacks=callbacks, max_epochs=1).fit(Net(), loader())
        return strategy.worker_state_dict(1)

    def swap(hook: str, t: Any, m: Any) -> None:
        with torch.no_grad():
            for p in m.parameters():
                kept = p.clone()
                p.zero_()
                p.copy_(kept)

    assert_same(run([Probe(swap, "on_train_batch_start", "on_train_batch_end")]), run([]))


def test_load_state_dict_in_a_callback_and_buffers_written_outside() -> None:
    other = Net(seed=9)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)  # so that no value is θ's already: what is equal to θ counts as not written

    def write(hook: str, t: Any, m: Any) -> None:
        if t.global_step == 2:
            m.load_state_dict(other.state_dict())

    states: list[Any] = []

    class Look(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                states.append(copy_of(self.state_dict()))

    strategy = DilocoStrategy(num_nodes=3, diloco_interval=100)
    trainer(strategy, max_steps=4, callbacks=[Probe(write, "on_train_batch_start")]).fit(Look(), loader())
    for state in states:
        assert_same(state, copy_of(other.state_dict()))
    assert len(states) == 3


@pytest.mark.slow
def test_stochastic_weight_averaging_runs_and_its_average_ends_in_the_module() -> None:
    module, strategy = Net(), DilocoStrategy(num_nodes=2, diloco_interval=3)
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    trainer(strategy, callbacks=[swa], max_epochs=4).fit(module, loader())
    average = dict(swa._average_model.named_parameters())
    assert_same({n: p.detach() for n, p in module.named_parameters()}, {n: p.detach() for n, p in average.items()})
    assert_same(copy_of(module.state_dict()), strategy.outer_state_dict())


# -------------------------------------------------------------------------------------------- unusual parameters


class Tied(Net):
    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1))
        self.net[2].weight = self.net[0].weight


def test_tied_parameters_are_one_parameter() -> None:
    module, strategy = Tied(), DilocoStrategy(num_nodes=3, diloco_interval=2)
    trainer(strategy, max_steps=5).fit(module, loader())
    assert module.net[2].weight is module.net[0].weight
    assert len(strategy.outer_optimizer.param_groups[0]["params"]) == 5
    for state in (strategy.outer_state_dict(), strategy.worker_state_dict(2)):
        assert torch.equal(state["net.0.weight"], state["net.2.weight"])
    # Δ, once: two rounds and a flush of 9 + 3 + 3 + 3 + 1 float32 numbers
    assert strategy.ledger.total_bytes == 3 * 4 * 19


class Mixed(Net):
    """Parameters of four dtypes, one of them complex, and a permuted one."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.h = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        self.d = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0))
        self.image = nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        extra = self.h.float().sum() + self.d.float().sum() + (self.wave.abs() ** 2).sum() + self.image.sum()
        return self.net(x) * self.scalar + 0.1 * extra

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_parameters_of_any_dtype_and_layout() -> None:
    module, strategy = Mixed(), DilocoStrategy(num_nodes=3, diloco_interval=2)
    strides = {n: p.stride() for n, p in module.named_parameters()}
    start = copy_of(module.state_dict())
    trainer(strategy, max_steps=5).fit(module, loader())
    for name, replica in strategy._engine.context.replicas.tensors(1).items():
        assert replica.stride() == strides[name]
        assert replica.dtype == start[name].dtype
        assert replica.data_ptr() % 64 == 0
        assert name == "empty" or not torch.equal(replica, start[name])
        assert replica.untyped_storage().nbytes() == replica.nbytes
    assert_same(copy_of(module.state_dict()), strategy.outer_state_dict())
    assert_same(strategy.worker_state_dict(1), strategy.outer_state_dict())


class SavesParts(Net):
    """Writes one layer's weights, and the whole module, wherever it can: files of the layer hold the layer only."""

    def __init__(self) -> None:
        super().__init__(optimizer=torch.optim.Adam)  # can be pickled
        self.large = nn.Linear(200, 200)
        self.sizes: dict[str, int] = {}

    def save(self, place: str) -> None:
        torch.save(self.net[0].state_dict(), "part.pt")
        assert_same(torch.load("part.pt", weights_only=True), self.net[0].state_dict())
        torch.save(self.net[0], "module.pt")
        assert_same(torch.load("module.pt", weights_only=False).state_dict(), self.net[0].state_dict())
        assert_same(copy.deepcopy(self.net[0]).state_dict(), self.net[0].state_dict())
        torch.save(self, "whole.pt")
        assert_same(torch.load("whole.pt", weights_only=False).state_dict(), self.state_dict())
        self.sizes[place] = max(Path("part.pt").stat().st_size, Path("module.pt").stat().st_size)

    def training_step(self, batch, batch_idx):
        self.save(f"worker {self.trainer.strategy.current_worker}")
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.save("validation")

    def on_train_batch_end(self, *_):
        self.save("end of batch")


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_part_that_is_saved_in_a_hook_is_no_larger_than_that_part(num_nodes: int) -> None:
    module, strategy = SavesParts(), DilocoStrategy(num_nodes=num_nodes, diloco_interval=3)
    between = Probe(lambda hook, t, m: m.save(hook), "on_train_batch_end", "on_train_epoch_start")
    validation = loader(regression_data(8), shuffle=False)
    trainer(strategy, max_steps=4, val_check_interval=2, callbacks=[between]).fit(module, loader(), validation)
    for which in (0, "average", "outer"):
        with strategy.weights(which):
            module.save(f"weights {which}")
    for name, state in (("worker", strategy.worker_state_dict(0)), ("outer", strategy.outer_state_dict())):
        torch.save({k: v for k, v in state.items() if k.startswith("net.0")}, "part.pt")
        module.sizes[name] = Path("part.pt").stat().st_size
    assert len(module.sizes) == num_nodes + 9
    assert max(module.sizes.values()) < 8_000, "the whole module has 160 kB"


class Adapter(Net):
    """A frozen base with a trainable adapter."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.net[0].requires_grad_(False)


def test_share_frozen_keeps_one_copy_and_changes_no_number() -> None:
    results, memory = [], []
    for share in (False, True):
        L.seed_everything(3, verbose=False)
        module, strategy = Adapter(), DilocoStrategy(num_nodes=3, diloco_interval=2, share_frozen=share)
        storages: set[int] = set()

        class Look(Adapter):
            def on_train_batch_start(self, batch, batch_idx, storages=storages):
                storages.add(self.net[0].weight.data_ptr())

        module = Look()
        trainer(strategy, max_steps=5).fit(module, loader())
        assert len(storages) == (1 if share else 3)
        results.append(copy_of(module.state_dict()))
        memory.append(strategy.memory_report()["parameters_per_worker"])
    assert_same(*results)
    assert memory[1] < memory[0]


@pytest.mark.parametrize("share", [False, True])
def test_unfreezing_between_steps_makes_a_parameter_every_workers_own(share: bool) -> None:
    def thaw(hook: str, t: Any, m: Any) -> None:
        if t.global_step == 3:
            m.net[0].requires_grad_(True)
            t.optimizers[0].add_param_group({"params": list(m.net[0].parameters()), "lr": 0.02})

    class Head(Adapter):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module = Head()
    start = copy_of(module.state_dict())
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=2, share_frozen=share)
    apart: list[bool] = []

    def look(hook: str, t: Any, m: Any) -> None:
        apart.append(not torch.equal(*(t.strategy.worker_state_dict(w)["net.0.weight"] for w in (0, 2))))

    callbacks = [Probe(thaw, "on_train_batch_start"), Probe(look, "on_train_batch_end")]
    trainer(strategy, max_steps=6, callbacks=callbacks).fit(module, loader())
    # thawed before step 4, which synchronises; apart again at step 5, together at step 6
    assert apart == [False, False, False, False, True, False]
    assert not torch.equal(module.net[0].weight, start["net.0.weight"])
    assert len(strategy.outer_optimizer.param_groups[0]["params"]) == 4
    assert [len(g["params"]) for g in module.trainer.optimizers[0].param_groups] == [2, 2]


def test_parameters_added_between_steps_join_and_inside_a_step_raise() -> None:
    class Grows(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2 and self.inside and self.trainer.strategy.current_worker == 1:
                self.extra = nn.Parameter(torch.zeros(3))
            extra = self.extra.sum() if hasattr(self, "extra") else 0
            return super().training_step(batch, batch_idx) + extra

    def grow(hook: str, t: Any, m: Any) -> None:
        if t.global_step == 3 and not m.inside:
            m.extra = nn.Parameter(torch.ones(3))
            t.optimizers[0].add_param_group({"params": [m.extra]})

    module = Grows()
    module.inside = False
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=2)
    trainer(strategy, max_steps=5, callbacks=[Probe(grow, "on_train_batch_start")]).fit(module, loader())
    assert "extra" in strategy.worker_state_dict(0)
    assert not torch.equal(module.extra, torch.ones(3))

    module = Grows()
    module.inside = True
    with pytest.raises(
        RuntimeError, match=r"^Parameters were added, removed or replaced inside worker 1's step, where"
    ):
        trainer(DilocoStrategy(num_nodes=3), max_steps=5).fit(module, loader())


def test_modules_that_cannot_be_replicated_are_refused() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyLinear(2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    class Scripted(Net):
        def __init__(self) -> None:
            super().__init__()
            with pytest.warns(DeprecationWarning, match="torch.jit"):
                self.scripted = torch.jit.script(nn.Linear(3, 3))

    class Frozen(Net):
        def configure_optimizers(self):
            self.requires_grad_(False)
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for make, message in (
        (Lazy, r"Parameter 'lazy.weight' of Lazy is uninitialised"),
        (Scripted, r"Submodule 'scripted' of Scripted is TorchScript"),
        (Frozen, r"Frozen has no parameter with `requires_grad`"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(DilocoStrategy(num_nodes=2), max_steps=1).fit(make(), loader())


def test_same_bits() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert bitwise_equal(nan, nan.clone())
    assert not bitwise_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not bitwise_equal(nan, nan.double())
    for dtype in (torch.bfloat16, torch.float64, torch.complex64, torch.int64, torch.bool):
        x = torch.tensor([1, 0, 1]).to(dtype)
        assert bitwise_equal(x, x.clone())
        assert not bitwise_equal(x, 1 - x if dtype is not torch.bool else ~x)


def test_a_second_fit_starts_afresh_from_the_modules_weights() -> None:
    def run(strategy: DilocoStrategy, module: Any, again: bool) -> Any:
        L.seed_everything(4, verbose=False)
        trainer(strategy, max_steps=5).fit(module, loader(regression_data(60)))
        return copy_of(module.state_dict()), strategy.local_steps, strategy.outer_steps, strategy.ledger.total_bytes

    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    first = Net()
    run(strategy, first, False)
    start = Net()
    start.load_state_dict(first.state_dict())
    second = run(strategy, first, True)
    fresh = run(DilocoStrategy(num_nodes=2, diloco_interval=2), start, True)
    assert_same(second[0], fresh[0])
    assert second[1:] == fresh[1:] == (5, 3, fresh[3])
