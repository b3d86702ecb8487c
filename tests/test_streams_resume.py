"""Streams that shuffle themselves with torch's generator, and loaders with an ``__iter__``, resume exactly."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import slow_but, trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import CombinedLoader
from loaders import Lazy as Lazily
from loaders import N, Numbers, Recorder, Weighted, own_loader, tens
from processes import run as run_processes
from torch.utils.data import DataLoader, IterableDataset

from lightning_diloco import DilocoStrategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:The `__iter__` of Loader fetched"),
    pytest.mark.filterwarnings("ignore:The last 3 batch.es. of an epoch don't suffice for 4 workers"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
]


def draw() -> list[Any]:
    return list(torch.randperm(30).view(-1, 2))


class Iterable:
    def __iter__(self) -> Iterator[Any]:
        return iter(draw())


class Sized(Iterable):
    def __len__(self) -> int:
        return 15


class Lazy:
    """Draws between its batches."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(15):
            yield torch.randint(30, (2,))


class Set(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(draw())


class SizedSet(Set):
    def __len__(self) -> int:
        return 15


class Ignores(DataLoader):
    """Never asks its sampler."""

    def __iter__(self) -> Iterator[Any]:
        return iter(draw())

    def __len__(self) -> int:
        return 15


class Cuts(Ignores):
    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(30).split(2))


def skip_some(batches: Any) -> Iterator[Any]:
    """By place and by chance."""
    return (batch for k, batch in enumerate(batches) if k != 4 and torch.rand(1) < 0.9)


LOADERS: dict[str, Any] = {
    "iterable": Iterable,
    "sized iterable": Sized,
    "lazy iterable": Lazy,
    "stream": lambda: DataLoader(Set(), None),
    "sized stream": lambda: DataLoader(SizedSet(), None),
    "stream in processes": lambda: DataLoader(SizedSet(), None, num_workers=1),
    "ignores its sampler": lambda: Ignores(Numbers(30), 2),
    "cuts by itself": lambda: Cuts(Numbers(30), 2),
    "leaves out": lambda: own_loader(skip_some)(Numbers(60), 2, shuffle=True),
    "leaves out in processes": lambda: own_loader(skip_some)(Numbers(60), 2, shuffle=True, num_workers=2),
    "leaves out of a sampler": lambda: own_loader(skip_some)(Numbers(60), 2, sampler=Weighted(torch.ones(60), 60)),
    "two": lambda: {"a": Iterable(), "b": DataLoader(Numbers(30), 2, shuffle=True)},
}


def run(make: Any, draws: bool = True, seed: int = 1, folder: Path | None = None, **kwargs: Any) -> dict[Any, Any]:
    """What each worker saw; ``folder``: saves after each step."""

    def save(trainer: L.Trainer, *_: Any) -> None:
        if folder is not None:
            trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

    L.seed_everything(seed, verbose=False)
    model = Recorder(draw=draws)
    trainer(DilocoStrategy(N, 2), callbacks=[LambdaCallback(on_train_batch_end=save)]).fit(model, make(), **kwargs)
    return model.seen


SHORT: dict[str, Any] = {  # 2 or 3 local steps of a pass
    "iterable": lambda: First(),
    "stream": lambda: DataLoader(Shortened(), None),
    "leaves out": lambda: own_loader(skip_some)(Numbers(18), 2, shuffle=True),
    "sampler": lambda: DataLoader(Numbers(18), 2, shuffle=True),
    "sampler without length": lambda: DataLoader(Numbers(18), 2, sampler=Lazily(18)),
}


class First:
    def __iter__(self) -> Iterator[Any]:
        return iter(draw()[:9])


class Shortened(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(draw()[:9])


@pytest.mark.slow
@pytest.mark.parametrize("long", [Iterable, lambda: DataLoader(Numbers(60), 2, shuffle=True)])
@pytest.mark.parametrize("name", SHORT)
def test_shorter_loaders_go_on_after_they_have_begun_again(name, long, tmp_path):
    def both() -> Any:
        return CombinedLoader({"long": long(), "short": SHORT[name]()}, "max_size_cycle")

    whole = run(both, folder=tmp_path)
    steps = len(whole[0, 0])
    assert steps >= 5
    for done in range(1, 2 * steps):
        later = run(both, seed=99, ckpt_path=tmp_path / f"{done}.ckpt")
        assert later == {
            key: batches[max(0, done - key[0] * steps) :] for key, batches in whole.items() if key[0] >= done // steps
        }


@pytest.mark.parametrize("name", slow_but(["sized iterable", "stream", "cuts by itself"], LOADERS))
def test_it_goes_on_where_it_was(name, tmp_path):
    whole = run(LOADERS[name], folder=tmp_path)
    steps = len(whole[0, 0])
    assert len(whole[1, 0]) > 3
    assert whole[0, 0] != whole[1, 0] or name == "cuts by itself"
    for done in (1, steps - 1, steps, steps + 3):  # in both epochs, and between them
        later = run(LOADERS[name], seed=99, ckpt_path=tmp_path / f"{done}.ckpt")
        assert later
        for (epoch, worker), batches in later.items():
            assert batches == whole[epoch, worker][max(0, done - epoch * steps) :]


def test_the_order_depends_on_seed_epoch_and_loader_alone():
    whole = run(Iterable)
    assert run(Iterable, draws=False) == whole  # training's draws
    assert run(Iterable, seed=2) != whole
    both = run(lambda: {"a": Iterable(), "b": Iterable()})
    assert all(batch["a"] != batch["b"] for batches in both.values() for batch in batches)
    assert {key: [batch["a"] for batch in batches] for key, batches in both.items()} == whole


# (an iterable that draws in ``__iter__`` itself draws once from the global generator, when Lightning checks it)
@pytest.mark.parametrize("make", [Lazy, lambda: DataLoader(Set(), None), lambda: Ignores(Numbers(30), 2)])
def test_training_draws_the_same_whatever_data_draw(make):
    states = []
    for loader in (make(), Cuts(Numbers(30), 2)):
        torch.manual_seed(4)
        trainer(DilocoStrategy(N, 2)).fit(Recorder(), loader)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_partition_and_an_iter_of_its_own(tmp_path):
    def read(**kwargs: Any) -> Any:
        L.seed_everything(1, verbose=False)
        model = Recorder()
        save = LambdaCallback(on_train_batch_end=lambda t, *_: t.save_checkpoint(tmp_path / f"{t.global_step}.ckpt"))
        strategy = DilocoStrategy(N, 2, partition=tens)
        trainer(strategy, callbacks=[save]).fit(model, own_loader(skip_some)(Numbers(30), 2, shuffle=True), **kwargs)
        return model.seen

    whole = read()
    assert read(ckpt_path=tmp_path / "2.ckpt") == {k: b[2 * (k[0] == 0) :] for k, b in whole.items()}


@pytest.mark.processes
@pytest.mark.parametrize("name", ["iterable", "stream", "ignores its sampler"])
def test_every_process_reads_the_same_stream(name, tmp_path):
    def read() -> Any:
        L.seed_everything(1, verbose=False)
        torch.rand(int(torch.distributed.is_initialized()) + 1)
        model = Recorder(draw=True)
        trainer(DilocoStrategy(4, 2), devices=size).fit(model, LOADERS[name]())
        return model.seen

    size = 1
    alone = read()
    size = 2
    joined: dict[Any, Any] = {}
    for seen in run_processes(read, 2, out=tmp_path):
        joined.update(seen)
    assert joined == alone
