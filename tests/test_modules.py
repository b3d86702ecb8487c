"""Modules that do unusual things, each as its own plain run and with outer steps."""

from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from helpers import Net, assert_same, copy_of, differs, loader, regression_data, slow_but, trainer
from lightning.pytorch.demos import boring_classes
from lightning.pytorch.demos.transformer import Transformer
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_diloco import DilocoStrategy

SEED = 5


class Configured(Net):
    """Makes its layers in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


class MaterialisedInSetup(Net):
    """Lazy layers that have seen a batch before training starts."""

    def setup(self, stage):
        if not hasattr(self, "lazy"):
            torch.manual_seed(3)
            self.lazy = nn.LazyLinear(3)
            self.lazy(torch.zeros(1, 3))

    def forward(self, x):
        return super().forward(self.lazy(x))


class WeightNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = weight_norm(self.net[0])


class SometimesUnused(Net):
    """A layer without gradients in every second step."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        torch.manual_seed(4)
        self.extra = nn.Linear(3, 1)
        self.calls = 0

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return loss + self.extra(batch[0]).pow(2).mean() if batch_idx % 2 else loss


class Sparse(Net):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        torch.manual_seed(4)
        self.table = nn.Embedding(10, 3, sparse=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, x):
        return super().forward(x + self.table((x[:, 0].abs() * 5).long().clamp(max=9)))


class ReassignsBuffers(Net):
    """A forward that makes new tensors of its buffers, and registers one on the first call."""

    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen = self.seen + x.detach().sum()
            if not hasattr(self, "late"):
                self.register_buffer("late", torch.zeros(()))
            self.late.add_(1)
        return super().forward(x)


class HalfParameters(Net):
    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def forward(self, x):
        return super().forward(x) * self.scale.float().mean()


class Wave(Net):
    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        self.wave = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x):
        return super().forward(x) * self.wave.abs().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__(batch_norm=False)
        torch.manual_seed(4)
        self.lstm = nn.LSTM(1, 3, batch_first=True)

    def forward(self, x):
        return super().forward(self.lstm(x.unsqueeze(-1))[0][:, -1])


MODULES = [
    Configured,
    MaterialisedInSetup,
    WeightNorm,
    SometimesUnused,
    Sparse,
    ReassignsBuffers,
    HalfParameters,
    Wave,
    Recurrent,
]


@pytest.mark.parametrize("make", slow_but(MODULES[:3], MODULES))
def test_every_replica_is_its_own_run_and_one_worker_the_plain_run(make: Any) -> None:
    data = regression_data(36)
    L.seed_everything(SEED, verbose=False)
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=10**6, final_sync=False)
    trainer(strategy, max_epochs=2).fit(make(), loader(data, 3))
    for w in range(3):
        shard = DistributedSampler(data, num_replicas=3, rank=w, seed=SEED)
        module = make()
        trainer(max_epochs=2).fit(module, DataLoader(data, 3, sampler=shard))
        assert_same(strategy.worker_state_dict(w), copy_of(module.state_dict()))

    states = []
    for one in ("auto", DilocoStrategy(num_nodes=1, diloco_interval=3, outer_optimizer_kwargs={"lr": 1.0})):
        L.seed_everything(SEED, verbose=False)
        module = make()
        trainer(one, max_epochs=2).fit(module, loader(data, 3))
        states.append(copy_of(module.state_dict()))
    assert_same(*states)

    strategy, module = DilocoStrategy(num_nodes=3, diloco_interval=2), make()
    trainer(strategy, max_epochs=2).fit(module, loader(data, 3))
    theta = strategy.outer_state_dict()
    assert_same(copy_of(module.state_dict()), theta)
    for w in range(3):
        assert_same(strategy.worker_state_dict(w), theta)


def test_a_parameter_that_is_replaced_between_steps_is_followed() -> None:
    class Replaces(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                new = nn.Parameter(torch.full_like(pl_module.net[0].bias, 0.25))
                pl_module.net[0].bias = new
                trainer.optimizers[0].param_groups[0]["params"][1] = new

    module, strategy = Net(batch_norm=False), DilocoStrategy(num_nodes=3, diloco_interval=2)
    trainer(strategy, max_steps=6, callbacks=[Replaces()]).fit(module, loader(batch_size=2))
    assert_same(strategy.worker_state_dict(1), copy_of(module.state_dict()))
    assert not torch.equal(module.net[0].bias, torch.full((8,), 0.25))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_submodules_are_not_recompiled_per_worker() -> None:
    frames = []
    for strategy in ("auto", DilocoStrategy(num_nodes=4, diloco_interval=2)):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        module = Net()
        module.net = torch.compile(module.net, backend=counter)
        trainer(strategy, max_steps=6).fit(module, loader(batch_size=4))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] > 0


@pytest.mark.parametrize("make", [boring_classes.BoringModel, boring_classes.ManualOptimBoringModel])
def test_lightnings_boring_models(make: Any) -> None:
    states = []
    for strategy in ("auto", DilocoStrategy(num_nodes=1, diloco_interval=3, outer_optimizer_kwargs={"lr": 1.0})):
        L.seed_everything(SEED, verbose=False)
        module = make()
        trainer(strategy, max_epochs=1).fit(module)
        states.append(copy_of(module.state_dict()))
    assert_same(*states)
    strategy, module = DilocoStrategy(num_nodes=3, diloco_interval=4), make()
    start = copy_of(module.state_dict())
    trainer(strategy, max_epochs=1).fit(module)
    assert differs(copy_of(module.state_dict()), start)
    assert strategy.local_steps == 22  # 64 samples in batches of one, dealt to three


@pytest.mark.slow
def test_lightnings_demo_transformer_learns() -> None:
    class Sequences(L.LightningModule):
        """The demo's transformer, told to repeat its input."""

        def __init__(self) -> None:
            super().__init__()
            self.model = Transformer(vocab_size=7, nlayers=1, nhid=16, ninp=16, nhead=2, dropout=0.1)

        def loss(self, batch):
            (tokens,) = batch
            return nn.functional.nll_loss(self.model(tokens, tokens), tokens.view(-1))

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch), batch_size=8)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    L.seed_everything(SEED, verbose=False)
    tokens = TensorDataset(torch.randint(7, (96, 6)))
    module, strategy = Sequences(), DilocoStrategy(num_nodes=4, diloco_interval=3)
    evaluate = trainer().validate
    before = evaluate(module, loader(tokens, 8, shuffle=False), verbose=False)[0]["val_loss"]
    trainer(strategy, max_epochs=4).fit(module, loader(tokens, 4))
    after = evaluate(module, loader(tokens, 8, shuffle=False), verbose=False)[0]["val_loss"]
    assert after < 0.5 * before
