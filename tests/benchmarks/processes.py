"""What a second process brings on CPUs: time per local step of four workers, as ratios taken in one run.

The byte GPT of 1 M parameters, N = 4, three ways: one process with one thread, one process with two threads, and two
processes (``Trainer(devices=2)``) with one thread each; a hand-written loop that steps two models in each of two
processes, without Lightning, is the bound. Wall-clock time from the end of a local step to the end of the next, the
median; the ways alternate, and the median of their ratios is shown. An outer step falls into no timed step; start-up of
the second process is the time to the first step beyond that of one process. Needs two idle cores.

Run ``python tests/benchmarks/processes.py``: about five minutes.
"""

import argparse
import importlib
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch

from lightning_diloco import DilocoStrategy

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
byte_gpt = importlib.import_module("byte_gpt")

WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}
WORKERS, STEPS, WARM_UP = 4, 40, 8


class Marks(L.Callback):
    """The time at the end of every step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *_) -> None:
        self.marks.append(time.perf_counter())


def lightning(devices: int, threads: int) -> dict[str, float]:
    """Seconds per local step, and until the end of the first."""
    torch.set_num_threads(threads)
    model, data = byte_gpt.build(byte_gpt.parse(["--megabytes", "0.3"]))
    marks = Marks()
    trainer = L.Trainer(
        strategy=DilocoStrategy(num_nodes=WORKERS, diloco_interval=10**6, final_sync=False),
        accelerator="cpu",
        devices=devices,
        max_steps=STEPS,
        gradient_clip_val=1.0,
        callbacks=marks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data.train_dataloader())
    steps = [b - a for a, b in itertools.pairwise(marks.marks[WARM_UP:])]
    return {"rank": trainer.global_rank, "step": statistics.median(steps), "first": marks.marks[0] - start}


def by_hand(models: int) -> float:
    """Seconds that stepping ``models`` models in turn takes in plain PyTorch, batches included."""
    torch.set_num_threads(1)
    args = byte_gpt.parse(["--megabytes", "0.3"])
    model, data = byte_gpt.build(args)
    replicas = [model, *(byte_gpt.build(args)[0] for _ in range(models - 1))]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in replicas]
    marks = []
    for group in itertools.islice(zip(*[iter(data.train_dataloader())] * models, strict=False), STEPS):
        for window, replica, optimizer in zip(group, replicas, optimizers, strict=True):
            optimizer.zero_grad()
            replica.loss(window).backward()
            torch.nn.utils.clip_grad_norm_(replica.parameters(), 1.0)
            optimizer.step()
        marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(marks[WARM_UP:]))


def run(*arguments: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, float]:
    output, _ = process.communicate()
    return json.loads(output.strip().splitlines()[-1])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lightning", nargs=2, type=int, metavar=("DEVICES", "THREADS"), help=argparse.SUPPRESS)
    parser.add_argument("--by-hand", type=int, metavar="MODELS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.lightning or args.by_hand:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        measured = lightning(*args.lightning) if args.lightning else {"rank": 0, "step": by_hand(args.by_hand)}
        if measured["rank"] == 0:
            print(json.dumps(measured), flush=True)
        return
    steps: dict[str, list[float]] = {name: [] for name in [*WAYS, "by hand, 2 processes"]}
    first: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(args.repeats):
        for name, way in WAYS.items():
            measured = result(run("--lightning", *map(str, way)))
            steps[name].append(measured["step"])
            first[name].append(measured["first"])
        pair = [run("--by-hand", str(WORKERS // 2)) for _ in range(2)]
        steps["by hand, 2 processes"].append(max(result(p)["step"] for p in pair))
    one = steps["1 process, 1 thread"]
    for name, values in steps.items():
        ratio = statistics.median(v / o for v, o in zip(values, one, strict=True))
        print(f"{name:<24}{1000 * statistics.median(values):>8.1f} ms per local step{ratio:>8.2f}")
    beyond = statistics.median(first["2 processes, 1 thread"]) - statistics.median(first["1 process, 1 thread"])
    print(f"start-up of the second process: {beyond:.1f} s")


if __name__ == "__main__":
    main()
