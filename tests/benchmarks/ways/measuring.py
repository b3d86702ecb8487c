"""The task that every way does, and what is measured of it; not a line of the user's.

A way's file hands its ``train(task) → trained model`` to :func:`run`. It calls ``task.mark()`` after every local step.
"""

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

SIZES = {
    "1M": {"layers": 5, "width": 128, "heads": 4, "context": 64},
    "tiny": {"layers": 1, "width": 16, "heads": 2, "context": 16},
}


def byte_gpt() -> ModuleType:
    """``examples/byte_gpt.py``; what this way hasn't imported is replaced there, so that it needn't pay for it."""
    for name in ("lightning", "lightning.pytorch.loggers", "lightning.pytorch.utilities", "lightning_diloco"):
        if name.partition(".")[0] not in sys.modules or hasattr(sys.modules[name.partition(".")[0]], "stands_in"):
            sys.modules[name] = stand_in = ModuleType(name)
            vars(stand_in).update(stands_in=True, LightningModule=nn.Module, LightningDataModule=object)
            vars(stand_in)["__getattr__"] = lambda name: None
    sys.path.append(str(Path(__file__).parents[3] / "examples"))
    return importlib.import_module("byte_gpt")


@dataclass
class Task:
    """What is trained, and how long; ``launched`` is when the command was started, by ``time.monotonic()``."""

    workers: int
    processes: int
    interval: int
    steps: int
    batch_size: int
    size: str
    dtype: str
    folder: str
    launched: float
    marks: list[tuple[float, float]] = field(default_factory=list)  # wall clock, CPU seconds of this process

    @cached_property
    def example(self) -> ModuleType:
        return byte_gpt()

    def model(self) -> Any:
        """The byte GPT with AdamW and no schedule; a LightningModule where Lightning is imported."""

        class Model(self.example.ByteGPT):
            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=self.lr)

        torch.manual_seed(0)
        return Model(**SIZES[self.size], lr=1e-3)

    @cached_property
    def text(self) -> Any:
        return self.example.LibraryText(SIZES[self.size]["context"], self.batch_size, megabytes=0.3)

    @property
    def data(self) -> Dataset[torch.Tensor]:
        return self.text.train_data

    def mark(self) -> None:
        self.marks.append((time.monotonic(), time.process_time()))

    @property
    def quiet(self) -> dict[str, Any]:
        """Arguments of a Trainer that prints and writes nothing, and marks every step."""
        callback = importlib.import_module("lightning").Callback()
        callback.on_train_batch_end = lambda *_: self.mark()
        silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        return {"callbacks": callback, "accelerator": "cpu", **dict.fromkeys(silent, False)}

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Nats per byte of the held-out windows."""
        (windows,) = DataLoader(self.text.val_data, len(self.text.val_data))
        return model.eval().loss(windows).item()


def peak_memory() -> int | None:
    """VmHWM of this process in bytes, where Linux tells it; unlike ``ru_maxrss`` not inherited from the parent."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


def run(train: Callable[[Task], Any]) -> None:
    """Trains, and leaves what was measured in the task's folder, in a file per process; process 0 the weights, too."""
    task = Task(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, task.dtype))
    if "REPLICA_GROUP_ID" in os.environ:  # torchrun would have made this store
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ["MASTER_PORT"] = str(store.port)
    model = train(task)
    measured: dict[str, Any] = {"peak_memory_bytes": peak_memory()}
    assert len(task.marks) == task.steps, f"{len(task.marks)} local steps instead of {task.steps}"
    timed = task.workers * (task.steps - task.interval)  # worker-steps of all processes
    seconds, cpu_seconds = (b - a for a, b in zip(task.marks[task.interval - 1], task.marks[-1], strict=True))
    measured["cpu_seconds_per_worker_step"] = cpu_seconds / timed
    rank = int(os.environ.get("REPLICA_GROUP_ID", os.environ.get("LOCAL_RANK", 0)))
    if rank == 0:
        measured["worker_steps_per_second"] = timed / seconds
        measured["start_up_seconds"] = task.marks[0][0] - task.launched
        measured["loss"] = task.loss(model)
        measured["parameters"] = sum(p.numel() for p in model.parameters())
        torch.save([p.detach() for p in model.parameters()], Path(task.folder) / "weights.pt")
    file = Path(task.folder) / f"{rank}.tmp"
    file.write_text(json.dumps(measured))
    file.rename(file.with_suffix(".json"))
