"""What projects and callbacks do between the workers' turns, or inside them, that replicas must follow."""

from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from observers import Probe
from torch import nn
from torch.nn.utils import prune
from torch.optim import lr_scheduler

from lightning_diloco import DilocoStrategy
from lightning_diloco.algorithms import Diloco


def far(num_nodes: int = 3, **kwargs: Any) -> DilocoStrategy:
    return DilocoStrategy(num_nodes=num_nodes, diloco_interval=10**6, final_sync=False, **kwargs)


class Masked(Net):
    """A causal mask as a buffer and one as a frozen parameter, as transformers have them."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        mask = torch.triu(torch.full((3, 3), float("-inf")), 1)
        self.register_buffer("mask", mask)
        self.frozen = nn.Parameter(mask.clone(), requires_grad=False)
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)
        self.wide = nn.Parameter(torch.ones(1).expand(3), requires_grad=False)

    def validation_step(self, batch, batch_idx):
        assert torch.equal(self.mask, torch.triu(torch.full((3, 3), float("-inf")), 1))
        assert torch.equal(self.frozen, self.mask)
        assert self.table.tolist() == [0, 1, 2, 3]
        super().validation_step(batch, batch_idx)


def test_infinities_integers_and_expanded_tensors_survive_validation_checkpoints_and_synchronisations() -> None:
    module, strategy = Masked(), DilocoStrategy(num_nodes=3, diloco_interval=2)
    t = trainer(strategy, max_steps=5, val_check_interval=1)
    save = Probe(lambda hook, t, m: t.save_checkpoint("x.ckpt"), "on_train_batch_end")
    t.callbacks.append(save)
    t.fit(module, loader(), loader(shuffle=False))
    saved = torch.load("x.ckpt", weights_only=True)["state_dict"]
    for state in (saved, strategy.worker_state_dict(2), copy_of(module.state_dict())):
        assert torch.equal(state["mask"], Masked().mask)
        assert torch.equal(state["frozen"], Masked().mask)
        assert state["table"].tolist() == [0, 1, 2, 3]
        assert state["wide"].tolist() == [1, 1, 1]


def test_batch_norm_statistics_that_swa_measures_at_the_end_reach_the_module() -> None:
    module, strategy = Net(), DilocoStrategy(num_nodes=3, diloco_interval=3)
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    trainer(strategy, max_epochs=4, callbacks=[swa]).fit(module, loader())
    assert module.net[1].num_batches_tracked.item() > 0
    assert not torch.equal(module.net[1].running_mean, torch.zeros(8))
    workers = [strategy.worker_state_dict(w)["net.1.running_mean"] for w in range(3)]
    assert all(torch.equal(w, module.net[1].running_mean) for w in workers)


def test_the_weights_that_swa_writes_are_not_moved_by_a_pending_round() -> None:
    """32 steps train, a fifth epoch only measures BatchNorm; a round of 5 is pending, but nothing is left of it."""
    module, strategy = Net(), DilocoStrategy(num_nodes=3, diloco_interval=5)
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    trainer(strategy, max_epochs=4, callbacks=[swa]).fit(module, loader())
    assert strategy.local_steps == 32
    average = {n: p.detach() for n, p in swa._average_model.named_parameters()}
    assert_same({n: p.detach() for n, p in module.named_parameters()}, average)


def test_a_parameter_frozen_between_steps_leaves_the_outer_optimizer() -> None:
    def freeze(hook: str, t: Any, m: Any) -> None:
        if t.global_step == 3:
            m.net[0].requires_grad_(False)

    module, strategy = Net(batch_norm=False), DilocoStrategy(num_nodes=2, diloco_interval=2)
    trainer(strategy, max_steps=6, callbacks=[Probe(freeze, "on_train_batch_start")]).fit(module, loader())
    assert [len(g["params"]) for g in strategy.outer_optimizer.param_groups] == [2]
    assert len(strategy.outer_optimizer.state) == 2
    delta = [e.payload_bytes for e in strategy.ledger.entries if e.what == "delta"]
    assert delta == [4 * 41, 4 * 9, 4 * 9]


@pytest.mark.slow
@pytest.mark.parametrize("automatic", [True, False])
def test_learning_rates_and_schedulers_changed_in_validation_hooks_are_everybodys(automatic: bool) -> None:
    class Halves(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.automatic_optimization = automatic

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.08)
            return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5), "frequency": 10**6}]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if not automatic:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                self.lr_schedulers().step()

    states = []
    for strategy in ("auto", far(1, outer_optimizer_kwargs={"lr": 1.0}), far(3)):
        t = trainer(strategy, max_epochs=3)
        t.fit(Halves(), loader(), loader(shuffle=False))
        assert t.optimizers[0].param_groups[0]["lr"] == 0.01
        assert t.lr_scheduler_configs[0].scheduler.last_epoch == 3
        states.append(t)
    workers = states[-1].strategy._engine.context.inner.workers.values()
    assert [w.control[0][0]["lr"] for w in workers] == [0.01] * 3


def test_parameter_groups_added_in_a_validation_hook_join() -> None:
    def thaw(hook: str, t: Any, m: Any) -> None:
        if not t.sanity_checking and len(t.optimizers[0].param_groups) == 1:
            m.net[0].requires_grad_(True)
            t.optimizers[0].add_param_group({"params": list(m.net[0].parameters()), "lr": 0.02})

    class Head(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.net[0].requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    module, start = Head(), copy_of(Head().state_dict())
    trainer(DilocoStrategy(num_nodes=3, diloco_interval=2), callbacks=[Probe(thaw, "on_validation_end")]).fit(
        module, loader(), loader(shuffle=False)
    )
    assert not torch.equal(module.net[0].weight, start["net.0.weight"])


class Toggles(Net):
    """Alternates what requires a gradient inside training_step, as GANs do."""

    def __init__(self, toggle: bool) -> None:
        super().__init__(batch_norm=False)
        self.automatic_optimization = False
        self.toggle = toggle

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.05) for i in (0, -1)]

    def training_step(self, batch, batch_idx):
        for optimizer, own, other in zip(
            self.optimizers(), (self.net[0], self.net[-1]), (self.net[-1], self.net[0]), strict=True
        ):
            if self.toggle:
                own.requires_grad_(True)
                other.requires_grad_(False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


@pytest.mark.parametrize("share", [False, True])
def test_requires_grad_toggled_inside_a_step_freezes_nothing(share: bool) -> None:
    states = []
    for toggle in (False, True):
        L.seed_everything(1, verbose=False)
        strategy = DilocoStrategy(num_nodes=3, diloco_interval=2, share_frozen=share)
        module = Toggles(toggle)
        trainer(strategy, max_epochs=1).fit(module, loader())
        states.append([copy_of(module.state_dict()), *(strategy.worker_state_dict(w) for w in range(3))])
        assert len(strategy.outer_optimizer.param_groups[0]["params"]) == 4
    for plain, toggled in zip(*states, strict=True):
        assert_same(plain, toggled)


def test_tensors_that_replicas_cannot_follow_are_refused() -> None:
    class Raw(Net):
        def configure_optimizers(self):
            self.alpha = torch.zeros(1, requires_grad=True)
            return torch.optim.SGD([*self.parameters(), self.alpha], lr=0.1)

    class TiedByData(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.twin = nn.Linear(3, 8)
            self.twin.weight.data = self.net[0].weight.data

    class ViewOfParameter(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.register_buffer("head", self.net[0].weight.data[:2])

    for make, message in (
        (Raw, r"^SGD trains a tensor of shape \(1,\) that is no parameter of Raw, so workers can't have replicas of"),
        (TiedByData, r"^'net.0.weight' and 'twin.weight' of TiedByData share memory, which replicas can't, since each"),
        (ViewOfParameter, r"'(head|net.0.weight)' and '(head|net.0.weight)' of ViewOfParameter share memory"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(DilocoStrategy(num_nodes=2), max_steps=1).fit(make(), loader())
        states = []  # one worker with a plain average works on the module's own tensors: it is the plain run
        for strategy in ("auto", DilocoStrategy(num_nodes=1, outer_optimizer_kwargs={"lr": 1.0})):
            L.seed_everything(1, verbose=False)
            module = make()
            trainer(strategy, max_steps=3).fit(module, loader())
            states.append(copy_of(module.state_dict()))
        assert_same(*states)


def test_buffers_that_are_views_of_one_storage_stay_so_in_every_replica() -> None:
    class Views(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.register_buffer("whole", torch.zeros(4))
            self.register_buffer("head", self.whole[:2])

        def training_step(self, batch, batch_idx):
            self.whole += batch[0].sum()
            assert torch.equal(self.head, self.whole[:2])
            return super().training_step(batch, batch_idx)

    strategy = DilocoStrategy(num_nodes=3, diloco_interval=2)
    trainer(strategy, max_steps=5).fit(Views(), loader())
    for worker in range(3):
        state = strategy.worker_state_dict(worker)
        assert torch.equal(state["head"], state["whole"][:2])
        assert state["head"].abs().sum() > 0


def test_what_an_algorithm_publishes_is_not_taken_for_theta() -> None:
    """The module shows the mean of the replicas between rounds; θ, which the algorithm never moves, stays."""

    class Apart(Diloco):
        published = "average"

        def after_inner_step(self, step):
            pass

    L.seed_everything(1, verbose=False)
    module, strategy = Net(), DilocoStrategy(num_nodes=2, diloco_interval=3, algorithm=Apart())
    start = copy_of(dict(module.named_parameters()))
    trainer(strategy, max_epochs=3).fit(module, loader(), loader(shuffle=False))
    workers = [strategy.worker_state_dict(w) for w in range(2)]
    for name, theta in strategy._engine.context.outer.tensors.items():
        assert torch.equal(theta, start[name])
        mean = workers[0][name] + (workers[1][name] - workers[0][name]) / 2
        assert torch.equal(module.state_dict()[name], mean)
        assert torch.equal(strategy.outer_state_dict()[name], mean)


def test_mutable_values_in_groups_are_each_workers_own() -> None:
    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group.setdefault("k", torch.zeros(()))
                group["k"] += 1
                group.setdefault("history", []).append(int(group["k"]))
            return super().step(closure)

    strategy = far()
    trainer(strategy, max_steps=4).fit(Net(lambda p: Counts(p, lr=0.1)), loader())
    for worker in strategy._engine.context.inner.workers.values():
        assert worker.control[0][0]["k"].item() == 4
        assert worker.control[0][0]["history"] == [1, 2, 3, 4]


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start"])
def test_writes_without_a_trace_at_starts_act_at_once(hook: str) -> None:
    seen: list[float] = []

    class Look(Net):
        def training_step(self, batch, batch_idx):
            seen.append(self.net[0].bias.abs().sum().item())
            return super().training_step(batch, batch_idx)

    zero = Probe(lambda hook, t, m: m.net[0].bias.data.zero_(), hook)
    trainer(far(), max_steps=1, callbacks=[zero]).fit(Look(batch_norm=False), loader())
    assert seen == [0.0, 0.0, 0.0]


def test_a_callback_that_writes_all_weights_every_step_does_not_stop_the_rounds() -> None:
    decay = Probe(lambda h, t, m: [p.data.mul_(0.999) for p in m.parameters()], "on_train_batch_end")
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    trainer(strategy, max_steps=6, callbacks=[decay]).fit(Net(batch_norm=False), loader())
    assert strategy.outer_steps == 3


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[True, False], [True]], r"True is a boolean \(`nonzero` turns masks into indices\)\.$"),
        ([torch.tensor([True]), [1]], r"tensor\(True\) is a boolean"),
        ([[0.5], [1]], r"'float' object cannot be interpreted as an integer\.$"),
        (None, r"^`partition` must return one list of integer indices per worker, not a NoneType like this"),
        ([0, 1], r"'int' object is not iterable\.$"),
    ],
)
def test_partitions_that_are_no_lists_of_indices(returned: Any, message: str) -> None:
    strategy = DilocoStrategy(num_nodes=2, partition=lambda dataset, n: returned)
    with pytest.raises(ValueError, match=message):
        trainer(strategy, max_steps=1).fit(Net(), loader())


def test_the_sanity_check_after_the_lr_finder_sees_the_module() -> None:
    class Tuned(Net):
        lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def validation_step(self, batch, batch_idx):
            if self.trainer.sanity_checking:
                assert_same(copy_of(self.state_dict()), start)
                checked.append(True)

    checked: list[bool] = []
    module = Tuned()
    start = copy_of(module.state_dict())
    t = trainer(DilocoStrategy(num_nodes=2), max_steps=2, max_epochs=-1)
    t.callbacks.append(LearningRateFinder(num_training_steps=5))
    t.fit(module, loader(), loader(shuffle=False))
    assert checked


def test_reshaped_and_removed_tensors_between_steps_are_followed() -> None:
    def act(hook: str, t: Any, m: Any) -> None:
        if t.global_step == 2:
            prune.l1_unstructured(m.net[0], "weight", amount=0.5)
        if t.global_step == 4:
            prune.remove(m.net[0], "weight")
            m.extra = nn.BatchNorm1d(3, affine=False)
            m.gone = None
        if t.global_step == 5:
            m.net[-1].bias.data = torch.zeros(2)[:1].clone()

    class Extra(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.register_buffer("gone", torch.ones(2))

        def forward(self, x):
            return super().forward(self.extra(x) if hasattr(self, "extra") else x)

    module, strategy = Extra(), DilocoStrategy(num_nodes=3, diloco_interval=100, final_sync=False)
    t = trainer(strategy, max_steps=7, callbacks=[Probe(act, "on_train_batch_start")])
    t.fit(module, loader())
    for worker in range(3):
        state = strategy.worker_state_dict(worker)
        assert state.keys() == module.state_dict().keys()
        assert "gone" not in state
        assert state["extra.num_batches_tracked"].item() == 3


def test_gradients_of_a_backward_inside_weights_do_not_stay() -> None:
    def look(hook: str, t: Any, m: Any) -> None:
        with t.strategy.weights("average"), torch.enable_grad():
            m(torch.ones(2, 3)).sum().backward()
        assert all(p.grad is None for p in m.parameters())

    trainer(far(), max_steps=2, callbacks=[Probe(look, "on_train_batch_end")]).fit(Net(batch_norm=False), loader())


def test_outer_optimizers_that_leave_parameters_out_are_refused_and_muon_gets_its_matrices() -> None:
    strategy = DilocoStrategy(
        num_nodes=2, outer_optimizer_cls=lambda ps: torch.optim.SGD([p for p in ps if p.ndim == 2], lr=0.5)
    )
    with pytest.raises(
        ValueError, match=r"^The outer optimizer SGD leaves out net.0.bias, net.3.bias, which would never"
    ):
        trainer(strategy, max_steps=1).fit(Net(batch_norm=False), loader())

    class Matrices(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            for p in self.parameters():
                p.requires_grad_(p.ndim == 2)

    muon = DilocoStrategy(num_nodes=2, diloco_interval=2, outer_optimizer_cls=torch.optim.Muon)
    trainer(muon, max_steps=4).fit(Matrices(), loader(regression_data()))
    assert muon.outer_steps == 2
