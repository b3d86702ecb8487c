"""What hooks find as ``trainer.train_dataloader``, and what batches are to a step."""

import copy
import pickle
import random
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from lightning.pytorch.utilities import CombinedLoader
from loaders import (
    N,
    Numbers,
    Recorder,
    Rows,
    SizedRows,
    Stream,
    Weighted,
    as_lists,
    ddp,
    every_nth,
    fit,
    own_loader,
    skip_fifth,
)
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from lightning_diloco import DilocoStrategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:The last . batch.es. of an epoch don't suffice"),
    pytest.mark.filterwarnings("ignore:The `__iter__` of Loader fetched"),
]


class Noisy(Numbers):
    """Draws from every generator in the process that reads it."""

    def __getitem__(self, index: int) -> Any:
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return super().__getitem__(index)


class Shuffled:
    """Shuffles itself with torch's generator; iterates over itself."""

    def __iter__(self) -> Iterator[Any]:
        self.order = torch.randperm(24).view(-1, 2).tolist()
        return self

    def __next__(self) -> Any:
        if not self.order:
            raise StopIteration
        return self.order.pop()


class ShuffledStream(IterableDataset):
    """Shuffles itself with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.randperm(24, generator=self.generator).tolist())


class Looks(L.Callback):
    """Reads the training loader, wholly and in part, at the beginning of each epoch and in the middle of it."""

    def __init__(self, looks: bool = True) -> None:
        self.looks = looks
        self.read: list[Any] = []

    def look(self, trainer: L.Trainer) -> None:
        if self.looks:
            next(iter(trainer.train_dataloader))
            self.read.append([as_lists(batch) for batch in trainer.train_dataloader])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.look(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.look(trainer)


GENERATOR = torch.Generator()


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(24), 2, shuffle=True),
    "processes": lambda: DataLoader(Noisy(24), 2, shuffle=True, num_workers=2, persistent_workers=True),
    "without batches": lambda: DataLoader(Noisy(24), None, shuffle=True),
    "its sampler": lambda: DataLoader(Noisy(24), 2, sampler=Weighted(torch.ones(24), 24)),
    "its sampler's generator": lambda: DataLoader(
        Noisy(24), 2, sampler=RandomSampler(Noisy(24), True, 24, generator=GENERATOR.manual_seed(1))
    ),
    "its iter": lambda: own_loader(skip_fifth)(Noisy(24), 2, shuffle=True),
    "stream": lambda: DataLoader(Stream(24), 2),
    "shuffled stream": lambda: DataLoader(ShuffledStream(), 2),
    "iterable": lambda: Rows(12),
    "sized iterable": lambda: SizedRows(12),
    "shuffled iterable": Shuffled,
}


@pytest.mark.parametrize("name", LOADERS)
def test_hooks_read_the_first_workers_batches_and_disturb_nothing(name):
    runs = []
    for looks in (False, True):
        L.seed_everything(41, verbose=False)
        callback = Looks(looks)
        model = fit(LOADERS[name](), model=Recorder(draw=True), callbacks=[callback])
        runs.append((model.seen, torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))  # noqa: NPY002
    assert runs[0] == runs[1]
    seen = runs[0][0]
    for number, read in enumerate(callback.read):
        assert all(not isinstance(batch, dict) for batch in read)
        if name in ("shuffled", "processes", "without batches", "its sampler", "stream", "iterable", "sized iterable"):
            assert read == seen[number // 2, 0]
        assert len(read) >= len(seen[number // 2, 0])
    assert len(callback.read) == 4


@pytest.mark.parametrize("where", ["module", "callback"])
def test_a_hook_that_looks_disturbs_no_resumed_run(where, tmp_path):
    class Project(Recorder):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if where == "module":  # in a worker's turn
                list(self.trainer.train_dataloader)

    class Save(Looks):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 5 and not (tmp_path / "a.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(**kwargs: Any) -> dict[Any, Any]:
        model = Project(draw=True)
        trainer(DilocoStrategy(N, 2), callbacks=[Save(where == "callback")]).fit(
            model, DataLoader(Noisy(24), 2, sampler=Weighted(torch.ones(24), 24)), **kwargs
        )
        return model.seen

    L.seed_everything(41, verbose=False)
    whole = run()
    L.seed_everything(42, verbose=False)
    later = run(ckpt_path=tmp_path / "a.ckpt")
    assert later == {key: batches[1:] for key, batches in whole.items() if key[0] == 1}


def test_a_partition():
    callback = Looks()
    model = fit(DataLoader(Numbers(24), 2), partition=every_nth, callbacks=[callback])
    assert callback.read == [model.seen[0, 0]] * 4


@pytest.mark.parametrize("kind", [dict, list, CombinedLoader])
def test_collections_of_loaders(kind):
    both = {"a": DataLoader(Numbers(24), 2), "b": Rows(12)}
    loaders: Any = {dict: both, list: list(both.values()), CombinedLoader: CombinedLoader(both, "min_size")}[kind]
    read = []

    class Reads(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            now = trainer.train_dataloader
            parts = now if kind is list else list(now.values())
            read.append([[as_lists(batch) for batch in part] for part in parts])

    model = fit(loaders, callbacks=[Reads()])
    for epoch in range(2):
        seen = [list(b.values()) if isinstance(b, dict) else b for b in model.seen[epoch, 0]]
        assert read[epoch] == [[b[0] for b in seen], [b[1] for b in seen]]


def test_update_bn_in_a_hook():
    class Updates(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            torch.optim.swa_utils.update_bn(trainer.train_dataloader, pl_module.net)

    L.seed_everything(3, verbose=False)
    model = Net()
    trainer(DilocoStrategy(N, 2), max_epochs=1, callbacks=[Updates()]).fit(model, loader())
    twin, data = Net().net, regression_data()
    twin.load_state_dict(model.net.state_dict())
    indices = ddp(Numbers(96), 3, epochs=[0], batch_size=4)[0, 0]
    torch.optim.swa_utils.update_bn([data.tensors[0][i] for i in indices], twin)
    assert_same(copy_of(model.net.state_dict()), copy_of(twin.state_dict()))


class Resettable:
    """A training loader that is no DataLoader, with more than batches."""

    def __init__(self) -> None:
        self.resets, self.batch_size = 0, 2

    def reset(self) -> None:
        self.resets += 1

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(6 * self.batch_size).split(self.batch_size))


def test_attributes_of_a_loader_that_is_no_dataloader():
    lengths = []

    class Resets(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            assert isinstance(trainer.train_dataloader, Resettable)
            assert trainer.train_dataloader
            trainer.train_dataloader.reset()
            if trainer.current_epoch == 1:
                trainer.train_dataloader.batch_size = 3

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            lengths.append(len(batch))

    data = Resettable()
    fit(data, callbacks=[Resets()], max_epochs=3)
    assert data.resets == 3
    assert lengths == [2, 2, 3, 3, 3, 3]


def test_attributes_of_a_dataloader():
    seen: dict[str, Any] = {}

    class Mine(DataLoader):
        note = "mine"
        threshold = 1

    class Asks(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            now = trainer.train_dataloader
            assert isinstance(now, Mine)
            assert isinstance(now, DataLoader)
            seen.update(
                length=len(now),
                dataset=now.dataset,
                batch_size=now.batch_size,
                sampler=now.sampler,
                indices=list(now.batch_sampler),
                cut=(now.batch_sampler.batch_size, now.batch_sampler.drop_last, len(now.batch_sampler)),
                note=now.note,
            )
            now.threshold = 7
            now.collate_fn = lambda items: items[:1]
            with pytest.raises(ValueError, match="should not be set"):
                now.batch_size = 3

    data = Mine(Numbers(24), 2)
    model = fit(data, callbacks=[Asks()])
    assert seen.pop("dataset") is data.dataset
    assert seen.pop("sampler") is data.sampler
    assert [batch[:1] for batch in seen.pop("indices")] == model.seen[1, 0]  # training reads with the new `collate_fn`
    assert seen == {"length": 4, "batch_size": 2, "cut": (2, False, 4), "note": "mine"}
    assert data.threshold == 7
    assert model.fitted.train_dataloader is data


class Growing(BatchSampler):
    """A curriculum: its batches grow."""

    def grow(self) -> None:
        self.batch_size *= 2


class Bare:
    """Batches without a base class."""

    def __init__(self) -> None:
        self.batch_size = 2

    def grow(self) -> None:
        self.batch_size *= 2

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(24).split(self.batch_size))

    def __len__(self) -> int:
        return 24 // self.batch_size


class Several(Numbers):
    def __getitem__(self, index: Any) -> Any:
        return torch.as_tensor(index)


def grow(data: Any) -> None:
    data.batch_sampler.grow()


def set_size(data: Any) -> None:
    data.batch_sampler.batch_size = 4


def ranks() -> DistributedSampler:
    return DistributedSampler(Numbers(24), N, 0, shuffle=False)


GROWING = {
    "method": (lambda: DataLoader(Numbers(24), batch_sampler=Growing(range(24), 2, False)), grow),
    "attribute": (lambda: DataLoader(Numbers(24), batch_sampler=Growing(range(24), 2, False)), set_size),
    "bare": (lambda: DataLoader(Numbers(24), batch_sampler=Bare()), grow),
    "torch's": (lambda: DataLoader(Numbers(24), 2), set_size),
    "ranks": (lambda: DataLoader(Numbers(24), 2, sampler=ranks()), set_size),
    "batches of ranks": (lambda: DataLoader(Numbers(24), batch_sampler=Growing(ranks(), 2, False)), grow),
    "without batches": (lambda: DataLoader(Several(24), None, sampler=Bare()), lambda data: data.sampler.grow()),
}


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("name", GROWING)
def test_hooks_change_the_users_sampler(name, distributed):
    make, change = GROWING[name]

    class Grows(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            now = trainer.train_dataloader
            here, there = (x.sampler if x.batch_sampler is None else x.batch_sampler for x in (now, data))
            assert isinstance(here, type(there))
            if trainer.current_epoch == 1:
                change(now)
                assert there.batch_size == here.batch_size == 4
                assert copy.copy(here).batch_size == pickle.loads(pickle.dumps(here)).batch_size == 4
            items.append([as_lists(batch) for batch in here])
            assert len(here) == len(items[-1])

    data, items = make(), []
    model = fit(data, callbacks=[Grows()], use_distributed_sampler=distributed)
    for epoch in (0, 1):
        assert items[epoch] == model.seen[epoch, 0]
        assert {len(batch) for w in range(N) for batch in model.seen[epoch, w]} == {2 * (epoch + 1)}
        assert sorted(j for w in range(N) for batch in model.seen[epoch, w] for j in batch) == list(range(24))


def test_the_loader_that_hooks_see_can_be_copied():
    read = []

    class Copies(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            now = trainer.train_dataloader
            twins = (now, copy.copy(now), copy.deepcopy(now), pickle.loads(pickle.dumps(now)))
            read.extend([as_lists(batch) for batch in twin] for twin in twins)

    model = fit(DataLoader(Numbers(24), 2, shuffle=True), callbacks=[Copies()])
    assert read == [model.seen[0, 0]] * 4 + [model.seen[1, 0]] * 4


def test_data_that_can_be_read_only_once_arent_read_by_hooks():
    class Reads(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            with pytest.raises(TypeError, match="come from a generator, which can be read only once"):
                next(iter(trainer.train_dataloader))

    model = fit((j for j in range(12)), callbacks=[Reads()], max_epochs=1)
    assert model.seen == {(0, w): list(range(w, 12, N)) for w in range(N)}


# -------------------------------------------------------------------------------------------- what a step gets


class Mapping(dict):
    """A batch class with more than its items."""

    def __init__(self, items: Any = (), *, size: int) -> None:
        super().__init__(items)
        self.size = size

    def to(self, *args: Any, **kwargs: Any) -> "Mapping":
        return self


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    nothing: None = None

    def to(self, *args: Any, **kwargs: Any) -> "Frozen":
        return self


@dataclass
class Made:
    x: torch.Tensor
    rows: int = field(init=False, default=0)

    def to(self, *args: Any, **kwargs: Any) -> "Made":
        return self


class Graph:
    """As torch_geometric's Data: attributes, ``__getattr__``, ``to``."""

    def __init__(self, **kwargs: Any) -> None:
        self.__dict__["store"] = kwargs

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["store"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *args: Any, **kwargs: Any) -> "Graph":
        return self


Pair = namedtuple("Pair", ["x", "nothing"])


BATCHES = {
    "mapping": (lambda x: Mapping({"x": x}, size=len(x)), lambda b: b["x"]),
    "frozen": (Frozen, lambda b: b.x),
    "made": (Made, lambda b: b.x),
    "graph": (lambda x: Graph(x=x), lambda b: b.x),
    "named tuple": (lambda x: Pair(x, None), lambda b: b.x),
    "list of None": (lambda x: [None, {"x": x, "none": None}], lambda b: b[1]["x"]),
}


@pytest.mark.parametrize("workers", [1, N])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("several", [False, True])
def test_batches_are_handed_through(name, workers, several):
    make, rows = BATCHES[name]
    kinds, sums = set(), []

    class Project(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch = batch["a"] if several else batch
            kinds.add(type(batch))
            x = rows(batch)
            if name == "mapping":
                assert batch.size == len(x)
            sums.extend(x[:, 0].tolist())
            return self.layer(x).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = DataLoader(torch.arange(24.0).view(24, 1), 4, collate_fn=lambda items: make(torch.stack(items)))
    strategy = DilocoStrategy(workers, 2, outer_optimizer_kwargs={"lr": 1.0})
    trainer(strategy, max_epochs=1).fit(Project(), {"a": data} if several else data)
    assert kinds == {type(make(torch.zeros(1, 1)))}
    assert sorted(sums) == list(range(24))


@pytest.mark.parametrize("workers", [1, N])
def test_the_batch_of_a_step_is_the_object_that_was_collated(workers):
    made: list[Any] = []

    class Project(Recorder):
        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert any(batch is one for one in made)
            return self.weight.sum()

    def collate(items: list[int]) -> Any:
        made.append({"x": [items, None]})
        return made[-1]

    fit(DataLoader(Numbers(24), 2, collate_fn=collate), workers, Project())
    assert len(made) == 24
