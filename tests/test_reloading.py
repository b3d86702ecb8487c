"""Are loaders that hooks make, and make again, sharded for their epoch?"""

from typing import Any

import lightning as L
import pytest
import torch
from helpers import trainer
from loaders import (
    N,
    Numbers,
    Recorder,
    Weighted,
    child_processes,
    ddp,
    every_nth,
    flat,
    pair_of_loaders,
    pair_under_ddp,
)
from torch.utils.data import (
    DataLoader,
)

from lightning_diloco import DilocoStrategy


def _sizes(epoch: int) -> int:
    return 12 + 6 * epoch


@pytest.mark.parametrize("kwargs", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_reloaded_loaders_are_sharded_for_their_epoch(owner, kwargs):
    L.seed_everything(41, verbose=False)
    others = child_processes()
    made: list[DataLoader] = []

    def make() -> DataLoader:
        made.append(DataLoader(Numbers(_sizes(len(made))), 2, shuffle=True, **kwargs))
        return made[-1]

    counts = []

    class WithHook(Recorder):
        def on_train_epoch_end(self) -> None:
            counts.append((self.during["len"], self.during["batches"]))
            assert len(child_processes() - others) <= 2  # the last epoch's pool has ended

    class Module(WithHook):
        def train_dataloader(self) -> DataLoader:
            return make()

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return make()

    model = Module() if owner == "module" else WithHook()
    t = trainer(DilocoStrategy(N, 2), reload_dataloaders_every_n_epochs=1, max_epochs=3)
    t.fit(model, datamodule=Data() if owner == "datamodule" else None)
    assert len(made) == 3
    for epoch in range(3):
        expected = ddp(Numbers(_sizes(epoch)), 41, [epoch], batch_size=2)
        assert {key: shard for key, shard in model.seen.items() if key[0] == epoch} == expected
        batches = _sizes(epoch) // N // 2
        assert counts[epoch] == (batches, batches)
    assert all(type(loader) is DataLoader for loader in made)
    assert t.global_step == 2 + 3 + 4


@pytest.mark.parametrize("combined", [False, True])
def test_reloading_the_same_objects(combined):
    L.seed_everything(41, verbose=False)
    loader = pair_of_loaders("min_size") if combined else DataLoader(Numbers(20), 2, shuffle=True)

    class Module(Recorder):
        def train_dataloader(self) -> Any:
            return loader

    model = Module()
    trainer(DilocoStrategy(N, 2), reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(model)
    assert model.seen == (pair_under_ddp("min_size", dict, 3) if combined else ddp(Numbers(20), 41, 3, batch_size=2))
    if combined:
        assert [type(x) for x in loader.flattened] == [DataLoader, DataLoader]


def test_reloading_does_not_change_what_custom_samplers_draw():
    class Module(Recorder):
        def train_dataloader(self) -> Any:
            return {name: DataLoader(Numbers(20), 2, sampler=Weighted(torch.ones(20), 20)) for name in "ab"}

    L.seed_everything(41, verbose=False)
    once, again = Module(), Module()
    trainer(DilocoStrategy(N, 2), max_epochs=3).fit(once)
    trainer(DilocoStrategy(N, 2), reload_dataloaders_every_n_epochs=1, max_epochs=3).fit(again)
    assert len(once.seen) == 3 * N
    assert again.seen == once.seen


def test_a_partition_is_asked_again_when_the_loader_is_reloaded():
    class Module(Recorder):
        def train_dataloader(self) -> Any:
            return DataLoader(Numbers(6 * (1 + self.current_epoch)), 2)

    model = Module()
    strategy = DilocoStrategy(N, 2, partition=every_nth)
    trainer(strategy, reload_dataloaders_every_n_epochs=1).fit(model)
    assert flat(model.seen[0, 1]) == [1, 4]
    assert flat(model.seen[1, 1]) == [1, 4, 7, 10]
