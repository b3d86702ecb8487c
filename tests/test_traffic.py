"""Are the bytes handed to collectives those of the closed form?"""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers import trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from processes import run
from torch import nn
from torch.utils.data import DataLoader

from lightning_diloco import DilocoStrategy
from lightning_diloco.comm import means

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(("workers", "size"), [(2, 2), (4, 2), (4, 4), (2, 4)])
@pytest.mark.parametrize("reduction", ["ordered", "all_reduce"])
def test_bytes_handed_to_collectives_match_the_closed_form(
    workers: int, size: int, reduction: Any, tmp_path: Path
) -> None:
    """n = workers per process, k = processes per worker, P = bytes of the model (here a multiple of 4·W numbers)."""

    def sent() -> dict[str, int]:
        counts = {"to owners": 0, "results": 0, "all_reduce": 0}
        plain = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather", "all_reduce")}

        def all_to_all_single(output, given, output_sizes, sizes):
            own = sizes[dist.get_rank()]
            counts["to owners"] += (given.numel() - own) * given.itemsize
            assert given.nbytes <= 4 * means.CHUNK  # float32, all workers of the process together
            return plain["all_to_all_single"](output, given, output_sizes, sizes)

        def all_gather(output, given, **kwargs):
            counts["results"] += (dist.get_world_size() - 1) * given.nbytes
            return plain["all_gather"](output, given, **kwargs)

        def all_reduce(tensor, **kwargs):
            if kwargs.get("group") is None:  # the workers', not a team's
                counts["all_reduce"] += 2 * (dist.get_world_size() - 1) * tensor.nbytes // dist.get_world_size()
            return plain["all_reduce"](tensor, **kwargs)

        dist.all_to_all_single, dist.all_gather, dist.all_reduce = all_to_all_single, all_gather, all_reduce
        means.CHUNK = 32  # half of the model
        module = BoringModel()
        module.layer = nn.Linear(32, 2, bias=False)
        module.training_step = lambda batch, batch_idx: module.layer(batch).square().mean()
        strategy = DilocoStrategy(num_nodes=workers, diloco_interval=4, reduction=reduction)
        t = trainer(strategy, devices=size, max_steps=12, limit_val_batches=0, default_root_dir=tmp_path)
        t.fit(module, DataLoader(RandomDataset(32, 64)))
        assert strategy.outer_steps == 3
        assert strategy.ledger.total_bytes == 3 * 256  # what a worker would send to a server
        return counts

    n, k, rounds, model = max(1, workers // size), max(1, size // workers), 3, 256
    expected = {
        "to owners": rounds * n * model * (size // k - 1) // size,
        "results": rounds * model * (size - 1) // size,
        "all_reduce": rounds * 2 * model * (size - 1) // size,
    }
    for counts in run(sent, size, out=tmp_path / "out"):
        unused = ("all_reduce",) if reduction == "ordered" else ("to owners", "results")
        assert counts == {**expected, **dict.fromkeys(unused, 0)}
