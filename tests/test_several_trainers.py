"""One strategy object in several Trainers: every run has the settings of its own Trainer."""

from typing import Any

import pytest
import torch
from helpers import Net, loader, trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.plugins.environments import LightningEnvironment

from lightning_diloco import DilocoStrategy


class Notes(Net):
    """Notes the types it is trained and asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.net[0].weight.dtype)
        return super().forward(x.to(self.net[0].weight.dtype))

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1].to(self.net[0].weight.dtype))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])


def strategy() -> DilocoStrategy:
    return DilocoStrategy(num_nodes=2, diloco_interval=2)


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({"precision": "64-true"}, {}, ("precision='64-true'", "precision='32-true'")),
        ({"devices": 1}, {"devices": 2}, ("devices=['cpu']", "devices=['cpu', 'cpu']")),
        ({}, {"num_nodes": 2}, ("Trainer(", "num_nodes=2")),
    ],
)
def test_a_second_trainer_with_other_settings_is_refused_before_the_first_has_run(
    first: dict[str, Any], second: dict[str, Any], named: tuple[str, str]
) -> None:
    shared, module = strategy(), Notes()
    one = trainer(shared, max_steps=2, **first)
    before = (one.precision, one.world_size, one.accelerator, one.precision_plugin, one.num_nodes)
    with pytest.raises(
        ValueError, match=r"^The strategy belongs to Trainer\(.*Make a DilocoStrategy for each"
    ) as error:
        trainer(shared, max_steps=2, **second)
    assert all(name in str(error.value) for name in named)
    assert (one.precision, one.world_size, one.accelerator, one.precision_plugin, one.num_nodes) == before
    one.fit(module, loader())
    assert set(module.seen) == {torch.float64 if first.get("precision") else torch.float32}


def test_trainers_of_the_same_settings_share_a_strategy() -> None:
    shared, module = strategy(), Notes()
    fits, predicts = trainer(shared, max_steps=2), trainer(shared)
    fits.fit(module, loader())
    assert len(predicts.predict(module, loader(shuffle=False))) == 24
    fits.fit_loop.epoch_loop.max_steps = 4
    fits.fit(module, loader())
    assert shared.local_steps == 2


def test_one_after_the_other_every_trainer_runs_with_its_own_settings() -> None:
    shared, module = strategy(), Notes()
    double = trainer(shared, max_steps=2, max_epochs=9, precision="64-true")
    double.fit(module, loader())
    single = trainer(shared, max_steps=2, max_epochs=9, precision="32-true")
    assert single.precision == "32-true"
    plugin = single.precision_plugin
    for t, kind in ((double, torch.float64), (single, torch.float32), (double, torch.float64)):
        module.seen.clear()
        module.to(torch.float32)
        t.fit_loop.epoch_loop.max_steps += 2
        t.fit(module, loader())
        assert set(module.seen) == {kind}
    assert double.precision == "64-true"
    assert shared.precision_plugin is not plugin


def test_plugins_of_each_trainer_hold_in_its_runs() -> None:
    class Mine(MixedPrecision):
        pass

    class Others(MixedPrecision):
        pass

    shared, module = strategy(), Net()
    one = trainer(shared, max_steps=2, plugins=[Mine("bf16-mixed", "cpu"), LightningEnvironment()])
    two = trainer(shared, max_steps=2, plugins=[Others("bf16-mixed", "cpu"), LightningEnvironment()])
    for t, kind in ((one, Mine), (two, Others)):
        t.fit(module, loader())
        assert type(t.precision_plugin) is kind


def test_devices_of_a_trainer_that_has_run_do_not_hold_for_the_next() -> None:
    shared = strategy()
    one = trainer(shared, max_steps=2)
    one.fit(Net(), loader())
    two = trainer(shared, devices=2)
    assert (two.world_size, len(shared.parallel_devices)) == (2, 2)
    with pytest.raises(ValueError, match=r"^This Trainer can't run: it has 1 processes, and its strategy was given to"):
        shared._take_settings_of(one)


def test_a_trainer_that_fails_in_its_constructor_leaves_the_strategy_to_the_one_before() -> None:
    shared, module = strategy(), Notes()
    one = trainer(shared, max_steps=2, precision="64-true")
    for bad, error in (({"devices": 3}, ValueError), ({"sync_batchnorm": True}, Exception)):
        with pytest.raises(error):
            trainer(shared, precision="64-true", **bad)
    assert (one.world_size, one.precision) == (1, "64-true")
    one.fit(module, loader())
    assert set(module.seen) == {torch.float64}
    with pytest.raises(ValueError, match="can't share 2 workers"):  # found last, when all settings have been set
        trainer(shared, devices=3)
    assert (one.world_size, one.precision) == (1, "64-true")


def test_what_the_strategy_brings_holds_in_all_trainers() -> None:
    environment, precision = LightningEnvironment(), Precision()
    shared = DilocoStrategy(2, cluster_environment=environment, precision_plugin=precision)
    for _ in range(2):
        t = trainer(shared, max_steps=1)
        t.fit(Net(), loader())
        assert t.precision_plugin is precision
        assert shared.cluster_environment is environment
