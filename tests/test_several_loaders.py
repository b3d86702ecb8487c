"""Does each worker read its shard of every one of several loaders?"""

from itertools import cycle, islice
from typing import Any

import lightning as L
import pytest
import torch
from loaders import (
    N,
    Numbers,
    Recorder,
    Rows,
    Weighted,
    child_processes,
    ddp,
    fit,
    pair_of_loaders,
    pair_under_ddp,
    round_robin,
)
from torch.utils.data import (
    DataLoader,
)


@pytest.mark.parametrize("kind", [dict, list])
@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_combined_loaders_give_every_worker_its_shard_of_each(mode, kind):
    L.seed_everything(41, verbose=False)
    expected = pair_under_ddp(mode, kind, 2)
    lengths = {"min_size": 3, "max_size_cycle": 5, "max_size": 5}
    combined = pair_of_loaders(mode, kind)
    before = list(combined.flattened)
    for _ in range(2):  # a second fit finds the loaders as the first one did
        model = fit(combined)
        assert model.seen == expected
        assert model.during["batches"] == lengths[mode]
        assert model.fitted.global_step == 2 * lengths[mode]
        assert all(now is then for now, then in zip(combined.flattened, before, strict=True))
        assert model.fitted.train_dataloader is combined.iterables
        now = combined.iterables.values() if kind is dict else combined.iterables
        assert all(x is y for x, y in zip(now, before, strict=True))
    if mode == "max_size":
        last = expected[0, 0][-1]
        assert None in (last.values() if kind is dict else last)


@pytest.mark.parametrize("kind", [dict, list])
def test_a_dict_or_a_list_of_loaders(kind):
    L.seed_everything(41, verbose=False)
    loaders = pair_of_loaders("max_size_cycle", kind).iterables
    before = loaders.copy()
    assert fit(loaders).seen == pair_under_ddp("max_size_cycle", kind, 2)
    assert loaders == before


@pytest.mark.slow
def test_combined_loaders_with_processes():
    L.seed_everything(41, verbose=False)
    others = child_processes()
    model = fit(pair_of_loaders("max_size_cycle", dict, 2))
    assert child_processes() <= others
    assert model.seen == pair_under_ddp("max_size_cycle", dict, 2)


def test_a_loader_and_a_stream_together():
    L.seed_everything(41, verbose=False)
    model = fit({"a": DataLoader(Numbers(13), 2), "b": Rows(12)}, max_epochs=1)
    shards = ddp(Numbers(13), 41, 1, batch_size=2)
    rows = round_robin([[j, 10 * j] for j in range(12)])
    for worker in range(N):
        cycled = list(islice(cycle(shards[0, worker]), 4))
        assert model.seen[0, worker] == [{"a": a, "b": b} for a, b in zip(cycled, rows[worker], strict=True)]


def test_samplers_of_several_loaders_draw_independently():
    a, b = Weighted(torch.ones(20), 20), Weighted(torch.ones(20), 20)
    fit({"a": DataLoader(Numbers(20), 2, sampler=a), "b": DataLoader(Numbers(20), 2, sampler=b)})
    assert a.drawn != b.drawn


def test_a_failing_fit_leaves_the_users_combined_loader_as_it_was():
    class Failing(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("stop")

    combined = pair_of_loaders("min_size")
    before = list(combined.flattened)
    with pytest.raises(RuntimeError, match=r"^stop$"):
        fit(combined, model=Failing())
    assert all(now is then for now, then in zip(combined.flattened, before, strict=True))
