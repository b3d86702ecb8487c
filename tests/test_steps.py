"""Which steps count as local steps, and what becomes of training that no known optimizer does."""

import copy
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_diloco import DilocoStrategy


def three(interval: int = 4, **kwargs: Any) -> DilocoStrategy:
    return DilocoStrategy(num_nodes=3, diloco_interval=interval, **kwargs)


# ------------------------------------------------------------------------------------ optimizers that nobody knows


def step_at_once(optimizer: Any, _: Any) -> None:
    optimizer.step()
    optimizer.zero_grad()


class Hidden(Net):
    """Trains with an optimizer of its own making."""

    def __init__(self, kind: str) -> None:
        super().__init__(batch_norm=False)
        self.automatic_optimization = False
        self.kind = kind
        if kind == "in a list":
            self.optimizer = [torch.optim.Adam(self.parameters(), lr=1e-2)]
        elif kind == "in backward hooks":
            for p in self.parameters():
                optimizer = torch.optim.SGD([p], lr=0.1)
                p.register_post_accumulate_grad_hook(partial(step_at_once, optimizer))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1) if self.kind == "beside one that never steps" else None

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.zero_grad()
        self.manual_backward(loss)
        if self.kind == "in a list":
            self.optimizer[0].step()
        elif self.kind == "by hand" or self.kind == "beside one that never steps":
            with torch.no_grad():
                for p in self.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        elif self.kind == "by hand, without a trace":
            for p in self.parameters():
                p.data.sub_(0.1 * p.grad.data)
        elif self.kind == "by hand, by pointer":
            for p in self.parameters():
                p.data = p.data - 0.1 * p.grad.data


NO_OPTIMIZER = pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
KINDS = ["in a list", "in backward hooks", "by hand", "by hand, without a trace", "by hand, by pointer"]


@NO_OPTIMIZER
@pytest.mark.parametrize("num_nodes", [1, 3])
@pytest.mark.parametrize("kind", [*KINDS, "beside one that never steps"])
def test_training_that_lightning_knows_nothing_of_is_an_error_in_the_first_step(kind: str, num_nodes: int) -> None:
    module, strategy = Hidden(kind), DilocoStrategy(num_nodes=num_nodes, diloco_interval=4)
    t = trainer(strategy)
    with pytest.raises(
        RuntimeError, match=r"Parameter 'net.0.(weight|bias)' moved in worker 0's turn at local step 1, but no"
    ):
        t.fit(module, loader())
    assert t.fit_loop.epoch_loop.batch_progress.total.processed == 0


@NO_OPTIMIZER
@pytest.mark.parametrize("kind", KINDS)
def test_such_training_is_nothing_to_the_plain_run(kind: str) -> None:
    plain, same = Hidden(kind), Hidden(kind)
    for module, strategy in ((plain, "auto"), (same, DilocoStrategy(1, 4, outer_optimizer_kwargs={"lr": 1.0}))):
        L.seed_everything(1, verbose=False)
        trainer(strategy).fit(module, loader())
    assert_same(copy_of(plain.state_dict()), copy_of(same.state_dict()))


class Late(Hidden):
    """Trains by hand from its fifth batch on, behind the back of an optimizer that never steps."""

    def __init__(self, forgets_gradients: bool) -> None:
        super().__init__("beside one that never steps")
        self.forgets_gradients = forgets_gradients

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss)
        if batch_idx >= 4:
            for p in self.parameters():
                p.data.sub_(0.1 * p.grad.data)
        if self.forgets_gradients:
            self.zero_grad()


@pytest.mark.parametrize(("forgets_gradients", "batches"), [(True, 4), (False, 8)])
def test_training_by_hand_that_begins_later_is_found_when_it_begins_or_at_the_end_of_the_epoch(
    forgets_gradients: bool, batches: int
) -> None:
    t = trainer(three())
    with pytest.raises(RuntimeError, match="moved in worker"):
        t.fit(Late(forgets_gradients), loader())
    assert t.fit_loop.epoch_loop.batch_progress.total.processed == batches


class Second(Net):
    """A known optimizer and, for the same parameters, one that Lightning doesn't know."""

    def __init__(self, fresh: bool) -> None:
        super().__init__(batch_norm=False)
        self.fresh = fresh
        self.second = [self.make()]

    def make(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        if self.fresh:
            self.second = [self.make()]
        for _ in range(2):
            self.loss(batch).backward()
            self.second[0].step()
            self.second[0].zero_grad()
        return super().training_step(batch, batch_idx)


def test_a_second_optimizer_whose_state_the_workers_would_share_is_refused_and_one_made_for_a_turn_is_not() -> None:
    with pytest.raises(RuntimeError, match="Adam steps parameters of Second in the turns of several workers"):
        trainer(three()).fit(Second(fresh=False), loader())
    strategy = three()
    trainer(strategy).fit(Second(fresh=True), loader())
    assert strategy.local_steps == 16


class Teacher(Net):
    """A moving average of the weights, updated by hand; and weights clipped by hand, as in a Wasserstein GAN."""

    def __init__(self, frozen: bool) -> None:
        super().__init__(batch_norm=False)
        self.teacher = nn.Linear(3, 8).requires_grad_(not frozen)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net[0].weight, 0.1)
            for p in self.net.parameters():
                p.clamp_(-0.4, 0.4)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_average_kept_by_hand_needs_no_optimizer(frozen: bool) -> None:
    strategy = three()
    trainer(strategy).fit(Teacher(frozen), loader())
    assert strategy.local_steps == 16


class Target(Net):
    """A target network that is copied now and then, as in Q-learning; with gradients if it is ``trained``."""

    def __init__(self, trained: bool) -> None:
        super().__init__(batch_norm=False)
        self.target = copy.deepcopy(self.net)
        self.trained = trained

    def training_step(self, batch, batch_idx):
        if batch_idx % 4 == 3:
            self.target.load_state_dict(self.net.state_dict())
        with torch.set_grad_enabled(self.trained):
            target = self.target(batch[0])
        return super().training_step(batch, batch_idx) + (self(batch[0]) - target).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_a_target_network_outside_the_optimizer_may_move_unless_it_has_gradients() -> None:
    strategy = three()
    trainer(strategy).fit(Target(trained=False), loader())
    assert strategy.local_steps == 16
    with pytest.raises(RuntimeError, match=r"Parameter 'target.0.weight' moved .* set `requires_grad_\(False\)` on it"):
        trainer(three()).fit(Target(trained=True), loader())


class LateGenerator(Net):
    """A generator whose optimizer begins at the fourth batch; all weights are clipped in every batch."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.automatic_optimization = False
        self.generator = nn.Linear(3, 3)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD(self.generator.parameters(), lr=0.1)]

    def training_step(self, batch, batch_idx):
        critic, generator = self.optimizers()
        critic.zero_grad()
        with torch.no_grad():
            made = self.generator(batch[0])
        self.manual_backward(self(batch[0]).mean() - self(made).mean())
        critic.step()
        if batch_idx >= 3:
            generator.zero_grad()
            self.manual_backward(self(self.generator(batch[0])).mean())
            generator.step()

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.2, 0.2)


def test_an_optimizer_that_begins_late_is_no_stranger_to_clipped_weights() -> None:
    strategy = three()
    trainer(strategy).fit(LateGenerator(), loader())
    assert strategy.local_steps == 16


def test_one_that_keeps_no_state_may_step_in_every_turn() -> None:
    class Stateless(Second):
        def make(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    strategy = three()
    trainer(strategy).fit(Stateless(fresh=False), loader())
    assert strategy.local_steps == 16


def test_one_worker_shares_a_second_optimizer_with_nobody() -> None:
    strategy = DilocoStrategy(num_nodes=1, diloco_interval=4)
    trainer(strategy).fit(Second(fresh=False), loader())
    assert strategy.local_steps == 48


class Both(torch.optim.Optimizer):
    """Two optimizers in a list, as one."""

    def __init__(self, params: Any) -> None:
        first, *others = list(params)
        self.optimizers = [torch.optim.Adam([first], lr=1e-2), torch.optim.SGD(others, lr=0.1, momentum=0.9)]
        super().__init__([first, *others], {})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


class Remembers(torch.optim.SGD):
    """Keeps its momentum, or averages of the weights, in an attribute."""

    def __init__(self, params: Any, how: str) -> None:
        super().__init__(list(params), lr=0.1)
        self.how = how
        self.buffers: dict[Any, Tensor] = {}
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
            if self.how == "momentum":
                self.buffers[p] = p.grad.clone() + 0.9 * self.buffers.get(p, torch.zeros_like(p))
            elif self.how == "slow weights":
                slow.lerp_(p, 0.5)
        super().step()
        return loss


def far() -> DilocoStrategy:
    return DilocoStrategy(num_nodes=3, diloco_interval=10**6, final_sync=False)


@pytest.mark.parametrize("make", [Both, lambda p: Remembers(p, "constants")])
def test_optimizers_in_lists_and_constants_in_attributes_train_every_worker_as_its_own_trainer_would(make: Any) -> None:
    strategy = far()
    L.seed_everything(1, verbose=False)
    trainer(strategy).fit(Net(make, batch_norm=False), loader())
    for w in range(3):
        alone = Net(make, batch_norm=False)
        sampler = torch.utils.data.DistributedSampler(regression_data(), 3, w, seed=1)
        trainer().fit(alone, DataLoader(regression_data(), 4, sampler=sampler))
        assert_same(strategy.worker_state_dict(w), copy_of(alone.state_dict()))


@pytest.mark.parametrize(("how", "attribute"), [("momentum", "buffers"), ("slow weights", "slow")])
def test_state_in_attributes_of_an_optimizer_is_refused(how: str, attribute: str) -> None:
    with pytest.raises(
        RuntimeError, match=f"Remembers keeps tensors that its step changes in its attribute `{attribute}`"
    ):
        trainer(three()).fit(Net(lambda p: Remembers(p, how)), loader())


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end"])
def test_a_step_between_the_turns_is_refused(hook: str) -> None:
    def step(self: Any) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.net(torch.ones(2, 3)).mean().backward()
        optimizer.step()

    module = type("Between", (InHook,), {hook: step})(late=False)
    with pytest.raises(RuntimeError, match="Adam stepped between the workers' turns, where the module holds θ"):
        trainer(three()).fit(module, loader())


class Normalises(Net):
    """Normalises a matrix before every forward, also in batches that only accumulate (as SwAV does)."""

    def __init__(self, automatic: bool) -> None:
        super().__init__(batch_norm=False)
        self.automatic_optimization = automatic

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net[0].weight.copy_(nn.functional.normalize(self.net[0].weight, dim=1))
        loss = self.loss(batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("automatic", [True, False])
def test_weights_written_by_hand_while_gradients_wait_for_their_optimizer_are_no_training(automatic: bool) -> None:
    strategy = three()
    accumulate = {"accumulate_grad_batches": 2} if automatic else {}
    trainer(strategy, **accumulate).fit(Normalises(automatic), loader())
    assert strategy.local_steps == 8


# ------------------------------------------------------------------------------------ steps in on_train_batch_end


class InHook(Net):
    """The same computation in ``training_step`` or one hook later."""

    def __init__(self, late: bool, both: bool = False) -> None:
        super().__init__(lambda p: torch.optim.Adam(p, lr=1e-2), dropout=0.3)
        self.automatic_optimization = False
        self.late, self.both = late, both

    def step(self, batch: Any) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def training_step(self, batch, batch_idx):
        if not self.late or self.both:
            self.step(batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.late or self.both:
            self.step(batch)


class Watch(L.Callback):
    """What a callback sees after each batch; saves a file after one of them."""

    def __init__(self, save_after: int | None = None) -> None:
        self.save_after = save_after
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        strategy = trainer.strategy
        self.seen.append((strategy.local_steps, strategy.outer_steps))
        if len(self.seen) == self.save_after:
            trainer.save_checkpoint("x.ckpt")


def fitted(late: bool, batches: int, both: bool = False, watch: Any = None, ckpt: Any = None) -> Any:
    L.seed_everything(1, verbose=False)
    module, strategy = InHook(late, both), three(outer_optimizer_kwargs={"lr": 0.5})
    callbacks = [] if watch is None else [watch]
    t = trainer(strategy, max_epochs=1, limit_train_batches=batches, callbacks=callbacks)
    t.fit(module, loader(), ckpt_path=ckpt)
    return copy_of(module.state_dict()), strategy


@pytest.mark.parametrize("batches", [3, 4, 5, 8])
def test_a_step_in_on_train_batch_end_counts_in_its_batch_and_the_last_one_is_not_lost(batches: int) -> None:
    early, late = Watch(), Watch()
    (a, one), (b, other) = fitted(False, batches, watch=early), fitted(True, batches, watch=late)
    assert_same(a, b)
    assert late.seen == early.seen == [(t, t // 4) for t in range(1, batches + 1)]
    assert (other.local_steps, other.outer_steps) == (one.local_steps, one.outer_steps) == (batches, -(-batches // 4))


@pytest.mark.parametrize("save_after", range(1, 8))
def test_a_run_that_steps_in_on_train_batch_end_resumes_exactly(save_after: int) -> None:
    uninterrupted, _ = fitted(True, 8, watch=Watch(save_after))
    resumed, _ = fitted(True, 8, ckpt="x.ckpt")
    assert_same(resumed, uninterrupted)


def test_two_steps_in_one_batch_are_one_local_step_and_both_are_kept() -> None:
    state, strategy = fitted(True, 4, both=True)
    assert (strategy.local_steps, strategy.outer_steps) == (4, 1)
    inner: Any = strategy._engine._inner
    assert {int(s["step"]) for w in inner.workers.values() for s in w.states[0].values()} == {8}
    assert_same(state, copy_of(strategy.outer_state_dict()))


class Extra(Net):
    """Automatic optimization, and one more step by hand after the last batch was counted."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 3:
            optimizer = self.optimizers().optimizer
            with torch.enable_grad():
                self.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_step_after_the_last_synchronisation_is_synchronised_at_the_end() -> None:
    module, strategy = Extra(), three()
    trainer(strategy, max_epochs=1, limit_train_batches=4).fit(module, loader())
    assert (strategy.local_steps, strategy.outer_steps) == (4, 2)
    for worker in range(3):
        assert_same(strategy.worker_state_dict(worker), strategy.outer_state_dict())


# ------------------------------------------------------------------------------------ optimizers replaced in a fit


class Replaces(Net):
    """Fresh optimizers at the start of every epoch, as continual learning does."""

    def __init__(self, how: str) -> None:
        super().__init__(dropout=0.3)
        self.how = how
        self.automatic_optimization = how != "manual"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.lr_schedulers().step()
        return None

    def on_train_epoch_start(self):
        if self.current_epoch == 0:
            return
        if self.how == "trainer.optimizers":
            self.trainer.optimizers = [torch.optim.Adam(self.parameters(), lr=3e-3)]
        else:
            self.trainer.strategy.setup_optimizers(self.trainer)


@pytest.mark.parametrize("how", ["setup_optimizers", "trainer.optimizers", "manual"])
def test_every_worker_gets_fresh_state_of_a_replaced_optimizer(how: str) -> None:
    """Without an outer step in reach, every worker is an ordinary run on its shard."""
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=10**6, final_sync=False)
    module = Replaces(how)
    L.seed_everything(1, verbose=False)
    t = trainer(strategy)
    saves = []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.strategy.local_steps == 12:
                trainer.save_checkpoint("x.ckpt")

    t.callbacks.append(Save())
    t.fit(module, loader())
    streams = torch.load("x.ckpt", weights_only=True)["diloco"]["workers"]
    for w in range(3):
        (state,) = streams[w]["inner"]
        assert {int(entry["step"]) for entry in state.values()} == {4}  # of the second epoch's four steps so far
        (control,) = [c for c in streams[w]["control"] if "lr" in c[0]]
        saves.append(control[0]["lr"])
    assert len(set(saves)) == 1
    assert t.optimizers[0].state_dict()["state"][0]["step"] == 8
    L.seed_everything(1, verbose=False)
    again = Replaces(how)
    trainer(DilocoStrategy(num_nodes=3, diloco_interval=10**6, final_sync=False)).fit(
        again, loader(), ckpt_path="x.ckpt"
    )
    assert_same(copy_of(again.state_dict()), copy_of(module.state_dict()))


@pytest.mark.parametrize("how", ["setup_optimizers", "trainer.optimizers"])
def test_a_replaced_optimizer_trains_every_worker_as_its_own_trainer_would(how: str) -> None:
    class Undropped(Replaces):
        def __init__(self) -> None:
            super().__init__(how)
            self.net[3].p = 0.0

    strategy = DilocoStrategy(num_nodes=3, diloco_interval=10**6, final_sync=False)
    L.seed_everything(1, verbose=False)
    trainer(strategy).fit(Undropped(), loader())
    for w in range(3):
        own = Undropped()
        sampler = torch.utils.data.DistributedSampler(regression_data(), 3, w, seed=1)
        trainer().fit(own, DataLoader(regression_data(), 4, sampler=sampler))
        assert_same(strategy.worker_state_dict(w), copy_of(own.state_dict()))


def test_optimizers_replaced_inside_a_turn_are_refused() -> None:
    class Inside(Net):
        def training_step(self, batch, batch_idx):
            self.trainer.optimizers = [torch.optim.Adam(self.parameters())]
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="The optimizers were replaced inside worker 0's turn"):
        trainer(three()).fit(Inside(), loader())


class Half(Net):
    """Two optimizers, of which one is replaced by another for the second epoch."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, second = self.net[0], self.net[3]
        return [torch.optim.Adam(first.parameters()), torch.optim.Adam(second.parameters())]

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.optimizers = [self.trainer.optimizers[0], torch.optim.SGD(self.net[3].parameters(), 0.1)]


def test_the_state_that_workers_are_reset_to_is_that_after_configure_optimizers() -> None:
    module, strategy = Half(), three(6, inner_state="reset", final_sync=False)
    trainer(strategy).fit(module, loader())  # 16 steps, the last synchronisation after 12
    inner: Any = strategy._engine._inner
    assert [int(w.states[0][module.net[0].weight]["step"]) for w in inner.workers.values()] == [4, 4, 4]


def test_an_optimizer_that_stays_keeps_every_workers_state() -> None:
    module, strategy = Half(), three(inner_state="keep")
    trainer(strategy).fit(module, loader())
    inner: Any = strategy._engine._inner
    moments: list[Tensor] = [w.states[0][module.net[0].weight]["exp_avg"] for w in inner.workers.values()]
    assert [int(w.states[0][module.net[0].weight]["step"]) for w in inner.workers.values()] == [16, 16, 16]
    assert not torch.equal(moments[0], moments[1])
    assert [len(w.states[1]) for w in inner.workers.values()] == [0, 0, 0]
