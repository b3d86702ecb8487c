"""Are the user's loaders left as they were?"""

from typing import Any

import lightning as L
import pytest
import torch
from helpers import slow_but, trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.utilities import CombinedLoader
from loaders import (
    N,
    Numbers,
    Recorder,
    Rows,
    Stream,
    as_lists,
    batched,
    child_processes,
    fit,
    flat,
    pair_of_loaders,
    thirds,
)
from torch.utils.data import (
    DataLoader,
)

from lightning_diloco import DilocoStrategy


class MyLoader(DataLoader):
    pass


@pytest.mark.parametrize("kind", [DataLoader, MyLoader])
@pytest.mark.parametrize(
    "kwargs", slow_but([{}], [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
)
@pytest.mark.parametrize("partition", [None, thirds])
def test_the_users_loader_is_left_as_it_was(kind, kwargs, partition):
    generator = torch.Generator().manual_seed(12)
    loader = kind(Numbers(20), 4, shuffle=True, generator=generator, **kwargs)
    loader.note = ["mine"]
    list(loader)  # from here on the user's own processes run, if they persist
    state = generator.get_state()
    before = dict(vars(loader))
    sampler = dict(vars(loader.sampler))
    batch_sampler = dict(vars(loader.batch_sampler))
    others = child_processes()
    model = fit(loader, partition=partition)
    assert child_processes() <= others
    for now, then in (
        (vars(loader), before),
        (vars(loader.sampler), sampler),
        (vars(loader.batch_sampler), batch_sampler),
    ):
        assert now.keys() == then.keys()
        assert all(now[key] is then[key] for key in now)
    assert type(loader) is kind
    assert torch.equal(generator.get_state(), state)
    during = model.during["loader"]
    assert during is not loader
    assert isinstance(during, kind)
    assert during.note is loader.note
    assert during.dataset is loader.dataset
    assert model.fitted.train_dataloader is loader
    assert len(loader) == 5
    assert sorted(flat(as_lists(batch) for batch in loader)) == list(range(20))
    loader._iterator = None  # ends persistent processes now; the garbage collector would wait 5 s for each


def test_one_worker_reads_the_users_own_loader_as_the_plain_trainer_does():
    seen = []
    for strategy in (DilocoStrategy(1, 2), "auto"):
        torch.manual_seed(4)
        model, loader = Recorder(), DataLoader(Numbers(20), 3, shuffle=True)
        model.trainer = t = trainer(strategy)
        if strategy == "auto":
            t.strategy.current_worker = 0
        t.fit(model, loader)
        assert model.during["loader"] is loader
        seen.append((model.seen, torch.get_rng_state().tolist(), model.during["batches"], t.global_step))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "make", [lambda: Rows(4), lambda: pair_of_loaders("max_size_cycle"), lambda: DataLoader(Stream(9), 2)]
)
def test_one_workers_loaders_of_other_kinds_are_the_users_own(make):
    loader = make()
    before = loader.flattened if isinstance(loader, CombinedLoader) else [loader]
    during = fit(loader, 1).during["loader"]
    assert all(now is then for now, then in zip(CombinedLoader(during).flattened, before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("sanity_steps", [0, 2])  # set up after the training loader, or before
def test_validation_loaders_are_untouched(sanity_steps):
    loaders = [DataLoader(Numbers(5), 2), DataLoader(Numbers(3), 1, num_workers=2), DataLoader(Stream(4), 3), Rows(1)]
    before = [dict(vars(loader)) for loader in loaders]
    model = Recorder()

    class Identity(L.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            assert all(now is then for now, then in zip(trainer.val_dataloaders, loaders, strict=True))

    t = trainer(DilocoStrategy(N, 2), callbacks=[Identity()], num_sanity_val_steps=sanity_steps)
    t.fit(model, DataLoader(Numbers(20), 4), loaders)
    once = [
        *[(0, None, b) for b in ([0, 1], [2, 3], [4])],
        *[(1, None, b) for b in ([0], [1], [2])],
        *[(2, None, b) for b in ([0, 1, 2], [3])],
        (3, None, [0, 0]),
    ]
    assert model.validated == once * 2
    for loader, then in zip(loaders, before, strict=True):
        assert all(vars(loader)[key] is value for key, value in then.items())
    assert len(model.seen) == 2 * N


@pytest.mark.slow
def test_the_batch_size_finder_finds_validation_loaders_untouched():
    """It sets validation loaders up while ``trainer.training`` is True."""

    class Module(Recorder):
        batch_size = 2

        def train_dataloader(self) -> DataLoader:
            return DataLoader(Numbers(48), self.batch_size)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(Numbers(10), self.batch_size)

    model = Module()
    t = trainer(DilocoStrategy(N, 2), callbacks=[BatchSizeFinder(max_trials=2, steps_per_trial=2)], max_epochs=1)
    t.fit(model)
    assert model.batch_size == 4
    assert model.validated[-3:] == [(0, None, b) for b in batched(list(range(10)), 4)]
    assert t.global_step == 4
